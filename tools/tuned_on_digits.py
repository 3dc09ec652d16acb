"""Tune methods on a fifth of the training digits, then train and certify each with several seeds.

    python tools/tuned_on_digits.py runs/digits-seeds --epochs 30                            (three hours on one core)
    python tools/tuned_on_digits.py runs/digits-seeds gaussian4 smoothadv sodm --epochs 30   (some methods)
    python tools/tuned_on_digits.py runs/digits-seeds --epochs 30 --seeds 3 --keep

Every method has the same number of trials, the first of which is its recipe. A trial learns without each fifth training
image and is judged by the ACR on those; the test images are read by the runs that follow, and only by them. A command
that was stopped goes on where it was. What it leaves: OUT/tuning/METHOD/TRIAL and OUT/seeds/METHOD/SEED, run folders;
with --keep also the logs of all seeds, and a table of the trials, in data/digits-seeds.
"""
import argparse
import ast
import json
from pathlib import Path

import pandas as pd
import yaml

from recipes import ROOT, pack
from rs_toolkit.bounds import max_radius
from rs_toolkit.catalogue import METHODS
from rs_toolkit.certify import certify_dataset
from rs_toolkit.command import announced
from rs_toolkit.common import unknown
from rs_toolkit.metrics import radii_grid
from rs_toolkit.processes import pick_device
from rs_toolkit.recipe import Task, choose_parts, find_start, find_teacher, keep_run, learn_from, run_record
from rs_toolkit.recipe import train_network
from rs_toolkit.run import open_run, write_json

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
FEWER = {'macer': dict(num_noise=8)}       # the recipe draws 16, at twice the cost

def merged(setting, change):
    "The setting with the change, mapping by mapping."
    both = {k: setting[k] | v for k, v in change.items() if isinstance(v, dict) and k in setting}
    return setting | change | both

def settings_of(key, epochs):
    "The recipe and its variations: as many for every method."
    recipe = yaml.safe_load((ROOT/f'recipes/digits/{key}_0.5.yaml').read_text())
    recipe = merged(recipe, FEWER.get(key, {}) | dict(epochs=epochs))
    return [recipe] + [merged(recipe, change) for change in TRIALS[key]]

def run(setting, folder):
    "What train.ipynb does, without its pictures; a run that is finished is left alone."
    if (folder/'metrics.json').exists(): return
    print(folder, flush=True)
    known = {name: ast.literal_eval(record['default']) for name, record in announced('train').items()}
    config = known | setting | dict(device='cpu', out=str(folder))
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

def tune_and_run(keys, out, epochs, seeds):
    "All trials, then all seeds: one seed of every method before the next."
    best = {key: settings_of(key, epochs)[tune(key, out, epochs)] for key in keys}
    for seed in range(seeds):
        for key, setting in best.items():
            teacher = out/'seeds'/'smoothmix'/str(seed)
            run(taught(setting, teacher) | dict(seed=seed), out/'seeds'/key/str(seed))

def keep(keys, out, epochs, seeds):
    "Logs of all seeds, and a row per trial."
    place = ROOT/'data/digits-seeds'
    rows = []
    for key in keys:
        for seed in range(seeds): pack(out/'seeds'/key/str(seed)/'certify.tsv', place/key/f'{seed}.tsv.gz')
        chosen = tune(key, out, epochs)
        for trial, change in enumerate([{}] + TRIALS[key]):
            rows.append(dict(method=key, trial=trial, change=json.dumps(change), epochs=epochs,
                             acr=round(judged(out/'tuning'/key/str(trial)), 4), chosen=trial == chosen))
    pd.DataFrame(rows).to_csv(place/'trials.csv', index=False)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path)
    parser.add_argument('methods', nargs='*', default=list(METHODS))
    parser.add_argument('--epochs', type=int, default=100, help='of every run')
    parser.add_argument('--seeds', type=int, default=5, help='of every method')
    parser.add_argument('--keep', action='store_true', help='logs and trials go into data/digits-seeds')
    given = parser.parse_args()
    for key in given.methods:
        if key not in TRIALS: parser.error(str(unknown('method', key, TRIALS)))
    tune_and_run(given.methods, given.out.resolve(), given.epochs, given.seeds)
    if given.keep: keep(given.methods, given.out.resolve(), given.epochs, given.seeds)
