"""The p_a explorer: every control by hand, against the votes as they stand in the files. Here an exception in a callback comes out of the assignment."""
import shutil, subprocess, sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from scipy.stats import beta, norm

from rs_toolkit.distribution import open_log
from rs_toolkit.explore.p_a import PAExplorer
from rs_toolkit.metrics import recertify

ROOT = Path(__file__).resolve().parents[1]
EPOCHS, FIRST = 'digits, σ = .5, equal epochs', ('Gaussian m=4', 'SmoothAdv', 'CAT-RS', 'ACR paper')
FOLDERS = {'Gaussian m=1': 'digits-methods/equal_epochs/gaussian', 'Gaussian m=4': 'digits-methods/equal_epochs/gaussian4', 'my digits-gaussian': 'digits-gaussian',
           'SmoothAdv': 'digits-methods/equal_epochs/smoothadv', 'CAT-RS': 'digits-methods/equal_epochs/catrs', 'ACR paper': 'digits-methods/equal_epochs/acr'}
CIFAR = {'Gaussian': 'cifar10-gaussian', 'CRT': 'cifar10-crt'}
COLOURS = {'Gaussian m=4': '#555555', 'Gaussian m=1': '#000000', 'SmoothAdv': '#C98500', 'CAT-RS': '#882255', 'ACR paper': '#0072B2', 'Gaussian': '#555555', 'CRT': '#D55E00'}

@pytest.fixture(autouse=True)
def here(monkeypatch): monkeypatch.chdir(ROOT/'nbs/explore')

def shown(explorer): return defaultdict(lambda: go.Scatter(x=[], y=[], text=''), {trace.name: trace for trace in explorer.fig.data})      # one that was never needed is not there

def picture(explorer):
    "All that is drawn, in a number: when texts of this length differ, pytest takes minutes to say where."
    drawn = [(t.name, tuple(t.x), tuple(t.y), str(t.text), t.line.color, t.line.dash) for t in explorer.fig.data if t.x is not None and len(t.x)]
    return hash((*drawn, *(explorer.fig.layout[axis].range for axis in ('yaxis2', 'yaxis3', 'xaxis4'))))

def certified(rows, n, alpha):
    "What each image gets, from the file and a textbook: the share, the credited radius, and whether there is an answer."
    drawn = rows.n.iloc[0]
    votes = rows.n_a + (n - drawn) * (rows.n_a + .5) / (drawn + 1)                # n = drawn: what was counted
    bound = beta.ppf(alpha, votes, n - votes + 1)
    bound = np.where(votes == n, alpha**(1/n), np.where(votes == 0, 0, bound))
    credited = np.where((bound >= .5) & (rows.selected == rows.label), rows.sigma * norm.ppf(bound), -1.)
    return (rows.n_true / drawn).to_numpy(), credited, bound < .5

def check(e, n=10_000, alpha=.001, names=FIRST, folders=FOLDERS, cdf=False):
    "Every line of the picture and every number of the table against the files."
    t, files = shown(e), {name: pd.read_csv(ROOT/'data'/folders[name]/'certify.tsv', sep='\t') for name in names}
    common = set.intersection(*(set(rows.idx) for rows in files.values()))
    images = {name: certified(rows[rows.idx.isin(common)], n, alpha) for name, rows in files.items()}
    projected, x = n > 10_000, np.arange(201) / 200
    base = np.array([(images[names[0]][0] >= s).mean() for s in x])
    for i, name in enumerate(names):
        p, credited, abstains = images[name]
        survival = np.array([(p >= s).mean() for s in x])
        np.testing.assert_allclose(t[f'survival {i}'].y, 1 - survival if cdf else survival)
        np.testing.assert_allclose(t[f'difference {i}'].y, survival - base, atol=1e-12)
        bins = np.minimum(np.floor(20 * p + 1e-9), 19)
        part = [credited.clip(0)[bins == b].sum() / credited.clip(0).sum() for b in range(20)]
        np.testing.assert_allclose(t[f'share {i}'].y, [*part, part[-1]], atol=1e-9)
        radii = t[f'accuracy {i}'].x
        np.testing.assert_allclose(t[f'accuracy {i}'].y, [(credited >= r).mean() for r in radii])
        assert radii[-1] >= credited.max() and t[f'accuracy {i}'].y[-1] == 0
        if name in COLOURS: assert {t[f'{panel} {i}'].line.color for panel in ['survival', 'difference', 'share', 'accuracy']} == {COLOURS[name]}
        assert (t[f'accuracy {i}'].line.dash == t[f'survival {i}'].line.dash) != projected and bool(len(t[f'certified {i}'].x)) == projected
        numbers = [f'{credited.clip(0).mean():.3f}', *(f'{share:.1%}' for share in [(credited >= 0).mean(), abstains.mean(), (p < .5).mean(), (p >= .9).mean()])]
        row = next(row for row in e.words.value.split('<tr>') if f'<b>{name}</b>' in row and '<td' in row)
        assert [cell.split('>')[-1] for cell in row.split('</td>')[1:6]] == numbers
    for i in range(len(names), 6): assert not len(t[f'survival {i}'].x) and not len(t[f'accuracy {i}'].x)
    first = images[names[0]][0]
    np.testing.assert_allclose(t['images'].y[:-1], np.histogram(first, np.arange(21) / 20)[0] / len(first))
    for panel in ['survival', 'difference', 'share', 'accuracy']: assert {name.strip() for name in t[f'{panel} names'].text} == set(names)
    for panel in ['share', 'accuracy']: assert ('projected, not certified' in str(t[f'{panel} projected'].text)) == projected
    assert ('Projected, not certified' in e.words.value) == projected and f'{len(common)} images, N = {n:,}, α = {alpha:.2g}' in e.words.value
    assert 'role="status"' in e.words.value and 'alert' not in e.words.value

MOVES = dict(n=100_000, alpha=1e-6, runs=('Gaussian m=1', 'ACR paper'), data='CIFAR-10 (JPEG copy), σ = .25', baseline='ACR paper', own='data/digits-gaussian', curve='distribution')
THEN = dict(n=dict(n=100_000), alpha=dict(alpha=1e-6), runs=dict(names=('Gaussian m=4', 'Gaussian m=1', 'ACR paper')), data=dict(names=('Gaussian', 'CRT'), folders=CIFAR),
            baseline=dict(names=('ACR paper', 'Gaussian m=4', 'SmoothAdv', 'CAT-RS')), own=dict(names=(*FIRST, 'my digits-gaussian')), curve=dict(cdf=True))

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = PAExplorer()
    check(e)
    assert e.controls.keys() == MOVES.keys() and next(iter(e.controls)) == 'n'
    before = picture(e)
    e.controls[control].value = MOVES[control]
    check(e, **THEN[control])
    assert picture(e) != before

def test_all_controls_together_and_back():
    e = PAExplorer()
    e.controls['data'].value = MOVES['data']
    for name in ['n', 'alpha', 'curve']: e.controls[name].value = MOVES[name]
    e.controls['baseline'].value, e.controls['runs'].value = 'CRT', ('Gaussian',)
    check(e, n=100_000, alpha=1e-6, cdf=True, names=('CRT', 'Gaussian'), folders=CIFAR)
    e.controls['data'].value = EPOCHS
    for name, value in dict(n=10_000, alpha=.001, curve='survival', baseline='Gaussian m=4', runs=FIRST).items(): e.controls[name].value = value
    check(e)

@pytest.mark.parametrize('n', [100, 1995])
def test_fewer_votes_are_a_draw_from_those_that_were_cast(n):
    "Against another draw, image by image: alike but for its noise, and shares are multiples of 1/n."
    e = PAExplorer()
    e.controls['n'].value = n
    t = shown(e)
    for i, name in enumerate(FIRST):
        log = recertify(open_log(f'data/{FOLDERS[name]}'), n=n)
        p, credited = log.n_true / n, np.where(log.correct == 1, log.radius, -1)
        assert np.abs(t[f'survival {i}'].y - [(p >= x).mean() for x in t[f'survival {i}'].x]).max() < .05
        assert np.abs(t[f'accuracy {i}'].y - [(credited >= r).mean() for r in t[f'accuracy {i}'].x]).max() < .08
        ceiling = .5 * norm.ppf(.001**(1/n))
        assert not t[f'accuracy {i}'].y[t[f'accuracy {i}'].x > ceiling].any()
        assert t[f'accuracy {i}'].line.dash == 'solid'
    if n == 100:
        y = t['survival 3'].y                                     # x = 0, .005 ...: 0, then two that round up to .01, and so on
        assert all(len(set(y[k:k+2])) == 1 for k in range(1, 201, 2)) and len(set(y)) > 50
    drawn = picture(e)
    e.controls['n'].value = 10_000
    check(e)
    e.controls['n'].value = n
    assert picture(e) == drawn                               # the seed is fixed

@pytest.mark.parametrize('data', ['digits, σ = .5, equal epochs', 'digits, σ = .5, equal cost', 'digits, σ = .25', 'digits, σ = .25 and .5', 'CIFAR-10 (JPEG copy), σ = .25'])
@pytest.mark.parametrize('n', [100, 1_000_000])
@pytest.mark.parametrize('alpha', [1e-6, .1])
def test_corners(data, n, alpha):
    "Nothing is nan or escapes its axis, and every run there is a Gaussian to be compared with."
    e = PAExplorer()
    for name, value in dict(data=data, n=n, alpha=alpha).items(): e.controls[name].value = value
    assert e.controls['baseline'].value.startswith('Gaussian') and 'alert' not in e.words.value
    layout = e.fig.layout
    for name, t in shown(e).items():
        if name[-1].isdigit() and len(t.x):
            axis = {'survival': 'yaxis', 'difference': 'yaxis2', 'share': 'yaxis3', 'accuracy': 'yaxis4', 'certified': 'yaxis4'}[name.split()[0]]
            low, high = layout[axis].range
            assert np.isfinite(t.y).all() and low <= min(t.y) and max(t.y) <= high
    for panel in ['survival', 'difference', 'share', 'accuracy']:
        heights = np.sort(shown(e)[f'{panel} names'].y)
        assert (np.diff(heights) > .06 * heights.max()).all() or panel == 'difference'

def test_line_style_tells_sigma():
    e = PAExplorer()
    e.controls['data'].value = 'digits, σ = .25 and .5'
    t = shown(e)
    by_name = dict(zip(e.page.runs, range(6)))
    for method in ['Gaussian', 'CRT']:
        small, large = [t[f'survival {by_name[f"{method} σ={s}"]}'].line for s in ['.25', '.5']]
        assert small.color == large.color and small.dash == 'solid' and large.dash != 'solid'
    e.controls['n'].value = 50_000
    assert len({t[f'accuracy {i}'].line.dash for i in range(4)} | {'solid', large.dash}) == 4

WRONG = {
    'nothing there': (lambda folder: 'nowhere', 'there is no nowhere'),
    'a folder without a log': (lambda folder: str(folder), 'certify.tsv, neither in'),
    'another kind of text': (lambda folder: 'data/README.md', 'is not a certification log'),
    'another kind of file': (lambda folder: 'data/digits-crt/model.safetensors', 'is not a certification log'),
    'other images': (lambda folder: 'data/cifar10-crt', 'different data'),
    'no votes': (lambda folder: published(folder), 'does not hold the votes'),
    'no rows': (lambda folder: empty(folder), 'no image in common'),
    'markup': (lambda folder: '<b>x</b>', 'there is no &lt;b&gt;x'),
}

def published(folder):
    rows = pd.read_csv(ROOT/'data/digits-gaussian/certify.tsv', sep='\t')
    rows[['idx', 'label', 'predict', 'radius', 'correct', 'time']].assign(n=10_000, alpha=.001, sigma=.5).to_csv(folder/'foreign.tsv', sep='\t', index=False)
    return str(folder/'foreign.tsv')

def empty(folder):
    (folder/'begun.tsv').write_text((ROOT/'data/digits-gaussian/certify.tsv').read_text().splitlines()[0] + '\n')
    return str(folder/'begun.tsv')

@pytest.mark.parametrize('case', WRONG)
def test_wrong_paths_are_said_and_survived(tmp_path, case):
    path, message = WRONG[case]
    e = PAExplorer()
    before = picture(e)
    e.controls['own'].value = path(tmp_path)
    assert 'role="alert"' in e.words.value and message in e.words.value
    assert picture(e) == before
    e.controls['n'].value = 100_000                       # all else goes on
    assert 'role="alert"' in e.words.value and 'N = 100,000' in e.words.value and picture(e) != before
    e.controls['own'].value = ''
    check(e, n=100_000)

def test_only_your_own(tmp_path):
    e = PAExplorer()
    before = picture(e)
    e.controls['data'].value = 'only your own'
    assert 'role="alert"' in e.words.value and 'your runs' in e.words.value and picture(e) == before
    e.controls['own'].value = f'{ROOT}/data/cifar10-gaussian, data/cifar10-crt/certify.tsv'
    check(e, names=('my cifar10-gaussian', 'my cifar10-crt'), folders={f'my {folder}': folder for folder in CIFAR.values()})

def test_more_votes_of_ones_own_are_certified_where_others_are_projected(tmp_path):
    rows = pd.read_csv(ROOT/'data/digits-methods/equal_epochs/acr/certify.tsv', sep='\t')
    rows.assign(n=100_000, n_a=10 * rows.n_a, n_true=10 * rows.n_true).to_csv(tmp_path/'large.tsv', sep='\t', index=False)
    e = PAExplorer()
    e.controls['own'].value = str(tmp_path/'large.tsv')
    e.controls['n'].value = 100_000
    dashes = {name: shown(e)[f'accuracy {i}'].line.dash for i, name in enumerate(e.page.runs)}
    assert {name for name, dash in dashes.items() if dash == 'solid'} == {'my large'}
    assert 'For Gaussian m=4, SmoothAdv, CAT-RS, ACR paper only 10,000 votes' in e.words.value

def test_too_many_runs_are_said():
    e = PAExplorer()
    before = picture(e)
    e.controls['runs'].value = e.controls['runs'].options
    assert 'role="alert"' in e.words.value and 'at most 6' in e.words.value and picture(e) == before
    e.controls['runs'].value = FIRST
    check(e)

def test_without_the_shipped_data(tmp_path, monkeypatch):
    shutil.copytree(ROOT/'data/digits-crt', tmp_path/'mine')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('rs_toolkit.common.package_folder', lambda: tmp_path)
    e = PAExplorer()
    assert 'role="alert"' in e.words.value and 'there is no data/digits-methods' in e.words.value
    e.controls['alpha'].value = .01
    e.controls['own'].value = 'mine'
    e.controls['data'].value = 'only your own'
    check(e, alpha=.01, names=('my mine',), folders={'my mine': 'digits-crt'})

def test_controls_clamp():
    e = PAExplorer()
    for name, wild, kept in [('n', 1e12, 1e6), ('n', 0, 100), ('alpha', 2, .1), ('alpha', 0, 1e-6)]:
        e.controls[name].value = wild
        assert e.controls[name].value == pytest.approx(kept)

@pytest.mark.parametrize('broken, control', [('p_a_traces', 'n'), ('open_log', 'data')])
def test_a_bug_is_shown_and_raised(monkeypatch, broken, control):
    e = PAExplorer()
    with monkeypatch.context() as patch:
        patch.setattr(f'rs_toolkit.explore.p_a.{broken}', lambda *_: 1/0)
        with pytest.raises(ZeroDivisionError): e.controls[control].value = MOVES[control]
    assert 'role="alert"' in e.words.value and 'division' in e.words.value
    e.controls['alpha'].value = .01
    assert 'role="status"' in e.words.value and 'α = 0.01' in e.words.value

def test_opens_without_torch():
    code = 'from rs_toolkit.explore.p_a import PAExplorer; PAExplorer(); import sys; assert not {"torch", "matplotlib"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)
