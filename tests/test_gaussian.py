"""Gaussian training: the formula's value is in its notebook; its gradient, order of copies and options are here."""
from functools import partial

import pytest
import torch
from slow import (BATCH, COMMON, M, SIGMA, at_the_ends, bad, check_finite, check_gradients, check_learns, check_mean,
                  check_refused, counts, every, gaussian, given_noise, torch_net, with_noise)
from torch import nn

from rs_toolkit.attacks import ATTACKS, smoothed_pgd, sphere_attack
from rs_toolkit.curriculum import EasyData
from rs_toolkit.methods.core import switch_on
from rs_toolkit.methods.gaussian import Gaussian

CASE = given_noise(Gaussian, gaussian)

def test_gradients(): check_gradients(CASE)
def test_a_batch_is_the_mean_of_its_images(): check_mean(CASE)

def test_the_other_layout_would_show():
    model = torch_net(BATCH.net)
    x, y, index = BATCH.tensors
    flat = model((x + BATCH.given).flatten(0, 1))                                # x0 x1 ... x0 x1 ...
    right = nn.functional.cross_entropy(flat, y.repeat(M))
    wrong = nn.functional.cross_entropy(flat, y.repeat_interleave(M))
    ours = with_noise(Gaussian(SIGMA, num_noise=M), BATCH.given)(model, x, y, index)['ce']
    assert ours.item() == pytest.approx(right.item(), rel=1e-5)
    assert abs(wrong - right) > .1 * right

def test_accumulated_noise():
    "The copies of the ACR paper's Gaussian baseline: copy j holds j noises."
    x, y, index = BATCH.tensors
    base = Gaussian(SIGMA, num_noise=M).noise(None, x, y, index).cumsum(0).flatten(2).double().numpy()
    loss = Gaussian(SIGMA, accumulate_noise=True, num_noise=M)(torch_net(BATCH.net), x, y, index)['ce']
    assert loss.item() == pytest.approx(gaussian(BATCH.net, BATCH.x, BATCH.y, base)['ce'], rel=1e-5)

def test_strength_zero_is_no_attack():
    x, y, index = BATCH.tensors
    method = Gaussian(SIGMA, num_noise=M, attack=partial(smoothed_pgd, eps=.5, steps=2), ramp=switch_on(1))
    quiet = method.noise(torch_net(BATCH.net), x, y, index)
    assert torch.equal(quiet, Gaussian(SIGMA, num_noise=M).noise(None, x, y, index))
    method.start_epoch(1)
    assert not torch.allclose(method.noise(torch_net(BATCH.net), x, y, index), quiet)

@at_the_ends
def test_finite_gradients(scale, labels): check_finite(Gaussian, scale, labels)

LEARNERS = {'one noise': {}, 'two noises': dict(num_noise=2), 'accumulated': dict(num_noise=2, accumulate_noise=True),
            **{name: dict(num_noise=2, attack=partial(attack, eps=.25, steps=2)) for name, attack in ATTACKS.items()}}

@every(LEARNERS)
def test_learns_digits(name): check_learns(Gaussian(.25, **LEARNERS[name]))

def test_a_convolutional_network_learns_digits(): check_learns(Gaussian(.25), arch='small_cnn')

def test_the_acr_papers_recipe_learns_digits():
    method = Gaussian(.25, num_noise=2, attack=partial(sphere_attack, eps=.1, steps=2), ramp=switch_on(4))
    check_learns(method, curriculum=EasyData(.25, start=4, every=2))

@bad(COMMON, counts('num_noise'))
def test_bad_arguments(arguments, message): check_refused(Gaussian, arguments, message)
