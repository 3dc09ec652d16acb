"""The sequential explorer: every control by hand, against votes that are counted one look after the other."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.signal import fftconvolve
from scipy.stats import binom, norm

from explorer import clamps, complains, move, shown
from rs_toolkit.explore.sequential import ANY, SequentialExplorer
from rs_toolkit.sequential import PROCEDURES, anytime_bound

DATA = Path(__file__).resolve().parents[1]/'data'
OPENING = 'Gaussian m=1 (CIFAR-10 (JPEG copy))'
CRT = 'CRT (digits, equal epochs)'
FOLDERS = {OPENING: 'cifar10-gaussian', CRT: 'digits-methods/equal_epochs/crt'}

@pytest.fixture(autouse=True)
def here(monkeypatch): monkeypatch.chdir(DATA.parent)

def image_of(run, p):
    "(share, sigma, name) of the image in the file whose share is nearest."
    log = pd.read_csv(DATA/FOLDERS[run]/'certify.tsv', sep='\t')
    share = log.n_a / log.n
    row = (share - p).abs().idxmin()
    return share[row], log.sigma[row], f'Image {log.idx[row]}'

def looks_of(n, ratio):
    "After 100 votes, then each time there are `ratio` times as many, in whole hundreds."
    looks = [100]
    while looks[-1] < n: looks.append(max(looks[-1] + 100, int(np.ceil(looks[-1] * ratio / 100)) * 100))
    return np.array([*(look for look in looks if look < n), n])

def drawn_at(count, n, sigma):
    "Where a count stands in the picture: nowhere, where there are fewer votes."
    share = (np.minimum(count, n) + .5) / (n + 1)
    return np.where(count > n, np.nan, sigma * norm.ppf(share))

def followed(procedure, path, selected):
    "(votes, votes for the class, radius, why) where an image ends, by the machine, look by look."
    at = procedure.begin(selected, 500)
    while at.stop == '': at = procedure.look(at, path[at.wanted // 100 - 1])
    return int(at.n), int(at.count), float(procedure.radius(at.p_lower)), str(at.stop)

def false_claims(looks, counts, p):
    "From the definition: the chances of all counts that have not claimed yet, look by look."
    alive = np.ones(1)
    seen = 0
    claimed = [0.]
    for look, count in zip(looks, counts):
        alive = fftconvolve(alive, binom.pmf(np.arange(look - seen + 1), look - seen, p))
        claimed.append(claimed[-1] + alive[count:].sum())
        alive[count:] = 0
        seen = look
    return claimed[1:]

def check_sequential(e, run=OPENING, p=.9182, r=1., n=10_000, alpha=.001, ratio=1.1, seed=0, tol=.05):
    "Every line of the picture."
    p, sigma, image = image_of(run, p)
    t = shown(e)
    looks = looks_of(n, ratio)
    luck = np.random.default_rng(seed).random(1 + n // 100)
    path = binom.ppf(luck[1:], 100, p).astype(int).cumsum()
    at_looks = path[looks // 100 - 1]
    np.testing.assert_array_equal(t['votes'].x, looks)
    np.testing.assert_allclose(t['votes'].y, drawn_at(at_looks, looks, sigma))

    common = dict(sigma=sigma, n=n, alpha=alpha)
    ceiling = norm.ppf(alpha**(1/n))
    table = [k*sigma for k in range(5) if k <= .95 * ceiling]
    rules = [PROCEDURES['fixed'](**common), PROCEDURES['pilot'](**common, tol=tol, ratio=ratio),
             PROCEDURES['anytime'](**common, tol=tol, ratio=ratio),
             PROCEDURES['sequential'](**common, radii=table, ratio=ratio),
             PROCEDURES['sequential'](**common, radii=r*sigma, ratio=ratio)]
    check_boundaries(t, rules[-2], rules[-1])
    peeking = check_claims(t, rules[-1], norm.cdf(r))

    ends = [followed(rule, path, binom.ppf(luck[0], 500, p)) for rule in rules]
    claim = [*np.flatnonzero(at_looks >= peeking), len(looks) - 1][0]
    claims = at_looks[claim] >= peeking[claim]
    votes = [*(end[0] for end in ends), looks[claim]]
    np.testing.assert_array_equal(t['stops'].x, votes)
    assert [label.strip() for label in t['ends'].text] == [f'{v:,}' for v in votes]
    counts = np.array([*(end[1] for end in ends), at_looks[claim]])
    where = np.where(np.array(votes) > 0, drawn_at(counts, np.array(votes), sigma), np.nan)
    np.testing.assert_allclose(t['stops'].y, where)
    says = [text.split(': ')[1].strip() for text in t['answers'].text]
    for said, (_, _, radius, _) in zip(says[:3], ends):
        if said != 'nothing': assert 0 <= radius - float(said) < .001
    assert says[4] == ('yes' if ends[4][3] == 'certified' else 'no')
    assert says[5] == ('no' if not claims else 'yes' if p > norm.cdf(r) else 'wrong')
    for words in 'role="status"', image, f'{p:.5g}', f'{ends[4][0]:,} votes': assert words in e.words.value

def check_boundaries(t, table, one):
    "The lines that the votes must reach."
    n = np.array(one.looks)
    lines = {'sequential': one.certify[:, 0], 'hope r': one.hope[:, 0]}
    for name, counts in lines.items(): np.testing.assert_allclose(t[name].y, drawn_at(counts, n, one.sigma))
    for name, counts in {'table': table.certify, 'hope': table.hope}.items():
        drawn = np.reshape(t[name].y, (len(table.radii), len(n) + 1))                   # each with a gap after it
        np.testing.assert_allclose(drawn[:, :-1], drawn_at(counts, n[:, None], one.sigma).T)
        assert np.isnan(drawn[:, -1]).all()
    assert set(t['asked'].y) == {one.radii[0]} and f'r = {one.radii[0]:.3g}' in t['asked'].text[1]

def check_claims(t, one, p):
    "How often an image with just the radius in question gets a larger one. Returns the counts that convince a peeker."
    n = np.array(one.looks)
    peeking = binom.isf(one.alpha, n, p).astype(int) + 1
    np.testing.assert_allclose(t['peeking'].y, drawn_at(peeking, n, one.sigma))
    share = norm.cdf(np.array(t['anytime'].y) / one.sigma)
    anytime = np.where(np.isnan(share), n + 1, np.rint(share * (n + 1) - .5)).astype(int)
    certain = anytime <= n
    assert (anytime_bound(anytime, n, one.alpha) >= p)[certain].all()
    assert (anytime_bound(anytime - 1, n, one.alpha) < p).all()
    for name, counts in {'peeking': peeking, 'sequential': one.certify[:, 0], 'anytime': anytime}.items():
        drawn = np.nan_to_num(t[f'risk, {name}'].y)                                     # no chance: not drawn
        assert (np.diff(drawn) >= 0).all()
        assert name == 'peeking' or drawn[-1] <= one.alpha
        if one.n <= 10_000: np.testing.assert_allclose(drawn, false_claims(n, counts, p), rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(t['risk, one look'].y, binom.sf(peeking[-1] - 1, one.n, p), rtol=1e-6)
    assert set(t['α'].y) == {one.alpha}
    return peeking

MOVES = dict(run=CRT, p=.8587, r=2.1, n=100_000, alpha=.1, ratio=2, seed=7, tol=.2)

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = SequentialExplorer(n=10_000)
    check_sequential(e)
    assert e.controls.keys() == MOVES.keys()
    before = e.fig.to_json()
    move(e, **{control: MOVES[control]})
    check_sequential(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before

def test_all_controls_together():
    e = SequentialExplorer(n=10_000)
    moves = MOVES | dict(p=image_of(CRT, .8587)[0], n=1000)
    move(e, **moves)
    check_sequential(e, **moves)
    move(e, run=OPENING)
    move(e, **SequentialExplorer(n=10_000).values)
    check_sequential(e)

@pytest.mark.parametrize('n', [1000, 10_000])
@pytest.mark.parametrize('alpha', [1e-6, .1])
def test_corners(n, alpha):
    "Nothing overflows, from an image without a radius to one that is unanimous, and for radii out of reach."
    e = SequentialExplorer(n=n, alpha=alpha)
    move(e, run=ANY)
    for p in [.4, 1.]:
        for r in [0., 3.8]:
            move(e, p=p, r=r)
            t = shown(e)
            assert 'role="status"' in e.words.value, (p, r)
            assert np.isfinite(t['votes'].y).all()
            low, high = e.fig.layout.yaxis.range
            assert low < max(t['votes'].y) < high
            for name in 'sequential', 'anytime':
                assert np.nan_to_num(t[f'risk, {name}'].y[-1]) <= alpha, (name, p, r)
    assert ('nobody can claim it' in e.words.value) == (norm.cdf(3.8)**n > alpha)

def test_peeking_is_what_breaks_the_promise():
    "At 100,000 votes, the numbers of the library; with two looks nearly twice the promise."
    e = SequentialExplorer()
    assert shown(e)['risk, peeking'].y[-1] > 10 * .001
    assert 'by peeking 55 times (16 α)' in e.words.value
    move(e, ratio=1000)
    assert .0015 < shown(e)['risk, peeking'].y[-1] <= .002

def test_it_happens():
    "An image of radius .248: is it more than .25? About half of those who peek at alpha = .1 will say so."
    e = SequentialExplorer(alpha=.1)
    move(e, run=ANY, p=.69, r=.5)
    said = []
    for seed in range(12):
        move(e, seed=seed)
        said.append(shown(e)['answers'].text[-1].strip() == 'peeking: wrong')
        assert ('It happened.' in e.words.value) == said[-1]
    assert 2 < sum(said) < 10

CLAMPED = [('alpha', 2, .1), ('alpha', 0, 1e-6), ('seed', -1, 0), ('seed', 10**6, 99),
           ('tol', 0, .01), ('tol', 9, .3)]

def test_controls_clamp():
    e = SequentialExplorer()
    for name, wild, kept in CLAMPED: assert clamps(e, name, wild) == pytest.approx(kept), (name, wild)
    assert 'role="status"' in e.words.value

def test_own_runs_and_wrong_ones(tmp_path):
    log = pd.read_csv(DATA/'digits-gaussian/certify.tsv', sep='\t')
    log.to_csv(tmp_path/'mine.tsv', sep='\t', index=False)
    log[log.columns[:6]].to_csv(tmp_path/'foreign.tsv', sep='\t', index=False)
    e = SequentialExplorer({'mine': tmp_path/'mine.tsv', 'foreign': tmp_path/'foreign.tsv'})
    shares = [share for _, share in e.controls['p'].options]
    assert shares == sorted({*(log.n_a / log.n)})
    before = e.fig.to_json()
    move(e, run='foreign')
    assert complains(e, 'does not hold the votes') and e.fig.to_json() == before
    move(e, run='mine')
    assert 'role="status"' in e.words.value

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = SequentialExplorer()
    monkeypatch.setattr('rs_toolkit.explore.sequential.sequential_traces', lambda s: 1/0)
    with pytest.raises(ZeroDivisionError): move(e, seed=1)
    assert complains(e, 'division')
