"""Every method on CIFAR-10 images, from one network: how far the same short training moves it.

    python tools/methods_on_cifar10.py                     (four hours on one core)
    python tools/methods_on_cifar10.py macer smoothadv     (some methods)
    python tools/methods_on_cifar10.py --keep              (what is finished goes into data/cifar10-methods)

Training from random weights is days on a processor. So each method starts from the network of data/cifar10-gaussian
(30 epochs of Gaussian training, sigma = .25) and trains for two more epochs on each tenth training image, with its
recipe for CIFAR-10 but for what `SHORT` and `OWN` say. Images: the JPEG copy at data/cache/cifar10-jpeg. Each hundredth
test image is certified, sequentially. Runs go into runs/cifar10-methods; a run that is finished is not made again, one
that was stopped goes on.
"""
import argparse
import shutil
from pathlib import Path

from recipes import ROOT, run, ship
from rs_toolkit.common import unknown

RUNS = Path('runs/cifar10-methods')
START = 'data/cifar10-gaussian'

# What all share. The learning rate is a tenth of most recipes', and drops once: the start has been through their drops.
SHORT = dict(dataset='folder:data/cache/cifar10-jpeg', arch='cifar_resnet20', start=START, device='cpu',
             train_every=10, epochs=2, batch_size=64, lr=.01, lr_drops=[],
             procedure='sequential', procedure_args=dict(radii=[0, .25, .5, .75]), n=10_000, every=100)

# Fewer copies and steps than in the recipes where an epoch would cost more than ten plain ones; what a recipe begins
# late begins at once. In the order in which they run: CRT needs its teacher.
OWN = {
    'gaussian': {},
    'gaussian4': {},
    'stability': {},
    'consistency': {},
    'smoothmix': dict(ramp={}),
    'crt': dict(teacher=str(RUNS/'smoothmix')),
    'sodm': dict(num_noise=8, method_args=dict(beta=1.)),                              # without a map
    'acr': dict(ramp={}, curriculum_args=dict(start=0, threshold=.5, every=1, discard_noise=32)),
    'catrs': dict(teacher=START, teacher_samples=16),
    'macer': dict(num_noise=8),
    'smoothadv': dict(num_noise=2, ramp={}, attack_args=dict(eps=1., steps=4)),
}

SHOWN = 'acr', 'catrs'      # whose networks come along, for the pages

def train(key): run('train', f'cifar10/{key}_0.25', RUNS/key, **SHORT | OWN[key])

def keep(key):
    finished = ROOT/RUNS/key
    place = ROOT/'data/cifar10-methods'/key
    if not (finished/'metrics.json').exists(): return
    ship(finished, place)
    if key in SHOWN: shutil.copy(finished/'model.safetensors', place)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('methods', nargs='*', default=list(OWN))
    parser.add_argument('--keep', action='store_true', help='nothing runs; what is finished goes into data/')
    given = parser.parse_args()
    for key in given.methods:
        if key not in OWN: parser.error(str(unknown('method', key, OWN)))
    for key in given.methods: keep(key) if given.keep else train(key)
