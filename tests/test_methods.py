"""Every training method read twice: the library in float32, and plain NumPy in float64 with loops over images, noises and classes and gradients by hand.

Then what a formula does not say: finite gradients at the ends, passes through the network, draws, bad input, that it learns. Last, certificates under attack.
"""
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import binom
from torch import nn

from rs_toolkit import checkpoint, curriculum, train
from rs_toolkit.attacks import ddn, gradient_free, smoothed_pgd, sphere_attack
from rs_toolkit.certify import ABSTAIN, Settings, certify, count_votes, predict
from rs_toolkit.data import load
from rs_toolkit.methods.catrs import CATRS
from rs_toolkit.methods.consistency import Consistency
from rs_toolkit.methods.core import count_passes, double_from, switch_on, warm_up
from rs_toolkit.methods.crt import CRT
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.methods.macer import MACER
from rs_toolkit.methods.smoothmix import SmoothMix
from rs_toolkit.methods.sodm import SODM
from rs_toolkit.methods.stability import Stability
from rs_toolkit.models import HalfSpace, build, frozen

ROOT = Path(__file__).resolve().parents[1]
SIGMA, B, M, K, D = .5, 5, 3, 3, 4                                  # noise level, images, noises, classes, pixels
LAM, DRAWN = np.array([.1, .45, .3, .2, .05]), np.array([3, 1, 2, 3, 3])              # what SmoothMix and CAT-RS would draw
COUNTS = np.array([[40, 7, 3], [5, 30, 15], [0, 10, 40], [20, 20, 10], [0, 0, 50]])   # smoothed predictions; two of them hold zeros

every = lambda cases: pytest.mark.parametrize('name', cases)

# --- a batch that both readings share

class Net(NamedTuple):
    "A linear classifier of flat images."
    weight: np.ndarray  # [k, d]
    bias: np.ndarray    # [k]
    def __call__(self, v): return self.weight @ v + self.bias

class Batch(NamedTuple):
    net: Net
    x: np.ndarray       # [b, d] in [0, 1]
    y: np.ndarray       # [b]
    noise: np.ndarray   # [m, b, d], of another size for each image and each copy

    @property
    def tensors(self):  # x, y and index as the library wants them
        return torch.tensor(self.x, dtype=torch.float32).reshape(-1, 1, 2, 2), torch.tensor(self.y), torch.arange(len(self.x))

    @property
    def given(self):    # the noise likewise
        return torch.tensor(self.noise, dtype=torch.float32).reshape(*self.noise.shape[:2], 1, 2, 2)

def softmax(z): return np.exp(z - z.max()) / np.exp(z - z.max()).sum()
def log_softmax(z): return z - z.max() - np.log(np.exp(z - z.max()).sum())
def onehot(y): return np.eye(K)[y]
def average(values): return sum(values) / len(values)
def kl(p, log_q): return sum(p[c] * (math.log(p[c]) - log_q[c]) for c in range(len(p)) if p[c] > 0)
def xent(p, log_q): return -sum(p[c] * log_q[c] for c in range(len(p)))
def unit(g): return g / (np.linalg.norm(g) + 1e-8)
def shrink(d, norm): return d * min(1, norm / max(np.linalg.norm(d), 1e-30))

def smoothed(net, x, noise): return average([softmax(net(x + delta)) for delta in noise])      # noise [m, d] of one image

def make_batch(seed=8, m=M):
    "Two images of five are wrong, for the average prediction over the noise."
    rng = np.random.default_rng(seed)
    net = Net(2*rng.normal(size=(K, D)).astype('f4').astype('f8'), rng.normal(size=K).astype('f4').astype('f8'))
    x = rng.uniform(.02, .98, (B, D)).astype('f4').astype('f8')
    sizes = np.linspace(.5, 1.5, m)[:, None, None] * np.linspace(.7, 1.3, B)[:, None]
    noise = (SIGMA * sizes * rng.normal(size=(m, B, D))).astype('f4').astype('f8')
    top = np.array([smoothed(net, x[i], noise[:, i]).argmax() for i in range(B)])
    return Batch(net, x, (top + [0, 0, 0, 1, 2]) % K, noise)

def torch_net(net):
    model = nn.Sequential(nn.Flatten(), nn.Linear(*net.weight.shape[::-1]))
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), net): parameter.copy_(torch.tensor(values))
    return model

def with_noise(method, noise):
    "The method, made to use this noise [m, b, *image]."
    method.noise = lambda model, x, y, index=None: noise if index is None else noise[:, index]
    return method

# --- losses: one dict of named terms each

def gaussian(net, x, y, noise):
    "Cohen et al. (2019), Gaussian data augmentation, with m copies."
    return {'ce': average([-log_softmax(net(x[i] + delta[i]))[y[i]] for delta in noise for i in range(len(x))])}

def stability(net, x, y, noise, lbd):
    "Li et al. (2019), stability training with cross-entropy."
    return {'ce': average([-log_softmax(net(x[i]))[y[i]] for i in range(len(x))]),
            'stable': lbd * average([xent(softmax(net(x[i])), log_softmax(net(x[i] + delta[i]))) for delta in noise for i in range(len(x))])}

def macer_gap(net, x, noise, beta):
    "Predicted class of the soft smoothed classifier, and Phi^-1 of its largest output minus Phi^-1 of the next."
    s = average([softmax(beta * net(x + delta)) for delta in noise])
    second, first = np.sort(s)[-2:]
    return s.argmax(), ndtri(first) - ndtri(second)

def macer(net, x, y, noise, lbd, gamma, beta):
    "Zhai et al. (2020), soft randomized smoothing: classification loss and hinge on the radius of right images."
    gaps = [macer_gap(net, x[i], noise[:, i], beta) for i in range(len(x))]
    return {'ce': average([-math.log(smoothed(net, x[i], noise[:, i])[y[i]] + 1e-10) for i in range(len(x))]),
            'radius': lbd * SIGMA/2 * sum(gamma - gap for (top, gap), label in zip(gaps, y) if top == label and gap <= gamma) / len(x)}

def consistency(net, x, y, noise, form='kl+entropy', lbd=10., eta=.5):
    "Jeong & Shin (2020), consistency regularization; the other forms are options of their code."
    agree, entropy = [], []
    for i in range(len(x)):
        mean, logs = smoothed(net, x[i], noise[:, i]), [log_softmax(net(x[i] + delta[i])) for delta in noise]
        if form == 'mse': agree.append(lbd * ((np.exp(logs[0]) - np.exp(logs[1]))**2).sum())
        elif form == 'xent': agree.append(lbd * average([xent(mean, log) for log in logs]))
        else: agree.append(lbd * average([kl(mean, log) for log in logs]))
        entropy.append(eta * xent(mean, np.log(np.maximum(mean, 1e-20))))
    terms = gaussian(net, x, y, noise) | {'agree': average(agree), 'entropy': average(entropy)}
    return terms if form == 'kl+entropy' else {k: v for k, v in terms.items() if k != 'entropy'}

def smoothmix(net, y, noise, start, far, lam, eta, w):
    "Jeong et al. (2021), SmoothMix: mix each image with the end of its adversarial path, and its target with the uniform one."
    mix = 0
    for i in range(len(y)):
        mean = smoothed(net, start[i], noise[:, i])
        target, mixed = (1-lam[i]) * mean + lam[i] / K, (1-lam[i]) * start[i] + lam[i] * far[i]
        if mean.argmax() == y[i]: mix += sum(kl(target, log_softmax(net(mixed + delta[i]))) for delta in noise)
    return gaussian(net, start, y, noise) | {'mix': eta * w * mix / (len(noise) * len(y))}

def catrs(net, x, y, noise, moved, smooth, drawn, lbd):
    "Jeong et al. (2023), CAT-RS: the K easiest noises, and the worst of the attacked ones where K = m."
    low, high, m = [], [], len(noise)
    for i in range(len(x)):
        losses = sorted(-log_softmax(net(x[i] + delta[i]))[y[i]] for delta in noise)
        low.append(sum(losses[:drawn[i]]) / m)
        high.append(lbd * (drawn[i] == m) * max(kl(smooth[i], log_softmax(net(x[i] + delta[i]))) for delta in moved))
    return {'low': average(low), 'high': average(high)}

def sodm(net, x, y, noise, mapping, rho, beta):
    "The loss of SODM's Algorithm 1 (lines 4 and 5): accuracy for wrong images, Phi^-1 for right ones below rho, nothing above."
    accuracy = radius = 0
    for i in range(len(x)):
        g = average([mapping(net(x[i] + delta[i])) for delta in noise])
        if g.argmax() != y[i]: accuracy -= math.log(g[y[i]])
        elif g[y[i]] < rho: radius -= beta * ndtri(g[y[i]])
    return {'accuracy': accuracy / len(x), 'radius': radius / len(x)}

def crt(net, x, noise, teacher, match, norm):
    "Vaishnavi et al. (2022), CRT: distance between teacher and student, in their code of logits, in their text of softmax outputs."
    space = softmax if match == 'softmax' else lambda z: z
    gaps = [np.linalg.norm(space(net(x[i] + delta[i])) - space(teacher(x[i] + delta[i]))) for delta in noise for i in range(len(x))]
    return {'transfer': average([gap**2 if norm == 'l2_squared' else gap for gap in gaps])}

# --- attacks on a linear softmax classifier: gradients in closed form

def smoothed_slope(net, v, noise, y):
    "Gradient of -log(mean softmax)[y] for the image v."
    p = [softmax(net(v + delta)) for delta in noise]
    return -sum(q[y] * net.weight.T @ (onehot(y) - q) for q in p) / sum(q[y] for q in p)

def pgd(net, x, y, noise, eps=1., steps=10, strength=1., free=False):
    "Salman et al. (2019), SmoothAdv by projected gradient; `free`: with their gradient-free direction."
    moved, budget = noise.copy(), np.broadcast_to(np.asarray(eps) * strength, len(x))
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
        d, norm = np.zeros(D), eps * strength
        best, shortest = np.zeros(D), (farthest := np.linalg.norm(np.maximum(x[i], 1 - x[i])))
        for t in range(1, steps + 1):
            votes = np.bincount([net(x[i] + d + delta[i]).argmax() for delta in noise], minlength=K)
            wrong = votes.argmax() != y[i]
            if wrong and np.linalg.norm(d) < shortest: best, shortest = d, np.linalg.norm(d)
            d = d + (.01 + .99 * (1 + math.cos(math.pi * t/steps))/2) * unit(smoothed_slope(net, x[i] + d, noise[:, i], y[i]))
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

def smoothmix_path(net, x, y, noise, steps, step_size, mix_step, w):
    "Jeong et al. (2021): the unbounded attack's last image, and the clean side: the image, or its one-step adversary within w * step_size."
    path = [x]
    for _ in range(steps):
        path.append(np.array([np.clip(v + step_size * unit(smoothed_slope(net, v, noise[:, i], y[i])), 0, 1) for i, v in enumerate(path[-1])]))
    return (np.array([x[i] + shrink(path[1][i] - x[i], w * step_size) for i in range(len(x))]) if mix_step else x), path[-1]

def catrs_attack(net, x, noise, smooth, eps, steps):
    "Jeong et al. (2023), attack on each noise; as in their code its mean and its root mean square are put back after every step."
    moved, rms = noise.copy(), lambda v: math.sqrt((v**2).mean())
    for start, delta in zip(noise, moved):
        for i in range(len(x)):
            for _ in range(steps):
                g = net.weight.T @ (softmax(net(x[i] + delta[i])) - smooth[i])
                v = start[i] + shrink(delta[i] + 2*eps/steps * unit(g) - start[i], eps)
                delta[i] = (v - v.mean()) / rms(v) * rms(start[i]) + start[i].mean()
    return moved

# --- both readings of every loss: name -> batch -> method, and net -> terms

def plain(cls, reading, **kwargs):
    return lambda batch: (with_noise(cls(SIGMA, num_noise=M, **kwargs), batch.given), lambda net: reading(net, *batch[1:], **kwargs))

def smoothmix_case(mix_step, w):
    def case(batch):
        method = with_noise(SmoothMix(SIGMA, num_noise=M, steps=3, step_size=.4, mix_step=mix_step, ramp=lambda epoch: w), batch.given)
        method.mixing = lambda index, x: torch.tensor(LAM, dtype=torch.float32)[index]
        start, far = smoothmix_path(*batch, steps=3, step_size=.4, mix_step=mix_step, w=w)
        return method, lambda net: smoothmix(net, batch.y, batch.noise, start, far, LAM, eta=5., w=w)
    return case

def catrs_case(confidence, strength=1.):
    def case(batch):
        method = with_noise(CATRS(SIGMA, torch.tensor(COUNTS), eps=.6, lbd=2., confidence=confidence, num_noise=M, ramp=lambda epoch: strength), batch.given)
        method.draw = lambda p_hat, index: torch.tensor(DRAWN)[index]
        smooth = COUNTS / COUNTS.sum(1, keepdims=True)
        moved = catrs_attack(batch.net, batch.x, batch.noise, smooth, eps=.6*strength, steps=4)
        return method, lambda net: catrs(net, *batch[1:], moved, smooth, DRAWN, lbd=2.)
    return case

def layers(method): return [layer for layer in method.mapping.modules() if isinstance(layer, nn.Linear)]

def shake(method, scale=.2):
    "Random weights in the mapping, whose last layer starts at zero."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.mapping.parameters(): p.copy_(scale * torch.randn(p.shape, generator=generator))

def mapping_of(method, name):
    "What SODM's mapping computes with its present weights, in NumPy."
    if name == 'none': return softmax
    (w1, b1), (w2, b2) = [[p.detach().double().numpy() for p in layer.parameters()] for layer in layers(method)]
    mlp = lambda u: w2 @ np.maximum(w1 @ u + b1, 0) + b2
    if name == 'residual': return lambda u: softmax(u + mlp(u))
    return lambda u: softmax(math.exp(np.clip(mlp(u - u.max())[0], -math.log(16), math.log(16))) * u)

def sodm_case(mapping, shaken=False, boosted=False):
    def case(batch):
        method = with_noise(SODM(SIGMA, K, mapping=mapping, rho=.9, boost_from=0 if boosted else 1, boost=10., num_noise=M), batch.given)
        if shaken: shake(method)
        method.start_epoch(0)
        expected = mapping_of(method, mapping) if shaken else softmax
        return method, lambda net: sodm(net, *batch[1:], expected, rho=.9, beta=60. if boosted else 6.)
    return case

def crt_case(match, norm):
    def case(batch):
        teacher = make_batch(seed=7).net
        return (with_noise(CRT(SIGMA, torch_net(teacher), match=match, norm=norm, num_noise=M), batch.given),
                lambda net: crt(net, batch.x, batch.noise, teacher, match, norm))
    return case

CASES = {
    'gaussian': plain(Gaussian, gaussian), 'stability': plain(Stability, stability, lbd=2.),
    'macer': plain(MACER, macer, lbd=12., gamma=1.2, beta=2.),
    **{f'consistency {form}': plain(Consistency, consistency, form=form) for form in ('kl+entropy', 'kl', 'xent', 'mse')},
    'smoothmix': smoothmix_case(0, 1.), 'smoothmix warming up': smoothmix_case(0, .3),
    'smoothmix one-step': smoothmix_case(1, 1.), 'smoothmix one-step warming up': smoothmix_case(1, .3),
    'catrs noisy': catrs_case('noisy'), 'catrs stored': catrs_case('stored'), 'catrs doubled': catrs_case('noisy', 2.),
    **{f'sodm {mapping}': sodm_case(mapping) for mapping in ('none', 'temperature', 'residual')},
    **{f'sodm {mapping} shaken': sodm_case(mapping, shaken=True) for mapping in ('temperature', 'residual')},
    'sodm boosted': sodm_case('none', boosted=True),
    **{f'crt {match} {norm}': crt_case(match, norm) for match in ('logits', 'softmax') for norm in ('l2', 'l2_squared')},
}
BATCH = make_batch()

def test_the_batch_holds_every_branch():
    net, x, y, noise = BATCH
    assert [smoothed(net, x[i], noise[:, i]).argmax() == y[i] for i in range(B)] == [True]*3 + [False]*2
    gaps = [macer_gap(net, x[i], noise[:, i], 2.) for i in range(B)]
    assert {(top == label, gap <= 1.2) for (top, gap), label in zip(gaps, y)} >= {(True, True), (True, False), (False, True)}
    g = [smoothed(net, x[i], noise[:, i])[y[i]] for i in range(3)]
    assert min(g) < .9 < max(g)
    start, _ = smoothmix_path(net, x, y, noise, 3, .4, 1, 1.)
    assert {smoothed(net, start[i], noise[:, i]).argmax() == y[i] for i in range(B)} == {True, False}
    assert {start[i].min() == 0 or start[i].max() == 1 for i in range(B)} == {True, False}, 'some images meet the pixel bounds'
    assert 1 < len({sum(net(x[i] + d[i]).argmax() == y[i] for d in noise) for i in range(B)}), 'confidences differ'

@every(CASES)
def test_terms(name):
    method, reading = CASES[name](BATCH)
    terms, expected = method(torch_net(BATCH.net), *BATCH.tensors), reading(BATCH.net)
    assert terms.keys() == expected.keys()
    for term in terms: assert terms[term].item() == pytest.approx(expected[term], rel=2e-5, abs=1e-6), term

@every(CASES)
def test_gradients(name):
    "Targets of Stability, Consistency and SmoothMix are not detached; attacked images and drawn numbers stay fixed."
    method, reading = CASES[name](BATCH)
    model = torch_net(BATCH.net)
    sum(method(model, *BATCH.tensors).values()).backward()
    objective = lambda net: sum(reading(net).values())
    for parameter, array in zip(model.parameters(), BATCH.net):
        numeric = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            old = array[at]
            array[at] = old + 1e-6; above = objective(BATCH.net)
            array[at] = old - 1e-6; below = objective(BATCH.net)
            array[at] = old
            numeric[at] = (above - below) / 2e-6
        np.testing.assert_allclose(parameter.grad, numeric, rtol=2e-4, atol=2e-5 * np.abs(numeric).max())

@every(CASES)
def test_a_batch_is_the_mean_of_its_images(name):
    "Fails when labels, targets, mixing weights or noises go to another image's copies."
    method, _ = CASES[name](BATCH)
    model, (x, y, index) = torch_net(BATCH.net), BATCH.tensors
    whole, single = method(model, x, y, index), [method(model, x[[i]], y[[i]], index[[i]]) for i in range(B)]
    for term in whole: assert whole[term].item() == pytest.approx(average([terms[term].item() for terms in single]), rel=2e-5, abs=1e-6), term

def test_the_other_layout_would_show():
    model, (x, y, index) = torch_net(BATCH.net), BATCH.tensors
    flat = model((x + BATCH.given).flatten(0, 1))                                # x0 x1 ... x0 x1 ...
    right, wrong = nn.functional.cross_entropy(flat, y.repeat(M)), nn.functional.cross_entropy(flat, y.repeat_interleave(M))
    ours = with_noise(Gaussian(SIGMA, num_noise=M), BATCH.given)(model, x, y, index)['ce']
    assert ours.item() == pytest.approx(right.item(), rel=1e-5) and abs(wrong - right) > .1 * right

def test_accumulated_noise():
    "The copies of the ACR paper's Gaussian baseline: copy j holds j noises."
    x, y, index = BATCH.tensors
    base = Gaussian(SIGMA, num_noise=M).noise(None, x, y, index).cumsum(0).flatten(2).double().numpy()
    loss = Gaussian(SIGMA, accumulate_noise=True, num_noise=M)(torch_net(BATCH.net), x, y, index)['ce']
    assert loss.item() == pytest.approx(gaussian(BATCH.net, BATCH.x, BATCH.y, base)['ce'], rel=1e-5)

def test_macer_deferred():
    method = with_noise(MACER(SIGMA, gamma=1.2, beta=2., defer=1, num_noise=M), BATCH.given)
    term = lambda: method(torch_net(BATCH.net), *BATCH.tensors)['radius'].item()
    assert term() == 0
    method.start_epoch(1)
    assert term() == pytest.approx(macer(*BATCH, lbd=12., gamma=1.2, beta=2.)['radius'], rel=2e-5)

@every(['noisy', 'stored'])
def test_catrs_confidence(name):
    net, x, y, noise = BATCH
    method, asked = with_noise(CATRS(SIGMA, torch.tensor(COUNTS), confidence=name, num_noise=M), BATCH.given), []
    method.draw = lambda p_hat, index: asked.append(p_hat) or torch.tensor(DRAWN)
    method(torch_net(net), *BATCH.tensors)
    expected = [average([net(x[i] + d[i]).argmax() == y[i] for d in noise]) if name == 'noisy' else COUNTS[i, y[i]] / COUNTS[i].sum() for i in range(B)]
    np.testing.assert_allclose(asked[0], expected, rtol=1e-6)

# --- closed-form derivatives

def radius_slope(p): return math.sqrt(2*math.pi) * math.exp(ndtri(p)**2 / 2)    # d Phi^-1 / dp

def bias_gradient(method, batch):
    "Gradient of the radius term for the logits of the only image: that for the bias."
    model = torch_net(batch.net)
    method(model, *batch.tensors)['radius'].backward()
    return model[1].bias.grad.double().numpy()

one_image = Batch(BATCH.net, BATCH.x[:1], BATCH.y[:1], BATCH.noise[:, :1])

def test_macer_radius_derivative():
    (net, x, y, noise), beta = one_image, .5
    p = [softmax(beta * net(x[0] + delta[0])) for delta in noise]
    s = average(p)
    second, first = np.argsort(s)[-2:]
    assert first == y[0]
    slope = lambda c: radius_slope(s[c]) * beta * average([q[c] * (onehot(c) - q) for q in p])
    ours = bias_gradient(with_noise(MACER(SIGMA, lbd=3., beta=beta, num_noise=M), one_image.given), one_image)
    np.testing.assert_allclose(ours, -3*SIGMA/2 * (slope(first) - slope(second)), rtol=1e-4)

def test_sodm_radius_derivative():
    "sqrt(2 pi) exp(Phi^-1(g)^2 / 2); eq. 10 of the paper divides by sigma^2 in the exponent, which is a misprint."
    net, x, y, noise = one_image
    p = [softmax(net(x[0] + delta[0])) for delta in noise]
    ours = bias_gradient(with_noise(SODM(SIGMA, K, mapping='none', rho=.9999, beta=6., num_noise=M), one_image.given), one_image)
    np.testing.assert_allclose(ours, -6 * radius_slope(average(p)[y[0]]) * average([q[y[0]] * (onehot(y[0]) - q) for q in p]), rtol=1e-4)

# --- attacks

ATTACKS = {
    'pgd': (smoothed_pgd, pgd, dict(eps=.4, steps=5)), 'pgd one step': (smoothed_pgd, pgd, dict(eps=.4, steps=1)),
    'pgd warming up': (smoothed_pgd, pgd, dict(eps=.8, steps=5, strength=.3)),
    'gradient-free': (gradient_free, partial(pgd, free=True), dict(eps=.4, steps=5)),
    'ddn': (ddn, decoupled, dict(eps=.7, steps=8)), 'ddn short': (ddn, decoupled, dict(eps=1.5, steps=4, gamma=.2)),
    'ddn warming up': (ddn, decoupled, dict(eps=.7, steps=8, strength=.5)),
    'sphere': (sphere_attack, sphere, dict(eps=.2, steps=4)), 'sphere linf': (sphere_attack, sphere, dict(eps=.2, steps=4, norm='inf')),
}
SETTINGS = [pytest.param(*case, m, id=f'{name}, m={m}') for name, case in ATTACKS.items() for m in (1, M) if (name, m) != ('gradient-free', 1)]

@pytest.mark.parametrize('attack, reading, kwargs, m', SETTINGS)
def test_attack(attack, reading, kwargs, m):
    batch = make_batch(m=m)
    (x, y, _), model = batch.tensors, torch_net(batch.net)
    moved, expected = attack(model, x, y, batch.given, **kwargs), reading(*batch, **kwargs)
    assert moved.shape == batch.given.shape and not moved.requires_grad and all(p.grad is None and p.requires_grad for p in model.parameters())
    np.testing.assert_allclose(moved.flatten(2), expected, atol=2e-5)
    assert np.abs(expected - batch.noise).max() > .05, 'the attack does something'

@pytest.mark.parametrize('attack, reading, kwargs, m', SETTINGS)
def test_gaussian_under_attack(attack, reading, kwargs, m):
    "SmoothAdv and the sphere attack in training: the same noises in attack and loss, the strength of the epoch's ramp."
    kwargs = dict(kwargs)
    strength = kwargs.pop('strength', 1.)
    (x, y, index), model = BATCH.tensors, torch_net(BATCH.net)
    noise = Gaussian(SIGMA, num_noise=m).noise(model, x, y, index).flatten(2).double().numpy()
    for trained in {None, 1}:
        method = Gaussian(SIGMA, num_noise=m, trained=trained, attack=partial(attack, **kwargs), ramp=lambda epoch: strength)
        loss = method(model, x, y, index)['ce']
        expected = gaussian(BATCH.net, BATCH.x, BATCH.y, reading(BATCH.net, BATCH.x, BATCH.y, noise, **kwargs, strength=strength)[:trained])['ce']
        assert loss.item() == pytest.approx(expected, rel=2e-5)
        assert loss.requires_grad and all(p.grad is None and p.requires_grad for p in model.parameters())

def test_strength_zero_is_no_attack():
    x, y, index = BATCH.tensors
    method = Gaussian(SIGMA, num_noise=M, attack=partial(smoothed_pgd, eps=.5, steps=2), ramp=switch_on(1))
    quiet = method.noise(torch_net(BATCH.net), x, y, index)
    assert torch.equal(quiet, Gaussian(SIGMA, num_noise=M).noise(None, x, y, index))
    method.start_epoch(1)
    assert not torch.allclose(method.noise(torch_net(BATCH.net), x, y, index), quiet)

def test_ramps():
    for ramp, strengths in (warm_up(10), {0: .1, 4: .5, 9: 1, 20: 1}), (switch_on(70), {0: 0, 69: 0, 70: 1, 99: 1}), (double_from(80), {0: 1, 79: 1, 80: 2}):
        assert {epoch: ramp(epoch) for epoch in strengths} == pytest.approx(strengths)

def test_a_budget_for_each_image():
    (x, y, _), eps = BATCH.tensors, np.array([.1, .2, .3, .4, .5])
    moved = smoothed_pgd(torch_net(BATCH.net), x, y, BATCH.given, eps=torch.tensor(eps, dtype=torch.float32), steps=5)
    np.testing.assert_allclose(moved.flatten(2), pgd(*BATCH, eps=eps, steps=5), atol=2e-5)
    change = (moved - BATCH.given).flatten(2).norm(dim=-1)
    assert (change <= torch.tensor(eps) + 1e-5).all() and (change > torch.tensor(eps) / 2).any()

def noise_losses(model, x, y, noise):
    "Cross-entropy [m, b] and right answers [m, b]."
    with torch.no_grad(): logits = torch.stack([model(x + n) for n in noise])
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(len(noise)), reduction='none').view(len(noise), -1), logits.argmax(-1) == y

@every([2, 'inf'])
def test_sphere_attack(name):
    torch.manual_seed(0)
    model = build('mlp', 10, 1, 8)
    images, labels = (t[:64] for t in load('digits', 'train'))
    train.fit(model, Gaussian(.25), (images, labels), 30, device='cpu', progress=False)
    model.train()
    noise = .5 * torch.randn(4, 64, 1, 8, 8)
    steps = [sphere_attack(model, images, labels, noise, eps=.3, steps=t, norm=name) for t in range(1, 6)]
    assert all(m.training for m in model.modules()) and not steps[-1].requires_grad

    lengths = [n.flatten(2).norm(dim=-1) for n in (noise, *steps)]
    for length in lengths: torch.testing.assert_close(length, lengths[0], rtol=1e-5, atol=0)
    before, right = noise_losses(model, images, labels, noise)
    after, still = noise_losses(model, images, labels, steps[-1])
    assert 0 < (right & ~still).sum() and 0 < (right & still).sum() and 0 < (~right).sum(), 'every case occurs'
    assert torch.equal(steps[-1][~right], noise[~right]) and not still[~right].any()
    assert (after >= before - 1e-5)[right].all() and (after > before)[right & still].all()
    was, done = noise, ~right
    for now in steps:
        assert torch.equal(now[done], was[done]), 'a noise that fools the model stays where it is'
        assert (now != was).flatten(2).any(-1)[~done].all()
        was, done = now, ~noise_losses(model, images, labels, now)[1]

# --- draws

def seeded(draw):
    "`draw(epoch, seed, index)`: the same for the same image, seed and epoch, whatever the batch; another one otherwise."
    index = torch.arange(200)
    first = draw(0, 0, index)
    assert torch.equal(first, draw(0, 0, index)) and torch.equal(draw(0, 0, index[[7, 3]]), first[[7, 3]])
    for other in draw(1, 0, index), draw(0, 1, index): assert (first != other).float().mean() > .3
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < .25

def at_epoch(method, epoch):
    method.start_epoch(epoch)
    return method

def test_mixing():
    draw = lambda epoch, seed, index: at_epoch(SmoothMix(SIGMA, seed=seed), epoch).mixing(index, torch.zeros(len(index), 1, 2, 2))
    seeded(draw)
    lam = draw(0, 0, torch.arange(4000))
    assert lam.shape == (4000,) and 0 <= lam.min() < .001 and .499 < lam.max() <= .5
    np.testing.assert_allclose(np.histogram(lam, 5, (0, .5))[0] / 4000, .2, atol=.025)

def test_draw():
    method = lambda seed: CATRS(SIGMA, torch.ones(2000, K).long(), num_noise=4, seed=seed)
    draw = lambda epoch, seed, index, p=.6: at_epoch(method(seed), epoch).draw(torch.full((len(index),), p), index)
    seeded(draw)
    for p in 0., .25, .6, 1.:
        drawn, expected = torch.cat([draw(epoch, 1, torch.arange(2000), p) for epoch in range(4)]), binom.pmf(np.arange(5), 4, p)
        expected[:2] = 0, expected[:2].sum()                                     # K >= 1
        assert not drawn.is_floating_point()
        np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 8000, expected, atol=.02)

# --- SODM's mapping

def mapped(method, logits):
    with torch.no_grad(): return method.mapping(logits)

@every(['none', 'temperature', 'residual'])
def test_sodm_mapping_starts_as_softmax(name):
    logits = 3 * torch.randn(50, K, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mapped(SODM(SIGMA, K, mapping=name), logits), logits.softmax(-1))

def test_sodm_temperature_keeps_the_order():
    method, logits = SODM(SIGMA, 6), torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    start = mapped(method, logits)
    shake(method, 3.)
    p = mapped(method, logits)
    assert not torch.allclose(p, start, atol=.05) and (p.gather(1, logits.argsort(1)).diff(dim=1) >= 0).all()
    assert torch.equal(p.argmax(1), logits.argmax(1))
    with torch.no_grad():
        for bias, factor in (100., 16.), (-100., 1/16):
            layers(method)[-1].weight.zero_(), layers(method)[-1].bias.fill_(bias)
            torch.testing.assert_close(mapped(method, logits), (factor * logits).softmax(-1))

def test_sodm_residual_may_change_the_order():
    method, logits = SODM(SIGMA, 6, mapping='residual'), torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    shake(method, 3.)
    assert (mapped(method, logits).argmax(1) != logits.argmax(1)).any()

@pytest.mark.parametrize('mapping, hidden', [('temperature', 32), ('residual', 64)])
def test_sodm_updates(mapping, hidden):
    "The mapping moves in every fifth `after_step` and nowhere else, the classifier never there."
    torch.manual_seed(0)
    x, y, index = BATCH.tensors
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(D), nn.Linear(D, K))
    model[2].eval()                                                              # a mixture of modes, to be restored
    method = SODM(SIGMA, K, mapping=mapping, interval=5, num_noise=M, mapping_noise=16)
    assert layers(method)[0].out_features == hidden
    opt, snapshot = torch.optim.SGD(model.parameters(), .1), lambda module: [t.clone() for t in module.state_dict().values()]
    same, moved = lambda a, b: all(map(torch.equal, a, b)), []
    for step in range(15):
        start = snapshot(method.mapping)
        opt.zero_grad()
        sum(method(model, x, y, index).values()).backward()
        opt.step()
        assert same(snapshot(method.mapping), start)
        opt.zero_grad()
        before = snapshot(model)
        method.after_step(model, x, y, index)
        moved.append(not same(snapshot(method.mapping), start))
        assert same(snapshot(model), before) and [m.training for m in model.modules()] == [True, True, True, False]
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert np.diff(np.flatnonzero(moved)).tolist() == [5, 5], moved

def test_sodm_update_ignores_what_the_classifier_left():
    "Gradients that training leaves on the mapping do not enter its own step."
    x, y, index = BATCH.tensors
    def after(backward):
        torch.manual_seed(0)
        method, model = SODM(SIGMA, K, interval=1, num_noise=M, mapping_noise=16), torch_net(BATCH.net)
        if backward: sum(method(model, x, y, index).values()).backward()
        method.after_step(model, x, y, index)
        return [p.detach().clone() for p in method.mapping.parameters()]
    for ours, expected in zip(after(True), after(False)): assert torch.equal(ours, expected)

def test_sodm_update_lowers_the_loss():
    "Of images that are wrong: what past rho counts as 0 would blur the comparison."
    x, y, index = BATCH.tensors
    y = torch_net(BATCH.net)(x).argmin(1)
    torch.manual_seed(0)
    method, model = SODM(SIGMA, K, interval=1, num_noise=64, mapping_noise=64, mapping_lr=.01), torch_net(BATCH.net)
    loss = lambda: sum(method(model, x, y, index).values()).item()
    start = loss()
    for _ in range(30): method.after_step(model, x, y, index)
    assert loss() < start - .01

# --- the ends of the number line

teacher_net = torch_net(make_batch(seed=7).net)
FINITE = {
    'gaussian': Gaussian, 'stability': Stability, 'macer': MACER, 'macer past the hinge': partial(MACER, gamma=.01, beta=2.),
    **{f'consistency {form}': partial(Consistency, form=form) for form in ('kl+entropy', 'kl', 'xent', 'mse')},
    'smoothmix': SmoothMix, 'smoothmix one-step': partial(SmoothMix, mix_step=1),
    **{f'catrs {confidence}': partial(CATRS, predictions=torch.tensor(COUNTS), confidence=confidence) for confidence in ('noisy', 'stored')},
    **{f'sodm {mapping}': partial(SODM, num_classes=K, mapping=mapping, interval=1, mapping_noise=8) for mapping in ('none', 'temperature', 'residual')},
    **{f'crt {match} {norm}': partial(CRT, teacher=teacher_net, match=match, norm=norm) for match in ('logits', 'softmax') for norm in ('l2', 'l2_squared')},
    **{f'gaussian, {name}': partial(Gaussian, attack=partial(attack, **kwargs), ramp=lambda epoch: strength)
       for name, (attack, _, kwargs) in ATTACKS.items() for strength in [1.] if 'strength' not in kwargs},
    'consistency, pgd': partial(Consistency, attack=partial(smoothed_pgd, eps=.5, steps=2)),
}

@pytest.mark.parametrize('labels', ['right', 'wrong', 'mixed'])
@pytest.mark.parametrize('scale', [1, 20, 1e4])
@every(FINITE)
def test_finite_gradients(name, scale, labels):
    "Probabilities of exactly 0 and 1 at scale 1e4, all images wrong, all past the threshold."
    torch.manual_seed(0)
    x, _, index = BATCH.tensors
    method, model = FINITE[name](.01, num_noise=M), torch_net(BATCH.net)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(scale)
        order = model(x).argsort(1)
    y = {'right': order[:, -1], 'wrong': order[:, 0], 'mixed': torch.where(index < 3, order[:, -1], order[:, 0])}[labels]
    for _ in range(2):
        terms = method(model, x, y, index)
        total = sum(terms.values())
        if total.requires_grad: total.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(t).all() for t in [*terms.values(), *grads]), terms
        model.zero_grad()
        method.after_step(model, x, y, index)
        assert all(torch.isfinite(p).all() for p in method.parameters())

def test_extreme_probabilities_occur():
    x, *_ = BATCH.tensors
    with torch.no_grad(): p = (1e4 * torch_net(BATCH.net)(x)).softmax(1)
    assert ((p == 0) | (p == 1)).all()

def test_nothing_to_learn_from():
    "Past their thresholds, MACER's radius term pushes nothing; SODM's terms ask for no gradient and move nothing."
    x, _, index = BATCH.tensors
    model = torch_net(BATCH.net)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1e4)
        y = model(x).argmax(1)
    radius = FINITE['macer'](.01, num_noise=M)(model, x, y, index)['radius']
    assert radius == 0 and (not radius.requires_grad or all((g == 0).all() for g in torch.autograd.grad(radius, list(model.parameters()))))
    method = FINITE['sodm temperature'](.01, num_noise=M)
    terms, start = method(model, x, y, index), [p.clone() for p in method.mapping.parameters()]
    assert all(not t.requires_grad and t == 0 for t in terms.values())
    method.after_step(model, x, y, index)
    assert all(map(torch.equal, method.mapping.parameters(), start))

def test_self_distillation():
    x, y, index = BATCH.tensors
    model = torch_net(BATCH.net)
    loss = CRT(SIGMA, torch_net(BATCH.net), num_noise=M)(model, x, y, index)['transfer']
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())

# --- cost

digits = load('digits', 'train')
ones = lambda: torch.ones(len(digits[0]), 10).long()
COST = {  # method, slow-down over plain training
    'gaussian': (lambda: Gaussian(.25), 1), 'gaussian m=4': (lambda: Gaussian(.25, num_noise=4), 4), 'stability': (lambda: Stability(.25), 2),
    **{f'smoothadv m={m}': (partial(Gaussian, .25, num_noise=m, attack=partial(smoothed_pgd, steps=10)), m * 23/3) for m in (1, 2)},
    'smoothadv, one noise trained': (lambda: Gaussian(.25, num_noise=4, trained=1, attack=partial(smoothed_pgd, steps=10)), (2*4*10 + 3) / 3),
    'smoothadv, ddn': (lambda: Gaussian(.25, num_noise=2, attack=partial(ddn, steps=4)), 2 * 11/3),
    'smoothadv, gradient-free': (lambda: Gaussian(.25, num_noise=2, attack=partial(gradient_free, steps=10)), 2 * 13/3),
    'macer': (lambda: MACER(.25, num_noise=16), 16), 'consistency': (lambda: Consistency(.25, num_noise=2), 2),
    'consistency, smoothadv': (lambda: Consistency(.25, num_noise=2, attack=partial(smoothed_pgd, steps=10)), 2 * 23/3),
    'smoothmix': (lambda: SmoothMix(.25, num_noise=2, steps=4), 28/3), 'smoothmix one-step': (lambda: SmoothMix(.25, num_noise=2, steps=4, mix_step=1), 28/3),
    'catrs': (lambda: CATRS(.25, ones(), num_noise=4, steps=4), 56/3),
    'sodm': (lambda: SODM(.25, 10, num_noise=16), 16 + 128/15), 'sodm without mapping': (lambda: SODM(.25, 10, mapping='none', num_noise=16), 16),
    'crt': (lambda: CRT(.25, build('small_cnn', 10, 1, 8)), 4/3),
    'acr paper': (lambda: Gaussian(.25, num_noise=4, attack=partial(sphere_attack, steps=6)), 4 * 15/3),
}

def measure(method, model, x, y, index, steps=1):
    "Passes per image and step."
    with count_passes(model) as seen:
        for _ in range(steps):
            sum(method(model, x, y, index).values()).backward()
            method.after_step(model, x, y, index)
    return {k: getattr(seen, k) / (len(x) * steps) for k in ('forward', 'backward', 'input_backward')}

@every(COST)
def test_passes(name):
    torch.manual_seed(0)
    make, slow_down = COST[name]
    method, model, x, y, index = make(), build('small_cnn', 10, 1, 8), digits[0][:6], digits[1][:6], torch.arange(6)
    assert method.passes.slow_down() == pytest.approx(slow_down, rel=1e-6)
    if name == 'crt':
        assert method.passes.slow_down(teacher_cost=1/6.2) == pytest.approx(1 + 1/6.2/3)
        with count_passes(method.teacher) as seen: method(model, x, y, index)
        assert seen.forward / len(x) == method.passes.teacher and seen.backward == seen.input_backward == 0
    measured = measure(method, model, x, y, index, steps=5 if name.startswith('sodm') else 1)
    stated = {k: getattr(method.passes, k) for k in measured}
    if name == 'acr paper': assert all(measured[k] <= stated[k] for k in stated) and measured['backward'] == 4
    else: assert measured == pytest.approx(stated)

def test_sphere_attack_costs_what_it_says_while_nothing_is_fooled():
    torch.manual_seed(0)
    x, model = digits[0][:6], build('small_cnn', 10, 1, 8)
    method = Gaussian(1e-4, num_noise=4, attack=partial(sphere_attack, steps=6, eps=1e-5))
    with torch.no_grad(): y = model(x).argmax(1)
    stated = {k: getattr(method.passes, k) for k in ('forward', 'backward', 'input_backward')}
    assert measure(method, model, x, y, torch.arange(6)) == pytest.approx(stated)
    fooled = measure(method, model, x, (y + 1) % 10, torch.arange(6))
    assert fooled['forward'] == 2*4 and fooled['input_backward'] <= 4, 'noises that fool the model from the start are looked at once'

def test_count_passes():
    "The counter itself: plain passes of known size."
    model, x = build('small_cnn', 10, 1, 8), digits[0]
    with count_passes(model) as seen:
        model(x[:3])                                                             # 3 forward
        model(x[:4]).sum().backward()                                            # 4 forward and backward
        with torch.no_grad(): model(x[:5])                                       # 5 forward
        with frozen(model): torch.autograd.grad(model(moving := x[:2].clone().requires_grad_()).sum(), moving)
    assert (seen.forward, seen.backward, seen.input_backward) == (14, 4, 2)
    model(x[:3]).sum().backward()
    assert (seen.forward, seen.backward) == (14, 4), 'nothing is counted after the block'

# --- curriculum

PLANE = HalfSpace()
POINTS = torch.stack([PLANE.point_at(d) for d in np.linspace(-.35, .45, 60).astype('f4')])
LABELS = torch.ones(60, dtype=torch.int64)
easy = partial(curriculum.EasyData, .25, start=3)

def test_count_weights():
    "Sun et al. (2024), section 5.2, with the reference share's lower bound (the printed formula has the share itself)."
    weights = np.asarray(curriculum.count_weights(np.arange(17), 16, .1), dtype=float)
    np.testing.assert_allclose(weights / weights[0], [1]*13 + [2.138, 3.420, 4.976, 7.206], atol=5e-4)
    ten = np.asarray(curriculum.count_weights(np.arange(11), 10, .1), dtype=float)
    assert (ten > 0).all() and (np.diff(ten) >= 0).all(), 'other numbers of noises have positive weights too'

def test_easy_data():
    chosen, data = easy(), (POINTS, LABELS)
    assert [chosen(PLANE, data, epoch) for epoch in range(3)] == [None]*3
    w = np.asarray(chosen(PLANE, data, 3), dtype=float)
    kept = w > 0
    assert w.shape == (60,) and (w >= 0).all() and not kept[:15].any() and kept[45:].all()
    ratios = np.unique(np.round(w[kept] / w[kept].min(), 3))
    assert set(ratios) <= {1, 2.138, 3.42, 4.976, 7.206} and len(ratios) >= 4
    np.testing.assert_array_equal(w, chosen(PLANE, data, 4))
    np.testing.assert_array_equal(w, easy()(PLANE, data, 3))

    blind = HalfSpace(offset=5.)                                                 # from now on every image is wrong
    np.testing.assert_array_equal(w, chosen(blind, data, 12))
    again = easy()
    again.load_state_dict(chosen.state_dict())
    np.testing.assert_array_equal(w, again(blind, data, 12))
    for resumed in chosen, again:
        later = np.asarray(resumed(blind, data, 13), dtype=float)
        assert ((later > 0) == kept).all() and len(np.unique(later[kept])) == 1, 'counted again ten epochs later, among those that were kept'

def test_easy_data_parts():
    uniform = np.asarray(easy(reweigh=False)(PLANE, (POINTS, LABELS), 3), dtype=float)
    assert set(np.unique(uniform / uniform.max())) == {0, 1}
    assert (np.asarray(easy(threshold=0.)(PLANE, (POINTS, LABELS), 3)) > 0).all(), 'threshold 0 keeps even an image that is always wrong'
    with pytest.raises(ValueError, match='threshold'): easy(threshold=.9)(PLANE, (POINTS[45:], 1 - LABELS[45:]), 3)

def test_easy_data_keeps_equality():
    "Shares are hundredths: the largest one that still keeps an image is its own, and a hair more drops it."
    image = PLANE.point_at(.1)[None].repeat(2, 1, 1, 1)
    image[1] = PLANE.point_at(.45)                                               # one that stays
    keeps = lambda threshold: bool(np.asarray(easy(threshold=threshold)(PLANE, (image, LABELS[:2]), 3))[0] > 0)
    share = max(k for k in range(91) if keeps(k / 100))
    assert 50 < share < 80 and not keeps(share / 100 + 1e-6)
    assert all(keeps(k / 100) for k in range(share))

# --- every method learns

@pytest.fixture(scope='module')
def teacher(): return checkpoint.load(ROOT/'data'/'digits-gaussian')

@pytest.fixture(scope='module')
def predictions(teacher):
    "Votes of a Gaussian network on noisy copies of each training image."
    return torch.tensor(np.stack([v[0] for v in count_votes(teacher, digits[0], range(len(digits[0])), Settings(.25, {0: 100}))]))

LEARNERS = {  # method, its parameters, what differs in training
    'gaussian': (Gaussian, {}), 'gaussian m=2': (Gaussian, dict(num_noise=2)), 'accumulated': (Gaussian, dict(num_noise=2, accumulate_noise=True)),
    'stability': (Stability, dict(lbd=1.)), 'macer': (MACER, dict(num_noise=4, lbd=2.), dict(lr=.05)),
    **{f'consistency {form}': (Consistency, dict(num_noise=2, lbd=1., form=form)) for form in ('kl+entropy', 'kl', 'xent', 'mse')},
    'smoothmix': (SmoothMix, dict(num_noise=2, steps=2, eta=1.)), 'smoothmix one-step': (SmoothMix, dict(num_noise=2, steps=2, eta=1., mix_step=1)),
    **{f'catrs {confidence}': (CATRS, dict(num_noise=2, steps=2, eps=.5, confidence=confidence)) for confidence in ('noisy', 'stored')},
    **{f'sodm {mapping}': (SODM, dict(num_classes=10, num_noise=4, mapping=mapping, mapping_noise=16, beta=1.), dict(lr=.05))
       for mapping in ('none', 'temperature', 'residual')},
    'crt': (CRT, {}), 'crt softmax': (CRT, dict(match='softmax'), dict(epochs=20)),
    **{f'gaussian, {name}': (Gaussian, dict(num_noise=2, attack=partial(attack, eps=.25, steps=2))) for name, attack in
       {'smoothed_pgd': smoothed_pgd, 'gradient_free': gradient_free, 'ddn': ddn, 'sphere': sphere_attack}.items()},
    'acr paper': (Gaussian, dict(num_noise=2, attack=partial(sphere_attack, eps=.1, steps=2), ramp=switch_on(4)), dict(curriculum=dict(start=4, every=2))),
}

@every(LEARNERS)
def test_learns_digits(name, teacher, predictions):
    "Noisy accuracy above 85 % after a few seconds."
    cls, kwargs, *changes = LEARNERS[name]
    given = dict(teacher=teacher) if cls is CRT else dict(predictions=predictions) if cls is CATRS else {}
    training = dict(epochs=8, batch_size=32, lr=.1) | (changes[0] if changes else {})
    if 'curriculum' in training: training['curriculum'] = curriculum.EasyData(.25, **training['curriculum'])
    torch.manual_seed(0)
    model = build('small_cnn', 10, 1, 8)
    history = train.fit(model, cls(.25, **given, **kwargs), digits, device='cpu', progress=False, **training)
    assert len(history) == training['epochs'] and train.accuracy(model, *load('digits', 'test'), sigma=.25) > .85

# --- bad input

votes = torch.tensor(COUNTS)
CLASSES = {'gaussian': Gaussian, 'stability': Stability, 'macer': MACER, 'consistency': partial(Consistency, num_noise=2), 'smoothmix': SmoothMix,
           'catrs': partial(CATRS, predictions=votes), 'sodm': partial(SODM, num_classes=K), 'crt': partial(CRT, teacher=teacher_net)}
WEIGHTS = {'stability': 'lbd', 'macer': 'lbd gamma beta', 'consistency': 'lbd eta', 'smoothmix': 'eta step_size', 'catrs': 'lbd eps', 'sodm': 'beta boost'}
COUNTED = dict.fromkeys(CLASSES, 'num_noise') | {'smoothmix': 'num_noise steps', 'catrs': 'num_noise steps', 'sodm': 'num_noise interval mapping_noise'}
ARGUMENTS = [  # method, its arguments, what the message must say
    *[(name, dict(sigma=sigma), f'sigma.*{sigma}') for name in CLASSES for sigma in (-.5, 0., math.nan)],
    *[(name, {weight: -1.}, f'{weight}.*-1') for name, weights in WEIGHTS.items() for weight in weights.split()],
    *[(name, {count: number}, f'{count}.*{number}') for name, counts in COUNTED.items() for count in counts.split() for number in (0, -1, 1.5)],
    *[('sodm', dict(rho=rho), f'rho.*{rho}') for rho in (0., 1., 1.5, -.2)],
    ('consistency', dict(num_noise=1), 'at least 2.*1'), ('consistency', dict(form='kl-entropy'), r'kl-entropy.*kl\+entropy'),
    ('sodm', dict(mapping='temprature'), 'temprature.*temperature'), ('catrs', dict(confidence='nosy'), 'nosy.*noisy'), ('catrs', dict(eps=0.), 'eps.*0'),
    ('catrs', dict(predictions=None), 'None'), ('catrs', dict(predictions=votes[0]), r'\[3\]'), ('catrs', dict(predictions=votes / 50.), 'float'),
    ('smoothmix', dict(mix_step=2), 'mix_step.*2'), ('crt', dict(match='logit'), 'logit.*logits'), ('crt', dict(norm='l1'), 'l1.*l2'),
    *[(name, dict(attack=smoothed_pgd), 'attack') for name in ('smoothmix', 'catrs')],
]

refused = partial(pytest.mark.parametrize, 'name, arguments, message', ids=lambda v: v if isinstance(v, str) else '')

@refused(ARGUMENTS)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message): CLASSES[name](**dict(sigma=.25) | arguments)

EACH_ATTACK = dict(smoothed_pgd=smoothed_pgd, gradient_free=gradient_free, ddn=ddn, sphere=sphere_attack)
NUMBERS = [('steps', 0), ('steps', -1), ('eps', 0.), ('eps', -.5), ('eps', math.nan)]
STRIKES = [(name, {key: value}, f'{key}.*{value:g}') for name in EACH_ATTACK for key, value in NUMBERS] + [
    ('smoothed_pgd', dict(eps=torch.tensor([.1, .2, -1., .3, .4])), 'eps.*-1'), ('sphere', dict(norm=1), 'norm.*1')]

@refused(STRIKES)
def test_bad_attack(name, arguments, message):
    x, y, _ = BATCH.tensors
    with pytest.raises(ValueError, match=message): EACH_ATTACK[name](torch_net(BATCH.net), x, y, BATCH.given, **arguments)

MISFITS = {'crt': ('7 and 3', CRT, torch_net(Net(np.ones((7, D)), np.ones(7)))), 'catrs': ('[37].*[37]', CATRS, torch.ones(B, 7).long()),
           'sodm': ('[37].*[37]', SODM, 7), 'catrs, fewer images': ('2', CATRS, votes[:2])}

@every(MISFITS)
def test_another_number_of_classes(name):
    "A teacher, stored predictions or a mapping that do not belong to the network, or not to the data."
    message, cls, misfit = MISFITS[name]
    with pytest.raises(ValueError, match=message): cls(.25, misfit)(torch_net(BATCH.net), *BATCH.tensors)

def test_one_noise_gives_no_direction():
    x, y, _ = BATCH.tensors
    with pytest.raises(ValueError, match='at least 2.*1'): gradient_free(torch_net(BATCH.net), x, y, BATCH.given[:1], eps=.5)

@pytest.mark.parametrize('arguments', [dict(threshold=-.1), dict(threshold=1.1), dict(every=0), dict(discard_noise=0), dict(alpha=1.), dict(sigma=0.)], ids=str)
def test_bad_curriculum(arguments):
    (key, value), = arguments.items()
    with pytest.raises(ValueError, match=f'{key}.*{value:g}'): curriculum.EasyData(**dict(sigma=.25) | arguments)

# --- certificates under attack

def test_certificates_survive(teacher):
    "No attack inside a certified radius changes the smoothed prediction; at three times the radius it often does."
    images, sigma = load('digits', 'test')[0][:240], teacher.metadata['sigma']
    certificates = certify(teacher, images, sigma, n=2000)
    sure = [i for i, c in enumerate(certificates) if c.radius > 0]
    classes = torch.tensor([certificates[i].prediction for i in sure])
    assert len(sure) >= 200

    def attacked(factor, few, n):
        "Votes after an attack with `factor` radii, and how far it went."
        x, y, index = images[sure[:few]], classes[:few], sure[:few]
        radii = factor * torch.tensor([certificates[i].radius for i in index])
        noise = sigma * torch.randn(32, *x.shape, generator=torch.Generator().manual_seed(0))
        change = (smoothed_pgd(teacher, x, y, noise, eps=radii, steps=20) - noise)[0]
        assert (change.flatten(1).norm(dim=1) <= radii + 1e-5).all() and (change.flatten(1).norm(dim=1) > .9 * radii).float().mean() > .9
        found = torch.tensor(predict(teacher, (x + change).clamp(0, 1), sigma, n=n, idx=index))
        return found, (found != y) & (found != ABSTAIN)

    found, changed = attacked(.999, None, 10_000)
    assert not changed.any() and (found == ABSTAIN).float().mean() < .02
    assert attacked(3., 60, 1000)[1].float().mean() > .5
