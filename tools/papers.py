"""Make what tables and figures of the papers show, at a size that a laptop can do.

    python tools/papers.py acr_parts RUNS          Table 3 of the ACR paper (a quarter of an hour on one core)
    python tools/papers.py acr_sweeps RUNS         its Tables 5 to 10
    python tools/papers.py gentle RUNS             its recipe without the weights, five seeds (a quarter of an hour)
    python tools/papers.py released LOGS           its Table 2: methods against Gaussian training, on the authors' logs
    python tools/papers.py sodm_parts RUNS         SODM's ablation: the map, rho, n', the interval, beta, plain training
    python tools/papers.py crt_proxy RUNS          Table 1 of the CRT poster: a small teacher first, or none
    python tools/papers.py crt_generations RUNS    its Figures 1 and 2: students of other architectures

RUNS is where run folders go; a run that is finished is not made again. LOGS holds METHOD_SIGMA.tsv, as released.
`nbs/papers.ipynb` says which table is which, and what came out.
"""
import sys
from pathlib import Path

import pandas as pd
import yaml

from recipes import ROOT, pack, recipe_of, run
from rs_toolkit.log import read_log
from rs_toolkit.paired import differences, judge

DATA = ROOT/'data/papers'

def train(out, recipe, given='{}'):
    "Run a recipe, with other values for some of its parameters (YAML), unless that has been done."
    run('train', recipe, out.resolve(), **yaml.safe_load(given))

def keep_log(out, name): pack(out/'certify.tsv', DATA/f'{name}.tsv.gz')

def make(runs, table, name, recipe, given='{}'):
    "Run a recipe, as `train` does, and keep its log for a table."
    train(runs/name, recipe, given)
    keep_log(runs/name, f'{table}/{name}')

# What is left of the recipe of the ACR paper without some of its parts, which begin where the discard does.
# None of the three is the recipe `gaussian4`, all three are `acr`: both are shipped.
NO_ATTACK = 'attack: none, attack_args: {}, ramp: {}'
ACR_PARTS = {
    'discard': f'{{{NO_ATTACK}, curriculum_args: {{start: 0.4, threshold: 0.4, reweigh: false}}}}',
    'weights': f'{{{NO_ATTACK}, curriculum_args: {{start: 0.4, threshold: 0.0, every: 0.1}}}}',
    'attack': '{curriculum: none, curriculum_args: {}}',
    'discard+weights': f'{{{NO_ATTACK}}}',
    'discard+attack': '{curriculum_args: {start: 0.4, threshold: 0.4, reweigh: false}}',
    'weights+attack': '{curriculum_args: {start: 0.4, threshold: 0.0, every: 0.1}}',
}

def acr_parts(runs):
    for name, given in ACR_PARTS.items(): make(runs, 'acr_parts', name, 'digits/acr_0.5', given)

# What came closest to a recipe that nothing is paid for: no weights; with the seeds and epochs of `tuned_on_digits.py`.
def gentle(runs):
    for seed in range(5):
        given = yaml.safe_load(ACR_PARTS['discard+attack']) | {'epochs': 30, 'seed': seed}
        train(runs/f'seed_{seed}', 'digits/acr_0.5', yaml.safe_dump(given))
        keep_log(runs/f'seed_{seed}', f'gentle/{seed}')

# Tables 5 to 10: one parameter at a time, the others as in the recipe for digits. E_t is a part of the run, as the
# paper's 50 to 130 of 150 epochs; 64 pixels instead of 3,072 want smaller steps than the paper's.
def start(at): return f'{{ramp: {{switch_on: {at}}}, curriculum_args: {{start: {at}, threshold: 0.4, every: 0.1}}}}'
def threshold(p): return f'{{curriculum_args: {{start: 0.4, threshold: {p}, every: 0.1}}}}'
def attack(eps=.25, steps=3, norm='2'): return f'{{attack_args: {{eps: {eps}, steps: {steps}, norm: {norm}}}}}'

ACR_SWEEPS = {
    **{f'start_{at}': start(at) for at in (.33, .47, .6, .73, .87)},
    **{f'threshold_{p}': threshold(p) for p in (.3, .5, .6, .7, .8)},
    **{f'eps_{eps}': attack(eps=eps) for eps in (.125, .5, 1., 2.)},
    **{f'steps_{steps}': attack(steps=steps) for steps in (1, 2, 5)},
    **{f'inf_eps_{eps}': attack(eps=eps, norm='inf') for eps in (.125, .25, .5, 1.)},
    **{f'inf_steps_{steps}': attack(steps=steps, norm='inf') for steps in (1, 2, 5)},
}

def acr_sweeps(runs):
    for name, given in ACR_SWEEPS.items(): make(runs, 'acr_sweeps', name, 'digits/acr_0.5', given)

# SODM: one choice at a time, the others as in the recipe for digits, whose map is none.
RECIPE = recipe_of('digits/sodm_0.5')

def sodm(**given): return yaml.safe_dump({'method_args': RECIPE['method_args'] | given})

def mapped(**given): return sodm(mapping='temperature', **given)

SODM_PARTS = {
    'none': sodm(),
    'temperature': mapped(),
    'residual': sodm(mapping='residual'),
    'learns_votes': mapped(learns='votes'),
    **{f'mapping_noise_{n}': mapped(mapping_noise=n) for n in (16, 512)},
    **{f'interval_{steps}': mapped(interval=steps) for steps in (1, 25)},
    **{f'rho_{rho}': sodm(rho=rho) for rho in (.9, .999)},
    **{f'beta_{beta}': sodm(beta=beta) for beta in (2.5, 6.)},
    'plain_0': sodm(plain=0),
}

def sodm_parts(runs):
    for name, given in SODM_PARTS.items(): make(runs, 'sodm_parts', name, 'digits/sodm_0.5', given)

# Generations of architectures, from small to large, by what a pass costs: the last ones are dear, so all are short.
GENERATIONS = ['mlp', 'cifar_resnet20', 'regnet_x_400mf', 'resnet18']
SHORT = dict(epochs=30, n=1000)

def taught_by(folder): return dict(teacher=str(folder.resolve()))

def crt_generations(runs):
    "One small teacher, trained by SmoothMix; each architecture learns from it, and is trained by SmoothMix itself."
    def short(name, recipe, **given):
        make(runs, 'crt_generations', name, f'digits/{recipe}_0.5', yaml.safe_dump(SHORT | given))
    short('teacher', 'smoothmix')
    for arch in GENERATIONS:
        short(f'crt-{arch}', 'crt', arch=arch, **taught_by(runs/'teacher'))
        short(f'smoothmix-{arch}', 'smoothmix', arch=arch)

def crt_proxy(runs):
    "Where no teacher exists, a small one is trained for the student; against training the student itself."
    large = dict(arch='cifar_resnet20')
    make(runs, 'crt_proxy', 'proxy', 'digits/smoothmix_0.5')
    make(runs, 'crt_proxy', 'student', 'digits/crt_0.5', yaml.safe_dump(large | taught_by(runs/'proxy')))
    make(runs, 'crt_proxy', 'itself', 'digits/smoothmix_0.5', yaml.safe_dump(large))

def released(folder):
    "Every released log against Gaussian training of its noise level; one correction for all."
    tables = []
    for baseline in sorted(folder.glob('gaussian_*.tsv')):
        sigma = float(baseline.stem.partition('_')[2])
        paths = [baseline, *sorted(set(folder.glob(f'*_{sigma}.tsv')) - {baseline})]
        facts = dict(sigma=sigma, n0=100, n=100_000, alpha=.001, split='test')
        logs = {path.stem.partition('_')[0]: read_log(path, **facts) for path in paths}
        radii = [r/4 for r in range(11) if r/4 < 3.8*sigma]
        tables.append(differences(logs, radii).assign(sigma=sigma))
    table = judge(pd.concat(tables, ignore_index=True))
    DATA.mkdir(parents=True, exist_ok=True)
    table.to_csv(DATA/'released.csv', index=False, float_format='%.6g')

COMMANDS = dict(acr_parts=acr_parts, acr_sweeps=acr_sweeps, gentle=gentle, sodm_parts=sodm_parts,
                crt_generations=crt_generations, crt_proxy=crt_proxy, released=released)

if __name__ == '__main__':
    if len(sys.argv) != 3 or sys.argv[1] not in COMMANDS: sys.exit(__doc__)
    COMMANDS[sys.argv[1]](Path(sys.argv[2]))
