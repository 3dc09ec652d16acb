"""The methods explorer: every control by hand, against the CSV files and logs themselves."""
import csv
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from explorer import HOSTILE, complains, move, shown, written
from rs_toolkit.catalogue import METHODS, Entry
from rs_toolkit.explore import methods
from rs_toolkit.explore.door import guests
from rs_toolkit.explore.methods import MINE, SOURCES, MethodsExplorer, free_places

DATA = Path(__file__).resolve().parents[1] / 'data'

@pytest.fixture(autouse=True)
def here(monkeypatch): monkeypatch.chdir(DATA.parent)

AS_OURS = {'Gaussian': 'Gaussian m=4', 'Ours': 'ACR paper'}     # names of the file -> of the page

def table2():
    "(method, sigma) -> radius -> percent, as the file has it."
    values = defaultdict(dict)
    with open(DATA/'published/acr_paper_table2.csv') as file:
        for row in csv.DictReader(file):
            key = AS_OURS.get(row['method'], row['method']), float(row['sigma'])
            values[key][float(row['radius'])] = float(row['certified_accuracy'])
    return values

def curves(explorer, kind='line'):
    "What is drawn: label in the hover text -> (radii, values)."
    drawn = [t for t in explorer.fig.data if re.fullmatch(rf'{kind} \d+', t.name) and len(t.x)]
    return {t.hovertemplate.partition(':')[0]: (np.array(t.x), np.array(t.y)) for t in drawn}

def differences(values, paper, radii):
    "What is drawn below, by hand."
    return [(values[r] - paper[r]) / 100 for r in radii]

def check_curves(e, paper, baseline):
    "Each line of the paper, and its difference to the baseline."
    drawn = curves(e)
    gaps = curves(e, 'difference')
    assert set(drawn) - {'Gaussian m=1', 'Stability'} == set(paper)
    assert set(gaps) == set(drawn) - {baseline}
    for name, values in paper.items():
        known = [r for r in values if values[r] > 0]
        assert drawn[name][0].tolist() == known, name
        np.testing.assert_allclose(drawn[name][1], [values[r] / 100 for r in known], err_msg=name)
        if name not in gaps or baseline not in paper: continue
        radii, heights = gaps[name]
        np.testing.assert_allclose(heights, differences(values, paper[baseline], radii), atol=1e-9, err_msg=name)

def check_readings(e, paper, radius):
    "The ranking at the radius, and the lines that mark it."
    t = shown(e)
    reading = t['reading']
    assert list(reading.x) == sorted(reading.x, reverse=True)
    for name in 'radius', 'difference radius': assert t[name].x == (radius, radius), name
    for name, value in zip(reading.hovertext, reading.x):
        if name in paper and radius in paper[name]: assert value == pytest.approx(paper[name][radius] / 100), name

def check_table2(e, sigma=.5, methods=None, baseline='Gaussian m=4', radius=.5):
    "One noise level of Table 2, line by line."
    wanted = methods and {*methods, baseline}
    paper = {m: values for (m, s), values in table2().items() if s == sigma and (wanted is None or m in wanted)}
    check_curves(e, paper, baseline)
    check_readings(e, paper, radius)
    assert 'role="status"' in e.words.value
    assert f'radius <b>{radius:.2f}</b>' in e.words.value

# control -> new value, what then is checked
MOVES = dict(
    radius=(1., lambda e: check_table2(e, radius=1.)),
    source=('digits, equal cost', lambda e: check_digits(e, 'equal_cost')),
    runs=(guests('data/digits-methods/equal_epochs'), lambda e: check_digits(e, 'equal_epochs')),
    methods=(('MACER', 'CAT-RS'), lambda e: check_table2(e, methods=('MACER', 'CAT-RS'))),
    sigma=((1.,), lambda e: check_table2(e, sigma=1.)),
    baseline=('Gaussian m=1', lambda e: check_table2(e, baseline='Gaussian m=1')),
    envelope=(True, lambda e: check_envelope(e, (.5,))),
)

def check_digits(e, budget):
    "The curves of our own logs are exact: as many steps as the log has radii, each where it belongs."
    drawn = curves(e)
    assert drawn.keys() == {entry.label for entry in METHODS.values()}
    for key, entry in METHODS.items():
        log = pd.read_csv(DATA/'digits-methods'/budget/key/'certify.tsv', sep='\t')
        x, y = drawn[entry.label]
        np.testing.assert_allclose(y, [((log.correct == 1) & (log.radius >= r)).mean() for r in x], err_msg=key)
        assert set(log.radius[log.correct == 1]) <= set(x), key
    first = shown(e)['line 0']
    assert (first.line.shape, first.marker.opacity) == ('vh', 0)

@pytest.mark.parametrize('budget', ['equal epochs', 'equal cost'])
def test_five_seeds_are_drawn_as_their_mean(budget):
    e = MethodsExplorer(f'digits, five seeds, {budget}')
    drawn = curves(e)
    assert drawn.keys() == {entry.label for entry in METHODS.values()}
    folder = DATA/'digits-seeds'/budget.replace(' ', '_')
    for key, entry in METHODS.items():
        seeds = [pd.read_csv(file, sep='\t') for file in (folder/key).glob('*.tsv.gz')]
        x, y = drawn[entry.label]
        by_seed = [[((log.correct == 1) & (log.radius >= r)).mean() for r in x] for log in seeds]
        assert len(seeds) == 5
        np.testing.assert_allclose(y, np.mean(by_seed, 0), err_msg=key)
    costs = pd.read_csv(folder/'costs.csv', index_col='method').cost
    assert set(shown(e)['cost'].x) == set(costs)

def check_envelope(e, sigmas):
    drawn = curves(e)
    paper = table2()
    for name in {m for m, _ in paper}:
        best = [max(paper[name, s][r] for s in sigmas) / 100 for r in paper[name, .25]]
        np.testing.assert_allclose(drawn[name][1], [v for v in best if v > 0], err_msg=name)
    assert 'not one classifier' in e.words.value
    assert shown(e)['envelope'].text == ('upper envelope over σ: not one classifier',)
    assert len(shown(e)['envelope'].x) == 1
    assert '>ACR<' not in e.table.value

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = MethodsExplorer()
    check_table2(e)
    assert e.controls.keys() == MOVES.keys()
    if control == 'runs':
        move(e, runs=guests('data/digits-methods/equal_cost/*'), source=MINE)
        check_digits(e, 'equal_cost')
    before = e.fig.to_json()
    value, check = MOVES[control]
    e.controls[control].value = value
    check(e)
    assert e.fig.to_json() != before

def content(e):
    "Everything that is shown, spare lines apart: trace -> its properties."
    traces = [trace for trace in e.fig.to_plotly_json()['data'] if trace.get('visible') is not False]
    return {trace['name']: {k: v for k, v in trace.items() if k != 'uid' and v != {}} for trace in traces}

def test_what_is_drawn_does_not_depend_on_the_way_there():
    e = MethodsExplorer()
    f = MethodsExplorer('digits, equal cost')
    for explorer in e, f:
        move(explorer, sigma=(.5,), radius=.3)
        for source in 'ImageNet, released logs', 'digits, equal epochs', 'CIFAR-10, published':
            move(explorer, source=source)
        move(explorer, sigma=(.25, 1.), envelope=True)
    one = content(e)
    other = content(f)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys(), name
        for key in one[name]: np.testing.assert_equal(one[name][key], other[name][key], err_msg=f'{name}, {key}')
    assert e.words.value == f.words.value
    assert e.table.value == f.table.value
    check_envelope(e, (.25, 1.))

@pytest.mark.parametrize('source', SOURCES)
def test_every_source_opens_and_reads(source):
    e = MethodsExplorer(source)
    assert 'role="status"' in e.words.value
    assert '<table' in e.table.value
    move(e, sigma=[s for _, s in e.controls['sigma'].options])
    for r in [0, .25, 4]:
        e.controls['radius'].value = r
        values = np.array(shown(e)['reading'].x, float)
        assert ((0 <= values) & (values <= 1)).all(), r
        assert (np.diff(values) <= 0).all(), r
    assert (len(shown(e)['no cost'].x) == 1) == (len(shown(e)['cost'].x) == 0)
    assert not np.isnan(np.array(shown(e)['cost'].y, float)).any(), 'a dot without a place is not seen'
    if len(shown(e)['no cost'].x): assert 'not known' in shown(e)['no cost'].text[0]

def test_between_printed_radii():
    e = MethodsExplorer()
    e.controls['radius'].value = .6
    value = dict(zip(shown(e)['reading'].hovertext, shown(e)['reading'].x))['MACER']
    assert value == pytest.approx(.6*.495 + .4*.421)
    assert 'straight line' in e.words.value
    move(e, radius=1.8)                     # Table 2 ends at 1.75 with 12 %, N certifies up to 1.91: nobody knows
    assert len(shown(e)['reading'].x) == 0
    assert 'unknown' in e.words.value
    move(e, radius=2.)
    assert set(shown(e)['reading'].x) == {0}
    assert 'nothing is certified' in e.words.value

def test_the_table_under_the_figure():
    e = MethodsExplorer()
    e.controls['sigma'].value = (.25,)
    assert '<u><span style="color:#767676">78.7</span></u>' in e.table.value     # second, worse than the baseline
    assert '<b>81.3</b>' in e.table.value
    move(e, baseline='Gaussian m=1')
    assert '<u>78.7</u>' in e.table.value
    assert 'worse than Gaussian m=1' in e.table.value

def test_costs():
    cost = shown(MethodsExplorer())['cost']
    acr = dict(zip(cost.hovertext, zip(cost.x, cost.y)))
    assert acr['SmoothAdv, σ = 0.5'] == pytest.approx((8*23/3, .684))
    assert acr['Gaussian m=4, σ = 0.5'] == (4, .562)
    assert acr['Gaussian m=1, σ = 0.5'] == (1, .5251)

@pytest.mark.parametrize('values, message', [
    (dict(sigma=()), 'choose at least one'),
    (dict(source=MINE), 'no run of your own'),
])
def test_wrong_input_is_said_and_survived(values, message):
    e = MethodsExplorer()
    before = e.fig.to_json()
    old = e.values
    move(e, **values)
    assert complains(e, message)
    assert e.fig.to_json() == before
    move(e, **{name: old[name] for name in values})
    check_table2(e)

def test_runs_of_several_budgets_are_shown_or_refused():
    e = MethodsExplorer()
    move(e, source=MINE, runs=guests('data/digits-*'))            # two sigmas and budgets in one folder
    assert 'role=' in e.words.value

def test_runs_that_do_not_compare_are_left_out():
    e = MethodsExplorer()
    move(e, runs=guests('data/*-gaussian'))               # digits and CIFAR-10 at one sigma
    assert e.values['source'] == MINE and complains(e, 'Gaussian m=1 (digits-gaussian), σ = 0.25 is left out')
    assert complains(e, 'over the same images only</div>') and set(curves(e)) == {'Gaussian m=1'}
    move(e, runs=guests('data/cifar10-*'))
    assert 'alert' not in e.words.value and set(curves(e)) == {'CRT', 'Gaussian m=1'}
    move(e, runs=())
    assert complains(e, 'no run of your own')
    move(e, source='CIFAR-10, published', sigma=(.5,))
    shown(e)
    check_table2(e)

def test_names_from_outside_are_text(tmp_path):
    source = DATA/'digits-methods/equal_epochs/macer'
    copy_run(source, tmp_path/'mine', method=f'mine:{HOSTILE}', dataset='digits', seed=0)
    e = MethodsExplorer(own=tmp_path/'mine')
    assert set(curves(e)) == {'&lt;img src=x onerror=alert(1)&gt;'}
    move(e, radius=.1)
    assert HOSTILE in e.controls['methods'].options                              # a button shows text
    assert HOSTILE not in written(e) + e.table.value

def test_a_click_shows_images():
    e = MethodsExplorer('digits, equal epochs')
    e.clicked('line 0', .9, .5)
    assert 'ACR paper' in e.cases.title.value and len(e.cases.tiles.children) == 6
    e.cases.line.label = 'MACER, σ = 0.5'
    e.cases.button.click()
    assert 'MACER' in e.cases.title.value and 'certified to about 0.500' in e.cases.title.value
    move(e, source='CIFAR-10, published')
    assert not e.cases.tiles.children
    e.clicked('line 0', .5, .5)
    assert 'no images' in e.cases.title.value

def copy_run(source, folder, **parameters):
    "A run folder with the log of another one."
    folder.mkdir()
    shutil.copy(source/'certify.tsv', folder)
    (folder/'config.json').write_text(json.dumps(dict(parameters=parameters)))

def test_one_entry_brings_a_method_into_the_page(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, 'mine', Entry('mine', 'My method', '#123456'))
    copy_run(DATA/'digits-methods/equal_epochs/macer', tmp_path/'mine', method='mine', dataset='digits', seed=0)
    e = MethodsExplorer()
    move(e, runs=guests(tmp_path/'*'), source=MINE)
    assert set(curves(e)) == {'My method'}
    assert shown(e)['line 0'].line.color == '#123456'

def test_runs_of_certify_seeds_and_logs(tmp_path, monkeypatch):
    "Three seeds are one line, their mean; a run of certify goes by its network, a log by its name."
    digits = DATA/'digits-methods/equal_epochs'
    sources = 'macer', 'consistency', 'crt'               # made-up seeds: other certificates
    for seed, source in enumerate(sources):
        copy_run(digits/source, tmp_path/f'macer-{seed}', method='macer', dataset='digits', seed=seed)
    copy_run(digits/'acr', tmp_path/'certify-acr', checkpoint=str(digits/'acr'))
    shutil.copy(digits/'sodm/certify.tsv', tmp_path/'somebody.tsv')
    (tmp_path/'notes.txt').write_text('no log')
    e = MethodsExplorer()
    move(e, runs=guests(tmp_path/'*'), source=MINE)
    drawn = curves(e)
    assert set(drawn) == {'MACER', 'ACR paper', 'somebody'}
    logs = [pd.read_csv(digits/name/'certify.tsv', sep='\t') for name in sources]
    x, y = drawn['MACER']
    each = [[((log.correct == 1) & (log.radius >= r)).mean() for r in x] for log in logs]
    np.testing.assert_allclose(y, np.mean(each, axis=0))
    acr = [(log.correct * log.radius).mean() for log in logs]
    printed = re.sub('</?[bu]>', '', e.table.value)
    assert f'{np.mean(acr):.3f} ± {np.std(acr, ddof=1):.3f}' in printed
    monkeypatch.setattr(methods, 'export_figure', lambda *_: iter(()))
    e.folder.value = str(tmp_path/'export')
    e.button.click()
    assert f'$\\pm$ {np.std(acr, ddof=1):.3f}' in (tmp_path/'export/table.tex').read_text()

def test_export(tmp_path):
    if not shutil.which('chromium'): pytest.skip('SVG and PNG need a Chromium')
    e = MethodsExplorer()
    e.folder.value = str(tmp_path/'a'/'b')
    e.button.click()
    assert e.worker.wait(120)
    files = {p.name: p.read_bytes() for p in (tmp_path/'a'/'b').iterdir()}
    assert files.keys() == {'table.tex', 'table.md', 'table.csv', 'figure.html', 'figure.svg', 'figure.png'}
    for name in [*files, str(tmp_path)]: assert name in e.words.value
    assert rb'\underline{0.757}' in files['table.tex']
    assert b'**0.760**' in files['table.md']
    assert files['figure.png'].startswith(b'\x89PNG')
    assert b'CAT-RS' in files['figure.svg']
    table = pd.read_csv(tmp_path/'a'/'b'/'table.csv').set_index('method')
    assert table.loc['MACER', ['ACR', '0.0', '1.75']].tolist() == [.68, 64.7, 12.]

def test_a_folder_that_cannot_be_is_said(tmp_path):
    e = MethodsExplorer()
    (tmp_path/'file').write_text('here')
    for folder, message in [(tmp_path/'file', 'cannot write'), (tmp_path/'file'/'below', 'cannot write'),
                            ('  ', 'name a folder')]:
        e.folder.value = str(folder)
        e.button.click()
        assert complains(e, message), folder
    e.controls['radius'].value = 1.
    check_table2(e, radius=1.)

def test_without_a_browser_the_table_and_the_page_are_there(tmp_path, monkeypatch):
    def fail(*_, **__): raise RuntimeError('Kaleido requires Google Chrome to be installed.\nmore')
    monkeypatch.setattr('plotly.graph_objects.Figure.write_image', fail)
    e = MethodsExplorer()
    e.folder.value = str(tmp_path)
    e.button.click()
    assert e.worker.wait(60)
    for words in 'pip install kaleido', 'requires Google Chrome': assert complains(e, words), words
    assert {p.name for p in tmp_path.iterdir()} == {'table.tex', 'table.md', 'table.csv', 'figure.html'}

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = MethodsExplorer()
    monkeypatch.setattr(methods, 'method_traces', lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): e.controls['radius'].value = 1.
    assert complains(e, 'division')

def test_names_cover_no_points():
    assert free_places([], [], []) == []
    first, second, third = free_places([0, 1, 1.01], [0, 1, 1], ['a', 'long name', 'long name'])
    assert second != third
