"""SODM read twice, and its map: where it starts, what it may change, when it learns."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from slow import (B, BATCH, COMMON, D, K, M, ONE_IMAGE, SIGMA, at_the_ends, average, bad, check_finite,
                  check_gradients, check_learns, check_mean, check_refused, check_terms, counts, every,
                  onehot, radius_slope, smoothed, softmax, torch_net, weights, with_noise)
from torch import nn

from rs_toolkit.methods.core import warm_up
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.methods.sodm import MAPPINGS, SODM
from rs_toolkit.models import weights_hash
from rs_toolkit.recipe import FIT, Task, train_network
from rs_toolkit.train import fit

def sodm(net, x, y, noise, mapping, rho, beta):
    "SODM's Algorithm 1 (lines 4 and 5): accuracy for wrong images, Phi^-1 for right ones below rho, nothing above."
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
    "What SODM's mapping computes with its present weights, in NumPy; its factor lies within 1/2 and 2."
    if name == 'none': return softmax
    limit = math.log(2)
    def bounded(h): return limit * np.tanh(h / limit)
    (w1, b1), (w2, b2) = [[p.detach().double().numpy() for p in layer.parameters()] for layer in layers(method)]
    def mlp(u): return w2 @ np.maximum(w1 @ u + b1, 0) + b2
    if name == 'residual': return lambda u: softmax(u + bounded(mlp(u)))
    return lambda u: softmax(math.exp(bounded(mlp(u - u.max())[0])) * u)

def case_of(mapping, shaken=False, boosted=False):
    def case(batch):
        boost_from = 0 if boosted else 1
        method = SODM(SIGMA, K, mapping=mapping, rho=.9, beta=6., boost_from=boost_from, boost=10., num_noise=M)
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
    method = SODM(SIGMA, 6, mapping='temperature')
    logits = some_logits(200, 6)
    start = mapped(method, logits)
    shake(method, 3.)
    p = mapped(method, logits)
    assert not torch.allclose(p, start, atol=.05)
    assert (p.gather(1, logits.argsort(1)).diff(dim=1) >= 0).all()
    assert torch.equal(p.argmax(1), logits.argmax(1))
    for factor in 2., 1/2:
        with_factor(method, factor)
        torch.testing.assert_close(mapped(method, logits), (factor * logits).softmax(-1))

def with_factor(method, factor):
    "A temperature that is one of its limits, or 1, whatever the logits."
    nn.init.zeros_(layers(method)[-1].weight)
    nn.init.constant_(layers(method)[-1].bias, 100. * math.log(factor))
    return method

@pytest.mark.parametrize('mapping', ['temperature', 'residual'])
@pytest.mark.parametrize('most', [1.5, 2., 16.])
def test_a_map_keeps_its_range(mapping, most):
    "Factors of the logits, or of the odds: all of the range is used, and nothing beyond; and there is a way back."
    method = SODM(SIGMA, 6, mapping=mapping, most=most)
    shake(method, 3.)
    logits = some_logits(200, 6)
    with torch.no_grad(): scores = method.mapping.scores(logits)
    if mapping == 'residual': factor = (scores - logits).exp()
    else: factor = scores.amin(1) / (logits.amin(1) - logits.amax(1))
    assert factor.max() <= most * (1 + 1e-5) and factor.min() >= (1 - 1e-5) / most
    assert factor.max() > .9 * most and factor.min() < 1 / (.9 * most)
    at_the_limit = torch.tensor(3 * math.log(most), requires_grad=True)
    method.mapping.bounded(at_the_limit).backward()
    assert at_the_limit.grad > .005

def margins_of(p, size):
    "Margins of 50 copies of one image, with a share p of right ones: alike in size."
    right = round(50 * p)
    return torch.tensor([size]*right + [-size]*(50 - right))

def pull(method, margins):
    "How strongly the objective pulls at the margin of an image with two classes, copies together."
    logits = torch.stack([margins, torch.zeros(len(margins))], 1)[:, None].requires_grad_()
    sum(method.loss(logits, torch.tensor([0])).values()).backward()
    return -logits.grad[:, 0, 0].sum().item()

@pytest.mark.parametrize('factor', [1/2, 1., 2.])
@pytest.mark.parametrize('p', [.5, .9, .98])
def test_no_image_below_the_threshold_is_without_a_gradient(p, factor):
    "Copies alike, of answer p: a sqrt(2 pi) exp(Phi^-1(p)^2 / 2) p (1 - p) in closed form, .2 at least."
    method = with_factor(SODM(SIGMA, 2, mapping='temperature'), factor)
    margin = math.log(p / (1 - p)) / factor
    found = pull(method, torch.full((50,), margin))
    assert found == pytest.approx(factor * radius_slope(p) * p * (1 - p), rel=1e-3)
    assert .2 < found < 1.3

@pytest.mark.parametrize('p', [.52, .9, .98])
def test_the_bound_of_the_map_keeps_the_gradient(p):
    "Copies that vote, p of them right, at a margin of 2: factors within 1/2 and 2 leave a pull of .08, one of 16 none."
    for factor in 1/2, 1., 2.:
        assert .08 < pull(with_factor(SODM(SIGMA, 2, mapping='temperature'), factor), margins_of(p, 2.)) < 2
    assert abs(pull(with_factor(SODM(SIGMA, 2, mapping='temperature', most=16.), 16.), margins_of(p, 2.))) < 1e-6

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
        method = SODM(SIGMA, K, mapping='temperature', interval=1, num_noise=M, mapping_noise=16)
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
    method = SODM(SIGMA, K, mapping='temperature', interval=1, num_noise=64, mapping_noise=64, mapping_lr=.01)
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
    method = SODM(.01, K, mapping='temperature', interval=1, mapping_noise=8, num_noise=M)
    start = snapshot(method.mapping)
    for name, term in method(model, x, y, index).items(): assert term == 0 and not term.requires_grad, name
    method.after_step(model, x, y, index)
    assert same(snapshot(method.mapping), start)

@every(MAPPINGS)
def test_learns_digits(name): check_learns(SODM(.25, 10, num_noise=4, mapping=name, mapping_noise=16, beta=1.), lr=.05)

# --- towards the votes

def test_the_distance_from_the_votes():
    "-sum of v log g over the classes, v the shares of votes and g the answer; the mean over the images."
    method = SODM(SIGMA, K, mapping='temperature', learns='votes')
    shake(method)
    logits = 2 * torch.randn(7, 2, K, generator=torch.Generator().manual_seed(5))
    answer = mapping_of(method, 'temperature')
    expected = []
    for image in logits.double().numpy().transpose(1, 0, 2):
        votes = average([onehot(u.argmax()) for u in image])
        expected.append(-sum(votes * np.log(average([answer(u) for u in image]))))
    assert method.distance(logits).item() == pytest.approx(average(expected), rel=1e-5)

@pytest.mark.parametrize('mapping', ['temperature', 'residual'])
def test_the_votes_draw_the_map(mapping):
    "Timid logits: the answer comes nearer to the votes, and the factor that would be best lies beyond the bound."
    torch.manual_seed(0)
    x, y, index = BATCH.tensors
    model = torch_net(BATCH.net, scale=.3)
    method = SODM(SIGMA, K, mapping=mapping, learns='votes', interval=1, num_noise=64, mapping_noise=64, mapping_lr=.02)
    def gap():
        with torch.no_grad():
            logits = method.many_logits(model, x, y, index)
            votes = torch.nn.functional.one_hot(logits.argmax(-1), K).float().mean(0)
            return (method.log_answer(logits).exp() - votes).abs().mean().item()
    start = gap()
    for _ in range(40): method.after_step(model, x, y, index)
    assert gap() < start - .03

# --- how it begins

def test_plain_epochs():
    "Cross-entropy on their own number of copies; the map waits; then the objective."
    x, y, index = BATCH.tensors
    model = torch_net(BATCH.net)
    method = SODM(SIGMA, K, mapping='temperature', interval=1, plain=.5, plain_noise=2, num_noise=4, mapping_noise=8)
    method.start_run(4)
    method.start_epoch(1)
    start = snapshot(method.mapping)
    plain = Gaussian(SIGMA, num_noise=2)
    plain.start_epoch(1)
    assert method(model, x, y, index)['ce'].item() == plain(model, x, y, index)['ce'].item()
    assert method.after_step(model, x, y, index) is False and same(snapshot(method.mapping), start)
    method.start_epoch(2)
    assert set(method(model, x, y, index)) == {'accuracy', 'radius'} and method.copies == 4
    method.after_step(model, x, y, index)
    assert not same(snapshot(method.mapping), start)
    with pytest.raises(ValueError, match='plain=4 is never reached in a run of 4 epochs'):
        SODM(SIGMA, K, plain=4).start_run(4)

def test_the_ramp_scales_beta():
    method = with_noise(SODM(SIGMA, K, rho=.9, beta=2., ramp=warm_up(4)), BATCH.given)
    def radius(epoch):
        method.start_epoch(epoch)
        return method(torch_net(BATCH.net), *BATCH.tensors)['radius'].item()
    assert [radius(epoch) / radius(3) for epoch in range(5)] == pytest.approx([.25, .5, .75, 1, 1])

def test_a_run_from_a_start_goes_on_where_it_was_stopped(tmp_path):
    "The start is used once: a resumed run has its own weights, and ends as if it had not been stopped."
    config = dict(arch='mlp', arch_args={}, epochs=4, batch_size=200, lr=.05, seed=0, device='cpu', micro_batch=0)
    assert set(config) - set(FIT) == {'arch', 'arch_args', 'epochs', 'micro_batch'}
    task = Task('digits', train_every=4)
    torch.manual_seed(1)
    start = task.network('mlp', {})
    def run(state, start, watch=None):
        method = SODM(.25, 10, mapping='temperature', learns='votes', plain=2, fresh=True, interval=2,
                      num_noise=2, mapping_noise=8)
        return train_network(config, task, method, state=tmp_path/state, start=start, watch=watch)
    def stop(history):
        if len(history) == 3: raise KeyboardInterrupt
    whole, history = run('whole', start)
    assert history.ce.notna().tolist() == [True, True, False, False] == history.radius.isna().tolist()
    with pytest.raises(KeyboardInterrupt): run('killed', start, stop)
    again, _ = run('killed', task.network('mlp', {}))
    assert weights_hash(again) == weights_hash(whole)
    scratch, _ = run('scratch', None)
    assert weights_hash(scratch) != weights_hash(whole)

# --- what algorithm 1 has besides

def test_fresh_images():
    "Line 9: the map learns from the images of the step before, within an epoch."
    x, y, index = BATCH.tensors
    method = SODM(SIGMA, K, mapping='temperature', fresh=True, interval=1, num_noise=M, mapping_noise=4)
    seen = []
    plain = method.many_logits
    def watched(model, x, y, index):
        seen.append(index.tolist()[0])
        return plain(model, x, y, index)
    method.many_logits = watched
    for epoch in range(2):
        method.start_epoch(epoch)
        for rows in [0, 1], [2], [3]: method.after_step(torch_net(BATCH.net), x[rows], y[rows], index[rows])
    assert seen == [0, 1, 0, 1, 2] * 2

def test_jitter():
    "Line 7: one number for each copy of an image, on its label's logit alone, of the standard deviation asked for."
    x, y, index = BATCH.tensors
    model = torch_net(BATCH.net)
    def logits(jitter):
        method = SODM(SIGMA, K, mapping='temperature', jitter=jitter, mapping_noise=4000)
        with torch.no_grad(): return method.many_logits(model, x, y, index)
    moved = logits(.1) - logits(0.)
    label = torch.nn.functional.one_hot(y, K).bool().expand_as(moved)
    assert (moved[~label] == 0).all()
    assert moved[label].std().item() == pytest.approx(.1, rel=.03) and abs(moved[label].mean().item()) < .005

def test_repeat():
    "Line 11: after its step the network makes another, on the map's draws, in eval mode; by hand, and by `fit`."
    x, y, index = BATCH.tensors
    def make():
        torch.manual_seed(0)
        method = SODM(SIGMA, K, mapping='temperature', repeat=True, interval=1, num_noise=M, mapping_noise=8)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(D), nn.Linear(D, K)), method
    model, method = make()
    opt = torch.optim.SGD(model.parameters(), .5, momentum=.9, weight_decay=1e-4)
    model.train()
    for many in False, True:
        opt.zero_grad()
        model.train(not many)
        logits = [method.many_logits(model, x, y, index)] if many else []
        (sum(method.loss(*logits, y).values()) if many else sum(method(model, x, y, index).values())).backward()
        opt.step()
    by_fit, method = make()
    fit(by_fit, method, (x, y), 1, batch_size=len(x), lr=.5, schedule='cosine', device='cpu', progress=False)
    for (name, ours), theirs in zip(model.named_parameters(), by_fit.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5, msg=lambda m: f'{name}: {m}')

# --- the learning rate

@pytest.mark.parametrize('optimizer, factor', [('sgd', B), ('adam', 1)])
def test_the_rate_of_a_sum(optimizer, factor):
    "The paper sums over a batch: SGD on the mean needs a rate B times as large, Adam the same."
    x, y, index = BATCH.tensors
    make = dict(sgd=torch.optim.SGD, adam=partial(torch.optim.Adam, eps=1e-12))[optimizer]
    ends = []
    for scale, lr in (B, .01), (1, .01 * factor):
        model = torch_net(BATCH.net)
        opt = make(model.parameters(), lr)
        loss = sum(with_noise(SODM(SIGMA, K, num_noise=M), BATCH.given)(model, x, y, index).values())
        (scale * loss).backward()
        opt.step()
        ends.append(model[1].weight.detach())
    torch.testing.assert_close(*ends)

NO_MAP = 'mapping none learns nothing, so that .* would never act'
OF_THE_PAPER = "a line of algorithm 1.*leave learns='votes' out"

@bad(COMMON, counts('num_noise', 'interval', 'mapping_noise', 'plain_noise'),
     weights('beta', 'boost', 'most', 'jitter', 'plain'), [
    pytest.param(dict(most=1.), 'most=1 leaves', id='most=1'),
    pytest.param(dict(most=.5), 'most must be a number of at least 1', id='most=.5'),
    pytest.param(dict(learns='vote'), "learns 'vote'.*'votes'", id='misspelt learns'),
    *[pytest.param({name: value}, NO_MAP, id=f'no map, {name}')
      for name, value in dict(learns='votes', jitter=.1, fresh=True, repeat=True).items()],
    *[pytest.param({'mapping': 'residual', 'learns': 'votes', name: value}, OF_THE_PAPER, id=f'votes, {name}')
      for name, value in dict(jitter=.1, repeat=True).items()],
    *[pytest.param(dict(rho=rho), f'rho.*{rho}', id=f'rho={rho}') for rho in (0., 1., 1.5, -.2)],
    pytest.param(dict(mapping='temprature'), 'temprature.*temperature', id='misspelt mapping')])
def test_bad_arguments(arguments, message): check_refused(partial(SODM, num_classes=K), arguments, message)

def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match='[37].*[37]'): SODM(.25, 7)(torch_net(BATCH.net), *BATCH.tensors)
