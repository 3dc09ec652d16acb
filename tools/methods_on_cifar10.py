"""Every method on CIFAR-10 images, from one network: how far the same short training moves it.

    python tools/methods_on_cifar10.py runs/cifar10-methods                  (three hours on one core)
    python tools/methods_on_cifar10.py runs/cifar10-methods macer smoothadv  (some methods)
    python tools/methods_on_cifar10.py runs/cifar10-methods --keep           (logs of what is finished, into data/)

Training from random weights is days on a processor. So each method starts from the network of data/cifar10-gaussian
(30 epochs of Gaussian training, sigma = .25) and trains for one more epoch on each fifth training image, with its recipe
for CIFAR-10 but for what `SHORT` and `OWN` say. Images: the JPEG copy at data/cache/cifar10-jpeg. A run that is
finished is not made again, one that was stopped goes on. Each hundredth test image is certified, sequentially.
"""
import argparse
from pathlib import Path

import yaml

from recipes import ROOT, pack, run
from rs_toolkit.common import unknown

START = 'data/cifar10-gaussian'

# What all share. The learning rate is a tenth of the recipes': the start has been through their drops.
SHORT = dict(dataset='folder:data/cache/cifar10-jpeg', arch='cifar_resnet20', start=START, device='cpu',
             train_every=5, epochs=1, batch_size=64, lr=.01,
             procedure='sequential', procedure_args=dict(radii=[0, .25, .5, .75]), n=10_000, every=100)

# Fewer copies and steps than in the recipes where an epoch would cost more than twenty plain ones; what a recipe begins
# late begins at once. In the order in which they run: CRT needs its teacher.
OWN = {
    'gaussian': {},
    'gaussian4': {},
    'stability': {},
    'consistency': {},
    'smoothmix': dict(ramp={}),
    'crt': {},
    'sodm': dict(num_noise=8, method_args=dict(mapping='none', beta=1.)),
    'acr': dict(ramp={}, curriculum_args=dict(start=0, discard_noise=32)),
    'catrs': dict(teacher=START, teacher_samples=16),
    'macer': dict(num_noise=8),
    'smoothadv': dict(num_noise=2, ramp={}, attack_args=dict(eps=.5, steps=4)),
}
REPLACED = ('ramp',)                       # other mappings are merged

def setting(key, out):
    "The recipe of a method, made short."
    recipe = yaml.safe_load((ROOT/f'recipes/cifar10/{key}_0.25.yaml').read_text())
    own = {name: recipe[name] | value if isinstance(value, dict) and name not in REPLACED else value
           for name, value in OWN[key].items()}
    teacher = dict(teacher=str(out/'smoothmix')) if key == 'crt' else {}
    return SHORT | own | teacher

def keep(keys, out):
    "Logs of what is finished."
    for key in keys:
        if not (out/key/'metrics.json').exists(): continue
        pack(out/key/'certify.tsv', ROOT/f'data/cifar10-methods/{key}.tsv.gz')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path)
    parser.add_argument('methods', nargs='*', default=list(OWN))
    parser.add_argument('--keep', action='store_true', help='nothing runs; logs go into data/cifar10-methods')
    given = parser.parse_args()
    for key in given.methods:
        if key not in OWN: parser.error(str(unknown('method', key, OWN)))
    out = given.out.resolve()
    if given.keep:
        keep(given.methods, out)
    else:
        for key in given.methods: run('train', f'cifar10/{key}_0.25', out/key, **setting(key, out))
