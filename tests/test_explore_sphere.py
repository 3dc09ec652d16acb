"""The sphere explorer: every control by hand, against the attack as training calls it.

Here an exception in a callback comes out of the assignment."""
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import pytest
import torch

from explorer import HOSTILE, clamps, complains, move, shown
from rs_toolkit import checkpoint
from rs_toolkit.attacks import sphere_attack
from rs_toolkit.common import data_folder
from rs_toolkit.data import CRAFTING, image_keys, load, photographs
from rs_toolkit.explore import sphere
from rs_toolkit.explore.core import middles
from rs_toolkit.explore.smooth import CIFAR10
from rs_toolkit.explore.sphere import SphereExplorer
from rs_toolkit.explore.toy import PROBLEMS, train_toy
from rs_toolkit.gradients import gradient_norms
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.noise import gaussian_noise

START = dict(steps=10, eps=.25, norm=2, model='gaussian4', image=2, problem='two moons', point=53, sigma=.15)
toy = lru_cache(train_toy)
pytestmark = pytest.mark.usefixtures('digits_first')

def digits_model(name): return checkpoint.load(data_folder()/'digits-methods/equal_epochs'/name)

@dataclass
class Seen:
    "The noisy copies of an image at one moment, and what the network makes of them."
    copies: torch.Tensor      # [m, C, H, W]
    confidence: torch.Tensor  # [m] in the label
    right: torch.Tensor       # [m]

def look(model, copies, label):
    with torch.no_grad(): p = model(copies).softmax(1)
    return Seen(copies, p[:, label], p.argmax(1) == label)

def attacked(model, images, labels, at, sigma, *, eps, steps, norm):
    "24 noises of an image before and after the attack."
    x = images[[at]]
    y = labels[[at]]
    noise = gaussian_noise(x, sigma, 24, image_keys(0, 0, torch.tensor([at]), CRAFTING))
    moved = sphere_attack(model, x, y, noise, eps=eps, steps=steps, norm=norm) if steps else noise
    return [look(model, x + v[:, 0], y[0]) for v in (noise, moved)]

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
    np.testing.assert_array_equal(halves[:, 0], halves[:, 1, ::-1])
    return halves[:, 1, 0]

def points_of(trace): return np.stack([trace.x, trace.y], -1).reshape(-1, 2)

def inside(shape, points):
    "Whether points lie in a filled shape: a ray to the right crosses its rims an odd number of times."
    rim = np.stack([shape.x, shape.y])
    x0, y0 = rim[:, :-1, None]
    x1, y1 = rim[:, 1:, None]
    x, y = np.asarray(points, float).T
    with np.errstate(divide='ignore', invalid='ignore'): crossing = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
    crossed = ((y0 > y) != (y1 > y)) & (crossing > x) & ~np.isnan(x1 + x0)
    return crossed.sum(0) % 2 == 1

def check_digit(e, s):
    "The confidence along the way, and the pictures of a noise before and after."
    t = shown(e)
    images, labels = load('digits', 'test')
    how = dict(eps=s['eps'], steps=s['steps'], norm=s['norm'])
    before, after = attacked(digits_model(s['model']), images, labels, s['image'], .5, **how)
    if before.right.any():
        assert (f"<b>{(~before.right).sum()} of 24</b> noises; wrong after {s['steps']} steps: "
                f"<b>{(~after.right).sum()}</b>") in e.words.value
    else: assert 'all 24 noises are wrong from the start' in e.words.value
    first = before.right.int().argmax()
    for k, image in enumerate([images[s['image']], before.copies[first], after.copies[first]]):
        drawn = np.asarray(t['pictures'].z)[:, 9*k:9*k + 8, 0] / 255
        np.testing.assert_allclose(drawn, image[0].clamp(0, 1), atol=.51 / 255)
    mean = t['mean confidence']
    assert len(mean.x) == s['steps'] + 1
    np.testing.assert_allclose([mean.y[0], mean.y[-1]], [before.confidence.mean(), after.confidence.mean()], atol=1e-5)
    assert list(t['mean now'].x) == [s['steps']]
    last = [*ends(t['confidence'], before.right.sum()),
            *ends(t['confidence, wrong from the start'], (~before.right).sum())]
    np.testing.assert_allclose(sorted(last), after.confidence.sort().values, atol=1e-5)
    assert len(middles(t['confidence where wrong'])) == (before.right & ~after.right).sum()

def check_plane(e, s):
    "The noises of the point, and where the network is wrong."
    t = shown(e)
    images, labels = PROBLEMS[s['problem']]()
    model = toy(s['problem'])
    same_angle = s['eps'] * s['sigma'] * 2**.5 / 4
    how = dict(eps=same_angle, steps=s['steps'], norm=s['norm'])
    before, after = attacked(model, images, labels, s['point'], s['sigma'], **how)
    np.testing.assert_allclose(middles(t['drawn']), before.copies[before.right].flatten(1), atol=1e-5)
    expected = {'stay': before.copies[~before.right],
                'found': after.copies[before.right & ~after.right],
                'still right': after.copies[after.right]}
    for name, copies in expected.items():
        np.testing.assert_allclose(points_of(t[name]), copies.flatten(1), atol=1e-5, err_msg=name)
    assert (f"<b>In the plane</b> ({s['problem']}), wrong from the start, and unmoved: "
            f"<b>{(~before.right).sum()} of 24</b>") in e.words.value
    assert points_of(t['point']).tolist() == [images[s['point']].flatten().tolist()]
    here = torch.rand(2000, 2, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - .5
    with torch.no_grad(): wrong = model(here).argmax(1) != labels[s['point']]
    assert (inside(t['error'], here.flatten(1)) != wrong.numpy()).mean() < .005     # along the line

def check_gradients(e, s):
    "The gradients of many digits, before and after."
    t = shown(e)
    before = gradients(s['model'], s['eps'], 0, s['norm'])
    after = gradients(s['model'], s['eps'], s['steps'], s['norm'])
    for name, frame, shift in [('before', before, .03), ('after', after, .07)]:
        np.testing.assert_allclose(t[name].y, frame.grad_norm, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(t[name].x, np.minimum(frame.p_a * 100 // 10, 9) / 10 + shift, err_msg=name)
    easy = after.grad_norm[after.p_a > .5].mean()
    hard = after.grad_norm[after.p_a < .5].mean()
    assert f'then <b>{easy / hard:.2f}</b>.' in e.words.value

def check(e, **moved):
    "Every panel and the words against the attack."
    assert e.worker.wait()
    assert 'role="status"' in e.words.value
    assert '...' not in e.words.value
    for panel in check_digit, check_plane, check_gradients: panel(e, START | moved)

@pytest.fixture(scope='module', autouse=True)
def opening():
    "The picture with which most tests begin is computed once."
    remembered = lru_cache(sphere.all_work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sphere, 'all_work', lambda s: dict(remembered(s)))
        yield

MOVES = dict(steps=3, eps=.5, norm='inf', model='acr', image=8, problem='spirals', point=10, sigma=.3)

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = SphereExplorer()
    assert e.controls.keys() == MOVES.keys()
    assert e.values == START
    before = e.fig.to_json()
    e.controls[control].value = MOVES[control]
    check(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before

def test_as_it_opens_and_all_controls_together():
    e = SphereExplorer()
    check(e)
    move(e, **MOVES)                                                # faster than the work: the newest wins
    check(e, **MOVES)
    check(SphereExplorer(**MOVES), **MOVES)

def test_every_number_of_steps():
    "The slider looks things up: each press moves something, and no norm changes."
    e = SphereExplorer()
    thread = e.worker.thread
    pictures = set()
    for steps in range(21):
        e.controls['steps'].value = steps
        t = shown(e)
        pictures.add((len(t['mean confidence'].x), *t['mean now'].y))
        now = np.concatenate([points_of(t[name]) for name in ['stay', 'found', 'still right']])
        drawn = np.concatenate([points_of(t['stay']), middles(t['drawn'])])
        radii = [np.sort(np.hypot(*(points - points_of(t['point'])).T)) for points in (now, drawn)]
        np.testing.assert_allclose(*radii, rtol=1e-4, err_msg=f'after {steps} steps')
        assert f'wrong after {steps} steps' in e.words.value
    assert len(pictures) == 21
    assert e.worker.thread is thread

@pytest.mark.parametrize('here', [True, False], ids=['CIFAR-10 at hand', 'photographs'])
def test_real_images(here, monkeypatch):
    "The networks of CIFAR-10 have its test images, or the photographs; their noises move on larger spheres."
    images, labels, _ = photographs()
    monkeypatch.setattr('rs_toolkit.explore.smooth.is_here', lambda dataset: here)
    if here:
        images = images.flip(0)
        labels = torch.arange(20) % 10
        monkeypatch.setattr('rs_toolkit.explore.smooth.load', lambda *what: (images, labels))
    sphere.real_subject.cache_clear()
    model = checkpoint.load(data_folder()/'cifar10-gaussian')
    if not here:
        with torch.no_grad(): labels = torch.where(labels < 0, model(images).argmax(1), labels)
    e = SphereExplorer()
    move(e, model='cifar10-gaussian', image=359, steps=2)           # a digit's number: the last image instead
    assert e.worker.wait(120)
    assert e.controls['image'].value == 19
    how = dict(eps=.25, steps=2, norm=2)
    before, after = attacked(model, images, labels, 19, .25, **how)
    mean = shown(e)['mean confidence']
    np.testing.assert_allclose([mean.y[0], mean.y[-1]], [before.confidence.mean(), after.confidence.mean()], atol=1e-4)
    shape = np.asarray(shown(e)['pictures'].z)[:, :32, :3].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(shape, images[19], atol=.51 / 255)
    name = CIFAR10[labels[19]] if here else f'taken for {CIFAR10[labels[19]]}'
    assert f'<b>Image 19, {name}</b> (CIFAR-10, Gaussian)' in e.words.value
    assert shown(e)['titles'].text[0] == name
    assert len(shown(e)['before'].y) == 20
    move(e, model='gaussian4')
    check(e, image=19, steps=2)
    assert e.controls['image'].max == 359
    sphere.real_subject.cache_clear()

def test_names_of_classes_are_text(monkeypatch):
    named = replace(sphere.subject('gaussian4'), classes=(HOSTILE,) * 10)
    monkeypatch.setattr(sphere, 'subject', lambda name: named)
    titles = sphere.picture_traces(sphere.image_walk('gaussian4', 2, .25, 2), 3)['titles']['text']
    assert titles[0] == '&lt;img src=x onerror=alert(1)&gt;'

def test_a_number_in_digits_of_a_browser_begins_nothing():
    e = SphereExplorer()
    move(e, eps=np.nextafter(.25, 1))
    move(e, steps=3)
    assert e.worker.thread is None and 'after 3 steps' in e.words.value

def test_corners():
    "An image whose noises are all wrong, and the longest and shortest steps, break nothing."
    e = SphereExplorer(model='acr', eps=1., steps=20)
    e.controls['image'].value = 181
    check(e, model='acr', eps=1., steps=20, image=181)
    assert 'all 24 noises' in e.words.value
    assert len(shown(e)['confidence'].x) == 0
    move(e, problem='half-space', sigma=.05)
    check(e, model='acr', eps=1., steps=20, image=181, problem='half-space', sigma=.05)

def test_controls_clamp():
    e = SphereExplorer()
    for name, wild, kept in [('steps', 99, 20), ('steps', -1, 0), ('eps', 7, 1), ('eps', 0, .05),
                             ('image', 10**6, 359), ('image', -1, 0), ('point', 999, 199), ('sigma', 9, .35)]:
        assert clamps(e, name, wild) == pytest.approx(kept), name
    check(e, steps=0, eps=.05, image=0, point=199, sigma=.35)

def test_a_missing_file_is_said_and_survived(monkeypatch, tmp_path):
    e = SphereExplorer()
    before = e.fig.to_json()
    with monkeypatch.context() as patch:
        patch.setattr('rs_toolkit.explore.sphere.data_folder', lambda: tmp_path)
        e.controls['model'].value = 'acr'
        assert e.worker.wait()
        assert complains(e, 'no checkpoint at')
    assert e.fig.to_json() == before
    e.controls['model'].value = 'catrs'
    check(e, model='catrs')

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = SphereExplorer()
    monkeypatch.setattr('rs_toolkit.explore.sphere.plane_traces', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): e.controls['steps'].value = 5
    assert complains(e, 'division')

def test_a_bug_in_the_background_is_shown(monkeypatch):
    e = SphereExplorer()
    monkeypatch.setattr('rs_toolkit.explore.sphere.walk', lambda *args: 1/0)
    e.controls['eps'].value = .5
    assert e.worker.wait()
    assert complains(e, 'division')
