"""Evidence for certificates without noise: every loss on digits, and the front of accuracy against proofs on MNIST.

    python tools/proofs.py digits [SEEDS]         (ten minutes a seed on one core)
    python tools/proofs.py images FOLDER          (makes data/cache/mnist-t10k from the two t10k files in FOLDER)
    python tools/proofs.py mnist [SEEDS]          (half an hour a seed on one core)
    python tools/proofs.py cifar10 [SEEDS]        (two hours a seed on one core)
    python tools/proofs.py keep                   (logs of what is finished, and one table, into data/proofs)

Runs go into runs/proofs; what is finished there is not made again. SEEDS are numbers: 0 1 2 for digits, 0 1 for the
others, where none are given.
"""
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from recipes import ROOT, pack, run
from rs_toolkit.catalogue import entries
from rs_toolkit.deterministic.verify import accuracies
from rs_toolkit.log import read_log

RUNS = Path('runs/proofs')
BOOK = 'train_deterministic'
LOSSES = ['ibp', 'cc_ibp', 'mtl_ibp', 'exp_ibp', 'sabr', 'crown_ibp', 'cc_dist']

def digits(*seeds):
    "Every loss, and the teacher of the last one."
    for seed in map(int, seeds or (0, 1, 2)):
        teacher = RUNS/f'digits/adversarial/{seed}'
        run(BOOK, 'digits/adversarial_eps0.1', teacher, seed=seed, search=[], proofs=['ibp', 'crown-ibp'])
        for loss in LOSSES:
            found = {'teacher': str(teacher)} if loss == 'cc_dist' else {}
            run(BOOK, f'digits/{loss}_eps0.1', RUNS/f'digits/{loss}/{seed}', seed=seed, search=[], **found)

def images(folder):
    "Image files of MNIST's test split: every fifth of each class is for testing, the others are for training."
    def values(name, start): return np.frombuffer(gzip.decompress((Path(folder)/name).read_bytes())[start:], np.uint8)
    pixels = values('t10k-images-idx3-ubyte.gz', 16).reshape(-1, 28, 28)
    labels = values('t10k-labels-idx1-ubyte.gz', 8)
    for label in range(10):
        for place, i in enumerate(np.flatnonzero(labels == label)):
            split = 'test' if place % 5 == 0 else 'train'
            file = ROOT/'data/cache/mnist-t10k'/split/str(label)/f'{i:05}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(file)

def front(data, recipe, plain, taught, others, seeds):
    "Networks without and with a robust teacher, each with its alphas; and other methods."
    for seed in map(int, seeds):
        def one(method, name, seed=seed, **given):
            out = RUNS/f'{data}/{name}/{seed}'
            run(BOOK, recipe.format(method), out, seed=seed, **given)
            return str(out)

        teacher = one('adversarial', 'adversarial')
        for alpha in plain: one('cc_ibp', f'cc_ibp-{alpha}', method_args={'alpha': alpha})
        for alpha in taught: one('cc_dist', f'cc_dist-{alpha}', method_args={'alpha': alpha}, teacher=teacher)
        for method in others: one(method, method)

def mnist(*seeds):
    alphas = [.1, .3, .5, .7, .9]
    front('mnist', 'mnist-t10k/{}_eps0.1', alphas, alphas, ['ibp', 'sabr'], seeds or (0, 1))

def cifar10(*seeds):
    "CIFAR-10 (JPEG copy) in data/cache/cifar10-jpeg; a teacher acts like a smaller alpha, so there is one without it."
    front('cifar10-jpeg', 'cifar10-jpeg/{}_eps2_255', [.01, .03, .1], [.03, .1], ['ibp'], seeds or (0, 1))

def keep():
    "Logs of all finished runs, and a row per network; what was kept before and is not here stays."
    rows = []
    for finished in sorted((ROOT/RUNS).glob('*/*/*/metrics.json')):
        folder = finished.parent
        place = ROOT/'data/proofs'/folder.parent.relative_to(ROOT/RUNS)
        pack(folder/'verify.tsv', place/f'{folder.name}.tsv.gz')
        rows.append(row(folder))
    table = ROOT/'data/proofs/networks.csv'
    names = ['data', 'method', 'alpha', 'seed']
    both = pd.concat([pd.read_csv(table), pd.DataFrame(rows).round(6)])
    both.drop_duplicates(names, keep='last').sort_values(names).to_csv(table, index=False)

def row(folder):
    "What is known of one network."
    record = json.loads((folder/'metrics.json').read_text())
    asked = json.loads((folder/'config.json').read_text())['parameters']
    shares = accuracies({'network': read_log(folder/'verify.tsv')}).loc['network']
    return {'data': folder.parts[-3], 'method': entries()[asked['method']].label,
            'alpha': asked['method_args'].get('alpha'), 'seed': asked['seed'], 'images': record['images'],
            **shares}

PLANS = {'digits': digits, 'images': images, 'mnist': mnist, 'cifar10': cifar10, 'keep': keep}

if __name__ == '__main__':
    name, *rest = sys.argv[1:]
    PLANS[name](*rest)
