"""Trains on digits with each method named, and leaves weights and losses: `trainer.py FOLDER PROCESSES METHOD ...`."""
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from rs_toolkit.attacks import ddn, smoothed_pgd, sphere_attack
from rs_toolkit.curriculum import EasyData
from rs_toolkit.data import load
from rs_toolkit.deterministic.training import (CCIBP, CROWNIBP, IBP, MTLIBP, NFGSM, SABR, ADCert, Adversarial, CCDist,
                                               ExpIBP)
from rs_toolkit.methods.catrs import CATRS
from rs_toolkit.methods.consistency import Consistency
from rs_toolkit.methods.core import switch_on, warm_up
from rs_toolkit.methods.crt import CRT
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.methods.macer import MACER
from rs_toolkit.methods.smoothmix import SmoothMix
from rs_toolkit.methods.sodm import SODM
from rs_toolkit.methods.stability import Stability
from rs_toolkit.models import build
from rs_toolkit.train import fit

SIZE = 333

def counts(): return torch.randint(0, 50, (SIZE, 10), generator=torch.Generator().manual_seed(1)) + 1

METHODS = {  # the method, and the curriculum
    'stability': lambda: (Stability(.25), None),
    'smoothadv': lambda: (Gaussian(.25, num_noise=2, attack=partial(smoothed_pgd, eps=.2, steps=2), ramp=warm_up(2)),
                          None),
    'consistency_ddn': lambda: (Consistency(.25, lbd=2., num_noise=2, attack=partial(ddn, eps=.2, steps=2)), None),
    'macer': lambda: (MACER(.25, lbd=2., defer=1, num_noise=4), None),
    'smoothmix': lambda: (SmoothMix(.25, steps=2, step_size=.2, num_noise=2, ramp=warm_up(2)), None),
    'catrs': lambda: (CATRS(.25, counts(), eps=.2, steps=2, num_noise=2), None),
    'sodm': lambda: (SODM(.25, 10, mapping='temperature', mapping_noise=8, interval=2, num_noise=2,
                          jitter=.1, fresh=True, repeat=True), None),
    'crt': lambda: (CRT(.25, build('mlp', 10, 1, 8)), None),
    'easy_data': lambda: (Gaussian(.25, num_noise=2, attack=partial(sphere_attack, eps=.2, steps=2), ramp=switch_on(1)),
                          EasyData(.25, start=1, threshold=.05, every=2)),
    'adversarial': lambda: (Adversarial(.1, steps=2, restarts=2, eps_epochs=2), None),
    'ibp': lambda: (IBP(.1, lbd=0., l1=1e-5), None),
    'crown_ibp': lambda: (CROWNIBP(.1, eps_start=1, eps_epochs=3), None),
    'cc_ibp': lambda: (CCIBP(.1, restarts=2), None),
    'mtl_ibp': lambda: (MTLIBP(.1, bn='clean', w=.9), None),
    'exp_ibp': lambda: (ExpIBP(.1, reduction='image'), None),
    'sabr': lambda: (SABR(.1, share=.3, shrink=.8, reach=2., steps=2, step_size=.5), None),
    'ccdist': lambda: (CCDist(.1, build('small_cnn', 10, 1, 8)), None),
    'ad_cert': lambda: (ADCert(.1, build('small_cnn', 10, 1, 8)), None),
    'n_fgsm': lambda: (NFGSM(.1), None)}

def train(out, processes, names):
    "Train with each method named, or go on where it was killed; leave weights and losses."
    rank = os.environ.get('RANK', '0')
    images, labels = load('digits', 'train')
    for name in names:
        torch.manual_seed(0)
        model = build('small_cnn', 10, 1, 8)
        method, curriculum = METHODS[name]()
        history = fit(model, method, (images[:SIZE], labels[:SIZE]), 6, batch_size=61, lr=.02, device='cpu',
                      curriculum=curriculum, micro_batch=16, processes=processes, resume=out/f'{name}.state',
                      progress=False)
        weights = {f'model.{k}': v for k, v in model.state_dict().items()}
        weights |= {f'method.{k}': v for k, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
        torch.save(weights, out/f'{name}.{rank}.pt')
        (out/f'{name}.json').write_text(json.dumps(history.drop(columns='seconds').to_dict('list')))

if __name__ == '__main__': train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
