"""The sphere explorer: every control by hand, against the attack as training calls it. Here an exception in a callback comes out of the assignment."""
from functools import lru_cache, partial

import numpy as np
import pytest
import torch

from rs_toolkit import checkpoint
from rs_toolkit.attacks import sphere_attack
from rs_toolkit.common import data_folder
from rs_toolkit.data import CRAFTING, image_keys, load
from rs_toolkit.explore.core import middles
from rs_toolkit.explore.sphere import SphereExplorer
from rs_toolkit.explore.toy import PROBLEMS, train_toy
from rs_toolkit.gradients import gradient_norms
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.noise import gaussian_noise

START = dict(steps=10, eps=.25, norm=2, model='gaussian4', image=2, problem='two moons', point=53, sigma=.15)
toy = lru_cache(train_toy)

def shown(explorer): return {trace.name: trace for trace in explorer.fig.data}

def digits_model(name): return checkpoint.load(data_folder()/'digits-methods/equal_epochs'/name)

def attacked(model, images, labels, at, sigma, eps, steps, norm):
    "24 noises of an image before and after, and the confidence in its label, by the attack itself."
    x, y = images[[at]], labels[[at]]
    noise = gaussian_noise(x, sigma, 24, image_keys(0, 0, torch.tensor([at]), CRAFTING))
    moved = sphere_attack(model, x, y, noise, eps=eps, steps=steps, norm=norm) if steps else noise
    with torch.no_grad(): p = [model(x + v[:, 0]).softmax(1) for v in (noise, moved)]
    return x + noise[:, 0], x + moved[:, 0], *(v[:, y[0]] for v in p), *(v.argmax(1) == y for v in p)

@lru_cache
def gradients(model, eps, steps, norm):
    method = Gaussian(.5, num_noise=4, attack=partial(sphere_attack, eps=eps, steps=steps, norm=norm) if steps else None)
    return gradient_norms(digits_model(model), method, *(v[::8] for v in load('digits', 'train')), batch_size=180, progress=False)

def ends(trace, strands):
    "The last point of each strand, from which it returns."
    if not strands: return []
    halves = np.asarray(trace.y).reshape(strands, 2, -1)
    assert np.array_equal(halves[:, 0], halves[:, 1, ::-1])
    return halves[:, 1, 0]

def inside(shape, points):
    "Whether points lie in a filled shape: a ray to the right crosses its rims an odd number of times."
    (x0, y0), (x1, y1) = (np.stack([shape.x, shape.y])[:, cut, None] for cut in [slice(-1), slice(1, None)])
    x, y = np.asarray(points, float).T
    with np.errstate(divide='ignore', invalid='ignore'): crossed = ((y0 > y) != (y1 > y)) & (x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x) & ~np.isnan(x1 + x0)
    return crossed.sum(0) % 2 == 1

def check(e, **moved):
    "Every panel and the words against the attack."
    assert e.worker.wait()
    s, t = START | moved, shown(e)
    steps, eps, norm, words = s['steps'], s['eps'], s['norm'], e.words.value
    assert 'role="status"' in words and '...' not in words

    before, after, p_before, p_after, right_before, right_after = attacked(digits_model(s['model']), *load('digits', 'test'), s['image'], .5, eps, steps, norm)
    if right_before.any(): assert f"<b>{(~right_before).sum()} of 24</b> noises; wrong after {steps} steps: <b>{(~right_after).sum()}</b>" in words
    else: assert 'all 24 noises are wrong from the start' in words
    first = right_before.int().argmax()
    for k, image in enumerate([load('digits', 'test')[0][s['image']], before[first], after[first]]):
        np.testing.assert_allclose(t['pictures'].z[:, 9*k:9*k + 8], image[0], atol=1e-5)
    np.testing.assert_allclose([t['mean confidence'].y[0], t['mean confidence'].y[-1]], [p_before.mean(), p_after.mean()], atol=1e-5)
    last = [*ends(t['confidence'], right_before.sum()), *ends(t['confidence, wrong from the start'], (~right_before).sum())]
    np.testing.assert_allclose(sorted(last), p_after.sort().values, atol=1e-5)
    assert len(middles(t['confidence where wrong'])) == (right_before & ~right_after).sum()
    assert list(t['mean now'].x) == [steps] and len(t['mean confidence'].x) == steps + 1

    images, labels = PROBLEMS[s['problem']]()
    same_angle = eps * s['sigma'] * 2**.5 / 4
    before, after, _, _, right_before, right_after = attacked(toy(s['problem']), images, labels, s['point'], s['sigma'], same_angle, steps, norm)
    expected = dict(stay=before[~right_before], drawn=before[right_before], found=after[right_before & ~right_after])
    for name, points in (expected | {'still right': after[right_after]}).items():
        there = middles(t[name]) if name == 'drawn' else np.stack([t[name].x, t[name].y], -1).reshape(-1, 2)
        np.testing.assert_allclose(there, points.flatten(1), atol=1e-5, err_msg=name)
    assert f"<b>In the plane</b> ({s['problem']}), wrong from the start, and unmoved: <b>{(~right_before).sum()} of 24</b>" in words
    assert [(t['point'].x[0], t['point'].y[0])] == [tuple(images[s['point']].flatten().tolist())]
    here = torch.rand(2000, 2, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - .5
    with torch.no_grad(): wrong = toy(s['problem'])(here).argmax(1) != labels[s['point']]
    assert (inside(t['error'], here.flatten(1)) != wrong.numpy()).mean() < .005             # but for the width of a cell, along the line

    frames = gradients(s['model'], eps, 0, norm), gradients(s['model'], eps, steps, norm)
    for name, frame, shift in zip(['before', 'after'], frames, [.03, .07]):
        np.testing.assert_allclose(t[name].y, frame.grad_norm, rtol=1e-3)
        np.testing.assert_allclose(t[name].x, np.minimum(frame.p_a * 100 // 10, 9) / 10 + shift)
    easy, hard = (frames[1].grad_norm[group].mean() for group in (frames[1].p_a > .5, frames[1].p_a < .5))
    assert f'<b>{easy / hard:.2f}</b> after' in words

MOVES = dict(steps=3, eps=.5, norm='inf', model='acr', image=8, problem='spirals', point=10, sigma=.3)

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = SphereExplorer()
    assert e.controls.keys() == MOVES.keys() == e.values.keys() and e.values == START
    before = e.fig.to_json()
    e.controls[control].value = MOVES[control]
    check(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before

def test_as_it_opens_and_all_controls_together():
    e = SphereExplorer()
    check(e)
    for name, value in MOVES.items(): e.controls[name].value = value                  # faster than the work: the newest wins
    check(e, **MOVES)
    check(SphereExplorer(**MOVES), **MOVES)

def test_every_number_of_steps():
    "The slider looks things up: each press moves something, and no norm changes."
    e, seen = SphereExplorer(), set()
    thread = e.worker.thread
    for steps in range(21):
        e.controls['steps'].value = steps
        t = shown(e)
        seen.add(str([list(t['mean confidence'].x), list(t['mean now'].y)]))
        away = lambda *points: np.hypot(*(np.concatenate(points) - [t['point'].x[0], t['point'].y[0]]).T)
        stay, found, right = (np.stack([t[name].x, t[name].y], -1).reshape(-1, 2) for name in ['stay', 'found', 'still right'])
        radii, drawn = away(stay, found, right), away(stay, middles(t['drawn']))
        np.testing.assert_allclose(np.sort(radii), np.sort(drawn), rtol=1e-4)
        assert f'wrong after {steps} steps' in e.words.value
    assert len(seen) == 21 and e.worker.thread is thread

def test_corners():
    "An image whose noises are all wrong, and the longest and shortest steps, break nothing."
    e = SphereExplorer(model='acr', eps=1., steps=20)
    e.controls['image'].value = 181
    check(e, model='acr', eps=1., steps=20, image=181)
    assert 'all 24 noises' in e.words.value and len(shown(e)['confidence'].x) == 0
    e.controls['problem'].value, e.controls['sigma'].value = 'half-space', .05
    check(e, model='acr', eps=1., steps=20, image=181, problem='half-space', sigma=.05)

def test_controls_clamp():
    e = SphereExplorer()
    for name, wild, kept in [('steps', 99, 20), ('steps', -1, 0), ('eps', 7, 1), ('eps', 0, .05), ('image', 10**6, 359),
                             ('image', -1, 0), ('point', 999, 199), ('sigma', 9, .35)]:
        e.controls[name].value = wild
        assert e.controls[name].value == pytest.approx(kept)
    check(e, steps=0, eps=.05, image=0, point=199, sigma=.35)

def test_a_missing_file_is_said_and_survived(monkeypatch, tmp_path):
    e = SphereExplorer()
    before = e.fig.to_json()
    with monkeypatch.context() as patch:
        patch.setattr('rs_toolkit.explore.sphere.data_folder', lambda: tmp_path)
        e.controls['model'].value = 'acr'
        assert e.worker.wait() and 'role="alert"' in e.words.value and 'no checkpoint at' in e.words.value
    assert e.fig.to_json() == before
    e.controls['model'].value = 'catrs'
    check(e, model='catrs')

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = SphereExplorer()
    monkeypatch.setattr('rs_toolkit.explore.sphere.plane_traces', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): e.controls['steps'].value = 5
    assert 'role="alert"' in e.words.value and 'division' in e.words.value

def test_a_bug_in_the_background_is_shown(monkeypatch):
    e = SphereExplorer()
    monkeypatch.setattr('rs_toolkit.explore.sphere.walk', lambda *args: 1/0)
    e.controls['eps'].value = .5
    assert e.worker.wait() and 'role="alert"' in e.words.value and 'division' in e.words.value
