"""MACER read twice, and what happens beyond its hinge, before its term is on, and where its derivative is large."""
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from slow import (B, BATCH, COMMON, M, ONE_IMAGE, SIGMA, at_the_ends, average, bad, check_finite, check_gradients, check_learns,
                  check_mean, check_refused, check_terms, counts, every, given_noise, onehot, radius_slope, smoothed, softmax,
                  torch_net, weights, with_noise)

from rs_toolkit.methods.macer import MACER

def macer_gap(net, x, noise, beta):
    "Predicted class of the soft smoothed classifier, and Phi^-1 of its largest output minus Phi^-1 of the next."
    s = average([softmax(beta * net(x + delta)) for delta in noise])
    second, first = np.sort(s)[-2:]
    return s.argmax(), ndtri(first) - ndtri(second)

def macer(net, x, y, noise, lbd, gamma, beta):
    "Zhai et al. (2020), soft randomized smoothing: classification loss and hinge on the radius of right images."
    ce = radius = 0
    for i in range(len(x)):
        ce -= np.log(smoothed(net, x[i], noise[:, i])[y[i]] + 1e-10)
        top, gap = macer_gap(net, x[i], noise[:, i], beta)
        if top == y[i] and gap <= gamma: radius += gamma - gap
    return {'ce': ce / len(x), 'radius': lbd * SIGMA/2 * radius / len(x)}

CASE = given_noise(MACER, macer, lbd=12., gamma=1.2, beta=2.)

def test_the_batch_holds_every_branch():
    "Right below the hinge, right beyond it, and wrong."
    net, x, y, noise = BATCH
    found = set()
    for i in range(B):
        top, gap = macer_gap(net, x[i], noise[:, i], 2.)
        found.add((bool(top == y[i]), bool(gap <= 1.2)))
    assert found >= {(True, True), (True, False), (False, True)}

def test_terms(): check_terms(CASE)
def test_gradients(): check_gradients(CASE)
def test_a_batch_is_the_mean_of_its_images(): check_mean(CASE)

def test_deferred():
    method = with_noise(MACER(SIGMA, gamma=1.2, beta=2., defer=1, num_noise=M), BATCH.given)
    def term(): return method(torch_net(BATCH.net), *BATCH.tensors)['radius'].item()
    assert term() == 0
    method.start_epoch(1)
    assert term() == pytest.approx(macer(*BATCH, lbd=12., gamma=1.2, beta=2.)['radius'], rel=2e-5)

def test_radius_derivative():
    net, x, y, noise = ONE_IMAGE
    beta = .5
    p = [softmax(beta * net(x[0] + delta[0])) for delta in noise]
    s = average(p)
    second, first = np.argsort(s)[-2:]
    assert first == y[0]
    def slope(c): return radius_slope(s[c]) * beta * average([q[c] * (onehot(c) - q) for q in p])
    model = torch_net(net)
    method = with_noise(MACER(SIGMA, lbd=3., beta=beta, num_noise=M), ONE_IMAGE.given)
    method(model, *ONE_IMAGE.tensors)['radius'].backward()
    np.testing.assert_allclose(model[1].bias.grad, -3*SIGMA/2 * (slope(first) - slope(second)), rtol=1e-4)

FINITE = {'plain': MACER, 'past the hinge': partial(MACER, gamma=.01, beta=2.)}

@at_the_ends
@every(FINITE)
def test_finite_gradients(name, scale, labels): check_finite(FINITE[name], scale, labels)

def test_nothing_to_learn_from():
    "Past the hinge the radius pushes nothing."
    x, _, index = BATCH.tensors
    model = torch_net(BATCH.net, scale=1e4)
    radius = MACER(.01, num_noise=M)(model, x, model(x).argmax(1), index)['radius']
    assert radius == 0
    if radius.requires_grad:
        for slope in torch.autograd.grad(radius, list(model.parameters())): assert not slope.any(), slope

def test_learns_digits(): check_learns(MACER(.25, num_noise=4, lbd=2.), lr=.05)

@bad(COMMON, counts('num_noise'), weights('lbd', 'gamma', 'beta'))
def test_bad_arguments(arguments, message): check_refused(MACER, arguments, message)
