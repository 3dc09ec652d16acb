"""Tune methods on a fifth of the training digits, then train and certify each with several seeds.

    python tools/tuned_on_digits.py runs/digits-seeds --epochs 30                            (three hours on one core)
    python tools/tuned_on_digits.py runs/digits-seeds gaussian4 smoothadv sodm --epochs 30   (some methods)
    python tools/tuned_on_digits.py runs/digits-seeds --epochs 30 --cost 400
    python tools/tuned_on_digits.py runs/digits-seeds --epochs 30 --cost 400 --seeds 3 --keep

Every method has the same number of trials, the first of which is its recipe. A trial learns without each fifth training
image and is judged by the ACR on those; the test images are read by the runs that follow, and only by them. Those have
equal epochs or, with --cost, as many as cost so much: 400 are what 100 epochs of Gaussian training with four noises
take. A command that was stopped goes on where it was. What it leaves: OUT/tuning/METHOD/TRIAL, and
OUT/equal_epochs/METHOD/SEED or OUT/equal_cost/METHOD/SEED, run folders; with --keep also the logs of all seeds and
what was asked for, a table of the trials, and one of the costs, in data/digits-seeds.
"""
import argparse
import bisect
import json
from pathlib import Path

import pandas as pd

from costs import ANNOUNCED, cost_of, costs
from recipes import ROOT, merged, pack, recipe_of
from rs_toolkit.bounds import max_radius
from rs_toolkit.catalogue import METHODS
from rs_toolkit.certify import certify_dataset
from rs_toolkit.common import unknown
from rs_toolkit.metrics import radii_grid
from rs_toolkit.processes import pick_device
from rs_toolkit.recipe import Task, choose_parts, find_start, find_teacher, keep_run, learn_from, run_record
from rs_toolkit.recipe import train_network
from rs_toolkit.run import open_run, write_json

KEPT = ROOT/'data/digits-seeds'

TUNING = dict(held_out=5, n=1000)          # a trial is certified with fewer samples: it only has to be ranked

# What is tried beside the recipe: a change of the recipe, whose mappings are merged.
TRIALS = {
    'gaussian': [dict(lr=.2), dict(lr=.05)],
    'gaussian4': [dict(lr=.2), dict(lr=.05)],
    'stability': [dict(method_args=dict(lbd=2.)), dict(method_args=dict(lbd=5.))],
    'smoothadv': [dict(attack_args=dict(eps=.25)), dict(attack_args=dict(eps=1.))],
    'macer': [dict(lr=.05), dict(lr=.05, method_args=dict(lbd=1.))],
    'consistency': [dict(method_args=dict(lbd=2.)), dict(method_args=dict(lbd=10.))],
    'smoothmix': [dict(method_args=dict(eta=1.)), dict(method_args=dict(eta=5.))],
    'catrs': [dict(method_args=dict(lbd=.5)), dict(method_args=dict(lbd=2.))],
    'sodm': [dict(method_args=dict(beta=6.)),
             dict(method_args=dict(mapping='temperature', learns='votes', mapping_noise=64))],
    'crt': [dict(lr=.05), dict(lr=.1)],
    'acr': [dict(attack_args=dict(eps=.5)), dict(curriculum_args=dict(threshold=.2))],
}
SHORTEST = 10                              # epochs in which each part of a recipe has at least one
FEWER = {'macer': dict(num_noise=8)}       # the recipe draws 16, at twice the cost

def settings_of(key, epochs):
    "The recipe and its variations: as many for every method."
    recipe = recipe_of(f'digits/{key}_0.5')
    recipe = merged(recipe, FEWER.get(key, {}) | dict(epochs=epochs))
    return [recipe] + [merged(recipe, change) for change in TRIALS[key]]

def run(setting, folder):
    "What train.ipynb does, without its pictures; a run that is finished is left alone."
    if (folder/'metrics.json').exists(): return
    print(folder, flush=True)
    config = ANNOUNCED | setting | dict(device='cpu', out=str(folder))
    parts = choose_parts(config)
    task = Task(config['dataset'], train_every=config['train_every'], held_out=config['held_out'])
    teacher = find_teacher(config, parts, task)
    origin = find_start(config, task)
    folder, lock = open_run(folder, '', config, pick_device('cpu'))
    found = learn_from(teacher, config, parts, task, folder)
    objective = parts.objective(num_classes=task.shape['num_classes'], **found)
    model, history = train_network(config, task, objective, curriculum=parts.choice(), start=origin,
                                   state=folder/'resume'/'state.pt')
    keep_run(folder, model, history, config, task)
    sigma, n0, n, alpha = (config[name] for name in ('sigma', 'n0', 'n', 'alpha'))
    log = certify_dataset(model, *task.test, idx=task.idx, split=task.split, sigma=sigma, n0=n0, n=n, alpha=alpha,
                          seed=config['seed'], every=config['every'], batch_size=1000, log=folder/'certify.tsv')
    write_json(folder/'metrics.json', run_record(config, log, radii_grid(max_radius(sigma, n, alpha), 4), history))
    lock.release()

def judged(folder): return json.loads((folder/'metrics.json').read_text())['acr']

def tune(key, out, epochs):
    "The number of the best setting, by the images that were held out."
    folders = [out/'tuning'/key/str(trial) for trial in range(len(TRIALS[key]) + 1)]
    teacher = out/'tuning'/'smoothmix'/str(tune('smoothmix', out, epochs)) if key == 'crt' else ''
    for folder, setting in zip(folders, settings_of(key, epochs), strict=True):
        run(taught(setting, teacher) | TUNING, folder)
    scores = [judged(folder) for folder in folders]
    return scores.index(max(scores))

def taught(setting, teacher):
    "CRT learns from a SmoothMix run that saw the same images."
    return setting | dict(teacher=str(teacher)) if setting['method'] == 'crt' else setting

def paid_by(cost, setting):
    "The setting with as many epochs as that cost pays."
    choices = range(SHORTEST, cost + 1)
    def too_many(epochs): return cost_of(setting | dict(epochs=epochs)) > cost
    paid = bisect.bisect_left(choices, True, key=too_many)
    if not paid:
        raise ValueError(f"{cost} epochs of plain training do not pay {SHORTEST} of {setting['method']}: give more")
    return setting | dict(epochs=choices[paid - 1])

def final_settings(keys, out, epochs, cost):
    "By method: its best trial, at as many epochs as the trials had, or as the cost pays."
    best = {key: settings_of(key, epochs)[tune(key, out, epochs)] for key in keys}
    if cost is None: return best
    return {key: paid_by(cost, setting) for key, setting in best.items()}

def run_seeds(settings, seeds, out):
    "One seed of every method before the next."
    for seed in range(seeds):
        for key, setting in settings.items():
            teacher = out/'smoothmix'/str(seed)
            run(taught(setting, teacher) | dict(seed=seed), out/key/str(seed))

def keep(settings, seeds, runs, place):
    "Logs of all seeds, and what was asked for."
    for key, setting in settings.items():
        for seed in range(seeds): pack(runs/key/str(seed)/'certify.tsv', place/key/f'{seed}.tsv.gz')
        write_json(place/key/'config.json', dict(parameters=setting))

def trials(keys, out, epochs):
    "A row per trial."
    rows = []
    for key in keys:
        chosen = tune(key, out, epochs)
        for trial, change in enumerate([{}] + TRIALS[key]):
            rows.append(dict(method=key, trial=trial, change=json.dumps(change), epochs=epochs,
                             acr=round(judged(out/'tuning'/key/str(trial)), 4), chosen=trial == chosen))
    return pd.DataFrame(rows)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path)
    parser.add_argument('methods', nargs='*', default=list(METHODS))
    parser.add_argument('--epochs', type=int, default=100, help='of every trial, and of every seed')
    parser.add_argument('--cost', type=int, help='of every seed instead, in epochs of plain training')
    parser.add_argument('--seeds', type=int, default=5, help='of every method')
    parser.add_argument('--keep', action='store_true', help='logs, trials and costs go into data/digits-seeds')
    given = parser.parse_args(argv)
    for key in given.methods:
        if key not in TRIALS: parser.error(str(unknown('method', key, TRIALS)))
    out = given.out.resolve()
    budget = 'equal_epochs' if given.cost is None else 'equal_cost'
    settings = final_settings(given.methods, out, given.epochs, given.cost)
    run_seeds(settings, given.seeds, out/budget)
    if not given.keep: return
    keep(settings, given.seeds, out/budget, KEPT/budget)
    trials(given.methods, out, given.epochs).to_csv(KEPT/'trials.csv', index=False)
    costs(settings).to_csv(KEPT/budget/'costs.csv', index=False)

if __name__ == '__main__': main()
