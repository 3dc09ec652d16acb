"""Every attack read twice on a linear classifier, whose gradients are known in closed form.

Then what attacks must leave alone. Last, no certificate gives way.
"""
import math
from functools import partial

import numpy as np
import pytest
import torch
from slow import (BATCH, D, K, M, SIGMA, at_the_ends, average, check_finite, every, gaussian, make_batch,
                  onehot, shrink, smoothed_slope, softmax, torch_net, unit)
from torch import nn

from rs_toolkit import attacks, checkpoint, train
from rs_toolkit.attacks import ddn, gradient_free, smoothed_pgd, sphere_attack
from rs_toolkit.certify import ABSTAIN, certify, predict
from rs_toolkit.common import data_folder
from rs_toolkit.data import load
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.models import build

# --- the second readings

def pgd(net, x, y, noise, eps=1., steps=10, strength=1., free=False):
    "Salman et al. (2019), SmoothAdv by projected gradient; `free`: with their gradient-free direction."
    moved = noise.copy()
    budget = np.broadcast_to(np.asarray(eps) * strength, len(x))
    for i in range(len(x)):
        d = np.zeros(D)
        for _ in range(steps):
            if free: g = -average([softmax(net(x[i] + d + delta[i]))[y[i]] * delta[i] for delta in noise])
            else: g = smoothed_slope(net, x[i] + d, noise[:, i], y[i])
            d = shrink(np.clip(x[i] + d + 2*budget[i]/steps * unit(g), 0, 1) - x[i], budget[i])
        moved[:, i] += d
    return moved

def decoupled(net, x, y, noise, eps=1., steps=4, gamma=.05, strength=1.):
    "Rony et al. (2019), DDN on the smoothed classifier as Salman et al. (2019) use it; nothing is quantised."
    moved = noise.copy()
    for i in range(len(x)):
        farthest = np.linalg.norm(np.maximum(x[i], 1 - x[i]))
        norm = eps * strength
        d = best = np.zeros(D)
        shortest = farthest
        for t in range(1, steps + 1):
            votes = np.bincount([net(x[i] + d + delta[i]).argmax() for delta in noise], minlength=K)
            wrong = votes.argmax() != y[i]
            if wrong and np.linalg.norm(d) < shortest:
                best = d
                shortest = np.linalg.norm(d)
            rate = .01 + .99 * (1 + math.cos(math.pi * t/steps))/2
            d = d + rate * unit(smoothed_slope(net, x[i] + d, noise[:, i], y[i]))
            norm = min(norm * (1 - gamma if wrong else 1 + gamma), farthest)
            d = np.clip(x[i] + d * norm / np.linalg.norm(d), 0, 1) - x[i]
        moved[:, i] += shrink(best, eps * strength)
    return moved

def sphere(net, x, y, noise, eps=.25, steps=4, norm=2, strength=1.):
    "Sun et al. (2024), Algorithm 1: along the sphere of each noise until the classifier errs."
    moved = noise.copy()
    for delta in moved:
        for i in range(len(x)):
            length = np.linalg.norm(delta[i])
            for _ in range(steps):
                if net(x[i] + delta[i]).argmax() != y[i]: break
                g = net.weight.T @ (softmax(net(x[i] + delta[i])) - onehot(y[i]))
                delta[i] += eps * strength * (unit(g) if norm == 2 else np.sign(g) / math.sqrt(D))
                delta[i] *= length / (np.linalg.norm(delta[i]) + 1e-8)
    return moved

# --- both readings

CASES = {  # attack, its second reading, its setting
    'pgd': (smoothed_pgd, pgd, dict(eps=.4, steps=5)),
    'pgd one step': (smoothed_pgd, pgd, dict(eps=.4, steps=1)),
    'pgd warming up': (smoothed_pgd, pgd, dict(eps=.8, steps=5, strength=.3)),
    'gradient-free': (gradient_free, partial(pgd, free=True), dict(eps=.4, steps=5)),
    'ddn': (ddn, decoupled, dict(eps=.7, steps=8)),
    'ddn short': (ddn, decoupled, dict(eps=1.5, steps=4, gamma=.2)),
    'ddn warming up': (ddn, decoupled, dict(eps=.7, steps=8, strength=.5)),
    'sphere': (sphere_attack, sphere, dict(eps=.2, steps=4)),
    'sphere linf': (sphere_attack, sphere, dict(eps=.2, steps=4, norm='inf')),
}
PAIRS = [(name, m) for name in CASES for m in (1, M)]
PAIRS.remove(('gradient-free', 1))                                              # it compares noises
with_one_and_more = pytest.mark.parametrize('name, m', PAIRS)

def check_untouched(model):
    for name, p in model.named_parameters(): assert p.grad is None and p.requires_grad, name

@with_one_and_more
def test_attack(name, m):
    attack, reading, kwargs = CASES[name]
    batch = make_batch(m=m)
    x, y, _ = batch.tensors
    model = torch_net(batch.net)
    moved = attack(model, x, y, batch.given, **kwargs)
    expected = reading(*batch, **kwargs)
    assert moved.shape == batch.given.shape
    assert not moved.requires_grad
    check_untouched(model)
    np.testing.assert_allclose(moved.flatten(2), expected, atol=2e-5)
    assert np.abs(expected - batch.noise).max() > .05, 'the attack does something'

@with_one_and_more
def test_gaussian_under_attack(name, m):
    "SmoothAdv and the sphere attack in training: the same noises in attack and loss, the strength of the epoch's ramp."
    attack, reading, kwargs = CASES[name]
    strength = kwargs.get('strength', 1.)
    given = {key: value for key, value in kwargs.items() if key != 'strength'}
    x, y, index = BATCH.tensors
    model = torch_net(BATCH.net)
    noise = Gaussian(SIGMA, num_noise=m).noise(model, x, y, index).flatten(2).double().numpy()
    moved = reading(BATCH.net, BATCH.x, BATCH.y, noise, **kwargs)
    for trained in None, 1:
        method = Gaussian(SIGMA, num_noise=m, trained=trained, attack=partial(attack, **given),
                          ramp=lambda epoch: strength)
        loss = method(model, x, y, index)['ce']
        assert loss.item() == pytest.approx(gaussian(BATCH.net, BATCH.x, BATCH.y, moved[:trained])['ce'], rel=2e-5)
        assert loss.requires_grad
        check_untouched(model)

@at_the_ends
@every([name for name, (_, _, kwargs) in CASES.items() if 'strength' not in kwargs])
def test_finite_gradients(name, scale, labels):
    attack, _, kwargs = CASES[name]
    check_finite(partial(Gaussian, attack=partial(attack, **kwargs)), scale, labels)

def test_extreme_probabilities_occur():
    "What the tests of finite gradients are about."
    x, *_ = BATCH.tensors
    with torch.no_grad(): p = torch_net(BATCH.net, scale=1e4)(x).softmax(1)
    assert ((p == 0) | (p == 1)).all(), p

def test_a_budget_for_each_image():
    x, y, _ = BATCH.tensors
    eps = np.array([.1, .2, .3, .4, .5])
    moved = smoothed_pgd(torch_net(BATCH.net), x, y, BATCH.given, eps=torch.tensor(eps, dtype=torch.float32), steps=5)
    np.testing.assert_allclose(moved.flatten(2), pgd(*BATCH, eps=eps, steps=5), atol=2e-5)
    change = (moved - BATCH.given).flatten(2).norm(dim=-1)
    assert (change <= torch.tensor(eps) + 1e-5).all()
    assert (change > torch.tensor(eps) / 2).any()

@every(attacks.ATTACKS)
def test_what_follows_the_noise_is_named(name):
    "No attack takes a number by its position, where it could be a strength or a budget."
    x, y, _ = BATCH.tensors
    with pytest.raises(TypeError, match='positional'):
        attacks.ATTACKS[name](torch_net(BATCH.net), x, y, BATCH.given, .5)

# --- on the sphere

def noise_losses(model, x, y, noise):
    "Cross-entropy [m, b] and right answers [m, b]."
    with torch.no_grad(): logits = torch.stack([model(x + n) for n in noise])
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(len(noise)), reduction='none')
    return losses.view(len(noise), -1), logits.argmax(-1) == y

@every([2, 'inf'])
def test_sphere_attack(name):
    torch.manual_seed(0)
    model = build('mlp', 10, 1, 8)
    images, labels = (t[:64] for t in load('digits', 'train'))
    train.fit(model, Gaussian(.25), (images, labels), 30, device='cpu', progress=False)
    model.train()
    noise = .5 * torch.randn(4, 64, 1, 8, 8)
    path = [noise] + [sphere_attack(model, images, labels, noise, eps=.3, steps=t, norm=name) for t in range(1, 6)]
    for module in model.modules(): assert module.training
    assert not path[-1].requires_grad

    lengths = [n.flatten(2).norm(dim=-1) for n in path]
    for length in lengths: torch.testing.assert_close(length, lengths[0], rtol=1e-5, atol=0)
    before, right = noise_losses(model, images, labels, noise)
    after, still = noise_losses(model, images, labels, path[-1])
    for kind in right & ~still, right & still, ~right: assert kind.any(), 'every case occurs'
    assert torch.equal(path[-1][~right], noise[~right])
    assert not still[~right].any()
    assert (after >= before - 1e-5)[right].all()
    assert (after > before)[right & still].all()
    for was, now in zip(path, path[1:]):
        done = ~noise_losses(model, images, labels, was)[1]
        assert torch.equal(now[done], was[done]), 'a noise that fools the model stays where it is'
        assert (now != was).flatten(2).any(-1)[~done].all()

# --- bad input

NUMBERS = [('steps', 0), ('steps', -1), ('eps', 0.), ('eps', -.5), ('eps', math.nan)]
REFUSED = [pytest.param(name, {key: value}, f'{key}.*{value:g}', id=f'{name}, {key}={value:g}')
           for name in attacks.ATTACKS for key, value in NUMBERS]
REFUSED += [pytest.param('smoothed_pgd', dict(eps=torch.tensor([.1, .2, -1., .3, .4])), 'eps.*-1',
                         id='a negative budget'),
            pytest.param('sphere', dict(norm=1), 'norm.*1', id='another norm')]

@pytest.mark.parametrize('name, arguments, message', REFUSED)
def test_bad_arguments(name, arguments, message):
    x, y, _ = BATCH.tensors
    with pytest.raises(ValueError, match=message):
        attacks.ATTACKS[name](torch_net(BATCH.net), x, y, BATCH.given, **arguments)

def test_one_noise_gives_no_direction():
    x, y, _ = BATCH.tensors
    with pytest.raises(ValueError, match='at least 2.*1'):
        gradient_free(torch_net(BATCH.net), x, y, BATCH.given[:1], eps=.5)

# --- certificates under attack

@pytest.fixture(scope='module')
def certified():
    "A network, noise level, images, and the certificates of those that have a radius."
    model = checkpoint.load(data_folder()/'digits-gaussian')
    sigma = model.metadata['sigma']
    images = load('digits', 'test')[0][:240]
    found = certify(model, images, sigma, n=2000)
    sure = {i: certificate for i, certificate in enumerate(found) if certificate.radius > 0}
    assert len(sure) >= 200
    return model, sigma, images, sure

def attacked(certified, factor, few, n):
    "The smoothed predictions after an attack with so many radii, and those certified."
    model, sigma, images, sure = certified
    index = list(sure)[:few]
    x = images[index]
    y = torch.tensor([sure[i].prediction for i in index])
    radii = factor * torch.tensor([sure[i].radius for i in index])
    noise = sigma * torch.randn(32, *x.shape, generator=torch.Generator().manual_seed(0))
    change = (smoothed_pgd(model, x, y, noise, eps=radii, steps=20) - noise)[0]
    length = change.flatten(1).norm(dim=1)
    assert (length <= radii + 1e-5).all()
    assert (length > .9 * radii).float().mean() > .9
    return torch.tensor(predict(model, (x + change).clamp(0, 1), sigma, n=n, idx=index)), y

def test_certificates_survive(certified):
    "No attack inside a certified radius changes the smoothed prediction ..."
    found, y = attacked(certified, .999, 60, 10_000)
    assert not ((found != y) & (found != ABSTAIN)).any()
    assert (found == ABSTAIN).float().mean() < .02

def test_three_radii_are_too_many(certified):
    "... and at three times the radius it often does, so the test above can fail."
    found, y = attacked(certified, 3., 60, 1000)
    assert ((found != y) & (found != ABSTAIN)).float().mean() > .5
