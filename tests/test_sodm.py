"""SODM read twice, and its map: where it starts, what it may change, when it learns."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from slow import (BATCH, COMMON, D, K, M, ONE_IMAGE, SIGMA, at_the_ends, average, bad, check_finite, check_gradients,
                  check_learns, check_mean, check_refused, check_terms, counts, every, onehot, radius_slope,
                  smoothed, softmax, torch_net, weights, with_noise)
from torch import nn

from rs_toolkit.methods.sodm import MAPPINGS, SODM

def sodm(net, x, y, noise, mapping, rho, beta):
    "The loss of SODM's Algorithm 1 (lines 4 and 5): accuracy for wrong images, Phi^-1 for right ones below rho, nothing above."
    accuracy = radius = 0
    for i in range(len(x)):
        g = average([mapping(net(x[i] + delta[i])) for delta in noise])
        if g.argmax() != y[i]: accuracy -= math.log(g[y[i]])
        elif g[y[i]] < rho: radius -= beta * ndtri(g[y[i]])
    return {'accuracy': accuracy / len(x), 'radius': radius / len(x)}

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
    def mlp(u): return w2 @ np.maximum(w1 @ u + b1, 0) + b2
    if name == 'residual': return lambda u: softmax(u + mlp(u))
    return lambda u: softmax(math.exp(np.clip(mlp(u - u.max())[0], -math.log(16), math.log(16))) * u)

def case_of(mapping, shaken=False, boosted=False):
    def case(batch):
        boost_from = 0 if boosted else 1
        method = SODM(SIGMA, K, mapping=mapping, rho=.9, boost_from=boost_from, boost=10., num_noise=M)
        if shaken: shake(method)
        expected = mapping_of(method, mapping) if shaken else softmax
        beta = 60. if boosted else 6.
        return with_noise(method, batch.given), lambda net: sodm(net, *batch[1:], expected, rho=.9, beta=beta)
    return case

CASES = {'none': case_of('none'), 'temperature': case_of('temperature'), 'residual': case_of('residual'),
         'temperature shaken': case_of('temperature', shaken=True), 'residual shaken': case_of('residual', shaken=True),
         'boosted': case_of('none', boosted=True)}

def test_the_batch_holds_every_branch():
    "Three images are right (`make_batch`): one below rho at least, and one above."
    net, x, y, noise = BATCH
    g = [smoothed(net, x[i], noise[:, i])[y[i]] for i in range(3)]
    assert min(g) < .9 < max(g)

@every(CASES)
def test_terms(name): check_terms(CASES[name])

@every(CASES)
def test_gradients(name): check_gradients(CASES[name])

@every(CASES)
def test_a_batch_is_the_mean_of_its_images(name): check_mean(CASES[name])

def test_radius_derivative():
    "sqrt(2 pi) exp(Phi^-1(g)^2 / 2); eq. 10 of the paper divides by sigma^2 in the exponent, which is a misprint."
    net, x, y, noise = ONE_IMAGE
    label = y[0]
    p = [softmax(net(x[0] + delta[0])) for delta in noise]
    slope = radius_slope(average(p)[label]) * average([q[label] * (onehot(label) - q) for q in p])
    model = torch_net(net)
    method = with_noise(SODM(SIGMA, K, mapping='none', rho=.9999, beta=6., num_noise=M), ONE_IMAGE.given)
    method(model, *ONE_IMAGE.tensors)['radius'].backward()
    np.testing.assert_allclose(model[1].bias.grad, -6 * slope, rtol=1e-4)

# --- the map

def some_logits(images, classes): return torch.randn(images, classes, generator=torch.Generator().manual_seed(0))

def mapped(method, logits):
    with torch.no_grad(): return method.mapping(logits)

@every(MAPPINGS)
def test_mapping_starts_as_softmax(name):
    logits = 3 * some_logits(50, K)
    torch.testing.assert_close(mapped(SODM(SIGMA, K, mapping=name), logits), logits.softmax(-1))

def test_temperature_keeps_the_order():
    method = SODM(SIGMA, 6)
    logits = some_logits(200, 6)
    start = mapped(method, logits)
    shake(method, 3.)
    p = mapped(method, logits)
    assert not torch.allclose(p, start, atol=.05)
    assert (p.gather(1, logits.argsort(1)).diff(dim=1) >= 0).all()
    assert torch.equal(p.argmax(1), logits.argmax(1))
    for bias, factor in (100., 16.), (-100., 1/16):
        nn.init.zeros_(layers(method)[-1].weight)
        nn.init.constant_(layers(method)[-1].bias, bias)
        torch.testing.assert_close(mapped(method, logits), (factor * logits).softmax(-1))

def test_residual_may_change_the_order():
    method = SODM(SIGMA, 6, mapping='residual')
    logits = some_logits(200, 6)
    shake(method, 3.)
    assert (mapped(method, logits).argmax(1) != logits.argmax(1)).any()

# --- when it learns

def snapshot(module): return [t.clone() for t in module.state_dict().values()]
def same(a, b): return all(torch.equal(*pair) for pair in zip(a, b, strict=True))

@pytest.mark.parametrize('mapping, hidden', [('temperature', 32), ('residual', 64)])
def test_updates(mapping, hidden):
    "The mapping moves in every fifth `after_step` and nowhere else, the classifier never there."
    torch.manual_seed(0)
    x, y, index = BATCH.tensors
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(D), nn.Linear(D, K))
    model[2].eval()                                                              # a mixture of modes, to be restored
    method = SODM(SIGMA, K, mapping=mapping, interval=5, num_noise=M, mapping_noise=16)
    assert layers(method)[0].out_features == hidden
    opt = torch.optim.SGD(model.parameters(), .1)
    moved = []
    for step in range(15):
        start = snapshot(method.mapping)
        opt.zero_grad()
        sum(method(model, x, y, index).values()).backward()
        opt.step()
        assert same(snapshot(method.mapping), start), f'step {step}: the mapping moved with the network'
        opt.zero_grad()
        before = snapshot(model)
        method.after_step(model, x, y, index)
        moved.append(not same(snapshot(method.mapping), start))
        assert same(snapshot(model), before), f'step {step}: the network moved with the mapping'
        assert [m.training for m in model.modules()] == [True, True, True, False]
        for name, p in model.named_parameters(): assert p.grad is None and p.requires_grad, name
    assert np.diff(np.flatnonzero(moved)).tolist() == [5, 5], moved

def test_update_ignores_what_the_classifier_left():
    "Gradients that training leaves on the mapping do not enter its own step."
    x, y, index = BATCH.tensors
    def after(backward):
        torch.manual_seed(0)
        method = SODM(SIGMA, K, interval=1, num_noise=M, mapping_noise=16)
        model = torch_net(BATCH.net)
        if backward: sum(method(model, x, y, index).values()).backward()
        method.after_step(model, x, y, index)
        return snapshot(method.mapping)
    assert same(after(True), after(False))

def test_update_lowers_the_loss():
    "Of images that are wrong: what past rho counts as 0 would blur the comparison."
    x, _, index = BATCH.tensors
    model = torch_net(BATCH.net)
    y = model(x).argmin(1)
    torch.manual_seed(0)
    method = SODM(SIGMA, K, interval=1, num_noise=64, mapping_noise=64, mapping_lr=.01)
    def loss(): return sum(method(model, x, y, index).values()).item()
    start = loss()
    for _ in range(30): method.after_step(model, x, y, index)
    assert loss() < start - .01

@at_the_ends
@every(MAPPINGS)
def test_finite_gradients(name, scale, labels):
    check_finite(partial(SODM, num_classes=K, mapping=name, interval=1, mapping_noise=8), scale, labels)

def test_nothing_to_learn_from():
    "Past the threshold the terms ask for no gradient and move nothing."
    x, _, index = BATCH.tensors
    model = torch_net(BATCH.net, scale=1e4)
    y = model(x).argmax(1)
    method = SODM(.01, K, interval=1, mapping_noise=8, num_noise=M)
    start = snapshot(method.mapping)
    for name, term in method(model, x, y, index).items(): assert term == 0 and not term.requires_grad, name
    method.after_step(model, x, y, index)
    assert same(snapshot(method.mapping), start)

@every(MAPPINGS)
def test_learns_digits(name): check_learns(SODM(.25, 10, num_noise=4, mapping=name, mapping_noise=16, beta=1.), lr=.05)

@bad(COMMON, counts('num_noise', 'interval', 'mapping_noise'), weights('beta', 'boost'), [
    *[pytest.param(dict(rho=rho), f'rho.*{rho}', id=f'rho={rho}') for rho in (0., 1., 1.5, -.2)],
    pytest.param(dict(mapping='temprature'), 'temprature.*temperature', id='misspelt mapping')])
def test_bad_arguments(arguments, message): check_refused(partial(SODM, num_classes=K), arguments, message)

def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match='[37].*[37]'): SODM(.25, 7)(torch_net(BATCH.net), *BATCH.tensors)
