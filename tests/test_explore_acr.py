"""The ACR explorer: every control by hand, against the rows of the logs."""
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, norm

from explorer import complains, move, shown, written
from rs_toolkit.explore.acr import ACRExplorer, folders_of_runs

DATA = Path(__file__).resolve().parents[1] / 'data'
FIRST = 'ACR paper (digits, equal epochs)'
SECOND = 'SmoothAdv (digits, equal epochs)'
FOLDERS = {FIRST: 'digits-methods/equal_epochs/acr', SECOND: 'digits-methods/equal_epochs/smoothadv',
           'CAT-RS (digits, equal cost)': 'digits-methods/equal_cost/catrs',
           'Gaussian m=4 (digits, equal epochs)': 'digits-methods/equal_epochs/gaussian4'}

@pytest.fixture(autouse=True)
def here(monkeypatch): monkeypatch.chdir(DATA.parent)

def images(run, alpha):
    "(p_A, radius that counts) of each image, from its votes: the textbook formulas, an image at a time."
    log = pd.read_csv(DATA/FOLDERS[run]/'certify.tsv', sep='\t')
    bound = np.nan_to_num(beta.ppf(alpha, log.n_a, log.n - log.n_a + 1))
    radius = np.where((log.selected == log.label) & (bound >= .5), .5 * norm.ppf(bound.clip(1e-9)), -1)
    return sorted(zip(log.n_true / log.n, radius))

def ceiling(n, alpha): return -.5 * norm.ppf(-math.expm1(math.log(alpha) / n))

def check_constant(t, alpha, constant_n):
    "The constant answer from its formula."
    share = 44/360                                                                # the most frequent digit
    reach = ceiling(constant_n, alpha)
    expected = [share * max(ceiling(n, alpha), 0) for n in t['constant'].x]
    np.testing.assert_allclose(t['constant'].y, expected, atol=1e-12)
    np.testing.assert_allclose([t['constant now'].x[0], t['constant now'].y[1]], [constant_n, share * reach])
    np.testing.assert_allclose(t['curve constant'].x, [0, reach, reach])
    np.testing.assert_allclose(t['curve constant'].y, [share, share, 0])

def check_run(t, which, ranked):
    "The lines of a run from its images."
    radii = np.array([r for _, r in ranked])
    earned = np.maximum(radii, 0)
    acr = earned.mean()
    starts = [int(3.6*i + 1e-9) for i in range(101)]                              # a hundredth of the images, two ...
    np.testing.assert_allclose(t[f'level {which}'].y, acr, atol=1e-8)
    tenths = earned.reshape(10, 36).sum(1) / 360
    np.testing.assert_allclose(np.array(t[f'tenths {which}'].y)[::2], tenths, atol=1e-8)
    kept = [earned[start:].sum() / 360 / acr for start in starts]
    np.testing.assert_allclose(t[f'kept {which}'].y, kept, atol=1e-8)
    right = [(radii[start:] >= 0).sum() / 360 for start in starts]
    np.testing.assert_allclose(t[f'right {which}'].y, right)
    curve = t[f'curve {which}']
    between = np.array(curve.x)[1:-1] - 1e-7
    np.testing.assert_allclose(np.array(curve.y)[1:-1], [(radii >= x).mean() for x in between])

def opened():
    "The page, with the two best networks of the digits."
    e = ACRExplorer()
    move(e, run=FIRST, second=SECOND, constant_n=1e10)
    return e

def check_acr(e, run=FIRST, second=SECOND, n=10_000, alpha=.001, dropped=.3, constant_n=1e10):
    "Every line of the picture from the rows themselves."
    t = shown(e)
    check_constant(t, alpha, constant_n)
    assert set(t['given up'].x) == {dropped}
    if n != 10_000: return                                                        # thinned votes are another sample
    for which, name in zip('AB', (run, second)): check_run(t, which, images(name, alpha))
    radii = np.array([r for _, r in images(run, alpha)])
    left = radii[int(360*dropped + 1e-9):]
    kept = np.maximum(left, 0).sum() / np.maximum(radii, 0).sum()
    right = (left >= 0).sum() / 360
    np.testing.assert_allclose(t['kept now'].y, [kept, right], atol=1e-8)
    assert t['curve dropped'].y[0] == pytest.approx(right)
    twin = t['curve twin']
    acr = t['level A'].y[0]
    assert twin.x[1] * twin.y[0] == pytest.approx(acr)
    assert twin.x[1] == pytest.approx(ceiling(10_000, alpha))
    for words in 'role="status"', f'{kept:.1%}', f'{acr:.3f}': assert words in e.words.value

MOVES = dict(dropped=.44, run='CAT-RS (digits, equal cost)', second='Gaussian m=4 (digits, equal epochs)', n=1000.,
             alpha=.1, constant_n=1e22, own=())

@pytest.mark.parametrize('control', [name for name in MOVES if name != 'own'])
def test_every_control_moves_the_picture(control):
    e = opened()
    check_acr(e)
    assert e.controls.keys() == MOVES.keys()
    before = e.fig.to_json()
    e.controls[control].value = MOVES[control]
    check_acr(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before
    e.controls[control].value = opened().controls[control].value
    check_acr(e)

def test_fewer_samples():
    "N = 1,000 of 10,000 votes: about the shares of all, no radius above the new ceiling, and the same draw each time."
    e = opened()
    move(e, n=1000)
    few = np.array(shown(e)['curve A'].x)
    assert few.max() <= .5 * norm.ppf(.001**(1/1000)) and 'N = 1,000' in e.words.value
    shares = np.array([p for p, _ in images(FIRST, .001)])
    votes = np.round(1000 * shares[shares > .56])
    radii = np.maximum(.5 * norm.ppf(beta.ppf(.001, votes, 1001 - votes)), 0)
    assert shown(e)['level A'].y[0] == pytest.approx(radii.sum() / len(shares), rel=.03)
    again = opened()
    move(again, n=1000)
    assert np.array_equal(shown(again)['curve A'].x, few)

def test_the_constant_answer_wins_at_the_announced_number():
    e = opened()
    acr = shown(e)['level A'].y[0]
    needed = math.log(.001) / norm.logcdf(acr * 360/44 / .5)                  # alpha^(1/N) = Phi(radius / sigma)
    mantissa, exponent = f'{needed:.1e}'.split('e+')
    assert f'it beats ACR paper from N = {mantissa} × 10<sup>{exponent}</sup>' in e.words.value
    move(e, constant_n=.99 * needed)
    assert shown(e)['constant now'].y[1] < acr and '<b>beats' not in e.words.value
    move(e, constant_n=1.01 * needed)
    assert shown(e)['constant now'].y[1] > acr and '<b>beats ACR paper</b>' in e.words.value

def test_few_samples_of_the_constant_answer():
    e = opened()
    move(e, constant_n=10.)                                             # ten of ten certify next to nothing
    assert 0 < shown(e)['constant now'].y[1] < 1e-3
    move(e, alpha=1e-6)                                                 # and here nothing at all
    assert shown(e)['constant now'].y[1] == 0 and max(shown(e)['curve constant'].y) == 0

def test_only_what_compares_is_offered():
    e = opened()
    others = ['CRT (CIFAR-10 (JPEG copy))', 'CRT (digits, σ = 0.25)']
    assert not set(others) & set(e.controls['second'].options)
    for run in others:
        move(e, run=run)
        assert e.values['second'] != SECOND and 'role="status"' in e.words.value
    move(e, run=FIRST, second=SECOND)
    check_acr(e)

def test_a_run_whose_radii_have_no_average_does_not_stop_the_page():
    "Certified sequentially, at the radii of a table."
    e = ACRExplorer(own='data/cifar10-methods/0.25/consistency')
    assert 'my consistency does not stand beside MACER' in e.words.value and 'N = 10' in e.words.value
    assert 'my consistency' not in e.controls['second'].options

def test_the_page_opens_where_a_billion_samples_decide():
    e = ACRExplorer()
    assert 1e9 < e.pair.budget < 2e9 and 10**e.fig.layout.xaxis.range[1] <= 1e12
    move(e, constant_n=1e10)
    assert '<b>beats' in e.words.value

def test_every_run_opens():
    runs = folders_of_runs()
    assert len(runs) == len(set(runs.values())) == 26
    for group in 'equal cost', 'σ = 0.25', 'JPEG':
        e = ACRExplorer({name: folder for name, folder in runs.items() if group in name})
        for name in e.controls['run'].options:
            move(e, run=name)
            assert 'role="status"' in e.words.value, name

def test_own_runs(tmp_path):
    log = pd.read_csv(DATA/'digits-gaussian/certify.tsv', sep='\t')
    log.to_csv(tmp_path/'mine.tsv', sep='\t', index=False)
    e = ACRExplorer({'mine': tmp_path/'mine.tsv', 'theirs': DATA/'digits-crt'})
    assert shown(e)['level A'].y[0] == pytest.approx((log.radius * log.correct).mean())
    log[log.columns[:6]].to_csv(tmp_path/'foreign.tsv', sep='\t', index=False)
    with pytest.raises(ValueError): ACRExplorer({'mine': tmp_path/'foreign.tsv', 'theirs': DATA/'digits-crt'})

FACTS = dict(sigma=.25, n0=100, n=10_000, alpha=.001, split='test')

def published(path, run='digits-gaussian'):
    "A log as the field writes it, of nine tenths of the radius."
    log = pd.read_csv(DATA/run/'certify.tsv', sep='\t')
    log.assign(radius=.9 * log.radius)[log.columns[:6]].to_csv(path, sep='\t', index=False)
    return path

def test_guests_come_and_go(tmp_path):
    e = opened()
    path = published(tmp_path/'<i>.tsv')
    door = e.controls['own']
    door.bring(path)
    for fact, value in FACTS.items(): door.fields[fact].value = str(value)
    door.answer.click()
    assert e.values['run'] == 'my <i>' and 'without votes has no other' in e.words.value
    log = pd.read_csv(path, sep='\t')
    acr = (log.radius * log.correct).mean()
    assert shown(e)['level A'].y[0] == pytest.approx(acr)
    assert e.controls['second'].options == ('CRT (digits, σ = 0.25)', 'Gaussian m=1 (digits, σ = 0.25)', 'my <i>')
    move(e, n=100, alpha=.1)                              # nobody knows what these would have certified
    assert shown(e)['level A'].y[0] == pytest.approx(acr) and 'N = 10,000, α = 0.001' in e.words.value
    assert '<i>' not in written(e)
    move(e, n=10_000, alpha=.001, run=FIRST, second=SECOND)
    assert complains(e, f'my &lt;i&gt; does not stand beside {FIRST}')
    assert complains(e, 'over the same images only</div>')                        # the reason, and no code
    move(e, own=())
    check_acr(e)

def test_the_door_is_an_argument(tmp_path):
    e = ACRExplorer(own={'theirs': (published(tmp_path/'a.tsv'), FACTS)})
    move(e, run='theirs')
    assert 'theirs' in e.words.value and 'alert' not in e.words.value

def test_a_click_shows_images():
    e = opened()
    e.clicked('curve B', .8, .2)
    assert 'SmoothAdv' in e.cases.title.value and len(e.cases.tiles.children) == 6
    e.clicked('level A', 1e6, .4)
    assert 'SmoothAdv' in e.cases.title.value
    e.cases.line.label = e.values['run']
    e.cases.button.click()
    assert e.values['run'] in e.cases.title.value
    move(e, dropped=.5)
    assert not e.cases.tiles.children

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = opened()
    monkeypatch.setattr('rs_toolkit.explore.acr.acr_traces', lambda p: 1/0)
    with pytest.raises(ZeroDivisionError): move(e, dropped=.5)
    assert complains(e, 'division')
