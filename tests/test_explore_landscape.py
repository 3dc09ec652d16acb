"""The landscape explorer: every control by hand, a click, training in the background.

Truth comes from the network's answers to noise, and from the closed form."""
import re
import threading

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import beta

from explorer import clamps, click, complains, drag_about, move, shown
from rs_toolkit.explore import landscape
from rs_toolkit.explore.core import middles
from rs_toolkit.explore.landscape import OWN, SCENES, Landscape, LandscapeExplorer
from rs_toolkit.explore.toy import PROBLEMS, TOY_METHODS

def radius_of(trace, x, y): return np.hypot(trace.x[:-1] - x, trace.y[:-1] - y)

def answers(model, points):
    images = torch.tensor(np.asarray(points), dtype=torch.float32).reshape(-1, 2, 1, 1)
    return model(images).argmax(1).numpy()

def radius_from(votes, n, alpha, sigma):
    "The certified radius, by the beta quantile."
    bound = beta.ppf(alpha, votes, n - votes + 1) if votes < n else alpha**(1/n)
    return sigma * max(ndtri(bound), 0)

NOISE = np.random.default_rng(7).standard_normal((20_000, 2))

def orange(model, x, y, sigma):
    "The share of orange votes at a point."
    return answers(model, sigma * NOISE + [x, y]).mean()

def check_fields(e, scene, sigma):
    "The colours of both panels, at some cells, and the line where the vote is a tie."
    t = shown(e)
    smoothed = t['smoothed']
    for column, row in [(3, 44), (14, 31), (25, 25), (40, 8)]:
        truth = orange(scene.model, smoothed.x[column], smoothed.y[row], sigma)
        np.testing.assert_allclose(smoothed.z[row][column], truth, atol=.017, err_msg=f'{column}, {row}')
    base = t['base']
    for column, row in [(10, 90), (50, 55), (90, 10)]:
        z = base.z[row][column]
        if z in (0, 1): assert answers(scene.model, [[base.x[column], base.y[row]]])[0] == z, (column, row)
    line = np.stack([t['boundary'].x, t['boundary'].y], 1)
    ties = [orange(scene.model, *q, sigma) for q in line[~np.isnan(line).any(1)][::20]]
    np.testing.assert_allclose(ties, .5, atol=.03)

def check_points(e, scene, sigma, problem, x, y):
    "The training points, the cloud of noisy copies, and the point."
    t = shown(e)
    images, labels = PROBLEMS[problem](120)
    for label, name in enumerate(['blue', 'orange']):
        np.testing.assert_allclose(middles(t[f'{name} training']), images[labels == label].flatten(1), atol=1e-6)
        assert set(answers(scene.model, middles(t[f'{name} copies'], 3))) <= {label}
    cloud = np.concatenate([middles(t[f'{name} copies'], 3) for name in ['blue', 'orange']]) - [x, y]
    assert len(cloud) == 100
    np.testing.assert_allclose(cloud.std(), sigma, rtol=.15)
    for name in ['point', 'point, left']: assert (t[name].x[0], t[name].y[0]) == (x, y)

def check_balls(e, scene, sigma, n, alpha, x, y):
    "The three lengths at the point, as far as 20,000 votes can tell."
    t = shown(e)
    share = orange(scene.model, x, y, sigma)
    top = int(share > .5)
    p = max(share, 1 - share)
    slack = 5 * np.sqrt(p * (1 - p)) * (n**-.5 + len(NOISE)**-.5) + 1e-3
    low, high = [radius_from(round(n * q), n, alpha, sigma) for q in np.clip([p - slack, p + slack], 0, 1)]
    if len(t['ball'].x):
        ball = radius_of(t['ball'], x, y)
        np.testing.assert_allclose(ball, ball[0])
        assert low - 1e-6 <= ball[0] <= high + 1e-6
        np.testing.assert_array_equal(t['ball'].x, t['ball, left'].x)
        colour = [landscape.BLUE, landscape.ORANGE][top]
        assert f'say <b style="color:{colour}">{["blue", "orange"][top]}</b>' in e.words.value
    else:
        assert low == 0
        assert 'Abstain' in e.words.value
    known = radius_of(t['ball if known'], x, y)[0]
    np.testing.assert_allclose(known, sigma * ndtri(p), atol=sigma * slack / np.exp(-ndtri(p)**2/2) * 2.6)
    np.testing.assert_allclose(orange(scene.model, t['way out'].x[1], t['way out'].y[1], sigma), .5, atol=.03)
    adversary = np.array([t['adversary'].x[1], t['adversary'].y[1]])
    out = (adversary - [x, y]) / np.hypot(*(adversary - [x, y]))
    assert [*answers(scene.model, [adversary - .01*out, adversary + .01*out])] == [top, 1 - top]

def check(e, sigma=.1, n=10_000, alpha=.001, problem='two moons', method='Gaussian', x=.28, y=.62):
    "The picture against votes that this test draws itself."
    scene = SCENES[problem, method, ()]
    check_fields(e, scene, sigma)
    check_points(e, scene, sigma, problem, x, y)
    check_balls(e, scene, sigma, n, alpha, x, y)
    assert f'{n:,} noisy copies' in e.words.value
    assert 'role="status"' in e.words.value

MOVES = dict(sigma=.2, n=1000, alpha=1e-6, problem='spirals', method='SmoothAdv', x=.6, y=.8)

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = LandscapeExplorer()
    assert e.controls.keys() == {*MOVES, 'points'}
    check(e)
    before = e.fig.to_json()
    e.controls[control].value = MOVES[control]
    assert e.worker.wait()
    check(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before

def notes(e): return [(note.text, note.x, note.y, note.visible) for note in e.fig.layout.annotations[2:]]

def test_all_controls_together_and_back():
    e = LandscapeExplorer(**MOVES)
    check(e, **MOVES)
    fresh = LandscapeExplorer()
    for name, control in fresh.controls.items(): e.controls[name].value = control.value
    assert e.worker.wait()
    check(e)
    for name, trace in shown(e).items():                       # sending only what has changed leaves nothing behind
        for key in {*'xyz'} & {*trace}: np.testing.assert_array_equal(trace[key], shown(fresh)[name][key])
    assert notes(e) == notes(fresh)

def test_the_half_space_in_closed_form():
    e = LandscapeExplorer(problem='half-space', x=.2, y=.3, sigma=.15, n=100_000)
    t = shown(e)
    distance = .7 - .8*.2 - .6*.3
    np.testing.assert_allclose(radius_of(t['ball if known'], .2, .3), distance, atol=2e-4)
    for name in 'adversary', 'way out':
        end = t[name].x[1], t[name].y[1]
        np.testing.assert_allclose(end, [.2 + .8*distance, .3 + .6*distance], atol=2e-3, err_msg=name)
    assert distance - .02 < radius_of(t['ball'], .2, .3)[0] < distance
    x, y = np.meshgrid(t['smoothed'].x, t['smoothed'].y)
    np.testing.assert_allclose(t['smoothed'].z, ndtr((.8*x + .6*y - .7) / .15), atol=2e-3)
    for name, sign in [('blue', -1), ('orange', 1)]:                               # not one ball crosses the line
        xs = t[f'{name} balls'].x
        ys = t[f'{name} balls'].y
        side = sign * (.8*xs[~np.isnan(xs)] + .6*ys[~np.isnan(ys)] - .7)
        assert side.min() > -.003, name

def test_words():
    e = LandscapeExplorer()
    assert 'adversarial point of the base classifier lies inside the ball' in e.words.value
    assert 'Of all 120 training points, 92%' in e.words.value
    move(e, x=.37, y=.6)
    assert re.search('itself answers|inside the ball|Abstain', e.words.value)
    move(e, problem='half-space', x=.5, y=.5)
    assert '<b>Abstain.</b>' in e.words.value
    assert not len(shown(e)['ball'].x)
    e.controls['x'].value = .2
    assert 'errs first 0.240 away, outside the ball' in e.words.value
    assert 'boundary is 0.240 away' in e.words.value

def test_a_promise_that_was_too_large_is_said():
    "One in ten may be, at alpha = .1; these votes are among them."
    e = LandscapeExplorer(problem='half-space', x=.52, y=.5, alpha=.1)
    assert radius_of(shown(e)['ball'], .52, .5)[0] > .016
    assert 'Too much was promised' in e.words.value
    e.controls['alpha'].value = .001
    assert 'Too much' not in e.words.value

def test_a_classifier_without_a_boundary(monkeypatch):
    def always(x): return torch.tensor([1., 0.]).repeat(len(x), 1)
    square = np.stack([np.ones((100, 100)), np.zeros((100, 100))])
    around = np.pad(square, [(0, 0), (120, 120), (120, 120)], mode='edge')
    alone = landscape.Scene(always, *PROBLEMS['half-space'](120), square, around)
    monkeypatch.setitem(SCENES, ('half-space', 'MACER', ()), alone)
    e = LandscapeExplorer(problem='half-space', method='MACER')
    assert 'nowhere in the square' in e.words.value
    assert 'everywhere in the square' in e.words.value
    assert 'inf' not in e.words.value
    assert radius_of(shown(e)['ball if known'], .28, .62)[0] == pytest.approx(.1 * ndtri(1 - 1e-9))
    for name in 'boundary', 'way out': assert not len(shown(e)[name].x), name
    assert not e.fig.layout.annotations[2].visible

@pytest.mark.parametrize('sigma', [.02, .3])
@pytest.mark.parametrize('n', [100, 100_000])
def test_corners(sigma, n):
    for x, y in [(0, 0), (0, 1), (1, 0), (1, 1), (.5, .5)]:
        e = LandscapeExplorer(sigma=sigma, n=n, alpha=1e-6, x=x, y=y)
        for word in 'inf', 'nan', 'alert': assert word not in e.words.value, (x, y, e.words.value)
        for name in 'ball', 'ball if known': assert np.isfinite(shown(e)[name].x[:-1]).all(), (x, y, name)
        assert 0 <= shown(e)['smoothed'].z.min() <= shown(e)['smoothed'].z.max() <= 1, (x, y)

@pytest.mark.parametrize('panel', [0, 1])
def test_the_point_can_be_dragged(panel):
    e = LandscapeExplorer()
    drag_about(e, panel)
    assert (e.controls['x'].value, e.controls['y'].value) == (.9, .52)
    check(e, x=.9, y=.52)

@pytest.mark.parametrize('panel', [0, 1])
def test_a_click_moves_the_point(panel):
    e = LandscapeExplorer()
    assert [t.name for t in e.fig.data[:2]] == ['base', 'smoothed']
    e.fig._js2py_pointsCallback = click(panel, .41, .71)
    assert (e.controls['x'].value, e.controls['y'].value) == (.41, .71)
    check(e, x=.41, y=.71)

def test_clicks_add_points_and_the_network_learns_them():
    e = LandscapeExplorer()
    clicks = e.controls['points']
    ways = [value for _, value in clicks.way.options]
    before = np.array(shown(e)['smoothed'].z)
    clicks.way.value = ways[2]                                                    # orange, deep among the blue
    for y in .78, .8, .82: e.fig._js2py_pointsCallback = click(0, .35, y)
    assert clicks.value == ((.35, .78, 1), (.35, .8, 1), (.35, .82, 1)) and e.values['x'] == .28
    np.testing.assert_array_equal(shown(e)['orange added'].y, [.78, .8, .82])
    assert e.worker.wait()
    assert len(e.landscape.scene.labels) == 123 and e.landscape.scene.labels[-3:].tolist() == [1, 1, 1]
    after = np.array(shown(e)['smoothed'].z)
    assert after[40, 17] > before[40, 17]                                         # more orange votes there
    clicks.way.value = ways[-1]
    e.fig._js2py_pointsCallback = click(1, .9, .9)                                # none is near
    assert len(clicks.value) == 3
    e.fig._js2py_pointsCallback = click(1, .35, .79)
    assert len(clicks.value) == 2
    clicks.clear.click()
    assert e.worker.wait()
    check(e)

def test_a_point_is_added_without_a_mouse():
    e = LandscapeExplorer(x=.35, y=.8)
    clicks = e.controls['points']
    clicks.way.value = 1
    clicks.here.click()
    assert clicks.value == ((.35, .8, 1),)
    assert e.worker.wait()
    move(e, problem='half-space')
    clicks.here.click()
    assert len(clicks.value) == 1 and complains(e, 'nobody trains the half-space')

def test_a_page_of_ones_own_points():
    e = LandscapeExplorer(problem=OWN, points=[(.3, .2, 0), (.7, .8, 1)])
    images, labels = e.landscape.scene.images, e.landscape.scene.labels
    np.testing.assert_allclose(images.flatten(1), [[.3, .5], [.7, .5], [.3, .2], [.7, .8]])
    assert answers(e.landscape.scene.model, images.flatten(1)).tolist() == labels.tolist() == [0, 1, 0, 1]
    move(e, problem='half-space')
    e.controls['points'].way.value = 0
    e.fig._js2py_pointsCallback = click(0, .5, .5)
    assert complains(e, 'nobody trains the half-space')

def test_training_does_not_block_and_tells_how_far_it_is(monkeypatch):
    monkeypatch.delitem(SCENES, ('spirals', 'MACER', ()), raising=False)
    landscape.scene('spirals', 'Gaussian')                                        # the classifier before
    e = LandscapeExplorer()
    may = threading.Event()
    train = landscape.train_toy
    def slow(*args, **kwargs):
        assert may.wait(30)
        return train(*args, **kwargs)
    monkeypatch.setattr(landscape, 'train_toy', slow)
    move(e, problem='spirals', method='MACER')
    assert 'Training MACER on spirals' in e.words.value
    e.controls['sigma'].value = .2                                                # the page goes on with the one before
    check(e, sigma=.2, problem='spirals')
    assert 'Training MACER on spirals' in e.words.value
    said = []
    e.words.observe(lambda change: said.append(change.new), 'value')
    may.set()
    assert e.worker.wait()
    assert sum('epoch' in words for words in said) >= 99
    assert 'Training' not in e.words.value
    check(e, sigma=.2, problem='spirals', method='MACER')

def test_the_last_wish_counts(monkeypatch):
    for method in 'MACER', 'sphere attack': monkeypatch.delitem(SCENES, ('two moons', method, ()), raising=False)
    e = LandscapeExplorer()
    e.controls['method'].value = 'MACER'
    first = e.worker.thread
    e.controls['method'].value = 'sphere attack'
    assert e.worker.wait()
    first.join(60)
    check(e, method='sphere attack')
    e.controls['method'].value = 'MACER'                                          # and back, before anything is trained
    e.controls['method'].value = 'sphere attack'
    assert e.worker.wait()
    check(e, method='sphere attack')

def test_an_error_in_training_is_said_and_survived(monkeypatch):
    monkeypatch.delitem(SCENES, ('spirals', 'Consistency', ()), raising=False)
    def broken(*args, **kwargs): raise FloatingPointError('the loss term agree is not finite')
    e = LandscapeExplorer()
    with monkeypatch.context() as patch:
        patch.setattr(landscape, 'train_toy', broken)
        e.controls['problem'].value = 'spirals'
        assert e.worker.wait()
        e.controls['method'].value = 'Consistency'
        assert e.worker.wait()
        assert complains(e, 'not finite')
    move(e, problem='two moons', method='Gaussian')
    check(e)

def test_controls_clamp_and_offer_everything():
    e = LandscapeExplorer(problem='half-space')
    for name, wild, kept in [('sigma', 9, .3), ('sigma', 0, .02), ('n', 1e9, 1e5), ('n', 1, 100),
                             ('alpha', 1, .1), ('alpha', 0, 1e-6), ('x', 2, 1), ('y', -1, 0)]:
        assert clamps(e, name, wild) == pytest.approx(kept), name
    assert e.controls['problem'].options == (*PROBLEMS, OWN)
    assert e.controls['method'].options == tuple(TOY_METHODS)
    with pytest.raises(ValueError, match='unknown toy'): print(Landscape(problem='moons').scene)

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = LandscapeExplorer()
    monkeypatch.setattr(landscape, 'landscape_traces', lambda s: 1/0)
    with pytest.raises(ZeroDivisionError): e.controls['sigma'].value = .2
    assert complains(e, 'division')
