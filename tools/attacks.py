"""What attacks find where certificates end: how far images of a run must be moved to change its network, and its vote.

    python tools/attacks.py FOLDER [IMAGES [STEPS NUM_NOISE N]]

takes that many of the images in the log of the run at most (180), at its noise level, and writes FOLDER/attacks.csv: a
row per image with the smallest budget, of 0, .1 ... 2, at which PGD broke the network and the vote, and how hard it was
tried: 20 steps, 8 noises and N = 200 unless said. The page `attack` shows it.
"""
import sys
from pathlib import Path

import numpy as np

from rs_toolkit.attacks import breaking_budgets
from rs_toolkit.explore.smooth import trained
from rs_toolkit.log import read_log

BUDGETS = np.linspace(0, 2, 21).round(2)

def attack(folder, most=180, steps=20, num_noise=8, n=200):
    folder = Path(folder)
    model, images, labels = trained(folder)
    log = read_log(folder/'certify.tsv')
    log = log.iloc[::-(-len(log) // most)]
    settings = dict(steps=steps, num_noise=num_noise, n=n)
    idx = log.idx.to_numpy()
    rows = breaking_budgets(model, images[idx], labels[idx], float(log.sigma.iloc[0]), BUDGETS, idx=idx, **settings)
    rows.assign(**settings).to_csv(folder/'attacks.csv', index=False)

if __name__ == '__main__':
    folder, *numbers = sys.argv[1:]
    attack(folder, *map(int, numbers))
