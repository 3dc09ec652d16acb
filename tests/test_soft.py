"""Bounds on mean scores: formulas by hand, coverage, and certificates against a mean that is known."""
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from rs_toolkit.certify import ABSTAIN
from rs_toolkit.models import HalfSpace
from rs_toolkit.soft import bernstein_lower, betting_lower, certify_soft, softmax

@pytest.fixture
def half_space(): return HalfSpace(torch.ones(1, 4, 4), .5)

def wealth_by_hand(values, m, alpha):
    "Capital of the gambler after the last value, one bet after the other."
    n = len(values)
    capital, total, squares = 1., .5, .25
    variance = .25
    for i, x in enumerate(values, 1):
        stake = min(np.sqrt(2*np.log(1/alpha)/(n*variance)), .5/m)
        capital *= 1 + stake*(x - m)
        total += x
        squares += (x - total/(i + 1))**2
        variance = squares/(i + 1)
    return capital

@pytest.mark.parametrize('alpha', [.05, .001])
def test_the_bound_is_where_the_gambler_stops_being_rich(alpha):
    values = np.random.default_rng(0).beta(5, 1, 300)
    bound = betting_lower(values, alpha)
    assert wealth_by_hand(values, bound - 1e-6, alpha) > 1/alpha > wealth_by_hand(values, bound + 1e-6, alpha)

def test_bernstein_is_its_formula():
    values = [.2, .9, .7, 1., .6]
    mean = .68
    variance = (.48**2 + .22**2 + .02**2 + .32**2 + .08**2)/4
    log = np.log(2/.5)
    assert bernstein_lower(values*40, .5) == pytest.approx(
        mean - np.sqrt(2*variance*160/199*log/200) - 7*log/(3*199))
    assert bernstein_lower(values, .001) == 0

def test_nobody_gets_rich_too_often():
    "Capital at the true mean is a martingale: it is 1 in the mean, and 1/alpha with chance alpha at most."
    rng = np.random.default_rng(0)
    alpha = .1
    rich = [betting_lower(rng.binomial(1, .97, 150), alpha) > .97 for _ in range(2000)]
    assert np.mean(rich) <= alpha + 3*np.sqrt(alpha*(1 - alpha)/2000)

@pytest.mark.parametrize('temperature', [.05, 1.])
def test_the_mean_is_that_of_the_formula(half_space, temperature):
    "Two logits that differ by a normal number: their softmax, integrated."
    x = half_space.point_at(.3)
    sigma = .5
    found = certify_soft(half_space, x, sigma, softmax(temperature), n=4000)
    def gap_at(image):
        logits = half_space(image[None])[0].double()
        return float(logits[found.selected] - logits[1 - found.selected])
    gap = gap_at(x)
    spread = sigma*abs(gap_at(x + .01) - gap)/.01/4                    # the gradient has 16 equal entries
    def score(z): return norm.pdf(z) / (1 + np.exp(-(gap + spread*z)/temperature))
    expected, _ = quad(score, -8, 8, points=[-gap/spread])
    assert found.mean == pytest.approx(expected, abs=4*.5/np.sqrt(4000))
    assert found.p_a_lower < found.mean

@pytest.mark.parametrize('bound', ['betting', 'bernstein'])
def test_no_radius_beyond_the_boundary(half_space, bound):
    "Which is the same hyperplane for every temperature: the distance is .1."
    x = half_space.point_at(.1)
    alpha = .1
    batch = x.expand(300, *x.shape)
    found = certify_soft(half_space, batch, .5, softmax(.01), bound=bound, n=200, alpha=alpha)
    beyond = np.mean([c.radius > .1 for c in found])
    assert beyond <= alpha + 3*np.sqrt(alpha*(1 - alpha)/300)
    assert {c.prediction for c in found} <= {found[0].selected, ABSTAIN}

def test_batches_do_not_matter(half_space):
    images = torch.stack([half_space.point_at(d) for d in (.1, .4, .2)])
    found = [certify_soft(half_space, images, .5, n0=30, n=250, batch_size=size) for size in (7, 100, 1000)]
    for others in found[1:]:
        for one, other in zip(found[0], others):
            assert (one.selected, one.radius) == (other.selected, pytest.approx(other.radius, abs=1e-6))

@pytest.mark.parametrize('scores, says', [
    (lambda z: z.softmax(-1)*2, 'add up to at most 1'),
    (lambda z: -z.softmax(-1), 'must not be negative'),
    (lambda z: z.softmax(-1)[:, 0], 'finite numbers'),
    (lambda z: z.softmax(-1)/0, 'finite numbers')])
def test_what_is_no_score_is_refused(half_space, scores, says):
    with pytest.raises(ValueError, match=says): certify_soft(half_space, half_space.point_at(.3), .5, scores, n=200)

def test_a_misspelt_bound(half_space):
    with pytest.raises(ValueError, match="did you mean 'betting'"):
        certify_soft(half_space, half_space.point_at(.3), .5, bound='beting')
