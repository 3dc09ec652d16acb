"""The sphere explorer: every control by hand, against the attack as training calls it."""
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import pytest
import torch

from explorer import clamps, complains, move, shown
from rs_toolkit import checkpoint
from rs_toolkit.attacks import sphere_attack
from rs_toolkit.common import data_folder
from rs_toolkit.data import CRAFTING, image_keys, load
from rs_toolkit.explore import sphere
from rs_toolkit.explore.core import middles
from rs_toolkit.explore.sphere import SphereExplorer
from rs_toolkit.explore.toy import PROBLEMS, train_toy
from rs_toolkit.gradients import gradient_norms
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.noise import gaussian_noise

START = dict(steps=10, eps=.25, norm=2, model='gaussian4', image=2, problem='two moons', point=53, sigma=.15)
toy = lru_cache(train_toy)
opening = lru_cache(sphere.all_work)

@pytest.fixture(autouse=True)
def opens_at_once(monkeypatch):
    "What a page opens with is computed once for all tests."
    monkeypatch.setattr(sphere, 'all_work', lambda s: dict(opening(s)))

def digits_model(name): return checkpoint.load(data_folder()/'digits-methods/equal_epochs'/name)

@dataclass
class Copies:
    "Noisy copies of an image."
    images: torch.Tensor       # [24, C, H, W]
    confidence: torch.Tensor   # [24], in the label
    right: torch.Tensor        # [24]

def copies(model, x, y, noise):
    with torch.no_grad(): p = model(x + noise[:, 0]).softmax(1)
    return Copies(x + noise[:, 0], p[:, y[0]], p.argmax(1) == y)

def attacked(model, images, labels, at, sigma, eps, steps, norm):
    "24 noisy copies of an image before and after, by the attack itself."
    x = images[[at]]
    y = labels[[at]]
    noise = gaussian_noise(x, sigma, 24, image_keys(0, 0, torch.tensor([at]), CRAFTING))
    moved = sphere_attack(model, x, y, noise, eps=eps, steps=steps, norm=norm) if steps else noise
    return copies(model, x, y, noise), copies(model, x, y, moved)

@lru_cache
def gradients(model, eps, steps, norm):
    attack = partial(sphere_attack, eps=eps, steps=steps, norm=norm) if steps else None
    images, labels = (v[::8] for v in load('digits', 'train'))
    method = Gaussian(.5, num_noise=4, attack=attack)
    return gradient_norms(digits_model(model), method, images, labels, batch_size=180, progress=False)

def ends(trace, strands):
    "The last point of each strand, from which it returns."
    if not strands: return []
    halves = np.asarray(trace.y).reshape(strands, 2, -1)
    assert np.array_equal(halves[:, 0], halves[:, 1, ::-1])
    return halves[:, 1, 0]

def inside(shape, points):
    "Whether points lie in a filled shape: a ray to the right crosses its rims an odd number of times."
    shape = np.stack([shape.x, shape.y])
    x0, y0 = shape[:, :-1, None]
    x1, y1 = shape[:, 1:, None]
    x, y = np.asarray(points, float).T
    with np.errstate(divide='ignore', invalid='ignore'):
        at_right = x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x
    crossed = ((y0 > y) != (y1 > y)) & at_right & ~np.isnan(x1 + x0)
    return crossed.sum(0) % 2 == 1

def spots(trace): return np.stack([trace.x, trace.y], -1).reshape(-1, 2)

def check_digit(t, words, s):
    "The digit, its noisy copies, and the confidence along the way."
    images, labels = load('digits', 'test')
    steps = s['steps']
    model = digits_model(s['model'])
    before, after = attacked(model, images, labels, s['image'], .5, s['eps'], steps, s['norm'])
    wrong = [(~c.right).sum() for c in (before, after)]
    if before.right.any(): assert f"<b>{wrong[0]} of 24</b> noises; wrong after {steps} steps: <b>{wrong[1]}</b>" in words
    else: assert 'all 24 noises are wrong from the start' in words
    first = before.right.int().argmax()
    for k, image in enumerate([images[s['image']], before.images[first], after.images[first]]):
        np.testing.assert_allclose(t['pictures'].z[:, 9*k:9*k + 8], image[0], atol=1e-5)
    mean = t['mean confidence']
    np.testing.assert_allclose(mean.y[0], before.confidence.mean(), atol=1e-5)
    np.testing.assert_allclose(mean.y[-1], after.confidence.mean(), atol=1e-5)
    moving = ends(t['confidence'], before.right.sum())
    still = ends(t['confidence, wrong from the start'], wrong[0])
    np.testing.assert_allclose(sorted([*moving, *still]), after.confidence.sort().values, atol=1e-5)
    assert len(middles(t['confidence where wrong'])) == (before.right & ~after.right).sum()
    assert list(t['mean now'].x) == [steps] and len(mean.x) == steps + 1

def check_plane(t, words, s):
    "The point in the plane, its noises, and the region where the network is wrong."
    images, labels = PROBLEMS[s['problem']]()
    model = toy(s['problem'])
    same_angle = s['eps'] * s['sigma'] * 2**.5 / 4
    before, after = attacked(model, images, labels, s['point'], s['sigma'], same_angle, s['steps'], s['norm'])
    expected = {'stay': before.images[~before.right], 'drawn': before.images[before.right],
                'found': after.images[before.right & ~after.right], 'still right': after.images[after.right]}
    for name, points in expected.items():
        there = middles(t[name]) if name == 'drawn' else spots(t[name])
        np.testing.assert_allclose(there, points.flatten(1), atol=1e-5, err_msg=name)
    where = f"<b>In the plane</b> ({s['problem']})"
    assert f"{where}, wrong from the start, and unmoved: <b>{(~before.right).sum()} of 24</b>" in words
    np.testing.assert_array_equal(spots(t['point']), [images[s['point']].flatten()])
    here = torch.rand(2000, 2, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - .5
    with torch.no_grad(): wrong = model(here).argmax(1) != labels[s['point']]
    missed = inside(t['error'], here.flatten(1)) != wrong.numpy()
    assert missed.mean() < .005                                 # but for the width of a cell, along the line

def check_gradients(t, words, s):
    "The boxes, and the ratio that the words name."
    before, after = (gradients(s['model'], s['eps'], steps, s['norm']) for steps in (0, s['steps']))
    for name, frame, shift in [('before', before, .03), ('after', after, .07)]:
        np.testing.assert_allclose(t[name].y, frame.grad_norm, rtol=1e-3)
        np.testing.assert_allclose(t[name].x, np.minimum(frame.p_a * 100 // 10, 9) / 10 + shift)
    easy = after.grad_norm[after.p_a > .5].mean()
    hard = after.grad_norm[after.p_a < .5].mean()
    assert f'<b>{easy / hard:.2f}</b> after' in words

def check(e, **moved):
    "Every panel and the words against the attack."
    assert e.worker.wait()
    s = START | moved
    t = shown(e)
    words = e.words.value
    assert 'role="status"' in words and '...' not in words
    check_digit(t, words, s)
    check_plane(t, words, s)
    check_gradients(t, words, s)

MOVES = dict(steps=3, eps=.5, norm='inf', model='acr', image=8, problem='spirals', point=10, sigma=.3)

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = SphereExplorer()
    assert e.controls.keys() == MOVES.keys() and e.values == START
    before = e.fig.to_json()
    move(e, **{control: MOVES[control]})
    check(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before

def test_as_it_opens_and_all_controls_together():
    e = SphereExplorer()
    check(e)
    move(e, **MOVES)                                                    # faster than the work: the newest wins
    check(e, **MOVES)
    check(SphereExplorer(**MOVES), **MOVES)

def test_every_number_of_steps():
    "The slider looks things up: each press moves something, and no norm changes."
    e = SphereExplorer()
    seen = set()
    thread = e.worker.thread
    for steps in range(21):
        move(e, steps=steps)
        t = shown(e)
        seen.add(str([list(t['mean confidence'].x), list(t['mean now'].y)]))
        now = np.concatenate([spots(t[name]) for name in ['stay', 'found', 'still right']])
        drawn = np.concatenate([spots(t['stay']), middles(t['drawn'])])
        radii = [np.hypot(*(points - spots(t['point'])).T) for points in (now, drawn)]
        np.testing.assert_allclose(np.sort(radii[0]), np.sort(radii[1]), rtol=1e-4)
        assert f'wrong after {steps} steps' in e.words.value
    assert len(seen) == 21 and e.worker.thread is thread

def test_corners():
    "An image whose noises are all wrong, and the longest and shortest steps, break nothing."
    e = SphereExplorer(model='acr', eps=1., steps=20)
    move(e, image=181)
    check(e, model='acr', eps=1., steps=20, image=181)
    assert 'all 24 noises' in e.words.value and len(shown(e)['confidence'].x) == 0
    move(e, problem='half-space', sigma=.05)
    check(e, model='acr', eps=1., steps=20, image=181, problem='half-space', sigma=.05)

CLAMPED = [('steps', 99, 20), ('steps', -1, 0), ('eps', 7, 1), ('eps', 0, .05), ('image', 10**6, 359), ('image', -1, 0),
           ('point', 999, 199), ('sigma', 9, .35)]

def test_controls_clamp():
    e = SphereExplorer()
    for name, wild, kept in CLAMPED: assert clamps(e, name, wild) == pytest.approx(kept), (name, wild)
    check(e, steps=0, eps=.05, image=0, point=199, sigma=.35)

def test_a_missing_file_is_said_and_survived(monkeypatch, tmp_path):
    e = SphereExplorer()
    before = e.fig.to_json()
    with monkeypatch.context() as patch:
        patch.setattr('rs_toolkit.explore.sphere.data_folder', lambda: tmp_path)
        move(e, model='acr')
        assert e.worker.wait() and complains(e, 'no checkpoint at')
    assert e.fig.to_json() == before
    move(e, model='catrs')
    check(e, model='catrs')

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = SphereExplorer()
    monkeypatch.setattr('rs_toolkit.explore.sphere.plane_traces', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): move(e, steps=5)
    assert complains(e, 'division')

def test_a_bug_in_the_background_is_shown(monkeypatch):
    e = SphereExplorer()
    monkeypatch.setattr('rs_toolkit.explore.sphere.walk', lambda *args: 1/0)
    move(e, eps=.5)
    assert e.worker.wait() and complains(e, 'division')
