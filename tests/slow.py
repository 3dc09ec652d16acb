"""Methods and attacks read a second time: plain NumPy in float64, with loops over images, noises and classes, and gradients by hand.

Here is what those readings share, and what is checked of every method alike.
"""
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from torch import nn

from rs_toolkit import train
from rs_toolkit.data import load
from rs_toolkit.models import build

SIGMA = .5                                 # noise level
B = 5                                      # images
M = 3                                      # noises
K = 3                                      # classes
D = 4                                      # pixels

def every(cases): return pytest.mark.parametrize('name', cases)

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
        x = torch.tensor(self.x, dtype=torch.float32).reshape(-1, 1, 2, 2)
        return x, torch.tensor(self.y), torch.arange(len(self.x))

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
def radius_slope(p): return math.sqrt(2*math.pi) * math.exp(ndtri(p)**2 / 2)    # d Phi^-1 / dp

def smoothed(net, x, noise): return average([softmax(net(x + delta)) for delta in noise])      # noise [m, d] of one image

def smoothed_slope(net, v, noise, y):
    "Gradient of -log(mean softmax)[y] for the image v."
    p = [softmax(net(v + delta)) for delta in noise]
    return -sum(q[y] * net.weight.T @ (onehot(y) - q) for q in p) / sum(q[y] for q in p)

def gaussian(net, x, y, noise):
    "Cohen et al. (2019), Gaussian data augmentation, with m copies."
    return {'ce': average([-log_softmax(net(x[i] + delta[i]))[y[i]] for delta in noise for i in range(len(x))])}

def make_batch(seed=8, m=M):
    "Two images of five are wrong, for the average prediction over the noise."
    rng = np.random.default_rng(seed)
    net = Net(2*rng.normal(size=(K, D)).astype('f4').astype('f8'), rng.normal(size=K).astype('f4').astype('f8'))
    x = rng.uniform(.02, .98, (B, D)).astype('f4').astype('f8')
    sizes = np.linspace(.5, 1.5, m)[:, None, None] * np.linspace(.7, 1.3, B)[:, None]
    noise = (SIGMA * sizes * rng.normal(size=(m, B, D))).astype('f4').astype('f8')
    top = np.array([smoothed(net, x[i], noise[:, i]).argmax() for i in range(B)])
    return Batch(net, x, (top + [0, 0, 0, 1, 2]) % K, noise)

BATCH = make_batch()
ONE_IMAGE = Batch(BATCH.net, BATCH.x[:1], BATCH.y[:1], BATCH.noise[:, :1])

def torch_net(net, scale=1.):
    model = nn.Sequential(nn.Flatten(), nn.Linear(*net.weight.shape[::-1]))
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), net): parameter.copy_(torch.tensor(values)).mul_(scale)
    return model

def with_noise(method, noise):
    "The method, made to use this noise [m, b, *image]."
    method.noise = lambda model, x, y, index=None: noise if index is None else noise[:, index]
    return method

def given_noise(cls, reading, **kwargs):
    "Both readings of a loss that needs nothing but its arguments: batch -> method, and net -> terms."
    def case(batch):
        method = with_noise(cls(SIGMA, num_noise=M, **kwargs), batch.given)
        return method, lambda net: reading(net, *batch[1:], **kwargs)
    return case

# --- what is checked of every method

def check_terms(case):
    "The named terms are those of the formula."
    method, reading = case(BATCH)
    terms = method(torch_net(BATCH.net), *BATCH.tensors)
    expected = reading(BATCH.net)
    np.testing.assert_array_equal(sorted(terms), sorted(expected))
    for term in terms: np.testing.assert_allclose(terms[term].item(), expected[term], rtol=2e-5, atol=1e-6, err_msg=term)

def check_gradients(case):
    "Targets that are not detached take part in the gradient; attacked images and drawn numbers stay fixed."
    method, reading = case(BATCH)
    model = torch_net(BATCH.net)
    sum(method(model, *BATCH.tensors).values()).backward()
    def objective(): return sum(reading(BATCH.net).values())
    for parameter, array in zip(model.parameters(), BATCH.net):
        numeric = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            old = array[at]
            array[at] = old + 1e-6
            above = objective()
            array[at] = old - 1e-6
            below = objective()
            array[at] = old
            numeric[at] = (above - below) / 2e-6
        np.testing.assert_allclose(parameter.grad, numeric, rtol=2e-4, atol=2e-5 * np.abs(numeric).max())

def check_mean(case):
    "A batch is the mean of its images: labels, targets, mixing weights and noises stay with their image's copies."
    method, _ = case(BATCH)
    model = torch_net(BATCH.net)
    x, y, index = BATCH.tensors
    whole = method(model, x, y, index)
    single = [method(model, x[[i]], y[[i]], index[[i]]) for i in range(B)]
    for term in whole:
        mean = average([terms[term].item() for terms in single])
        np.testing.assert_allclose(whole[term].item(), mean, rtol=2e-5, atol=1e-6, err_msg=term)

def at_the_ends(test):
    "Probabilities of exactly 0 and 1 at scale 1e4, all images wrong, all past the threshold."
    scales = pytest.mark.parametrize('scale', [1, 20, 1e4])
    return pytest.mark.parametrize('labels', ['right', 'wrong', 'mixed'])(scales(test))

def check_finite(make, scale, labels):
    "Terms, gradients and what the method learns itself stay finite."
    torch.manual_seed(0)
    x, _, index = BATCH.tensors
    method = make(.01, num_noise=M)
    model = torch_net(BATCH.net, scale)
    with torch.no_grad(): order = model(x).argsort(1)
    right, wrong = order[:, -1], order[:, 0]
    y = {'right': right, 'wrong': wrong, 'mixed': torch.where(index < 3, right, wrong)}[labels]
    for _ in range(2):
        terms = method(model, x, y, index)
        for name, term in terms.items(): assert torch.isfinite(term), f'{name}: {term}'
        total = sum(terms.values())
        if total.requires_grad: total.backward()
        for name, p in model.named_parameters():
            if p.grad is not None: assert torch.isfinite(p.grad).all(), f'gradient of {name}: {p.grad}'
        model.zero_grad()
        method.after_step(model, x, y, index)
        for name, p in method.named_parameters(): assert torch.isfinite(p).all(), f'{name}: {p}'

def check_learns(method, arch='mlp', **training):
    "Noisy accuracy above 85 % after a few seconds."
    torch.manual_seed(0)
    model = build(arch, 10, 1, 8)
    given = dict(epochs=8, batch_size=32, lr=.1) | training
    history = train.fit(model, method, load('digits', 'train'), device='cpu', progress=False, **given)
    assert len(history) == given['epochs'], f'{len(history)} epochs'
    accuracy = train.accuracy(model, *load('digits', 'test'), sigma=.25)
    assert accuracy > .85, f'noisy accuracy {accuracy:.3f}'

def check_seeded(draw):
    "`draw(epoch, seed, index)`: the same for the same image, seed and epoch, whatever the batch; another one otherwise."
    index = torch.arange(200)
    first = draw(0, 0, index)
    np.testing.assert_array_equal(draw(0, 0, index), first)
    np.testing.assert_array_equal(draw(0, 0, index[[7, 3]]), first[[7, 3]])
    for name, other in ('epoch', draw(1, 0, index)), ('seed', draw(0, 1, index)):
        share = (first != other).float().mean()
        assert share > .3, f'another {name} changes {share:.2f} of the draws'
    correlation = np.corrcoef(first[1:], first[:-1])[0, 1]
    assert abs(correlation) < .25, f'neighbours correlate by {correlation:.2f}'

# --- bad input

def refusals(**values):
    "Each argument with each of its values: (arguments, what the message must say)."
    return [pytest.param({key: value}, f'{key}.*{value}', id=f'{key}={value}') for key, many in values.items() for value in many]

def weights(*names): return refusals(**{name: [-1.] for name in names})
def counts(*names): return refusals(**{name: [0, -1, 1.5] for name in names})

COMMON = refusals(sigma=[-.5, 0., math.nan])         # what every method refuses

def bad(*cases): return pytest.mark.parametrize('arguments, message', [case for some in cases for case in some])

def check_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message): make(**dict(sigma=.25) | arguments)
