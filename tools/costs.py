"""What a run costs, before it is run."""
import ast

import pandas as pd
import torch

from rs_toolkit.command import announced
from rs_toolkit.methods.cost import count_passes, passes_of
from rs_toolkit.models import build
from rs_toolkit.recipe import choose_parts

# What a run takes, with its defaults.
ANNOUNCED = {name: ast.literal_eval(record['default']) for name, record in announced('train').items()}

def easy_task():
    """A network that is right about an image in all noise, attacked or not; the image, and its label.

    So every noise takes all steps of an attack, and no image is discarded; gradients are not zero, as in training.
    """
    network = build('mlp', 10, 1, 8)
    output_bias = list(network.parameters())[-1]
    output_bias.data[0] = 5.
    return network, torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)

def made(parts):
    "The method, with a teacher that costs what the network costs."
    teacher, *_ = easy_task()
    found = dict(teacher=teacher, predictions=torch.ones(1, 10, dtype=torch.long), num_classes=10)
    return parts.objective(**{name: found[name] for name in parts.needs})

def cost_of(setting):
    """What a run costs, in epochs of plain training: the passes that `methods/cost` counts.

    The training of a teacher is not among them, nor are the predictions that CAT-RS stores.
    """
    network, x, y = easy_task()
    parts = choose_parts(ANNOUNCED | setting)
    method = made(parts)
    curriculum = parts.choice()
    method.start_run(setting['epochs'])
    if curriculum: curriculum.start_run(setting['epochs'])
    cost = 0.
    for epoch in range(setting['epochs']):
        with count_passes(network) as choosing:
            if curriculum: curriculum(network, (x, y), epoch)
        method.start_epoch(epoch)
        cost += choosing.slow_down() + passes_of(method, network, x, y, torch.arange(1)).slow_down()
    return cost

def costs(settings):
    "A row per method."
    return pd.DataFrame([dict(method=key, epochs=setting['epochs'], cost=round(cost_of(setting), 1))
                         for key, setting in settings.items()])
