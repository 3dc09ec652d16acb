"""The p_a explorer: every control by hand, against the votes as they stand in the files."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, norm

from explorer import HOSTILE, clamps, complains, move, shown, written
from rs_toolkit.distribution import open_log
from rs_toolkit.explore.door import guests
from rs_toolkit.explore.p_a import PAExplorer
from rs_toolkit.metrics import recertify

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 'digits, σ = .5, equal epochs'
COST = 'digits, σ = .5, equal cost'
BOTH = 'digits, σ = .25 and .5'
JPEG = 'CIFAR-10 (JPEG copy), σ = .25'
FIRST = 'Gaussian m=4', 'SmoothAdv', 'CAT-RS', 'ACR paper'
PANELS = 'survival', 'difference', 'share', 'accuracy'
NAMES = {'gaussian': 'Gaussian m=1', 'gaussian4': 'Gaussian m=4', 'smoothadv': 'SmoothAdv', 'catrs': 'CAT-RS',
         'acr': 'ACR paper'}
FOLDERS = {name: f'digits-methods/equal_epochs/{key}' for key, name in NAMES.items()}
FOLDERS['my digits-gaussian'] = 'digits-gaussian'
CIFAR = {'Gaussian': 'cifar10-gaussian', 'CRT': 'cifar10-crt'}
COLOURS = {'Gaussian m=4': '#555555', 'Gaussian m=1': '#000000', 'SmoothAdv': '#C98500', 'CAT-RS': '#882255',
           'ACR paper': '#0072B2', 'Gaussian': '#555555', 'CRT': '#CC6677'}

@pytest.fixture(autouse=True)
def here(monkeypatch): monkeypatch.chdir(ROOT/'nbs/explore')

def picture(explorer):
    "All that is drawn, in a number: when texts of this length differ, pytest takes minutes to say where."
    traces = [t for t in shown(explorer).values() if t.x is not None and len(t.x)]
    drawn = [(t.name, tuple(t.x), tuple(t.y), str(t.text), t.line.color, t.line.dash) for t in traces]
    ranges = [explorer.fig.layout[axis].range for axis in ('yaxis2', 'yaxis3', 'xaxis4')]
    return hash((*drawn, *ranges))

def certified(rows, n, alpha):
    "What each image gets, from the file and a textbook: the share, the credited radius, whether there is no answer."
    drawn = rows.n.iloc[0]
    votes = rows.n_a + (n - drawn) * (rows.n_a + .5) / (drawn + 1)                # n = drawn: what was counted
    bound = beta.ppf(alpha, votes, n - votes + 1)
    bound = np.where(votes == n, alpha**(1/n), np.where(votes == 0, 0, bound))
    credited = np.where((bound >= .5) & (rows.selected == rows.label), rows.sigma * norm.ppf(bound), -1.)
    return (rows.n_true / drawn).to_numpy(), credited, bound < .5

GRID = np.arange(201) / 200

def survival(p): return np.array([(p >= share).mean() for share in GRID])

def check_lines(t, i, images, base, cdf):
    "The lines of a run in all panels, from its images."
    p, credited, _ = images
    earned = credited.clip(0)
    own = survival(p)
    np.testing.assert_allclose(t[f'survival {i}'].y, 1 - own if cdf else own)
    np.testing.assert_allclose(t[f'difference {i}'].y, own - base, atol=1e-12)
    bins = np.minimum(np.floor(20 * p + 1e-9), 19)
    part = [earned[bins == b].sum() / earned.sum() for b in range(20)]
    np.testing.assert_allclose(t[f'share {i}'].y, [*part, part[-1]], atol=1e-9)
    radii = t[f'accuracy {i}'].x
    np.testing.assert_allclose(t[f'accuracy {i}'].y, [(credited >= r).mean() for r in radii])
    assert radii[-1] >= credited.max() and t[f'accuracy {i}'].y[-1] == 0

def check_looks(t, i, name, projected):
    "Its colour, and what is dotted."
    if name in COLOURS:
        assert {t[f'{panel} {i}'].line.color for panel in PANELS} == {COLOURS[name]}
    assert (t[f'accuracy {i}'].line.dash != t[f'survival {i}'].line.dash) == projected
    assert bool(len(t[f'certified {i}'].x)) == projected

def check_row(words, name, images):
    "Its row of the table."
    p, credited, abstains = images
    shares = [(credited >= 0).mean(), abstains.mean(), (p < .5).mean(), (p >= .9).mean()]
    [row] = [row for row in words.split('<tr>') if f'<b>{name}</b>' in row and '<td' in row]
    cells = [cell.split('>')[-1] for cell in row.split('</td>')[1:6]]
    assert cells == [f'{credited.clip(0).mean():.3f}', *(f'{share:.1%}' for share in shares)]

def check(e, n=10_000, alpha=.001, names=FIRST, folders=FOLDERS, cdf=False):
    "Every line of the picture and every number of the table against the files."
    t = shown(e)
    words = e.words.value + e.table.value
    files = {name: pd.read_csv(ROOT/'data'/folders[name]/'certify.tsv', sep='\t') for name in names}
    common = set.intersection(*(set(rows.idx) for rows in files.values()))
    images = {name: certified(rows[rows.idx.isin(common)], n, alpha) for name, rows in files.items()}
    first, *_ = images[names[0]]
    projected = n > 10_000
    for i, name in enumerate(names):
        check_lines(t, i, images[name], survival(first), cdf)
        check_looks(t, i, name, projected)
        check_row(words, name, images[name])
    for i in range(len(names), 6): assert not len(t[f'survival {i}'].x) and not len(t[f'accuracy {i}'].x)
    np.testing.assert_allclose(t['images'].y[:-1], np.histogram(first, np.arange(21) / 20)[0] / len(first))
    for panel in PANELS: assert {name.strip() for name in t[f'{panel} names'].text} == set(names)
    for panel in ['share', 'accuracy']:
        assert ('projected, not certified' in str(t[f'{panel} projected'].text)) == projected
    assert ('Projected, not certified' in words) == projected
    assert f'{len(common)} images, N = {n:,}, α = {alpha:.2g}' in words
    assert 'role="status"' in words and 'alert' not in words

MOVES = dict(n=100_000, alpha=1e-6, runs=('Gaussian m=1', 'ACR paper'), data=JPEG, baseline='ACR paper',
             own=guests('data/digits-gaussian'), curve='distribution')
THEN = dict(  # what `check` is told afterwards
    n=dict(n=100_000),
    alpha=dict(alpha=1e-6),
    runs=dict(names=('Gaussian m=4', 'Gaussian m=1', 'ACR paper')),
    data=dict(names=('Gaussian', 'CRT'), folders=CIFAR),
    baseline=dict(names=('ACR paper', 'Gaussian m=4', 'SmoothAdv', 'CAT-RS')),
    own=dict(names=(*FIRST, 'my digits-gaussian')),
    curve=dict(cdf=True))

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = PAExplorer()
    check(e)
    assert e.controls.keys() == MOVES.keys() and [*e.controls][0] == 'n'
    before = picture(e)
    e.controls[control].value = MOVES[control]
    check(e, **THEN[control])
    assert picture(e) != before

def test_all_controls_together_and_back():
    e = PAExplorer()
    move(e, data=JPEG, n=100_000, alpha=1e-6, curve='distribution', baseline='CRT', runs=('Gaussian',))
    check(e, n=100_000, alpha=1e-6, cdf=True, names=('CRT', 'Gaussian'), folders=CIFAR)
    move(e, data=EPOCHS, n=10_000, alpha=.001, curve='survival', baseline='Gaussian m=4', runs=FIRST)
    check(e)

@pytest.mark.parametrize('n', [100, 1995])
def test_fewer_votes_are_a_draw_from_those_that_were_cast(n):
    "Against another draw, image by image: alike but for its noise, and shares are multiples of 1/n."
    e = PAExplorer()
    e.controls['n'].value = n
    t = shown(e)
    for i, name in enumerate(FIRST):
        log = recertify(open_log(f'data/{FOLDERS[name]}'), n=n)
        credited = np.where(log.correct == 1, log.radius, -1)
        drawn = t[f'survival {i}']
        assert np.abs(drawn.y - survival(log.n_true / n)).max() < .05
        accuracy = t[f'accuracy {i}']
        assert np.abs(accuracy.y - [(credited >= r).mean() for r in accuracy.x]).max() < .08
        assert not accuracy.y[accuracy.x > .5 * norm.ppf(.001**(1/n))].any()
        assert accuracy.line.dash == 'solid'
    if n == 100:
        y = t['survival 3'].y                           # x = 0, .005 ...: 0, then two that round up to .01, and so on
        np.testing.assert_array_equal(y[1::2], y[2::2])
        assert len(set(y)) > 50
    drawn = picture(e)
    e.controls['n'].value = 10_000
    check(e)
    e.controls['n'].value = n
    assert picture(e) == drawn                               # the seed is fixed

@pytest.mark.parametrize('data', [EPOCHS, COST, 'digits, σ = .25', BOTH, JPEG])
@pytest.mark.parametrize('n', [100, 1_000_000])
@pytest.mark.parametrize('alpha', [1e-6, .1])
def test_corners(data, n, alpha):
    "Nothing is nan or escapes its axis, and every run there is a Gaussian to be compared with."
    e = PAExplorer()
    move(e, data=data, n=n, alpha=alpha)
    assert e.controls['baseline'].value.startswith('Gaussian') and 'alert' not in e.words.value
    axes = dict(survival='yaxis', difference='yaxis2', share='yaxis3', accuracy='yaxis4', certified='yaxis4')
    for name, t in shown(e).items():
        if name[-1].isdigit() and len(t.x):
            low, high = e.fig.layout[axes[name.split()[0]]].range
            assert np.isfinite(t.y).all() and low <= min(t.y) and max(t.y) <= high, name
    for panel in 'survival', 'share', 'accuracy':
        heights = np.sort(shown(e)[f'{panel} names'].y)
        assert (np.diff(heights) > .06 * heights.max()).all(), panel

def test_line_style_tells_sigma():
    e = PAExplorer()
    move(e, data=BOTH)
    t = shown(e)
    by_name = dict(zip(e.page.runs, range(6)))
    for method in ['Gaussian', 'CRT']:
        small, large = [t[f'survival {by_name[f"{method} σ={s}"]}'].line for s in ['.25', '.5']]
        assert small.color == large.color and small.dash == 'solid' and large.dash != 'solid'
    e.controls['n'].value = 50_000
    assert len({t[f'accuracy {i}'].line.dash for i in range(4)} | {'solid', large.dash}) == 4

WRONG = {
    'other images': (lambda folder: 'data/cifar10-crt', 'different data'),
    'no votes': (lambda folder: published(folder), 'does not hold the votes'),
    'no rows': (lambda folder: empty(folder), 'no image in common'),
}

def published(folder):
    rows = pd.read_csv(ROOT/'data/digits-gaussian/certify.tsv', sep='\t')
    foreign = rows[['idx', 'label', 'predict', 'radius', 'correct', 'time']].assign(n=10_000, alpha=.001, sigma=.5)
    foreign.to_csv(folder/'foreign.tsv', sep='\t', index=False)
    return str(folder/'foreign.tsv')

def empty(folder):
    header, *_ = (ROOT/'data/digits-gaussian/certify.tsv').read_text().splitlines()
    (folder/'begun.tsv').write_text(header + '\n')
    return str(folder/'begun.tsv')

@pytest.mark.parametrize('case', WRONG)
def test_guests_that_do_not_compare_are_said_and_survived(tmp_path, case):
    path, message = WRONG[case]
    e = PAExplorer()
    before = picture(e)
    move(e, own=guests(path(tmp_path)))
    assert complains(e, message) and complains(e, 'is left out')
    assert picture(e) == before
    move(e, n=100_000)                                    # all else goes on
    assert complains(e, 'N = 100,000') and picture(e) != before
    move(e, own=guests({'good': 'data/digits-gaussian', 'bad': path(tmp_path)}))
    assert 'good' in e.page.runs and 'bad' not in e.page.runs and complains(e, 'bad is left out')
    move(e, own=(), n=10_000, runs=FIRST)
    check(e)

def test_only_your_own(tmp_path):
    e = PAExplorer()
    before = picture(e)
    move(e, data='only your own')
    assert complains(e, 'add runs') and picture(e) == before
    e.controls['own'].bring(f'{ROOT}/data/cifar10-*')
    mine = {f'my {folder}': folder for folder in ('cifar10-crt', 'cifar10-gaussian')}
    check(e, names=tuple(mine), folders=mine)

def test_the_door_is_an_argument():
    e = PAExplorer(own={HOSTILE: 'data/digits-gaussian'})
    assert HOSTILE in e.values['runs'] and HOSTILE not in written(e) + e.table.value

def click(name, x, y, e):
    "What the browser sends."
    keys = dict.fromkeys(['alt', 'ctrl', 'meta', 'shift'], False)
    trace = [t.name for t in e.fig.data].index(name)
    points = dict(trace_indexes=[trace], point_indexes=[[0]], xs=[x], ys=[y])
    e.fig._js2py_pointsCallback = dict(event_type='plotly_click', selector=None, points=points,
                                       device_state=dict(keys, button=0, buttons=1))

def test_a_click_shows_the_images_behind_a_line():
    e = PAExplorer()
    log = open_log(f'data/{FOLDERS["ACR paper"]}')
    click('survival 3', .5, .7, e)
    assert 'ACR paper' in e.cases.title.value
    shares = [tile.children[0].value for tile in e.cases.tiles.children]
    near = (log.n_true / log.n - .5).abs().astype(float).nsmallest(6)
    assert all(f'image {log.idx[i]},' in ' '.join(shares) for i in near.index)
    assert all('data:image/png' in words for words in shares)
    click('accuracy 0', .9, .2, e)
    assert 'Gaussian m=4' in e.cases.title.value and 'certified to about 0.9' in e.cases.title.value
    click('images', .5, .1, e)                            # nobody's line
    assert 'Gaussian m=4' in e.cases.title.value
    move(e, alpha=.01)
    assert 'Click a line' in e.cases.title.value and not e.cases.tiles.children

    assert e.cases.line.label == 'Gaussian m=4'
    e.cases.line.label = 'CAT-RS'                         # without a mouse
    e.cases.radius.value = .7
    e.cases.button.click()
    assert 'CAT-RS' in e.cases.title.value and 'certified to about 0.700' in e.cases.title.value

def test_more_votes_of_ones_own_are_certified_where_others_are_projected(tmp_path):
    rows = pd.read_csv(ROOT/'data/digits-methods/equal_epochs/acr/certify.tsv', sep='\t')
    more = rows.assign(n=100_000, n_a=10 * rows.n_a, n_true=10 * rows.n_true)
    more.to_csv(tmp_path/'large.tsv', sep='\t', index=False)
    e = PAExplorer()
    move(e, own=guests(tmp_path/'large.tsv'), n=100_000)
    dashes = {name: shown(e)[f'accuracy {i}'].line.dash for i, name in enumerate(e.page.runs)}
    assert {name for name, dash in dashes.items() if dash == 'solid'} == {'my large'}
    assert 'For Gaussian m=4, SmoothAdv, CAT-RS, ACR paper only 10,000 votes' in e.words.value

def test_too_many_runs_are_said():
    e = PAExplorer()
    before = picture(e)
    move(e, runs=e.controls['runs'].options)
    assert complains(e, 'at most 6') and picture(e) == before
    move(e, runs=FIRST)
    check(e)

def test_without_the_shipped_data(tmp_path, monkeypatch):
    shutil.copytree(ROOT/'data/digits-crt', tmp_path/'mine')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('rs_toolkit.common.package_folder', lambda: tmp_path)
    e = PAExplorer()
    assert complains(e, 'there is no data/digits-methods')
    move(e, alpha=.01, own=guests('mine'), data='only your own')
    check(e, alpha=.01, names=('my mine',), folders={'my mine': 'digits-crt'})

def test_controls_clamp():
    e = PAExplorer()
    for name, wild, kept in [('n', 1e12, 1e6), ('n', 0, 100), ('alpha', 2, .1), ('alpha', 0, 1e-6)]:
        assert clamps(e, name, wild) == pytest.approx(kept), (name, wild)

@pytest.mark.parametrize('broken, control', [('p_a_traces', 'n'), ('together', 'data')])
def test_a_bug_is_shown_and_raised(monkeypatch, broken, control):
    e = PAExplorer()
    with monkeypatch.context() as patch:
        patch.setattr(f'rs_toolkit.explore.p_a.{broken}', lambda *_: 1/0)
        with pytest.raises(ZeroDivisionError): move(e, **{control: MOVES[control]})
    assert complains(e, 'division')
    move(e, alpha=.01)
    assert 'role="status"' in e.words.value and 'α = 0.01' in e.words.value

def test_opens_without_torch():
    code = '''if True:
        import sys
        from rs_toolkit.explore.p_a import PAExplorer
        PAExplorer()
        assert not {"torch", "matplotlib"} & set(sys.modules)'''
    subprocess.run([sys.executable, '-c', code], check=True)
