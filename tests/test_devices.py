"""What only runs on a graphics card, on a stand-in for one (`card.py`).

It ends with the processor's numbers, and what is missing is refused in words.
"""
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from torch import nn

import trainer
from card import CARD, OnCard, card
from rs_toolkit import certify as certification
from rs_toolkit.attacks import attack_smoothed
from rs_toolkit.curriculum import right_votes
from rs_toolkit.data import crop_flip, load
from rs_toolkit.methods.catrs import smoothed_predictions
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.models import build
from rs_toolkit.noise import gaussian_noise
from rs_toolkit.processes import join_processes, pick_device
from rs_toolkit.run import environment
from rs_toolkit.train import accuracy, fit

DIGITS = tuple(t[:60] for t in load('digits', 'train'))
COLOUR = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4

@pytest.fixture(autouse=True)
def alone():
    "accelerate remembers the first device that it saw."
    PartialState._reset_state()
    yield
    PartialState._reset_state()

# --- the stand-in is as strict as a card

def test_the_stand_in_is_strict():
    with card():
        there = torch.zeros(3, device='cuda:0')
        here = torch.zeros(3)
        assert there.device == CARD
        assert (there + 1).device == CARD
        assert there.cpu().device.type == 'cpu'
        for mix in lambda: there + here, lambda: here[there.long()], lambda: here.gather(0, there.long()):
            with pytest.raises(RuntimeError, match='two devices'): mix()
        assert there[torch.tensor([0, 2])].shape == (2,)                        # an index may lie on the processor
        with pytest.raises(RuntimeError, match='generator'): there.normal_(generator=torch.Generator())
        with pytest.raises((TypeError, RuntimeError)): np.asarray(there)
        with pytest.raises(ValueError, match='specified index'): torch.cuda.set_device(torch.device('cuda'))

# --- choosing one

@pytest.mark.parametrize('name', ['cuda', 'cuda:3', 'mps'])
def test_a_device_that_is_not_there(name):
    "Refused before any work, with those that are."
    model = build('mlp', 10, 1, 8)
    before = [p.clone() for p in model.parameters()]
    no_cuda = mock.patch('torch.cuda.is_available', return_value=False)
    no_mps = mock.patch('torch.backends.mps.is_available', return_value=False)
    with no_cuda, no_mps:
        assert str(pick_device('auto')) == 'cpu'
        with pytest.raises(ValueError, match=f"there is no device '{name}' here: this machine has cpu"):
            fit(model, Gaussian(.25), DIGITS, 1, device=name, progress=False)
    for p, q in zip(model.parameters(), before): assert torch.equal(p, q)

def test_one_card():
    with card(count=1) as cuda:
        for name in 'auto', 'cuda', 'cuda:0', CARD: assert str(pick_device(name)) == 'cuda:0', name
        assert str(pick_device('cpu')) == 'cpu'
        with pytest.raises(ValueError, match="no device 'cuda:3' here: this machine has cpu, cuda:0"):
            pick_device('cuda:3')
        assert join_processes(pick_device('auto')) == (0, 1)
        cuda.set_device.assert_called_with(CARD)
        assert environment(CARD)['hardware'] == 'Stand-in'
    with card(count=3, current=2):
        assert str(pick_device('cuda')) == 'cuda:2'                             # the one that the caller chose

def test_each_process_has_a_card_of_its_own(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with card(count=2):
        assert str(pick_device('auto')) == str(pick_device('cuda')) == 'cuda:1'
        with pytest.raises(ValueError, match='several processes cannot share cuda:0'): pick_device('cuda:0')
    alone = 'process 1 of this machine has no card of its own: it sees cpu, cuda:0.*nproc_per_node 1'
    with card(count=1), pytest.raises(ValueError, match=alone): pick_device('cuda')

def test_processes_that_do_not_meet(monkeypatch):
    "Two processes were started, and each would train alone and write the same files."
    monkeypatch.setenv('WORLD_SIZE', '2')
    with card(), pytest.raises(RuntimeError, match='2 processes were asked for, but 1 run'): join_processes(CARD)

# --- training

def plain(): return Gaussian(.25), None

def train(device, make=plain, arch='small_cnn', data=DIGITS, epochs=4, mean=None, std=None, **kwargs):
    "A trained model, and its history."
    images, labels = data
    torch.manual_seed(0)
    model = build(arch, int(labels.max()) + 1, images.shape[1], 8, mean, std)
    method, curriculum = make()
    history = fit(model, method, data, epochs, batch_size=20, lr=.02, device=device, curriculum=curriculum,
                  progress=False, **kwargs)
    return model, history.drop(columns='seconds')

def assert_same(there, here):
    "Every tensor of a model on the card is that of the one on the processor."
    for name, tensor in here.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), tensor), name

@pytest.mark.parametrize('name', trainer.METHODS)
def test_every_method_trains_there_what_it_trains_here(name, monkeypatch):
    monkeypatch.setattr(trainer, 'SIZE', 60)
    here, history = train('cpu', trainer.METHODS[name])
    with card():
        there, again = train('cuda', trainer.METHODS[name])
        for name, p in there.named_parameters(): assert isinstance(p, OnCard), name
        pd.testing.assert_frame_equal(again, history)
        assert_same(there, here)

def test_colour_batch_norm_augmentation_micro_batches_and_accuracy():
    setting = dict(arch='cifar_resnet20', data=COLOUR, epochs=2, augment=crop_flip, micro_batch=8, test=COLOUR,
                   mean=[.5]*3, std=[.2]*3)
    here, history = train('cpu', **setting)
    with card():
        there, again = train('auto', **setting)
        pd.testing.assert_frame_equal(again, history)
        assert_same(there, here)
        assert accuracy(there, *COLOUR, sigma=.25) == accuracy(here, *COLOUR, sigma=.25)

def test_a_run_goes_on_there(tmp_path, monkeypatch):
    "With the random state of the card, which dropout draws from."
    monkeypatch.setattr(trainer, 'SIZE', 60)
    def stop(history):
        if len(history) == 2: raise KeyboardInterrupt
    for name in 'sodm', 'easy_data':
        whole, _ = train('cpu', trainer.METHODS[name])
        with card() as cuda:
            with pytest.raises(KeyboardInterrupt, match='kept'):
                train('cuda', trainer.METHODS[name], resume=tmp_path/name, watch=stop)
            state = torch.load(tmp_path/name, weights_only=True)
            assert state['device_rng'].tolist() == [7]*16
            assert state['setup']['device'] == 'cuda'
            again, history = train('cuda', trainer.METHODS[name], resume=tmp_path/name)
            assert len(history) == 4
            assert_same(again, whole)
            assert cuda.set_rng_state.call_args.args[0].tolist() == [7]*16
        with pytest.raises(ValueError, match="device was 'cuda', is 'cpu'"):
            train('cpu', trainer.METHODS[name], resume=tmp_path/name)

# --- the rest that a model on a card is asked

def test_certification_attack_votes_and_predictions_there():
    model, _ = train('cpu', epochs=8)
    images, labels = (t[:6] for t in DIGITS)
    def all_of(model):
        attacked = attack_smoothed(model, images, labels, .25, .3, steps=2, num_noise=4, n=50, progress=False)
        return dict(certify=certification.certify(model, images, .25, n0=20, n=200),
                    predict=certification.predict(model, images, .25, n=100),
                    attacked=attacked.to_dict('list'),
                    right_votes=right_votes(model, images, labels, torch.arange(6), .25, 9).tolist(),
                    predictions=smoothed_predictions(model, images, .25, n=30, progress=False).tolist())
    here = all_of(model)
    with card():
        model.to(CARD)
        assert all_of(model) == here

def test_a_generator_draws_where_it_is():
    x = DIGITS[0][:2]
    drawn = gaussian_noise(x, .5, 3, torch.Generator().manual_seed(3))
    with card():
        there = gaussian_noise(x.to(CARD), .5, 3, torch.Generator().manual_seed(3))
        assert there.device == CARD and torch.equal(there.cpu(), drawn)

class Watched(nn.Module):
    "Notes how exactly torch would compute when it is asked last."
    last = []
    def __init__(self):
        super().__init__()
        self.net = build('mlp', 10, 1, 8)
    def forward(self, x):
        b = torch.backends
        switches = [b.cudnn.conv.fp32_precision, b.cuda.matmul.fp32_precision, b.mkldnn.matmul.fp32_precision]
        Watched.last[:] = [*switches, b.cudnn.enabled]
        return self.net(x)

USES = {'fit': lambda model: fit(model, Gaussian(.25), DIGITS, 1, device='cpu', progress=False),
        'accuracy': lambda model: accuracy(model, *DIGITS),
        'predictions': lambda model: smoothed_predictions(model, DIGITS[0][:2], .25, n=5, progress=False),
        'certify': lambda model: certification.certify(model, DIGITS[0][:2], .25, n0=5, n=50)}

@pytest.mark.skipif(not hasattr(torch.backends.cudnn, 'conv'), reason='older torch has other switches')
@pytest.mark.parametrize('use', USES)
def test_float32_means_float32(use):
    "Whatever a script has set before; and cuDNN stays on, which is the fast way."
    torch.set_float32_matmul_precision('medium')
    try:
        USES[use](Watched())
        assert Watched.last == ['ieee', 'ieee', 'ieee', True] and torch.get_float32_matmul_precision() == 'medium'
    finally: torch.set_float32_matmul_precision('highest')
