"""Sequential certification: the risk of every boundary, what it agrees with, what it saves on published logs."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from rs_toolkit.bounds import certified_radius, lower_bound, votes_of
from rs_toolkit.certify import Certificate
from rs_toolkit.log import read_log
from rs_toolkit.noise import CHUNK
from rs_toolkit.sequential import (PROCEDURES, Anytime, Fixed, Pilot, Sequential, anytime_bound, crossing_probability,
                                   fewest, log_wealth, schedule, simulate, spending_thresholds, table_thresholds)

N = 100_000
WORST = [.5, .69, .84, .977, .99865]                     # true probabilities with nothing to spare
LOGS = Path(__file__).resolve().parents[2]/'shared'/'reference'/'logs'/'acr_paper'/'cifar10'
FILES = sorted(LOGS.glob('*.tsv'))
published = pytest.mark.skipif(not FILES, reason=f"no published logs at {LOGS}")
LARGEST = {.25: .75, .5: 1.75, 1.: 3.5}                  # radii of the papers' tables end here


def test_imports_stay_light():
    heavy = "{'torch', 'pandas', 'scipy.stats', 'plotly'}"
    code = f"import sys, rs_toolkit.sequential; assert not {heavy} & {{*sys.modules}}, {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_looks_are_whole_chunks_of_noise():
    for n in [N, 10_000, 12_345]:
        for procedure in [Sequential(.5, n), Anytime(.5, n), Pilot(.5, n)]:
            *looks, last = procedure.looks
            assert last == n and all(look % CHUNK == 0 for look in looks)


def test_fixed_is_the_certificate_of_certify():
    fixed = Fixed(.5, 1000)
    counts = np.arange(1001)
    at = fixed.look(fixed.begin(counts), counts)
    for k in counts:
        c = Certificate.from_counts(np.array([100, 0]), np.array([k, 1000 - k]), .5, .001)
        assert c.p_a_lower == at.p_lower[k] and c.radius == fixed.radius(at.p_lower[k])
    np.testing.assert_allclose(at.p_lower, lower_bound(counts, 1000, .001), rtol=0, atol=1e-12)


def test_certified_radii_are_those_of_the_table():
    table = Sequential(.3, radii=np.arange(0, 1.2, .1))
    assert (table.p == ndtr(np.array(table.radii) / .3)).all() and table.p[0] == .5
    assert table.radius(table.p).tolist() == list(table.radii) and table.radius(0.) == 0    # not rounded down
    np.testing.assert_allclose(certified_radius(table.p, .3), table.radii, atol=1e-12)


# The risk, exactly

@pytest.mark.parametrize('p', WORST)
@pytest.mark.parametrize('alpha', [.05, .001, 1e-7])
@pytest.mark.parametrize('ratio, rho', [(1.1, .6), (1.3, .5), (2., 0.), (1.05, 1.)])
def test_sequential_spends_alpha_and_no_more(p, alpha, ratio, rho):
    looks = schedule(N, ratio=ratio)
    risk = crossing_probability(looks, spending_thresholds(p, looks, alpha, rho), p)
    assert (risk <= alpha * (np.array(looks) / N)**rho).all() and risk[-1] > .7*alpha


@pytest.mark.parametrize('p', WORST)
def test_the_risk_of_each_shipped_procedure(p):
    table = Sequential(1., N, radii=[0, *np.arange(.25, 3.6, .25), *ndtri(WORST[1:])][:15])
    column = np.searchsorted(table.p, p)
    if column < len(table.p): assert crossing_probability(table.looks, table.certify[:, column], p)[-1] <= .001
    one = Sequential(1., N, radii=[ndtri(p)])
    assert .0009 < crossing_probability(one.looks, one.certify[:, 0], p)[-1] <= .001

    looks = np.array(Anytime(1., N).looks)
    betting = fewest(lambda k: log_wealth(k, looks, p) >= -np.log(.001), looks)
    assert 0 < crossing_probability(looks, betting, p)[-1] <= .001

    for n in Pilot(1., N).looks:
        k = fewest(lambda k: lower_bound(k, n, .001) >= p, n)
        assert crossing_probability([n], [int(k)], p)[-1] <= .001 * (1 + 1e-9)


@pytest.mark.parametrize('p', WORST)
def test_peeking_is_caught(p):
    "The negative control: the plain bound at each look."
    looks = np.array(schedule(N, ratio=1.3))
    peeking = crossing_probability(looks, fewest(lambda k: lower_bound(k, looks, .001) >= p, looks), p)
    assert peeking[0] <= .001 and peeking[-1] > .005


@pytest.mark.parametrize('p', WORST)
def test_the_programme_is_exact(p):
    "Against whole vectors and a library's binomial chances."
    looks = schedule(3000, ratio=1.5)
    thresholds = spending_thresholds(p, looks, .01)
    alive = np.ones(1)
    seen = 0
    crossed = 0.
    for look, threshold in zip(looks, thresholds):
        alive = np.convolve(alive, binom.pmf(np.arange(look - seen + 1), look - seen, p))
        crossed += alive[threshold:].sum()
        alive = alive[:threshold]
        seen = look
    np.testing.assert_allclose(crossing_probability(looks, thresholds, p)[-1], crossed, rtol=1e-8)
    assert crossed <= .01


def test_overclaims_at_full_size():
    "A false certificate in about alpha of 100,000 images with nothing to spare, N = 100,000."
    for p in WORST:
        procedure = Sequential(1., N, radii=[ndtri(p)], z=np.inf)
        trials = 100_000
        wrong = (simulate(procedure, np.full(trials, p*(1 - 1e-12)), seed=7).p_lower > 0).sum()
        assert abs(wrong - 100) < 4*np.sqrt(100), (p, wrong)


def test_thresholds_grow_with_the_radius():
    radii = np.arange(0, 3.7, .05)
    looks = schedule(N, ratio=1.3)
    table = table_thresholds(ndtr(radii), looks, .001)
    alone = np.array([spending_thresholds(float(p), looks, .001) for p in ndtr(radii)]).T
    assert (np.diff(table, axis=1) >= 0).all() and (table >= alone).all()
    assert (np.diff(Sequential(1., N).hope, axis=1) >= 0).all()
    assert (Sequential(1., N).hope <= Sequential(1., N).certify).all()


def test_any_stopping_rule():
    "A rule that stops at the first false certificate it sees, looking after every vote."
    rng = np.random.default_rng(0)
    p = .8
    trials = 1500
    n = np.arange(1, 801)
    threshold = fewest(lambda k: anytime_bound(k, n, .1) >= p, n)
    wrong = ((rng.random((trials, 800)) < p*(1 - 1e-9)).cumsum(1) >= threshold).any(1).mean()
    naive = fewest(lambda k: lower_bound(k, n, .1) >= p, n)
    assert 0 < wrong <= .1 + 4*np.sqrt(.1*.9/trials)
    assert crossing_probability(n, threshold, p)[-1] <= .1 < .3 < crossing_probability(n, naive, p)[-1]


def test_every_procedure_has_a_name_that_a_log_can_tell_apart():
    tables = [Sequential(.5), Sequential(.5, z=3.), Sequential(.5, radii=.5)]
    names = [str(procedure) for procedure in (Fixed(.5), *tables, Anytime(.5), Pilot(.5))]
    assert len({*names}) == len(names) and [*PROCEDURES] == ['fixed', 'sequential', 'anytime', 'pilot']
    assert str(Sequential(.5, radii=[0, 1/3])).split()[1] == f'radii=0,{1/3!r}'                 # in full


# What it saves: images of the field's published logs

def probabilities(path, every=5):
    "Noise level, true probabilities behind a published log, and which images are right."
    sigma = float(path.stem.split('_')[1])
    rng = np.random.default_rng(0)
    log = read_log(path, sigma=sigma, n0=100, n=N, alpha=.001)[::every]
    votes = votes_of(ndtr(log.radius.to_numpy() / sigma), N, .001)
    p = np.where(votes < N, votes / N, 1 - rng.exponential(1e-5, len(log)))
    return sigma, np.where(log.predict == -1, rng.uniform(.3, .505, len(log)), p), (log.correct == 1).to_numpy()


def fewer(at, n0=100): return (N + 100) / (at.n + n0).mean()


@published
def test_savings_for_a_table():
    cost = []
    differ = []
    shift = []
    known = []
    for path in FILES:
        sigma, p, correct = probabilities(path)
        table = Sequential(sigma, N, radii=np.arange(0, LARGEST[sigma] + .1, .25))
        at = simulate(table, p, seed=1)
        whole = simulate(Fixed(sigma, N), p, seed=2)
        ours = at.p_lower[:, None] >= table.p
        theirs = whole.p_lower[:, None] >= table.p
        cost.append(100 + at.n)
        known.append(np.where(correct | (p < .505), 100 + at.n, 100))
        differ.append((ours != theirs).ravel())
        shift.append((ours*1. - theirs).ravel())
    cost, known, differ, shift = map(np.concatenate, (cost, known, differ, shift))
    figures = dict(mean=(N + 100) / cost.mean(), median=(N + 100) / np.median(cost), known=(N + 100) / known.mean(),
                   differ=100*differ.mean(), shift=100*shift.mean())
    print({name: round(value, 3) for name, value in figures.items()})
    assert figures['mean'] >= 6 and figures['median'] >= 15
    assert figures['differ'] <= .3 and abs(figures['shift']) <= .1


@published
def test_savings_for_one_radius():
    factors = []
    for path in FILES:
        sigma, p, _ = probabilities(path, every=20)
        for r in np.arange(0, LARGEST[sigma] + .1, .25):
            factors.append(fewer(simulate(Sequential(sigma, N, radii=r), p, seed=3)))
    print(f'one radius: {np.mean(factors):.1f}x in the mean, {min(factors):.1f}x at worst, {max(factors):.0f}x at best')
    assert np.mean(factors) >= 40 and min(factors) >= 6


@published
def test_a_radius_for_every_image_is_dearer():
    "About three times fewer votes for a few percent of the average radius; a smaller fixed n is nearly as good."
    for procedure, n0, least, kept in [(Pilot, 500, 3, .94), (Anytime, 100, 2, .94)]:
        factors = []
        parts = []
        for path in FILES:
            sigma, p, correct = probabilities(path, every=100)
            at = simulate(procedure(sigma, N), p, n0, seed=4)
            whole = simulate(Fixed(sigma, N), p, seed=5)
            radii = [Fixed(sigma).radius(end.p_lower) * correct for end in (at, whole)]
            factors.append(1 / fewer(at, n0))
            parts.append(radii[0].mean() / radii[1].mean())
        print(f'{procedure.name}: {1 / np.mean(factors):.1f}x fewer votes, {np.mean(parts):.3f} of ACR')
        assert 1 / np.mean(factors) >= least and np.mean(parts) >= kept
