"Training that is shared by processes, or killed, ends where undisturbed training ends."
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rs_toolkit.attacks import smoothed_pgd
from rs_toolkit.curriculum import EasyData
from rs_toolkit.data import load
from rs_toolkit.methods.catrs import smoothed_predictions
from rs_toolkit.methods.core import Method
from rs_toolkit.methods.crt import CRT
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.models import build, weights_hash
from rs_toolkit.train import describe, fit
from trainer import METHODS

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {'OMP_NUM_THREADS': '1'}
SHARED = ['easy_data', 'smoothmix', 'catrs', 'sodm']           # draws, buffers, weights and a second network

def trainer(folder, processes, names): return [sys.executable, 'tests/trainer.py', str(folder), str(processes), *names]

def torchrun(processes, *command):
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes), *command[1:]],
                          cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Every method, in one process, from beginning to end."
    folder = tmp_path_factory.mktemp('undisturbed')
    done = subprocess.run(trainer(folder, 1, METHODS), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    "Some methods, in two processes."
    folder = tmp_path_factory.mktemp('shared')
    done = torchrun(2, *trainer(folder, 2, SHARED))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

@pytest.mark.parametrize('name', SHARED)
def test_two_processes_train_what_one_does(undisturbed, shared, name):
    one, a, b = (torch.load(path/f'{name}.{rank}.pt', weights_only=True) for path, rank in ((undisturbed, 0), (shared, 0), (shared, 1)))
    assert all(torch.equal(a[k], b[k]) for k in a)                                     # both end with the same weights
    for k in one: torch.testing.assert_close(a[k], one[k], rtol=1e-3, atol=3e-5, msg=lambda m: f'{name}, {k}: {m}')     # sums in another order
    losses = [json.loads((path/f'{name}.json').read_text()) for path in (undisturbed, shared)]
    assert losses[0].keys() == losses[1].keys()
    for term in losses[0]: assert losses[1][term] == pytest.approx(losses[0][term], rel=1e-3, abs=1e-6)

def test_too_few_processes_are_refused(tmp_path):
    done = torchrun(1, *trainer(tmp_path, 2, ['stability']))
    assert done.returncode != 0 and '2 processes were asked for, but 1 run' in done.stderr

def test_every_method_survives_being_killed(undisturbed, tmp_path):
    kills = 0
    for name in METHODS:                                                               # SIGKILL while this one trains
        process = subprocess.Popen(trainer(tmp_path, 1, METHODS), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not (tmp_path/f'{name}.state').exists() and process.poll() is None and time.monotonic() < end: time.sleep(.005)
        time.sleep(random.random() * .3)
        kills += process.poll() is None and not (tmp_path/f'{name}.json').exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(trainer(tmp_path, 1, METHODS), cwd=ROOT, env=ENV, check=True)
    assert kills >= len(METHODS) // 2                                                  # most of them hit the training they were meant for
    for name in METHODS:
        whole, killed = (torch.load(path/f'{name}.0.pt', weights_only=True) for path in (undisturbed, tmp_path))
        assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole), name

# --- a state goes on with the same function only

DIGITS = tuple(t[:100] for t in load('digits', 'train'))

class Shifted(nn.Module):
    "A network that normalises by a plain number, as no tensor shows."
    def __init__(self, mean):
        super().__init__()
        self.mean, self.net = mean, build('mlp', 10, 1, 8)
    def forward(self, x): return self.net(x - self.mean)

def short(resume, model, method=None, stop=2, **kwargs):
    "Train for four epochs, or until `stop` of them are there."
    def watch(history):
        if len(history) == stop: raise KeyboardInterrupt
    return fit(model, method or Gaussian(.25), DIGITS, 4, resume=resume, device='cpu', progress=False, watch=watch, **kwargs)

def begun(path, *args, **kwargs):
    with pytest.raises(KeyboardInterrupt): short(path, *args, **kwargs)

FUNCTIONS = {  # two with the same tensors
    'normalised': [lambda: build('small_cnn', 10, 1, 8, [.1], [.2]), lambda: build('small_cnn', 10, 1, 8, [.4], [.2])],
    'a plain number': [lambda: Shifted(.1), lambda: Shifted(.4)]}

@pytest.mark.parametrize('name', FUNCTIONS)
def test_another_function_with_the_same_weights_is_refused(name, tmp_path):
    first, other = FUNCTIONS[name]
    begun(tmp_path/'state.pt', first())
    with pytest.raises(ValueError, match='answers otherwise.*normalisation'): short(tmp_path/'state.pt', other(), stop=4)
    begun(tmp_path/'state.pt', first(), stop=4)                                        # the same function goes on

def test_another_teacher_is_refused(tmp_path):
    make = lambda mean: CRT(.25, Shifted(mean))
    begun(tmp_path/'state.pt', build('mlp', 10, 1, 8), make(.1))
    with pytest.raises(ValueError, match='answers otherwise'): short(tmp_path/'state.pt', build('mlp', 10, 1, 8), make(.4), stop=4)
    begun(tmp_path/'state.pt', build('mlp', 10, 1, 8), make(.1), stop=4)

def test_predictions_of_another_function_are_refused(tmp_path):
    path, model = tmp_path/'counts.pt', build('mlp', 10, 1, 8, [.1], [.2])
    smoothed_predictions(model, DIGITS[0][:3], np.float32(.25), n=5, path=path, progress=False)
    again = smoothed_predictions(model, DIGITS[0][:3].numpy(), .25, n=5, path=path, progress=False)
    assert again.sum(1).tolist() == [5, 5, 5]
    other = build('mlp', 10, 1, 8, [.5], [.2])
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match='another'): smoothed_predictions(other, DIGITS[0][:3], .25, n=5, path=path, progress=False)

def test_a_state_of_before_goes_on(tmp_path):
    "It says nothing of what its network answered."
    torch.manual_seed(0)
    whole = build('mlp', 10, 1, 8)
    fit(whole, Gaussian(.25), DIGITS, 4, device='cpu', progress=False)
    torch.manual_seed(0)
    begun(tmp_path/'state.pt', build('mlp', 10, 1, 8))
    state = torch.load(tmp_path/'state.pt', weights_only=True)
    torch.save({k: v for k, v in state.items() if k != 'answers'}, tmp_path/'state.pt')
    model = build('mlp', 10, 1, 8)
    begun(tmp_path/'state.pt', model, stop=4)
    assert weights_hash(model) == weights_hash(whole)

def test_numbers_of_numpy_are_numbers(tmp_path):
    "A state that holds them could not be opened again, and .12 must mean .12."
    attack = partial(smoothed_pgd, eps=np.float64(.2), steps=np.int64(2))
    make = lambda: Gaussian(np.float32(.12), num_noise=np.int64(2), seed=np.int64(3), attack=attack)
    curriculum = EasyData(np.float32(.12), start=np.float64(.5), threshold=0, every=np.int64(1))
    setting = dict(lr=np.float32(.05), seed=np.int64(1), lr_drops=[np.int64(2)], curriculum=curriculum)
    begun(tmp_path/'state.pt', build('mlp', 10, 1, 8), make(), **setting)
    plain = Gaussian(.12, num_noise=2, seed=3, attack=partial(smoothed_pgd, eps=.2, steps=2))
    setting = dict(lr=.05, seed=1, lr_drops=[2], curriculum=EasyData(.12, start=.5, threshold=0, every=1))
    begun(tmp_path/'state.pt', build('mlp', 10, 1, 8), plain, stop=4, **setting)

def test_what_describes_a_part():
    part = partial(smoothed_pgd, eps=torch.tensor([.1, .2]))
    assert describe(part) == describe(partial(smoothed_pgd, eps=torch.tensor([.1, .2]))) != describe(partial(smoothed_pgd, eps=torch.tensor([.1, .3])))
    class Weighted(Gaussian):
        def __init__(self, weights):
            super().__init__(.25)
            self.weights_of_classes = weights
    assert describe(Weighted([1, 2])) != describe(Weighted([1, 3])) != describe(Weighted(np.array([1, 3])))

# --- data as they are, and mistakes that are named

def test_arrays_and_lists_train_what_tensors_do():
    images, labels = DIGITS
    found = []
    for data in DIGITS, (images.numpy(), labels.numpy()), (images, labels.tolist()), torch.utils.data.TensorDataset(*DIGITS):
        torch.manual_seed(0)
        model = build('mlp', 10, 1, 8)
        history = fit(model, Gaussian(.25), data, 2, device='cpu', progress=False, test=(images.numpy(), labels.tolist()))
        found.append((weights_hash(model), history.noisy_accuracy.tolist()))
    assert all(one == found[0] for one in found)

class Returns(Method):
    def __init__(self, make):
        super().__init__(.25)
        self.make = make
    def forward(self, model, x, y, index=None): return self.make(F.cross_entropy(model(x), y, reduction='none'))

@pytest.mark.parametrize('make, says', [
    (lambda losses: losses.mean(), r"Returns.forward must return a dict of named loss terms, got a tensor of shape \[\]: return {'ce': loss}"),
    (lambda losses: (losses.mean(),), 'got tuple'), (lambda losses: {}, 'got {}'), (lambda losses: None, 'got None'),
    (lambda losses: {'ce': losses}, r"'ce' of Returns must be a tensor with one number, got a tensor of shape \[64\]"),
    (lambda losses: {'ce': losses.mean().item()}, "'ce' of Returns must be a tensor with one number, got float")])
def test_what_forward_must_return(make, says):
    with pytest.raises(ValueError, match=says): fit(build('mlp', 10, 1, 8), Returns(make), DIGITS, 1, device='cpu', progress=False)

def test_what_cannot_learn_says_so():
    train = partial(fit, data=DIGITS, epochs=1, device='cpu', progress=False)
    model = build('mlp', 10, 1, 8)
    with pytest.raises(ValueError, match='got function'): train(lambda x: x.flatten(1), Gaussian(.25))
    with pytest.raises(ValueError, match='must be a Method'): train(model, Gaussian)
    with pytest.warns(UserWarning, match='nothing was learnt in epoch 0'): train(model, Returns(lambda losses: {'ce': losses.mean().detach()}))
    with pytest.raises(ValueError, match='no weights to train'): train(model.requires_grad_(False), Gaussian(.25))
    with pytest.raises(ValueError, match='must be a network'): CRT(.25, 'runs/teacher')

def test_a_part_that_never_acts_stops_the_run_before_any_work():
    "And leaves the network, its method and the folder as they were."
    model = build('mlp', 10, 1, 8)
    before = weights_hash(model)
    never = Gaussian(.25, num_noise=2, attack=partial(smoothed_pgd, eps=.2), ramp=lambda epoch: 0.)
    late, rare = EasyData(.25, start=3), EasyData(.25, start=1, every=2)
    for method, training in [(never, {}), (Gaussian(.25), dict(curriculum=late)), (Gaussian(.25), dict(curriculum=rare)),
                             (Gaussian(.25), dict(lr_drops=[1, 3])), (Gaussian(.25), dict(lr_drops=[2], lr_lag=1))]:
        with pytest.raises(ValueError, match='epochs'): fit(model, method, DIGITS, 3, device='cpu', progress=False, **training)
    assert weights_hash(model) == before

def test_sigterm_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(trainer(tmp_path, 1, ['macer']), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (tmp_path/'macer.state').exists() and process.poll() is None and time.monotonic() < end: time.sleep(.005)
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode != 0 and f"stopped by SIGTERM. Every finished epoch is kept in {tmp_path/'macer.state'}" in said
