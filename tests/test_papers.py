"""The map of the papers: it runs, every recipe that it names trains, every command that it names exists."""
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from forked import execute, forked
from test_recipes import asked

from rs_toolkit.data import batches
from rs_toolkit.models import build
from rs_toolkit.recipe import choose_parts

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT/'nbs/papers.ipynb'

@cache
def text(): return BOOK.read_text(encoding='utf-8')

def recipes():
    "Every recipe that the map names; `*` stands for noise levels."
    names = re.findall(r'recipes/[\w/.*]+\.yaml', text())
    found = {name: sorted(ROOT.glob(name)) for name in names}
    assert [name for name, paths in found.items() if not paths] == []
    return sorted({path for paths in found.values() for path in paths})

def test_the_map_runs():
    code, said = forked(execute, BOOK)
    assert code == 0, said[-4000:]

@pytest.mark.parametrize('path', recipes(), ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_every_recipe_that_it_names_trains(path):
    "The last epoch, when every part acts, on sixteen tiny images and a small network."
    recipe = yaml.safe_load(path.read_text())
    torch.manual_seed(0)
    channels = 1 if recipe['dataset'] in ('digits', 'mnist') else 3
    shape = dict(num_classes=4, in_channels=channels, image_size=8)
    images, labels = torch.rand(16, channels, 8, 8), torch.arange(16) % 4
    parts = choose_parts(asked(recipe))
    votes = torch.nn.functional.one_hot(labels, 4) * 100
    method = parts.objective(teacher=build('small_cnn', **shape), predictions=votes, num_classes=4)
    net = build('small_cnn', **shape)
    method.meet(net, images[:2])
    method.start_run(recipe['epochs'])
    last = recipe['epochs'] - 1
    method.start_epoch(last)
    choice = parts.choice()
    weights = None
    if choice:
        choice.threshold = 0.                                       # of an untrained network nothing would be kept
        choice.start_run(recipe['epochs'])
        weights = choice(net, (images, labels), last)
    before = [p.clone() for p in net.parameters()]
    step = torch.optim.SGD(net.parameters(), lr=.01)
    for x, y, index, _ in batches(images, labels, 8, 0, last, None, weights):
        loss = sum(method(net, x, y, index).values())
        step.zero_grad()
        loss.backward()
        step.step()
        method.after_step(net, x, y, index)
        assert torch.isfinite(loss)
    assert any(not torch.equal(p, q) for p, q in zip(before, net.parameters())), 'nothing was learnt'

@pytest.mark.parametrize('name', sorted(set(re.findall(r'tools/papers\.py (\w+)', text()))))
def test_every_command_that_it_names_exists(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    import papers
    assert callable(papers.COMMANDS[name])
    assert name in papers.__doc__

def test_what_a_command_asks_for_is_accepted(monkeypatch):
    "Each run of the ablation and of the sweeps is built as train.ipynb would."
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    import papers
    recipe = yaml.safe_load((ROOT/'recipes/digits/acr_0.5.yaml').read_text())
    for given in [*papers.ACR_PARTS.values(), *papers.ACR_SWEEPS.values()]:
        parts = choose_parts(asked(recipe | yaml.safe_load(given)))
        parts.objective().start_run(100)
        assert parts.mover or parts.choice()
    recipe = yaml.safe_load((ROOT/'recipes/digits/sodm_0.5.yaml').read_text())
    for given in papers.SODM_PARTS.values():
        choose_parts(asked(recipe | yaml.safe_load(given))).objective(num_classes=10).start_run(100)
    sys.modules.pop('papers')
