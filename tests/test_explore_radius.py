"""The radius explorer: every control by hand. Here an exception in a callback comes out of the assignment."""
import numpy as np
import pytest

from explorer import clamps, complains, move, shown
from rs_toolkit.bounds import certified_radius, constant_acr, fewest_votes, lower_bound, max_radius, sensitivity
from rs_toolkit.bounds import trivial_budget, vote_value
from rs_toolkit.explore.radius import RadiusExplorer

def check_radius(e, sigma=1., n=100_000, alpha=.001, share=.99, votes=None, scale='share', acr=.534, num_classes=10):
    "Every line of the picture against the statistics."
    t = shown(e)
    if votes is None: votes = round(share * n)
    def share_at(x): return 1 - np.array(x) if scale == 'nines' else np.array(x)          # of an axis of votes
    k = np.rint(t['bound'].x * -n + n)
    np.testing.assert_allclose(share_at(t['radius'].x)[:-1], k[:-1] / n)
    np.testing.assert_allclose(t['slope'].x, t['radius'].x)
    k[-1] = n
    bound = lower_bound(k, n, alpha)
    now = lower_bound(votes, n, alpha)
    np.testing.assert_allclose(t['radius'].y, certified_radius(bound, sigma))
    np.testing.assert_allclose(t['slope'].y, vote_value(k, n, alpha, sigma))
    np.testing.assert_allclose(t['bound'].y, 1 - bound)
    np.testing.assert_allclose(t['ceiling'].y, max_radius(sigma, n, alpha))
    np.testing.assert_allclose(t['radius now'].y, certified_radius(now, sigma))
    if votes < n: np.testing.assert_allclose(share_at(t['radius now'].x), votes/n)
    np.testing.assert_allclose(t['slope now'].y, vote_value(votes, n, alpha, sigma))
    np.testing.assert_allclose(t['bound now'].y, 1 - now)
    np.testing.assert_allclose(t['radius if known'].y, certified_radius(share_at(t['radius if known'].x), sigma))
    np.testing.assert_allclose(t['slope if known'].y, sensitivity(share_at(t['slope if known'].x), sigma))
    np.testing.assert_allclose(t['constant'].y, constant_acr(t['constant'].x, sigma, num_classes, alpha))
    np.testing.assert_allclose(t['this N'].y[1], max_radius(sigma, n, alpha) / num_classes)
    edge = min(1, fewest_votes(n, alpha) / n)
    np.testing.assert_allclose([share_at(t[f'{name} zone'].x[1]) for name in ('radius', 'slope')], edge, atol=1e-7)
    assert set(t['to beat'].y) == {acr}
    budget = trivial_budget(acr, sigma, num_classes, alpha)
    assert t['needed N'].x[0] == min(budget, 1e10) and t['needed N'].y[1] == (acr if budget <= 1e10 else None)
    assert 'role="status"' in e.words.value and f'{votes:,} of {n:,}' in e.words.value

MOVES = dict(sigma=.5, n=1000, alpha=1e-6, share=.76, votes=98_765, scale='nines', acr=.35, num_classes=2)
TOGETHER = {name: value for name, value in MOVES.items() if name != 'votes'}

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = RadiusExplorer()
    check_radius(e)
    assert e.controls.keys() == MOVES.keys()
    before = e.fig.to_json()
    e.controls[control].value = MOVES[control]
    check_radius(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before

def test_all_controls_together():
    e = RadiusExplorer(**TOGETHER)
    check_radius(e, **TOGETHER)
    move(e, **RadiusExplorer().values)
    check_radius(e)

def test_votes_and_share_follow_each_other():
    e = RadiusExplorer()
    for typed, share in (98_765, .988), (100_000, 1.), (99_991, .99991):
        move(e, votes=typed)
        assert e.values['share'] == pytest.approx(share)
        assert f'{typed:,} of 100,000' in e.words.value
    move(e, share=.9, n=1000)
    assert e.values['votes'] == 900
    move(e, votes=1001)
    assert complains(e, '1,001 votes of N = 1,000')
    move(e, votes=1000)
    check_radius(e, n=1000, share=1.)

@pytest.mark.parametrize('n', [10, 16, 100, 10_000_000])
@pytest.mark.parametrize('alpha', [1e-6, .1])
@pytest.mark.parametrize('share', [.4, .99, 1.])
def test_corners(n, alpha, share):
    "Nothing overflows or escapes its axis, from a vote that proves nothing to one that is certain."
    for sigma in [.05, 1.]:
        e = RadiusExplorer(sigma=sigma, n=n, alpha=alpha, share=share)
        check_radius(e, sigma, n, alpha, share)
        ceiling = sigma * max_radius(1., n, alpha)
        assert ceiling < e.fig.layout.yaxis.range[1] <= 10.4 * sigma, 'the axis follows sigma'
        slope = shown(e)['slope'].y
        low, high = 10**np.array(e.fig.layout.yaxis2.range, float)
        assert not (slope < low).any() and not (slope > high).any()

CLAMPED = [('sigma', 99, 1), ('sigma', -1, .05), ('n', 1e12, 1e7), ('n', 0, 10), ('alpha', 2, .1), ('alpha', 0, 1e-6),
           ('num_classes', 0, 2), ('num_classes', 10**9, 100_000)]

def test_controls_clamp():
    e = RadiusExplorer()
    for name, wild, kept in CLAMPED: assert clamps(e, name, wild) == pytest.approx(kept), (name, wild)
    check_radius(e, sigma=.05, n=10, alpha=1e-6, num_classes=100_000)

def test_words():
    e = RadiusExplorer()
    for words in 'than <b>2.289</b>', '3.811 = 3.81 σ', '1.5 × 10<sup>8</sup>': assert words in e.words.value
    move(e, share=.5)
    assert 'Abstain' in e.words.value and '50,490 votes' in e.words.value
    move(e, sigma=.1)
    assert 'more than 300 digits' in e.words.value

def test_wrong_input_is_said_and_survived():
    e = RadiusExplorer()
    before = e.fig.to_json()
    move(e, acr=-.5)
    assert complains(e, 'at least 0, got -0.5')
    assert e.fig.to_json() == before
    move(e, acr=.35)
    check_radius(e, acr=.35)

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = RadiusExplorer()
    monkeypatch.setattr('rs_toolkit.explore.radius.radius_traces', lambda s: 1/0)
    with pytest.raises(ZeroDivisionError): move(e, sigma=.5)
    assert complains(e, 'division')
