"""CAT-RS read twice, with its attack, both confidences, and what it draws."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binom
from slow import (B, BATCH, COMMON, K, M, SIGMA, at_the_ends, average, bad, check_finite, check_gradients,
                  check_learns, check_mean, check_refused, check_seeded, check_terms, counts, every, kl,
                  log_softmax, shrink, softmax, torch_net, unit, weights, with_noise)

from rs_toolkit import checkpoint
from rs_toolkit.attacks import smoothed_pgd
from rs_toolkit.certify import Settings, count_votes
from rs_toolkit.common import data_folder
from rs_toolkit.data import load
from rs_toolkit.methods.catrs import CATRS

DRAWN = np.array([3, 1, 2, 3, 3])                    # what CAT-RS would draw
# stored predictions; two hold zeros
VOTES = np.array([[40, 7, 3], [5, 30, 15], [0, 10, 40], [20, 20, 10], [0, 0, 50]])
STORED = VOTES / VOTES.sum(1, keepdims=True)

def catrs(net, x, y, noise, moved, drawn, lbd):
    "Jeong et al. (2023), CAT-RS: the K easiest noises, and the worst of the attacked ones where K = m."
    low = []
    high = []
    for i in range(len(x)):
        losses = sorted(-log_softmax(net(x[i] + delta[i]))[y[i]] for delta in noise)
        low.append(sum(losses[:drawn[i]]) / len(noise))
        worst = max(kl(STORED[i], log_softmax(net(x[i] + delta[i]))) for delta in moved)
        high.append(lbd * worst if drawn[i] == len(noise) else 0.)
    return {'low': average(low), 'high': average(high)}

def rms(v): return math.sqrt((v**2).mean())

def catrs_attack(net, x, noise, eps, steps):
    "Jeong et al. (2023), attack on each noise; its mean and its root mean square are put back after every step."
    moved = noise.copy()
    for start, delta in zip(noise, moved):
        for i in range(len(x)):
            for _ in range(steps):
                g = net.weight.T @ (softmax(net(x[i] + delta[i])) - STORED[i])
                v = start[i] + shrink(delta[i] + 2*eps/steps * unit(g) - start[i], eps)
                delta[i] = (v - v.mean()) / rms(v) * rms(start[i]) + start[i].mean()
    return moved

def case_of(confidence, strength=1.):
    def case(batch):
        setting = dict(eps=.6, lbd=2., confidence=confidence, ramp=lambda epoch: strength)
        method = with_noise(CATRS(SIGMA, torch.tensor(VOTES), num_noise=M, **setting), batch.given)
        method.draw = lambda p_hat, index: torch.tensor(DRAWN)[index]
        moved = catrs_attack(batch.net, batch.x, batch.noise, eps=.6*strength, steps=4)
        return method, lambda net: catrs(net, *batch[1:], moved, DRAWN, lbd=2.)
    return case

CASES = {'noisy': case_of('noisy'), 'stored': case_of('stored'), 'doubled': case_of('noisy', 2.)}

def shares_right():
    net, x, y, noise = BATCH
    return [average([net(x[i] + d[i]).argmax() == y[i] for d in noise]) for i in range(B)]

def test_the_confidences_of_the_batch_differ(): assert len(set(shares_right())) > 1

@every(CASES)
def test_terms(name): check_terms(CASES[name])

@every(CASES)
def test_gradients(name): check_gradients(CASES[name])

@every(CASES)
def test_a_batch_is_the_mean_of_its_images(name): check_mean(CASES[name])

@every(['noisy', 'stored'])
def test_confidence(name):
    asked = []
    def draw(p_hat, index):
        asked.append(p_hat)
        return torch.tensor(DRAWN)
    method = with_noise(CATRS(SIGMA, torch.tensor(VOTES), confidence=name, num_noise=M), BATCH.given)
    method.draw = draw
    method(torch_net(BATCH.net), *BATCH.tensors)
    expected = shares_right() if name == 'noisy' else STORED[np.arange(B), BATCH.y]
    np.testing.assert_allclose(asked[0], expected, rtol=1e-6)

def test_draw():
    "From the binomial distribution, but at least one."
    def draw(epoch, seed, index, p=.6):
        method = CATRS(SIGMA, torch.ones(2000, K).long(), num_noise=4, seed=seed)
        method.start_epoch(epoch)
        return method.draw(torch.full((len(index),), p), index)
    check_seeded(draw)
    for p in 0., .25, .6, 1.:
        drawn = torch.cat([draw(epoch, 1, torch.arange(2000), p) for epoch in range(4)])
        assert not drawn.is_floating_point()
        expected = binom.pmf(np.arange(5), 4, p)
        expected[1] += expected[0]
        expected[0] = 0
        np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 8000, expected, atol=.02, err_msg=f'p = {p}')

@at_the_ends
@every(['noisy', 'stored'])
def test_finite_gradients(name, scale, labels):
    check_finite(partial(CATRS, predictions=torch.tensor(VOTES), confidence=name), scale, labels)

@pytest.fixture(scope='module')
def predictions():
    "Votes of a Gaussian network on noisy copies of each training image."
    teacher = checkpoint.load(data_folder()/'digits-gaussian')
    images, _ = load('digits', 'train')
    votes = count_votes(teacher, images, range(len(images)), Settings(.25, {0: 100}))
    return torch.tensor(np.stack([v[0] for v in votes]))

@every(['noisy', 'stored'])
def test_learns_digits(name, predictions):
    check_learns(CATRS(.25, predictions, num_noise=2, steps=2, eps=.5, confidence=name))

@bad(COMMON, counts('num_noise', 'steps'), weights('lbd', 'eps'), [
    pytest.param(dict(confidence='nosy'), 'nosy.*noisy', id='misspelt confidence'),
    pytest.param(dict(eps=0.), 'eps.*0', id='eps=0'),
    pytest.param(dict(attack=smoothed_pgd), 'attack', id='an attack'),
    pytest.param(dict(predictions=None), 'None', id='no predictions'),
    pytest.param(dict(predictions=torch.tensor(VOTES[0])), r'\[3\]', id='predictions of one image'),
    pytest.param(dict(predictions=torch.tensor(STORED)), 'float', id='shares for counts')])
def test_bad_arguments(arguments, message):
    check_refused(partial(CATRS, predictions=torch.tensor(VOTES)), arguments, message)

@pytest.mark.parametrize('predictions, message', [
    pytest.param(torch.ones(B, 7).long(), '[37].*[37]', id='other classes'),
    pytest.param(torch.tensor(VOTES[:2]), '2', id='fewer images')])
def test_predictions_of_other_data_are_refused(predictions, message):
    with pytest.raises(ValueError, match=message): CATRS(.25, predictions)(torch_net(BATCH.net), *BATCH.tensors)
