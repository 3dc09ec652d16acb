"""Every method on CIFAR-10 images, from one network: how far the same short training moves it.

    python tools/methods_on_cifar10.py 0.25                     (four hours on one core)
    python tools/methods_on_cifar10.py 0.5 macer smoothadv      (some methods)
    python tools/methods_on_cifar10.py 0.5 --keep               (what is finished goes into data/cifar10-methods)

Training from random weights is days on a processor. So each method starts from one network of its sigma: that of
data/cifar10-gaussian (30 epochs of Gaussian training, sigma = .25) or, at .5, the same after five more epochs of
Gaussian training there. It trains for two more epochs on each fifth training image, with its recipe for CIFAR-10 but
for what `SHORT` and `own_settings` say. Images: the JPEG copy at data/cache/cifar10-jpeg. 500 test images are
certified, sequentially, in bfloat16, as it was trained. Runs go into runs/cifar10-methods; a run that is finished is
not made again, one that was stopped goes on.
"""
import argparse

from costs import costs
from recipes import ROOT, pack, recipe_of, run, ship
from rs_toolkit.catalogue import METHODS
from rs_toolkit.common import unknown

GAUSSIAN = 'data/cifar10-gaussian'

RADII = {.25: [0, .25, .5, .75], .5: [0, .25, .5, .75, 1, 1.25, 1.5]}

# What all share. The learning rate is a tenth of most recipes', and drops once: the start has been through their drops.
SHORT = dict(dataset='folder:data/cache/cifar10-jpeg', arch='cifar_resnet20', device='cpu', precision='bfloat16',
             train_every=5, epochs=2, batch_size=64, lr=.01, lr_drops=[], procedure='sequential', n=10_000, every=20)

# One method with more settings: the published one, its beta alone, and the one that digits chose.
SODM = {'sodm_paper': dict(mapping='temperature', beta=6.), 'sodm_beta6': dict(beta=6.),
        'sodm_votes': dict(mapping='temperature', learns='votes', mapping_noise=64, beta=1.)}
RUNS = [*METHODS, *SODM]

SHOWN = [('smoothadv', .25)]         # a network that pages open: 1.1 MB

def own_settings(sigma, runs):
    """What a method does not share with the others: fewer copies and steps than in its recipe where an epoch would cost
    more than ten plain ones; what a recipe begins late begins at once.
    """
    threshold = .5 if sigma == .25 else .4           # as in the recipes
    more_of_sodm = {key: dict(num_noise=8, method_args=args) for key, args in SODM.items()}
    return more_of_sodm | {
        'smoothmix': dict(ramp={}),
        'crt': dict(teacher=f'{runs}/smoothmix'),
        'sodm': dict(num_noise=8, method_args=dict(beta=1.)),                          # without a map
        'acr': dict(ramp={}, curriculum_args=dict(start=0, threshold=threshold, every=1, discard_noise=32)),
        'catrs': dict(teacher=GAUSSIAN, teacher_samples=16),
        'macer': dict(num_noise=8),
        'smoothadv': dict(num_noise=2, ramp={}, attack_args=dict(eps=1., steps=4)),
    }

def recipe_for(key, sigma):
    method, *_ = key.split('_')
    return f'cifar10/{method}_{sigma}'

def settings_of(key, sigma, start, runs):
    "What is changed in a method's recipe."
    shared = SHORT | dict(start=start, procedure_args=dict(radii=RADII[sigma]))
    return shared | own_settings(sigma, runs).get(key, {})

def make_start(sigma, runs):
    "The network that all methods of this sigma start from: its run folder."
    if sigma == .25: return GAUSSIAN
    folder = f'{runs}/start'
    longer = dict(train_every=1, epochs=5, lr=.05, schedule='cosine', batch_size=128, every=100)
    run('train', f'cifar10/gaussian_{sigma}', folder, **settings_of('gaussian', sigma, GAUSSIAN, runs) | longer)
    return folder

def train(methods, sigma, runs):
    start = make_start(sigma, runs)
    for key in methods:
        run('train', recipe_for(key, sigma), f'{runs}/{key}', **settings_of(key, sigma, start, runs))

def keep(methods, sigma, runs):
    "Copy logs and histories of what is finished, of SODM's other settings the log; count what each method costs."
    place = ROOT/'data/cifar10-methods'/str(sigma)
    for key in methods:
        finished = ROOT/runs/key
        if not (finished/'metrics.json').exists(): continue
        if key in SODM: pack(finished/'certify.tsv', place/f'{key}.tsv.gz')
        else: ship(finished, place/key, weights=(key, sigma) in SHOWN)
    settings = {key: recipe_of(recipe_for(key, sigma)) | settings_of(key, sigma, GAUSSIAN, runs) for key in RUNS}
    costs(settings).to_csv(place/'costs.csv', index=False)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('sigma', type=float, choices=RADII)
    parser.add_argument('methods', nargs='*', default=RUNS)
    parser.add_argument('--keep', action='store_true', help='nothing runs; what is finished goes into data/')
    given = parser.parse_args()
    for key in given.methods:
        if key not in RUNS: parser.error(str(unknown('run', key, RUNS)))
    work = keep if given.keep else train
    work(given.methods, given.sigma, f'runs/cifar10-methods/{given.sigma}')
