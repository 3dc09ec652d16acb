"""The ACR explorer: every control by hand, against the rows of the logs. Here an exception in a callback comes out of the assignment."""
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, norm

from rs_toolkit.explore.acr import ACRExplorer, folders_of_runs

DATA = Path(__file__).resolve().parents[1] / 'data'
FIRST, SECOND = 'ACR paper (digits, equal epochs)', 'SmoothAdv (digits, equal epochs)'
FOLDERS = {FIRST: 'digits-methods/equal_epochs/acr', SECOND: 'digits-methods/equal_epochs/smoothadv',
           'CAT-RS (digits, equal cost)': 'digits-methods/equal_cost/catrs',
           'Gaussian m=4 (digits, equal epochs)': 'digits-methods/equal_epochs/gaussian4'}

@pytest.fixture(autouse=True)
def here(monkeypatch): monkeypatch.chdir(DATA.parent)

def shown(explorer): return {trace.name: trace for trace in explorer.fig.data}

def images(run, alpha):
    "(p_A, radius that counts) of each image, from its votes: the textbook formulas, an image at a time."
    log = pd.read_csv(DATA/FOLDERS[run]/'certify.tsv', sep='\t')
    bound = np.nan_to_num(beta.ppf(alpha, log.n_a, log.n - log.n_a + 1))
    radius = np.where((log.selected == log.label) & (bound >= .5), .5 * norm.ppf(bound.clip(1e-9)), -1)
    return sorted(zip(log.n_true / log.n, radius))

def check_acr(e, run=FIRST, second=SECOND, n=10_000, alpha=.001, dropped=.3, constant_n=1e10):
    "Every line of the picture from the rows themselves."
    t, share = shown(e), 44/360                                                   # the most frequent digit
    ceiling = lambda n: -.5 * norm.ppf(-math.expm1(math.log(alpha) / n))
    np.testing.assert_allclose(t['constant'].y, [share * max(ceiling(n), 0) for n in t['constant'].x], atol=1e-12)
    np.testing.assert_allclose([t['constant now'].x[0], t['constant now'].y[1]], [constant_n, share * ceiling(constant_n)])
    np.testing.assert_allclose(t['curve constant'].x, [0, ceiling(constant_n), ceiling(constant_n)])
    np.testing.assert_allclose(t['curve constant'].y, [share, share, 0])
    assert set(t['given up'].x) == {dropped}
    if n != 10_000: return                                                        # thinned votes are another sample
    for which, name in zip('AB', (run, second)):
        ranked = images(name, alpha)
        earned = np.maximum([r for _, r in ranked], 0)
        acr = earned.mean()
        np.testing.assert_allclose(t[f'level {which}'].y, acr, atol=1e-8)
        np.testing.assert_allclose(np.array(t[f'tenths {which}'].y)[::2], [sum(earned[36*i:36*(i+1)]) / 360 for i in range(10)], atol=1e-8)
        np.testing.assert_allclose(t[f'kept {which}'].y, [earned[int(3.6*i + 1e-9):].sum() / 360 / acr for i in range(101)], atol=1e-8)
        np.testing.assert_allclose(t[f'right {which}'].y, [sum(r >= 0 for _, r in ranked[int(3.6*i + 1e-9):]) / 360 for i in range(101)])
        between = np.array(t[f'curve {which}'].x)[1:-1] - 1e-7
        np.testing.assert_allclose(np.array(t[f'curve {which}'].y)[1:-1], [np.mean([r >= x for _, r in ranked]) for x in between])
    ranked = images(run, alpha)
    left = ranked[int(360*dropped + 1e-9):]
    kept, right = sum(max(r, 0) for _, r in left) / sum(max(r, 0) for _, r in ranked), sum(r >= 0 for _, r in left) / 360
    np.testing.assert_allclose(t['kept now'].y, [kept, right], atol=1e-8)
    assert t['curve dropped'].y[0] == pytest.approx(right)
    twin = t['curve twin']
    assert twin.x[1] * twin.y[0] == pytest.approx(t['level A'].y[0]) and twin.x[1] == pytest.approx(ceiling(10_000))
    assert 'role="status"' in e.words.value and f'{kept:.1%}' in e.words.value and f'{t["level A"].y[0]:.3f}' in e.words.value

MOVES = dict(dropped=.44, run='CAT-RS (digits, equal cost)', second='Gaussian m=4 (digits, equal epochs)', n=1000., alpha=.1, constant_n=1e22)

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = ACRExplorer()
    check_acr(e)
    assert e.controls.keys() == MOVES.keys()
    before = e.fig.to_json()
    e.controls[control].value = MOVES[control]
    check_acr(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before
    e.controls[control].value = ACRExplorer().controls[control].value
    check_acr(e)

def test_fewer_samples():
    "N = 1,000 of the 10,000 votes: about the shares of all of them, no radius above the new ceiling, and the same draw each time."
    e = ACRExplorer()
    e.controls['n'].value = 1000
    few = np.array(shown(e)['curve A'].x)
    assert few.max() <= .5 * norm.ppf(.001**(1/1000)) and 'N = 1,000' in e.words.value
    expected = np.mean([max(0, .5 * norm.ppf(beta.ppf(.001, round(1000*p), 1001 - round(1000*p)))) if p > .56 else 0 for p, _ in images(FIRST, .001)])
    assert shown(e)['level A'].y[0] == pytest.approx(expected, rel=.03)
    again = ACRExplorer()
    again.controls['n'].value = 1000
    assert np.array_equal(shown(again)['curve A'].x, few)

def test_the_constant_answer_wins_at_the_announced_number():
    e = ACRExplorer()
    needed = math.log(.001) / norm.logcdf(shown(e)['level A'].y[0] * 360/44 / .5)              # alpha^(1/N) = Phi(radius / sigma)
    mantissa, exponent = f'{needed:.1e}'.split('e+')
    assert f'it beats ACR paper from N = {mantissa} × 10<sup>{exponent}</sup>' in e.words.value
    e.controls['constant_n'].value = .99 * needed
    assert shown(e)['constant now'].y[1] < shown(e)['level A'].y[0] and '<b>beats' not in e.words.value
    e.controls['constant_n'].value = 1.01 * needed
    assert shown(e)['constant now'].y[1] > shown(e)['level A'].y[0] and '<b>beats ACR paper</b>' in e.words.value

def test_few_samples_of_the_constant_answer():
    e = ACRExplorer()
    e.controls['constant_n'].value = 10.                                                     # ten of ten certify next to nothing
    assert 0 < shown(e)['constant now'].y[1] < 1e-3
    e.controls['alpha'].value = 1e-6
    assert shown(e)['constant now'].y[1] == 0 and max(shown(e)['curve constant'].y) == 0    # and here nothing at all

@pytest.mark.parametrize('second', ['CRT (CIFAR-10 (JPEG copy))', 'CRT (digits, σ = 0.25)'])
def test_runs_over_other_images_are_refused(second):
    e = ACRExplorer()
    before = e.fig.to_json()
    e.controls['second'].value = second
    assert 'role="alert"' in e.words.value and 'images' in e.words.value and e.fig.to_json() == before
    e.controls['second'].value = SECOND
    check_acr(e)

def test_every_run_opens():
    runs = folders_of_runs()
    assert len(runs) == len(set(runs.values())) == 26
    e = ACRExplorer()
    for names in [[n for n in runs if group in n] for group in ('equal cost', 'σ = 0.25', 'JPEG')]:
        e = ACRExplorer({name: runs[name] for name in names})
        for name in names:
            e.controls['run'].value = name
            assert 'role="status"' in e.words.value

def test_own_runs(tmp_path):
    log = pd.read_csv(DATA/'digits-gaussian/certify.tsv', sep='\t')
    log.to_csv(tmp_path/'mine.tsv', sep='\t', index=False)
    e = ACRExplorer({'mine': tmp_path/'mine.tsv', 'theirs': DATA/'digits-crt'})
    assert shown(e)['level A'].y[0] == pytest.approx((log.radius * log.correct).mean())
    log[log.columns[:6]].to_csv(tmp_path/'foreign.tsv', sep='\t', index=False)
    with pytest.raises(ValueError): ACRExplorer({'mine': tmp_path/'foreign.tsv', 'theirs': DATA/'digits-crt'})

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = ACRExplorer()
    monkeypatch.setattr('rs_toolkit.explore.acr.acr_traces', lambda p: 1/0)
    with pytest.raises(ZeroDivisionError): e.controls['dropped'].value = .5
    assert 'role="alert"' in e.words.value and 'division' in e.words.value
