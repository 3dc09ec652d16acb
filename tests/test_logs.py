"""Logs that other hands wrote, two hands on one log, and from runs and logs to a table: real files, real processes."""
import codecs
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from torch import nn

from rs_toolkit.certify import certify_dataset
from rs_toolkit.log import COLUMNS, SETUP, LogWriter, read_log
from rs_toolkit.metrics import average_certified_radius, certified_accuracy
from rs_toolkit.tables import export_table, marks, read_runs, spread_of, table_of

HEADER = 'idx\tlabel\tpredict\tradius\tcorrect\ttime\n'
COHEN = HEADER + '0\t3\t3\t0.644\t1\t0:00:03.966459\n20\t8\t-1\t0.0\t0\t0:00:03.540654\n'
SEMANTIC = HEADER + ('0\t3\t3\t0.00647\tTrue\t0:09:00.734784\n20\t7\t5\t-1.0\tFalse\t0:00:00.319516\n'
                     '40\t2\t2\t-1.01\tTrue\t0:04:42.039968\n')
CATRS = ('idx\tlabel\tp1\tp2\tc1\tc2\tcorrect\ttime\n'
         '0\t3\t0.99\t0.01\t3\t5\t1\t0:00:01\n1\t8\t0.6\t0.3\t2\t8\t0\t0:00:01\n')
PREDICT = 'idx\tlabel\tpredict\tbasePredict\tcorrect\ttime\n0\t3\t3\t5\t1\t0:00:01\n1\t8\t-1\t8\t0\t0:00:01\n'
SETTING = dict(n0=10, n=50, alpha=.1, sigma=.5, seed=0, split='test', precision='float32', device='cpu',
               weights='0123456789ab', answers='3.1 .7 -1.2 2.9')


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path

def row(idx, n_a=40):
    return dict(idx=idx, label=1, predict=1, radius=.1, correct=1, time=.5, n_a=n_a, n_true=n_a, selected=1,
                data=f'{idx:012}')

def texts(path): return pd.read_csv(path, sep='\t', dtype=str, keep_default_na=False).drop(columns='time')


OTHER_BYTES = {
    'mark': codecs.BOM_UTF8 + COHEN.encode(),
    'utf-16': codecs.BOM_UTF16_LE + COHEN.encode('utf-16-le'),
    'utf-16 the other way': codecs.BOM_UTF16_BE + COHEN.encode('utf-16-be'),
    'windows': COHEN.replace('\n', '\r\n').encode(),
    'windows with mark': codecs.BOM_UTF8 + COHEN.replace('\n', '\r\n').encode(),
    'gzip': gzip.compress(COHEN.encode()),
    'gzip with mark': gzip.compress(codecs.BOM_UTF8 + COHEN.encode()),
}

@pytest.mark.parametrize('content', OTHER_BYTES.values(), ids=OTHER_BYTES.keys())
def test_the_same_table_in_other_bytes(tmp_path, content):
    pd.testing.assert_frame_equal(read_log(write(tmp_path/'log', content)), read_log(write(tmp_path/'plain', COHEN)))

def test_a_log_of_semantic_smoothing(tmp_path):
    with pytest.warns(UserWarning, match="goes on after its last row, with 'Total: 0.667': left out"):
        log = read_log(write(tmp_path/'rotation', SEMANTIC + 'Total: 0.667\nACR 0.002\n'))
    assert log.idx.tolist() == [0, 20, 40] and log.correct.tolist() == [1, 0, 1]
    assert certified_accuracy(log, 0.) == 1/3                                # a radius of -1 certifies nothing
    assert average_certified_radius(log) == pytest.approx(.00647/3)

@pytest.mark.filterwarnings('ignore:.*goes on after')
def test_words_are_a_footer_only_at_the_end(tmp_path):
    for content, says in [(COHEN.replace('\n20', '\nmean 0.644\n20'), 'line 3 of .* has 1 fields, its header has 6'),
                          (HEADER + 'a\tb\nc\td\n', 'line 2 of .* has 2 fields'),
                          (COHEN.replace('\t0.644', '').replace('\t0.0', ''), 'line 2 of .* has 5 fields')]:
        with pytest.raises(ValueError, match=says): read_log(write(tmp_path/'log', content))

CONTRADICTIONS = {  # kind -> content, image
    'cohen': (COHEN.replace('\t1\t', '\t0\t'), 0),
    'abstaining': (COHEN.replace('0.0\t0', '0.0\t1'), 20),
    'semantic': (SEMANTIC.replace('5\t-1.0\tFalse', '5\t-1.0\tTrue'), 20),
    'confidences': (CATRS.replace('\t8\t0\t', '\t8\t1\t'), 1),
    'predictions': (PREDICT.replace('-1\t8\t0', '-1\t8\t1'), 1),
}

@pytest.mark.parametrize('kind', CONTRADICTIONS)
def test_correct_that_contradicts_is_refused(tmp_path, kind):
    content, idx = CONTRADICTIONS[kind]
    path = write(tmp_path/kind, content)
    with pytest.raises(ValueError, match=f'contradicts itself: idx {idx} has label'): read_log(path)

@pytest.mark.parametrize('content', [COHEN, CATRS, PREDICT, SEMANTIC])
def test_what_does_not_contradict_is_read(tmp_path, content): assert len(read_log(write(tmp_path/'log', content))) >= 2

RADII = {'1.9': True, '1.90572': True, '1.91': True, '1.906': True, '1.9057': True,
         '1.911': False, '1.92': False, '2.0': False, '1.9059': False, 'inf': False}

@pytest.mark.parametrize('radius, allowed', RADII.items())
def test_the_largest_radius_may_be_rounded_up_and_no_more(tmp_path, radius, allowed):
    path = write(tmp_path/'log', COHEN.replace('0.644', radius))  # the most at sigma .5 and n = 100,000 is 1.90573
    assert read_log(path).radius[0] == float(radius)                         # without n and alpha nobody can say
    attached = dict(sigma=.5, n=100_000, alpha=.001)
    if allowed: assert read_log(path, **attached).radius[0] == float(radius)
    else:
        with pytest.raises(ValueError, match=f'certifies radius {radius} at idx 0, but 100000 .* 1.90573 at most'):
            read_log(path, **attached)

def test_one_radius_is_not_a_number(tmp_path):
    log = read_log(write(tmp_path/'log', COHEN.replace('0.644', 'nan')))
    with pytest.raises(ValueError, match='the radius of image 0 is missing or not a number, in 1 of 2 rows'):
        average_certified_radius(log)
    log = read_log(write(tmp_path/'predict', PREDICT))
    with pytest.raises(ValueError, match='no radii'): average_certified_radius(log)


# ---- going on ----

CHANGES = {
    'windows': lambda t: t.replace('\n', '\r\n').encode(),
    'mark': lambda t: codecs.BOM_UTF8 + t.encode(),
    'utf-16': lambda t: t.encode('utf-16'),
    'half a line': lambda t: t.encode()[:-30],
    'footer': lambda t: (t + 'mean 0.1\n').encode(),
    'a row twice': lambda t: (t + t.splitlines(True)[2].replace('0:00:00.5', '0:00:07.5')).encode(),
}

@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.filterwarnings('ignore:.*(goes on after|in rows that agree)')
def test_a_log_goes_on_whatever_happened_to_its_bytes(tmp_path, change):
    path = tmp_path/'log.tsv'
    whole = tmp_path/'whole.tsv'
    for place, images in (path, range(3)), (whole, range(5)):
        with LogWriter(place, SETTING) as log:
            for i in images: log.write(row(i))
    path.write_bytes(change(path.read_text()))
    with LogWriter(path, SETTING) as log:
        for i in range(5):
            if i not in log.done: log.write(row(i))
    assert path.read_bytes() == whole.read_bytes()

def test_a_log_from_before_a_column_was_added_goes_on(tmp_path):
    path = tmp_path/'log.tsv'
    with LogWriter(path, SETTING) as log:
        for i in range(3): log.write(row(i))
    now = path.read_text()
    shorter = ''.join('\t'.join(line.split('\t')[:-1]) + '\n' for line in now.splitlines())
    assert shorter.splitlines()[0].endswith('\tdata')
    path.write_text(shorter)
    assert len(read_log(path)) == 3
    with pytest.raises(ValueError, match='weights: 0123456789ab there, ba9876543210 now'):
        LogWriter(path, SETTING | dict(weights='ba9876543210'))
    with mock.patch('rs_toolkit.common.os.replace', side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        LogWriter(path, SETTING)
    assert path.read_text() == shorter  # killed while it was rewritten: the old one
    with LogWriter(path, SETTING) as log: log.write(row(3))
    lines = path.read_text().splitlines()
    assert [line.split('\t')[-1] for line in lines] == ['answers', '', '', '', SETTING['answers']]
    assert [line.rpartition('\t')[0] for line in lines[:4]] == shorter.splitlines()
    with pytest.raises(ValueError, match='answers: 3.1 .7 -1.2 2.9 there, 3.1 .7 1.2 2.9 now'):
        LogWriter(path, SETTING | dict(answers='3.1 .7 1.2 2.9'))
    with LogWriter(path, SETTING | dict(answers='')) as log: assert len(log.done) == 4

def test_columns_of_tomorrow(tmp_path, monkeypatch):
    path = tmp_path/'log.tsv'
    with LogWriter(path, SETTING) as log: log.write(row(0))
    monkeypatch.setattr('rs_toolkit.log.COLUMNS', [*COLUMNS, 'procedure'])
    with LogWriter(path, SETTING) as log: log.write(row(1) | dict(procedure='fixed'))
    assert texts(path).procedure.tolist() == ['', 'fixed'] and texts(path).n_a.tolist() == ['40', '40']

@pytest.mark.parametrize('content', [COHEN, '\x89PNG\r\n', 'idx\tlabel\tcorrect\tpredict\tdata\n0\t1\t1\t1\tx\n'])
def test_somebody_elses_file_is_left_alone(tmp_path, content):
    path = write(tmp_path/'log.tsv', content)
    with pytest.raises(ValueError, match='another kind of file|not a certification log'): LogWriter(path, SETTING)
    assert path.read_bytes() == content.encode()

def test_rows_that_contradict_each_other(tmp_path):
    path = tmp_path/'log.tsv'
    with LogWriter(path, SETTING) as log: log.write(row(0))
    before = path.read_text() + path.read_text().splitlines(True)[1].replace('\t40\t40\t', '\t39\t39\t')
    path.write_text(before)
    for opening in read_log, lambda path: LogWriter(path, SETTING):
        with pytest.raises(ValueError, match='idx 0 twice, and its rows contradict .* 40 40 .* and .* 39 39 '):
            opening(path)
    assert path.read_text() == before
    with pytest.raises(ValueError, match='twice'): LogWriter(path, SETTING)  # and not: somebody holds it


# ---- two hands ----

CERTIFY = '''
import sys
import torch
from rs_toolkit.certify import certify_dataset

def slow(x):
    print('writing', flush=True)
    sys.stdin.readline()
    return torch.stack([x.mean((1, 2, 3)), .5 - x.mean((1, 2, 3))], 1)

x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
settings = dict(sigma=.5, n0=10, n=20, alpha=.1, log=sys.argv[1], progress=False)
certify_dataset(slow, x, torch.zeros(3, dtype=torch.int64), **settings)
'''

def mean_of(x): return torch.stack([x.mean((1, 2, 3)), .5 - x.mean((1, 2, 3))], 1)

def certify_here(log, model=mean_of):
    x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    settings = dict(sigma=.5, n0=10, n=20, alpha=.1, log=log, progress=False)
    return certify_dataset(model, x, torch.zeros(3, dtype=torch.int64), **settings)

@pytest.mark.filterwarnings('ignore')
def test_the_second_process_is_refused_at_once_and_a_killed_one_does_not_block(tmp_path):
    path = tmp_path/'certify.tsv'
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, '-c', CERTIFY, str(path)], **pipes)
    while not path.exists():                                                 # until it has begun its log
        assert other.stdout.readline() == 'writing\n'
        other.stdin.write('\n')
        other.stdin.flush()
    with pytest.raises(RuntimeError, match=f'certify.tsv is being written by process {other.pid} on .*, since 20'):
        certify_here(path)
    assert len(read_log(path)) == 0                                          # reading is free
    other.kill()
    other.wait()
    assert certify_here(path).idx.tolist() == [0, 1, 2]
    assert len(certify_here(path)) == 3                                      # and the lock was given back

def test_a_refused_writer_lets_go(tmp_path):
    path = tmp_path/'log.tsv'
    with LogWriter(path, SETTING) as log: log.write(row(0))
    with pytest.raises(ValueError, match='another setting') as error: LogWriter(path, SETTING | dict(sigma=.25))
    with LogWriter(path, SETTING) as log:  # though the error, and so its frames, still live
        with pytest.raises(RuntimeError, match=f'process {os.getpid()}'): LogWriter(path, SETTING)
    assert error


# ---- whose rows ----

class PlainNormalize(nn.Module):
    "Its constants are numbers that no state_dict knows."
    def __init__(self, mean):
        super().__init__()
        self.mean = mean
    def forward(self, x): return x - self.mean

@pytest.mark.filterwarnings('ignore')
def test_rows_of_another_function_are_not_continued(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    wrong = nn.Sequential(PlainNormalize(.1), net)
    first = certify_here(tmp_path/'log.tsv', nn.Sequential(PlainNormalize(.5), net))
    with pytest.raises(ValueError, match='another setting .answers: '): certify_here(tmp_path/'log.tsv', wrong)
    pd.testing.assert_frame_equal(certify_here(tmp_path/'log.tsv', nn.Sequential(PlainNormalize(.5), net)), first)

@pytest.mark.filterwarnings('ignore')
def test_a_plain_function_goes_on_and_another_does_not(tmp_path):
    first = certify_here(tmp_path/'log.tsv')
    pd.testing.assert_frame_equal(certify_here(tmp_path/'log.tsv', lambda x: mean_of(x)), first)
    with pytest.raises(ValueError, match='another setting .answers: '):
        certify_here(tmp_path/'log.tsv', lambda x: -mean_of(x))

def test_the_setup_says_what_identifies_a_log(tmp_path):
    assert SETUP[-2:] == ['weights', 'answers'] and COLUMNS[-2:] == ['data', 'answers']
    less = {name: value for name, value in SETTING.items() if name != 'answers'}
    with pytest.raises(ValueError, match='the setup of a log is'): LogWriter(tmp_path/'log.tsv', less)


# ---- from runs and logs to a table ----

def run_folder(place, radii, config, sigma=.5):
    "A run folder whose network is right on image i with radius radii[i]; 0 abstains."
    place.mkdir(parents=True)
    write(place/'config.json', json.dumps(config))
    setting = SETTING | dict(n0=100, n=10_000, alpha=.001, sigma=sigma, weights=place.name)
    with LogWriter(place/'certify.tsv', setting) as log:
        for idx, radius in enumerate(radii):
            log.write(dict(idx=idx, label=1, predict=1 if radius else -1, radius=radius, correct=int(radius > 0),
                           time=1., n_a=9000, n_true=9000, selected=1, data=f'{idx}'))
    return place

@pytest.fixture
def mix(tmp_path):
    "Three seeds of MACER, a run of certify on a CRT network that is gone, and six columns of somebody else."
    home = tmp_path/'home'
    training = dict(dataset='digits', method='macer', sigma=.5, num_noise=16)
    radii = [[.5, .5, .5, 0, 0], [.5, .5, .5, 1, 0], [.5, 0, 0, 0, 0]]
    configs = [dict(parameters=training | dict(seed=seed, out=f'somewhere/{seed}')) for seed in range(3)]
    seeds = [run_folder(home/f'macer-{seed}', radii[seed], configs[seed]) for seed in range(3)]
    config = dict(parameters=dict(checkpoint='gone/crt'), training=dict(method='crt', seed=0, dataset='digits'))
    certified = run_folder(home/'certify-crt', [1.25, 1.25, 0, 0, 0], config)
    six = HEADER + ''.join(f'{i}\t1\t1\t0.25\tTrue\t0:00:01\n' for i in range(5)) + 'ACR: 0.25\n'
    theirs = write(home/'theirs.tsv.gz', gzip.compress(six.encode()))
    return [*seeds, certified], {theirs: dict(sigma=.5, n0=100, n=10_000, alpha=.001, split='test', method='Theirs')}

@pytest.mark.filterwarnings('ignore:.*goes on after')
def test_any_mix_stands_in_one_table(mix, tmp_path):
    rows = read_runs(*mix)
    table = table_of(rows)
    spread = spread_of(rows)
    assert table.loc[.5].round(3).T.to_dict() == {
        'MACER': {'seeds': 3, 'ACR': .3, 0.: 53.3, .25: 53.3, .5: 53.3, .75: 6.7, 1.: 6.7, 1.25: 0},
        'CRT': {'seeds': 1, 'ACR': .5, 0.: 40, .25: 40, .5: 40, .75: 40, 1.: 40, 1.25: 40},
        'Theirs': {'seeds': 1, 'ACR': .25, 0.: 100, .25: 100, .5: 0, .75: 0, 1.: 0, 1.25: 0}}
    assert spread.loc[(.5, 'MACER'), ['ACR', .5]].tolist() == [.2, 30.6]
    assert spread.drop(index=(.5, 'MACER')).isna().all(axis=None)
    paths = export_table(table, marks(table, 'MACER'), tmp_path, 'MACER', spread=spread)
    latex, markdown, plain = (path.read_text() for path in paths)
    assert r'0.5 & MACER & 3 & \underline{0.300} $\pm$ 0.200 & \underline{53.3} $\pm$ 30.6 &' in latex
    assert r'0.5 & Theirs & 1 & 0.250 & \textbf{100.0} & \textbf{100.0} & \textcolor{gray}{0.0} &' in latex
    assert '± 30.6' in markdown and plain.startswith('sigma,method,seeds,ACR,0.0,')


@pytest.mark.filterwarnings('ignore:.*goes on after')
def test_no_mean_over_different_images_or_settings(mix):
    (first, *rest), foreign = mix
    log = pd.read_csv(first/'certify.tsv', sep='\t', dtype=str, keep_default_na=False)
    for changed, says in (log[:4], 'images'), (log.assign(n='9999'), 'n 9999'), (log.assign(alpha='.01'), 'alpha 0'):
        changed.to_csv(first/'certify.tsv', sep='\t', index=False)
        with pytest.raises(ValueError, match=says): read_runs([first, *rest])
    log.to_csv(first/'certify.tsv', sep='\t', index=False)
    (path, facts), = foreign.items()
    with pytest.raises(ValueError, match='does not say its sigma'): read_runs([path])
    with pytest.raises(ValueError, match="unknown fact about a log 'sigm': did you mean 'sigma'"):
        read_runs([], {path: dict(sigm=.5)})

def test_compare_from_anywhere_in_every_format(mix, tmp_path):
    runs, foreign = mix
    elsewhere = tmp_path/'elsewhere'
    elsewhere.mkdir()
    theirs = {f'~/{path.name}': facts | dict(alpha='1e-3') for path, facts in foreign.items()}
    given = dict(runs=[f'~/{run.name}' for run in runs], foreign=theirs, out='~/comparison')
    root = Path(__file__).resolve().parents[1]
    papermill = [Path(sys.executable).with_name('papermill'), root/'nbs/compare.ipynb', 'executed.ipynb']
    env = os.environ | dict(HOME=str(tmp_path/'home'), PYTHONPATH=str(root))
    done = subprocess.run([*papermill, '-y', json.dumps(given)], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path/'home/comparison'
    assert {p.name for p in elsewhere.iterdir()} == {'executed.ipynb'}
    figures = {'certified_accuracy.html', 'differences.html', 'p_a.html', 'p_a_difference.html'}
    assert {p.name for p in out.iterdir()} == {'table.csv', 'table.tex', 'table.md', 'differences.csv'} | figures
    table = pd.read_csv(out/'table.csv', index_col='log')
    assert table.index.tolist() == ['MACER, σ = 0.5, 3 seeds', 'certify-crt', 'theirs']
    assert table.seeds.tolist() == [3, 1, 1]
    assert table.loc['MACER, σ = 0.5, 3 seeds', ['ACR', '0.5', '0.5 std']].round(4).tolist() == [.3, .5333, .3055]
    assert table['0.5 std'].isna().tolist() == [False, True, True]
    assert r'0.5 & MACER & 3 & \textbf{0.300} $\pm$ 0.200 &' in (out/'table.tex').read_text()
    assert 'Theirs' in (out/'table.md').read_text()
