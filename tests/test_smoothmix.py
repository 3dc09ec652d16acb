"""SmoothMix read twice, with its path and its one-step adversary; what it draws."""
from functools import partial

import numpy as np
import pytest
import torch
from slow import (B, BATCH, COMMON, K, M, SIGMA, at_the_ends, bad, check_finite, check_gradients, check_learns, check_mean,
                  check_refused, check_seeded, check_terms, counts, every, gaussian, kl, log_softmax, shrink, smoothed,
                  smoothed_slope, unit, weights, with_noise)

from rs_toolkit.attacks import smoothed_pgd
from rs_toolkit.methods.smoothmix import SmoothMix

LAM = np.array([.1, .45, .3, .2, .05])               # what SmoothMix would draw

def smoothmix(net, y, noise, start, far, lam, eta, w):
    "Jeong et al. (2021): mix each image with the end of its adversarial path, and its target with the uniform one."
    mix = 0
    for i in range(len(y)):
        mean = smoothed(net, start[i], noise[:, i])
        target = (1-lam[i]) * mean + lam[i] / K
        mixed = (1-lam[i]) * start[i] + lam[i] * far[i]
        if mean.argmax() == y[i]: mix += sum(kl(target, log_softmax(net(mixed + delta[i]))) for delta in noise)
    return gaussian(net, start, y, noise) | {'mix': eta * w * mix / (len(noise) * len(y))}

def smoothmix_path(net, x, y, noise, steps, step_size, mix_step, w):
    "The clean side (the image, or its one-step adversary within w * step_size), and the unbounded attack's last image."
    path = [x]
    for _ in range(steps):
        slopes = [smoothed_slope(net, v, noise[:, i], y[i]) for i, v in enumerate(path[-1])]
        path.append(np.array([np.clip(v + step_size * unit(g), 0, 1) for v, g in zip(path[-1], slopes)]))
    if not mix_step: return x, path[-1]
    return np.array([x[i] + shrink(path[1][i] - x[i], w * step_size) for i in range(len(x))]), path[-1]

def case_of(mix_step, w):
    setting = dict(steps=3, step_size=.4, mix_step=mix_step)
    def case(batch):
        method = with_noise(SmoothMix(SIGMA, num_noise=M, ramp=lambda epoch: w, **setting), batch.given)
        method.mixing = lambda index, x: torch.tensor(LAM, dtype=torch.float32)[index]
        start, far = smoothmix_path(*batch, w=w, **setting)
        return method, lambda net: smoothmix(net, batch.y, batch.noise, start, far, LAM, eta=5., w=w)
    return case

CASES = {'plain': case_of(0, 1.), 'warming up': case_of(0, .3),
         'one-step': case_of(1, 1.), 'one-step warming up': case_of(1, .3)}

def test_the_batch_holds_every_branch():
    net, x, y, noise = BATCH
    start, _ = smoothmix_path(net, x, y, noise, 3, .4, 1, 1.)
    assert {bool(smoothed(net, start[i], noise[:, i]).argmax() == y[i]) for i in range(B)} == {True, False}
    meets = {bool(start[i].min() == 0 or start[i].max() == 1) for i in range(B)}
    assert meets == {True, False}, 'some images meet the pixel bounds'

@every(CASES)
def test_terms(name): check_terms(CASES[name])

@every(CASES)
def test_gradients(name): check_gradients(CASES[name])

@every(CASES)
def test_a_batch_is_the_mean_of_its_images(name): check_mean(CASES[name])

def test_mixing():
    def draw(epoch, seed, index):
        method = SmoothMix(SIGMA, seed=seed)
        method.start_epoch(epoch)
        return method.mixing(index, torch.zeros(len(index), 1, 2, 2))
    check_seeded(draw)
    lam = draw(0, 0, torch.arange(4000))
    assert lam.shape == (4000,)
    assert 0 <= lam.min() < .001
    assert .499 < lam.max() <= .5
    np.testing.assert_allclose(np.histogram(lam, 5, (0, .5))[0] / 4000, .2, atol=.025)

STEPS = {'plain': 0, 'one-step': 1}                  # mix_step

@at_the_ends
@every(STEPS)
def test_finite_gradients(name, scale, labels): check_finite(partial(SmoothMix, mix_step=STEPS[name]), scale, labels)

@every(STEPS)
def test_learns_digits(name): check_learns(SmoothMix(.25, num_noise=2, steps=2, eta=1., mix_step=STEPS[name]))

@bad(COMMON, counts('num_noise', 'steps'), weights('eta', 'step_size'), [
    pytest.param(dict(mix_step=2), 'mix_step.*2', id='mix_step=2'),
    pytest.param(dict(attack=smoothed_pgd), 'attack', id='an attack')])
def test_bad_arguments(arguments, message): check_refused(SmoothMix, arguments, message)
