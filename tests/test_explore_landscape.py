"""The landscape explorer: every control by hand, a click, training in the background.

Truth comes from the network's answers to noise, and from the closed form.
"""
import threading

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import beta

from explorer import clamps, complains, move, shown
from rs_toolkit.explore import landscape
from rs_toolkit.explore.core import middles
from rs_toolkit.explore.landscape import SCENES, LandscapeExplorer
from rs_toolkit.explore.toy import PROBLEMS, TOY_METHODS

COLOURS = dict(blue=landscape.BLUE, orange=landscape.ORANGE)

def radius_of(trace, x, y): return np.hypot(trace.x[:-1] - x, trace.y[:-1] - y)

def end_of(trace): return np.array([trace.x[1], trace.y[1]])

def answers(model, points):
    images = torch.tensor(np.asarray(points), dtype=torch.float32).reshape(-1, 2, 1, 1)
    return model(images).argmax(1).numpy()

def certified(share, sigma, n, alpha):
    "The radius that such a share of the votes certifies."
    k = round(n * share)
    bound = beta.ppf(alpha, k, n - k + 1) if k < n else alpha**(1/n)
    return sigma * max(ndtri(bound), 0)

def check_fields(t, model, share):
    "Some cells of both panels, and the smoothed boundary, against answers to noise."
    smoothed = t['smoothed']
    for column, row in [(3, 44), (14, 31), (25, 25), (40, 8)]:
        expected = share(smoothed.x[column], smoothed.y[row])
        np.testing.assert_allclose(smoothed.z[row][column], expected, atol=.017)
    base = t['base']
    for column, row in [(10, 90), (50, 55), (90, 10)]:
        z = base.z[row][column]
        if z in (0, 1): assert answers(model, [[base.x[column], base.y[row]]])[0] == z
    line = np.stack([t['boundary'].x, t['boundary'].y], 1)
    ties = line[~np.isnan(line).any(1)][::20]
    np.testing.assert_allclose([share(*q) for q in ties], .5, atol=.03)

def check_points(t, model, problem, sigma, x, y):
    "Training points, and the noisy copies of the chosen one."
    images, labels = PROBLEMS[problem](120)
    for i, name in enumerate(COLOURS):
        np.testing.assert_allclose(middles(t[f'{name} training']), images[labels == i].flatten(1), atol=1e-6)
        assert (answers(model, middles(t[f'{name} copies'])) == i).all()
    spread = np.concatenate([middles(t[f'{name} copies']) for name in COLOURS]) - [x, y]
    assert len(spread) == 100 and abs(spread.std() / sigma - 1) < .15
    for trace in ['point', 'point, left']: assert (t[trace].x[0], t[trace].y[0]) == (x, y)

def check_balls(t, words, p, top, sigma, n, alpha, x, y):
    "The certified ball, within what other votes might certify, and the ball if p_A were known."
    slack = 5 * np.sqrt(p * (1 - p)) * (n**-.5 + 20_000**-.5) + 1e-3
    low, high = (certified(q, sigma, n, alpha) for q in np.clip([p - slack, p + slack], 0, 1))
    if len(t['ball'].x):
        ball = radius_of(t['ball'], x, y)
        np.testing.assert_allclose(ball, ball[0])
        assert low - 1e-6 <= ball[0] <= high + 1e-6
        np.testing.assert_array_equal(t['ball'].x, t['ball, left'].x)
        name = [*COLOURS][top]
        assert f'say <b style="color:{COLOURS[name]}">{name}</b>' in words
    else: assert low == 0 and 'Abstain' in words
    known = radius_of(t['ball if known'], x, y)[0]
    np.testing.assert_allclose(known, sigma * ndtri(p), atol=sigma * slack / np.exp(-ndtri(p)**2/2) * 2.6)

def check(e, sigma=.1, n=10_000, alpha=.001, problem='two moons', method='Gaussian', x=.28, y=.62):
    "The picture against votes that this test draws itself."
    t = shown(e)
    model = SCENES[problem, method].model
    noise = sigma * np.random.default_rng(7).standard_normal((20_000, 2))
    def share(px, py): return answers(model, noise + [px, py]).mean()                      # of orange votes
    check_fields(t, model, share)
    check_points(t, model, problem, sigma, x, y)
    orange = share(x, y)
    top = int(orange > .5)
    check_balls(t, e.words.value, max(orange, 1 - orange), top, sigma, n, alpha, x, y)
    np.testing.assert_allclose(share(*end_of(t['way out'])), .5, atol=.03)
    adversary = end_of(t['adversary'])
    out = (adversary - [x, y]) / np.hypot(*(adversary - [x, y]))
    assert [*answers(model, [adversary - .01*out, adversary + .01*out])] == [top, 1 - top]
    assert f'{n:,} noisy copies' in e.words.value and 'role="status"' in e.words.value

MOVES = dict(sigma=.2, n=1000, alpha=1e-6, problem='spirals', method='SmoothAdv', x=.6, y=.8)

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = LandscapeExplorer()
    assert e.controls.keys() == MOVES.keys()
    check(e)
    before = e.fig.to_json()
    move(e, **{control: MOVES[control]})
    assert e.worker.wait()
    check(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before

def test_all_controls_together_and_back():
    e = LandscapeExplorer(**MOVES)
    check(e, **MOVES)
    fresh = LandscapeExplorer()
    move(e, **fresh.values)
    assert e.worker.wait()
    check(e)
    expected = shown(fresh)
    for name, trace in shown(e).items():                       # sending only what has changed leaves nothing behind
        for key in {*'xyz'} & {*trace}: np.testing.assert_array_equal(trace[key], expected[name][key])
    def notes(e): return [(note.text, note.x, note.y, note.visible) for note in e.fig.layout.annotations[2:]]
    assert notes(e) == notes(fresh)

def test_the_half_space_in_closed_form():
    e = LandscapeExplorer(problem='half-space', x=.2, y=.3, sigma=.15, n=100_000)
    t = shown(e)
    distance = .7 - .8*.2 - .6*.3
    foot = [.2 + .8*distance, .3 + .6*distance]
    np.testing.assert_allclose(radius_of(t['ball if known'], .2, .3), distance, atol=2e-4)
    for name in 'adversary', 'way out': np.testing.assert_allclose(end_of(t[name]), foot, atol=2e-3)
    assert distance - .02 < radius_of(t['ball'], .2, .3)[0] < distance
    x, y = np.meshgrid(t['smoothed'].x, t['smoothed'].y)
    np.testing.assert_allclose(t['smoothed'].z, ndtr((.8*x + .6*y - .7) / .15), atol=2e-3)
    for name, sign in dict(blue=-1, orange=1).items():                                # not one ball crosses the line
        balls = t[f'{name} balls']
        side = .8 * balls.x + .6 * balls.y - .7
        side = side[~np.isnan(side)]
        assert len(side) and (sign * side > -.003).all(), name

def test_words():
    e = LandscapeExplorer()
    assert 'adversarial point of the base classifier lies inside the ball' in e.words.value
    assert 'Of all 120 training points, 92%' in e.words.value
    move(e, x=.37, y=.6)
    assert any(words in e.words.value for words in ['itself answers', 'inside the ball', 'Abstain']), e.words.value
    move(e, problem='half-space', x=.5, y=.5)
    assert '<b>Abstain.</b>' in e.words.value and not len(shown(e)['ball'].x)
    move(e, x=.2)
    assert 'errs first 0.240 away, outside the ball' in e.words.value and 'boundary is 0.240 away' in e.words.value

def test_a_promise_that_was_too_large_is_said():
    "One in ten may be, at alpha = .1; these votes are among them."
    e = LandscapeExplorer(problem='half-space', x=.52, y=.5, alpha=.1)
    assert radius_of(shown(e)['ball'], .52, .5)[0] > .016 and 'Too much was promised' in e.words.value
    move(e, alpha=.001)
    assert 'Too much' not in e.words.value

def test_a_classifier_without_a_boundary(monkeypatch):
    def always(x): return torch.tensor([1., 0.]).repeat(len(x), 1)
    square = np.stack([np.ones((100, 100)), np.zeros((100, 100))])
    around = np.pad(square, [(0, 0), (120, 120), (120, 120)], mode='edge')
    scene = landscape.Scene(always, *PROBLEMS['half-space'](120), square, around)
    monkeypatch.setitem(SCENES, ('half-space', 'MACER'), scene)
    e = LandscapeExplorer(problem='half-space', method='MACER')
    assert 'nowhere in the square' in e.words.value and 'everywhere in the square' in e.words.value
    assert 'inf' not in e.words.value
    t = shown(e)
    assert radius_of(t['ball if known'], .28, .62)[0] == pytest.approx(.1 * ndtri(1 - 1e-9))
    assert not len(t['boundary'].x) and not len(t['way out'].x) and not e.fig.layout.annotations[2].visible

@pytest.mark.parametrize('sigma', [.02, .3])
@pytest.mark.parametrize('n', [100, 100_000])
def test_corners(sigma, n):
    for x, y in [(0, 0), (0, 1), (1, 0), (1, 1), (.5, .5)]:
        e = LandscapeExplorer(sigma=sigma, n=n, alpha=1e-6, x=x, y=y)
        for word in 'inf', 'nan', 'alert': assert word not in e.words.value, (x, y)
        t = shown(e)
        for name in 'ball', 'ball if known': assert np.isfinite(t[name].x[:-1]).all(), (x, y)
        assert 0 <= t['smoothed'].z.min() and t['smoothed'].z.max() <= 1, (x, y)

@pytest.mark.parametrize('panel', [0, 1])
def test_a_click_moves_the_point(panel):
    e = LandscapeExplorer()
    assert [t.name for t in e.fig.data[:2]] == ['base', 'smoothed']
    mouse = dict(alt=False, ctrl=False, meta=False, shift=False, button=0, buttons=1)
    points = dict(trace_indexes=[panel], point_indexes=[[70, 40]], xs=[.41], ys=[.71])
    click = dict(event_type='plotly_click', selector=None, device_state=mouse, points=points)
    e.fig._js2py_pointsCallback = click                                                         # what the browser sends
    assert (e.controls['x'].value, e.controls['y'].value) == (.41, .71)
    check(e, x=.41, y=.71)

def test_training_does_not_block_and_tells_how_far_it_is(monkeypatch):
    monkeypatch.delitem(SCENES, ('spirals', 'MACER'), raising=False)
    landscape.scene('spirals', 'Gaussian')                                                      # the classifier before
    e = LandscapeExplorer()
    may = threading.Event()
    train = landscape.train_toy
    said = []
    def slow(*args, watch, **kwargs):
        assert may.wait(30)
        return train(*args, watch=watch, **kwargs)
    monkeypatch.setattr(landscape, 'train_toy', slow)
    move(e, problem='spirals', method='MACER')
    assert 'Training MACER on spirals' in e.words.value
    move(e, sigma=.2)                                             # the page goes on with the classifier before
    check(e, sigma=.2, problem='spirals')
    assert 'Training MACER on spirals' in e.words.value
    e.words.observe(lambda change: said.append(change.new), 'value')
    may.set()
    assert e.worker.wait()
    assert sum('epoch' in words for words in said) >= 99 and 'Training' not in e.words.value
    check(e, sigma=.2, problem='spirals', method='MACER')

def test_the_last_wish_counts(monkeypatch):
    for method in 'MACER', 'sphere attack': monkeypatch.delitem(SCENES, ('two moons', method), raising=False)
    e = LandscapeExplorer()
    move(e, method='MACER')
    first = e.worker.thread
    move(e, method='sphere attack')
    assert e.worker.wait()
    first.join(60)
    check(e, method='sphere attack')
    move(e, method='MACER')                                       # and back, before anything is trained
    move(e, method='sphere attack')
    assert e.worker.wait()
    check(e, method='sphere attack')

def test_an_error_in_training_is_said_and_survived(monkeypatch):
    monkeypatch.delitem(SCENES, ('spirals', 'Consistency'), raising=False)
    def broken(*args, **kwargs): raise FloatingPointError('the loss term agree is not finite')
    e = LandscapeExplorer()
    with monkeypatch.context() as patch:
        patch.setattr(landscape, 'train_toy', broken)
        move(e, problem='spirals')
        assert e.worker.wait()
        move(e, method='Consistency')
        assert e.worker.wait() and complains(e, 'not finite')
    move(e, problem='two moons', method='Gaussian')
    check(e)

CLAMPED = [('sigma', 9, .3), ('sigma', 0, .02), ('n', 1e9, 1e5), ('n', 1, 100), ('alpha', 1, .1), ('alpha', 0, 1e-6),
           ('x', 2, 1), ('y', -1, 0)]

def test_controls_clamp_and_offer_everything():
    e = LandscapeExplorer(problem='half-space')
    for name, wild, kept in CLAMPED: assert clamps(e, name, wild) == pytest.approx(kept), (name, wild)
    assert e.controls['problem'].options == tuple(PROBLEMS)
    assert e.controls['method'].options == tuple(TOY_METHODS)
    with pytest.raises(ValueError, match='unknown toy'): landscape.scene('moons', 'Gaussian')

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = LandscapeExplorer()
    monkeypatch.setattr(landscape, 'landscape_traces', lambda s: 1/0)
    with pytest.raises(ZeroDivisionError): move(e, sigma=.2)
    assert complains(e, 'division')
