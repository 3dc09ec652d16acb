"Training that is shared by processes, or killed, ends where undisturbed training ends."
import json
import os
import random
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

import trainer
from forked import SERVER, until
from rs_toolkit.attacks import smoothed_pgd
from rs_toolkit.curriculum import EasyData
from rs_toolkit.data import load
from rs_toolkit.methods.catrs import smoothed_predictions
from rs_toolkit.methods.core import Method
from rs_toolkit.methods.crt import CRT
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.models import build, weights_hash
from rs_toolkit.train import describe, fit

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {'PYTHONPATH': str(ROOT)}
SHARED = ['easy_data', 'smoothmix', 'catrs', 'sodm', 'ibp']    # draws, buffers, weights, a second network, a clock

def start(target, *args):
    "A function in a process of its own, which can be killed."
    process = SERVER.Process(target=target, args=args)
    process.start()
    return process

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Every method, in one process, from beginning to end."
    folder = tmp_path_factory.mktemp('undisturbed')
    process = start(trainer.train, folder, 1, list(trainer.METHODS))
    process.join()
    assert process.exitcode == 0
    return folder

@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    "Some methods, in two processes."
    folder = tmp_path_factory.mktemp('shared')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
               'tests/trainer.py', str(folder), '2', *SHARED]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

def weights(path): return torch.load(path, weights_only=True)

@pytest.mark.parametrize('name', SHARED)
def test_two_processes_train_what_one_does(undisturbed, shared, name):
    one = weights(undisturbed/f'{name}.0.pt')
    first = weights(shared/f'{name}.0.pt')
    second = weights(shared/f'{name}.1.pt')
    assert one.keys() == first.keys() == second.keys()
    for key in one:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=lambda m: f'{name}, {key}: {m}')
        torch.testing.assert_close(first[key], one[key], rtol=1e-3, atol=3e-5,             # sums in another order
                                   msg=lambda m: f'{name}, {key}: {m}')
    alone = json.loads((undisturbed/f'{name}.json').read_text())
    together = json.loads((shared/f'{name}.json').read_text())
    assert alone.keys() == together.keys()
    for term in alone: assert together[term] == pytest.approx(alone[term], rel=1e-3, abs=1e-6), term

def wait_for(path, process, seconds=120):
    "Until the file is there, or the process has ended."
    until(lambda: path.exists() or not process.is_alive(), seconds)

def test_every_method_survives_being_killed(undisturbed, tmp_path):
    hit = []                                                              # killed while they trained
    for name in trainer.METHODS:
        process = start(trainer.train, tmp_path, 1, [name])
        wait_for(tmp_path/f'{name}.state', process)
        time.sleep(random.random() * .3)
        if process.is_alive() and not (tmp_path/f'{name}.json').exists(): hit.append(name)
        process.kill()                                                    # SIGKILL
        process.join()
    assert len(hit) >= len(trainer.METHODS) // 2, f'only {hit} were killed in training'
    last = start(trainer.train, tmp_path, 1, list(trainer.METHODS))
    last.join()
    assert last.exitcode == 0
    for name in trainer.METHODS:
        whole = weights(undisturbed/f'{name}.0.pt')
        killed = weights(tmp_path/f'{name}.0.pt')
        assert whole.keys() == killed.keys()
        for key in whole: assert torch.equal(whole[key], killed[key]), (name, key)

def train_with_words(path, *args):
    "Train, and leave in a file what would stand on stderr."
    sys.stderr = open(path, 'w')
    trainer.train(*args)

def test_sigterm_says_how_to_go_on(tmp_path):
    process = start(train_with_words, tmp_path/'words', tmp_path, 1, ['macer'])
    wait_for(tmp_path/'macer.state', process)
    process.terminate()                                                   # SIGTERM
    process.join()
    assert process.exitcode != 0
    words = (tmp_path/'words').read_text()
    assert f"stopped by SIGTERM. Every finished epoch is kept in {tmp_path/'macer.state'}" in words

# --- a state goes on with the same function only

DIGITS = tuple(t[:100] for t in load('digits', 'train'))

class Shifted(nn.Module):
    "A network that normalises by a plain number, as no tensor shows."
    def __init__(self, mean):
        super().__init__()
        self.mean = mean
        self.net = build('mlp', 10, 1, 8)
    def forward(self, x): return self.net(x - self.mean)

def short(resume, model, method=None, stop=2, **kwargs):
    "Train for four epochs, or until `stop` of them are there."
    def watch(history):
        if len(history) == stop: raise KeyboardInterrupt
    return fit(model, method or Gaussian(.25), DIGITS, 4, resume=resume, device='cpu', progress=False, watch=watch,
               **kwargs)

def begun(path, *args, **kwargs):
    with pytest.raises(KeyboardInterrupt): short(path, *args, **kwargs)

FUNCTIONS = {  # two with the same tensors
    'normalised': [lambda: build('small_cnn', 10, 1, 8, [.1], [.2]),
                   lambda: build('small_cnn', 10, 1, 8, [.4], [.2])],
    'a plain number': [lambda: Shifted(.1), lambda: Shifted(.4)]}

@pytest.mark.parametrize('name', FUNCTIONS)
def test_another_function_with_the_same_weights_is_refused(name, tmp_path):
    first, other = FUNCTIONS[name]
    begun(tmp_path/'state.pt', first())
    with pytest.raises(ValueError, match='answers otherwise.*normalisation'):
        short(tmp_path/'state.pt', other(), stop=4)
    begun(tmp_path/'state.pt', first(), stop=4)                                        # the same function goes on

def test_another_teacher_is_refused(tmp_path):
    def go_on(run, teacher, **kwargs): run(tmp_path/'state.pt', build('mlp', 10, 1, 8), CRT(.25, teacher), **kwargs)

    go_on(begun, Shifted(.1))
    with pytest.raises(ValueError, match='answers otherwise'): go_on(short, Shifted(.4), stop=4)
    go_on(begun, Shifted(.1), stop=4)

def test_predictions_of_another_function_are_refused(tmp_path):
    path = tmp_path/'counts.pt'
    model = build('mlp', 10, 1, 8, [.1], [.2])
    smoothed_predictions(model, DIGITS[0][:3], np.float32(.25), n=5, path=path, progress=False)
    again = smoothed_predictions(model, DIGITS[0][:3].numpy(), .25, n=5, path=path, progress=False)
    assert again.sum(1).tolist() == [5, 5, 5]
    other = build('mlp', 10, 1, 8, [.5], [.2])
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match='another'):
        smoothed_predictions(other, DIGITS[0][:3], .25, n=5, path=path, progress=False)

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
    method = Gaussian(np.float32(.12), num_noise=np.int64(2), seed=np.int64(3), attack=attack)
    curriculum = EasyData(np.float32(.12), start=np.float64(.5), threshold=0, every=np.int64(1))
    setting = dict(lr=np.float32(.05), seed=np.int64(1), lr_drops=[np.int64(2)], curriculum=curriculum)
    begun(tmp_path/'state.pt', build('mlp', 10, 1, 8), method, **setting)
    plain = Gaussian(.12, num_noise=2, seed=3, attack=partial(smoothed_pgd, eps=.2, steps=2))
    setting = dict(lr=.05, seed=1, lr_drops=[2], curriculum=EasyData(.12, start=.5, threshold=0, every=1))
    begun(tmp_path/'state.pt', build('mlp', 10, 1, 8), plain, stop=4, **setting)

def test_what_describes_a_part():
    part = partial(smoothed_pgd, eps=torch.tensor([.1, .2]))
    assert describe(part) == describe(partial(smoothed_pgd, eps=torch.tensor([.1, .2])))
    assert describe(part) != describe(partial(smoothed_pgd, eps=torch.tensor([.1, .3])))

    class Weighted(Gaussian):
        def __init__(self, weights):
            super().__init__(.25)
            self.weights_of_classes = weights

    assert describe(Weighted([1, 2])) != describe(Weighted([1, 3]))
    assert describe(Weighted([1, 3])) != describe(Weighted(np.array([1, 3])))

# --- data as they are, and mistakes that are named

IMAGES, LABELS = DIGITS
FORMS = {'arrays': (IMAGES.numpy(), LABELS.numpy()), 'a list of labels': (IMAGES, LABELS.tolist()),
         'a data set': torch.utils.data.TensorDataset(*DIGITS)}

@pytest.mark.parametrize('form', FORMS)
def test_arrays_and_lists_train_what_tensors_do(form):
    def trained(data):
        torch.manual_seed(0)
        model = build('mlp', 10, 1, 8)
        history = fit(model, Gaussian(.25), data, 2, device='cpu', progress=False,
                      test=(IMAGES.numpy(), LABELS.tolist()))
        return weights_hash(model), history.noisy_accuracy.tolist()

    assert trained(FORMS[form]) == trained(DIGITS)

class Returns(Method):
    def __init__(self, make):
        super().__init__(.25)
        self.make = make
    def forward(self, model, x, y, index=None): return self.make(F.cross_entropy(model(x), y, reduction='none'))

@pytest.mark.parametrize('make, says', [
    (lambda losses: losses.mean(),
     r"Returns.forward must return a dict of named loss terms, got a tensor of shape \[\]: return {'ce': loss}"),
    (lambda losses: (losses.mean(),), 'got tuple'),
    (lambda losses: {}, 'got {}'),
    (lambda losses: None, 'got None'),
    (lambda losses: {'ce': losses}, r"'ce' of Returns must be a tensor with one number, got a tensor of shape \[64\]"),
    (lambda losses: {'ce': losses.mean().item()}, "'ce' of Returns must be a tensor with one number, got float")])
def test_what_forward_must_return(make, says):
    with pytest.raises(ValueError, match=says):
        fit(build('mlp', 10, 1, 8), Returns(make), DIGITS, 1, device='cpu', progress=False)

def test_what_cannot_learn_says_so():
    train = partial(fit, data=DIGITS, epochs=1, device='cpu', progress=False)
    model = build('mlp', 10, 1, 8)
    with pytest.raises(ValueError, match='got function'): train(lambda x: x.flatten(1), Gaussian(.25))
    with pytest.raises(ValueError, match='must be a Method'): train(model, Gaussian)
    detached = Returns(lambda losses: {'ce': losses.mean().detach()})
    with pytest.warns(UserWarning, match='nothing was learnt in epoch 0'): train(model, detached)
    with pytest.raises(ValueError, match='no weights to train'): train(model.requires_grad_(False), Gaussian(.25))
    with pytest.raises(ValueError, match='must be a network'): CRT(.25, 'runs/teacher')

NEVER = {
    'attack': (Gaussian(.25, num_noise=2, attack=partial(smoothed_pgd, eps=.2), ramp=lambda epoch: 0.), {}),
    'late curriculum': (Gaussian(.25), dict(curriculum=EasyData(.25, start=3))),
    'rare curriculum': (Gaussian(.25), dict(curriculum=EasyData(.25, start=1, every=2))),
    'rate': (Gaussian(.25), dict(lr_drops=[1, 3])),
    'rate with a lag': (Gaussian(.25), dict(lr_drops=[2], lr_lag=1))}

@pytest.mark.parametrize('part', NEVER)
def test_a_part_that_never_acts_stops_the_run_before_any_work(part):
    "And leaves the network as it was."
    method, training = NEVER[part]
    model = build('mlp', 10, 1, 8)
    before = weights_hash(model)
    with pytest.raises(ValueError, match='epochs'):
        fit(model, method, DIGITS, 3, device='cpu', progress=False, **training)
    assert weights_hash(model) == before

def test_what_could_be_mixed_up_is_named():
    "Numbers that stand in a row are no call."
    with pytest.raises(TypeError, match='positional'): fit(build('mlp', 10, 1, 8), Gaussian(.25), DIGITS, 1, 64, .1)
