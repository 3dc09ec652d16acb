"""Logs that other hands wrote, and two hands on one log: real files and real processes."""
import codecs
import gzip
import os
import subprocess
import sys
from unittest import mock

import pandas as pd
import pytest
import torch
from torch import nn

from rs_toolkit.certify import certify_dataset
from rs_toolkit.log import COLUMNS, SETUP, LogWriter, read_log
from rs_toolkit.metrics import average_certified_radius, certified_accuracy

HEADER = 'idx\tlabel\tpredict\tradius\tcorrect\ttime\n'
COHEN = HEADER + '0\t3\t3\t0.644\t1\t0:00:03.966459\n20\t8\t-1\t0.0\t0\t0:00:03.540654\n'
SEMANTIC = HEADER + '0\t3\t3\t0.00647\tTrue\t0:09:00.734784\n20\t7\t5\t-1.0\tFalse\t0:00:00.319516\n40\t2\t2\t-1.01\tTrue\t0:04:42.039968\n'
CATRS = 'idx\tlabel\tp1\tp2\tc1\tc2\tcorrect\ttime\n0\t3\t0.99\t0.01\t3\t5\t1\t0:00:01\n1\t8\t0.6\t0.3\t2\t8\t0\t0:00:01\n'
PREDICT = 'idx\tlabel\tpredict\tbasePredict\tcorrect\ttime\n0\t3\t3\t5\t1\t0:00:01\n1\t8\t-1\t8\t0\t0:00:01\n'
SETTING = dict(n0=10, n=50, alpha=.1, sigma=.5, seed=0, split='test', precision='float32', device='cpu', weights='0123456789ab', answers='3.1 .7 -1.2 2.9')


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path

def row(idx, n_a=40):
    return dict(idx=idx, label=1, predict=1, radius=.1, correct=1, time=.5, n_a=n_a, n_true=n_a, selected=1, data=f'{idx:012}')

def texts(path): return pd.read_csv(path, sep='\t', dtype=str, keep_default_na=False).drop(columns='time')


@pytest.mark.parametrize('content', [
    codecs.BOM_UTF8 + COHEN.encode(), codecs.BOM_UTF16_LE + COHEN.encode('utf-16-le'), codecs.BOM_UTF16_BE + COHEN.encode('utf-16-be'),
    COHEN.replace('\n', '\r\n'), codecs.BOM_UTF8 + COHEN.replace('\n', '\r\n').encode(), gzip.compress(COHEN.encode()), gzip.compress(codecs.BOM_UTF8 + COHEN.encode()),
], ids=['mark', 'utf-16', 'utf-16 the other way', 'windows', 'windows with mark', 'gzip', 'gzip with mark'])
def test_the_same_table_in_other_bytes(tmp_path, content):
    pd.testing.assert_frame_equal(read_log(write(tmp_path/'log', content)), read_log(write(tmp_path/'plain', COHEN)))

def test_a_log_of_semantic_smoothing(tmp_path):
    with pytest.warns(UserWarning, match="goes on after its last row, with 'Total: 0.667': left out"):
        log = read_log(write(tmp_path/'rotation', SEMANTIC + 'Total: 0.667\nACR 0.002\n'))
    assert log.idx.tolist() == [0, 20, 40] and log.correct.tolist() == [1, 0, 1]
    assert certified_accuracy(log, 0.) == 1/3 and average_certified_radius(log) == pytest.approx(.00647/3)      # a radius of -1 certifies nothing

@pytest.mark.filterwarnings('ignore:.*goes on after')
def test_words_are_a_footer_only_at_the_end(tmp_path):
    middle = COHEN.replace('\n20', '\nmean 0.644\n20')
    with pytest.raises(ValueError, match='line 3 of .* has 1 fields, its header has 6'): read_log(write(tmp_path/'log', middle))
    with pytest.raises(ValueError, match='line 2 of .* has 2 fields'): read_log(write(tmp_path/'log', HEADER + 'a\tb\nc\td\n'))
    with pytest.raises(ValueError, match='line 2 of .* has 5 fields'): read_log(write(tmp_path/'log', COHEN.replace('\t0.644', '').replace('\t0.0', '')))

@pytest.mark.parametrize('kind, content, idx', [('cohen', COHEN.replace('\t1\t', '\t0\t'), 0), ('abstaining', COHEN.replace('0.0\t0', '0.0\t1'), 20),
                                                ('semantic', SEMANTIC.replace('5\t-1.0\tFalse', '5\t-1.0\tTrue'), 20), ('confidences', CATRS.replace('\t8\t0\t', '\t8\t1\t'), 1),
                                                ('predictions', PREDICT.replace('-1\t8\t0', '-1\t8\t1'), 1)])
def test_correct_that_contradicts_is_refused(tmp_path, kind, content, idx):
    with pytest.raises(ValueError, match=f'contradicts itself: idx {idx} has label'): read_log(write(tmp_path/kind, content))

@pytest.mark.parametrize('content', [COHEN, CATRS, PREDICT, SEMANTIC])
def test_what_does_not_contradict_is_read(tmp_path, content): assert len(read_log(write(tmp_path/'log', content))) >= 2

@pytest.mark.parametrize('radius, allowed', [('1.9', 1), ('1.90572', 1), ('1.91', 1), ('1.906', 1), ('1.9057', 1), ('1.911', 0), ('1.92', 0), ('2.0', 0), ('1.9059', 0), ('inf', 0)])
def test_the_largest_radius_may_be_rounded_up_and_no_more(tmp_path, radius, allowed):
    path = write(tmp_path/'log', COHEN.replace('0.644', radius))                       # n = 100,000 at sigma .5 certifies 1.90573 at most
    assert read_log(path).radius[0] == float(radius)                                   # without n and alpha nobody can say
    if allowed: assert read_log(path, sigma=.5, n=100_000, alpha=.001).radius[0] == float(radius)
    else:
        with pytest.raises(ValueError, match=f'certifies radius {radius} at idx 0, but 100000 samples .* can certify 1.90573 at most'):
            read_log(path, sigma=.5, n=100_000, alpha=.001)

def test_one_radius_is_not_a_number(tmp_path):
    log = read_log(write(tmp_path/'log', COHEN.replace('0.644', 'nan')))
    with pytest.raises(ValueError, match='the radius of image 0 is missing or not a number, in 1 of 2 rows'): average_certified_radius(log)
    with pytest.raises(ValueError, match='no radii'): average_certified_radius(read_log(write(tmp_path/'predict', PREDICT)))


# ---- going on ----

@pytest.mark.parametrize('change', [lambda t: t.replace('\n', '\r\n').encode(), lambda t: codecs.BOM_UTF8 + t.encode(), lambda t: t.encode('utf-16'), lambda t: t.encode()[:-30],
                                    lambda t: (t + 'mean 0.1\n').encode(), lambda t: (t + t.splitlines(True)[2].replace('0:00:00.5', '0:00:07.5')).encode()],
                         ids=['windows', 'mark', 'utf-16', 'half a line', 'footer', 'a row twice'])
@pytest.mark.filterwarnings('ignore:.*(goes on after|rows twice)')
def test_a_log_goes_on_whatever_happened_to_its_bytes(tmp_path, change):
    path, whole = tmp_path/'log.tsv', tmp_path/'whole.tsv'
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
    with pytest.raises(ValueError, match='weights: 0123456789ab there, ba9876543210 now'): LogWriter(path, SETTING | dict(weights='ba9876543210'))
    with mock.patch('rs_toolkit.common.os.replace', side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt): LogWriter(path, SETTING)
    assert path.read_text() == shorter                                                 # killed while it was rewritten: the old one
    with LogWriter(path, SETTING) as log: log.write(row(3))
    lines = path.read_text().splitlines()
    assert [line.split('\t')[-1] for line in lines] == ['answers', '', '', '', SETTING['answers']]
    assert [line.rpartition('\t')[0] for line in lines[:4]] == shorter.splitlines()
    with pytest.raises(ValueError, match='answers: 3.1 .7 -1.2 2.9 there, 3.1 .7 1.2 2.9 now'): LogWriter(path, SETTING | dict(answers='3.1 .7 1.2 2.9'))
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
        with pytest.raises(ValueError, match='idx 0 twice, and its rows contradict each other: .* 40 40 .* and .* 39 39 '): opening(path)
    assert path.read_text() == before
    with pytest.raises(ValueError, match='twice'): LogWriter(path, SETTING)            # and not: somebody holds it


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
certify_dataset(slow, x, torch.zeros(3, dtype=torch.int64), .5, 10, 20, .1, log=sys.argv[1], progress=False)
'''

def mean_of(x): return torch.stack([x.mean((1, 2, 3)), .5 - x.mean((1, 2, 3))], 1)

def certify_here(log, model=mean_of):
    x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return certify_dataset(model, x, torch.zeros(3, dtype=torch.int64), .5, 10, 20, .1, log=log, progress=False)

@pytest.mark.filterwarnings('ignore')
def test_the_second_process_is_refused_at_once_and_a_killed_one_does_not_block(tmp_path):
    path = tmp_path/'certify.tsv'
    other = subprocess.Popen([sys.executable, '-c', CERTIFY, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
    while not path.exists():                                                           # until it has begun its log
        assert other.stdout.readline() == 'writing\n'
        other.stdin.write('\n')
        other.stdin.flush()
    with pytest.raises(RuntimeError, match=f'certify.tsv is being written by process {other.pid} on .*, since 20'): certify_here(path)
    assert len(read_log(path)) == 0                                                    # reading is free
    other.kill()
    other.wait()
    assert certify_here(path).idx.tolist() == [0, 1, 2]
    assert len(certify_here(path)) == 3                                                # and the lock was given back

def test_a_refused_writer_lets_go(tmp_path):
    path = tmp_path/'log.tsv'
    with LogWriter(path, SETTING) as log: log.write(row(0))
    with pytest.raises(ValueError, match='another setting') as error: LogWriter(path, SETTING | dict(sigma=.25))
    with LogWriter(path, SETTING) as log:                                              # though the error, and so its frames, still live
        with pytest.raises(RuntimeError, match=f'process {os.getpid()}'): LogWriter(path, SETTING)
    assert error


# ---- whose rows ----

class PlainNormalize(nn.Module):
    "Its constants are numbers that no state_dict knows."
    def __init__(self, mean): super().__init__(); self.mean = mean
    def forward(self, x): return x - self.mean

@pytest.mark.filterwarnings('ignore')
def test_rows_of_another_function_are_not_continued(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    first = certify_here(tmp_path/'log.tsv', nn.Sequential(PlainNormalize(.5), net))
    with pytest.raises(ValueError, match='another setting .answers: '): certify_here(tmp_path/'log.tsv', nn.Sequential(PlainNormalize(.1), net))
    pd.testing.assert_frame_equal(certify_here(tmp_path/'log.tsv', nn.Sequential(PlainNormalize(.5), net)), first)

@pytest.mark.filterwarnings('ignore')
def test_a_plain_function_goes_on_and_another_does_not(tmp_path):
    first = certify_here(tmp_path/'log.tsv')
    pd.testing.assert_frame_equal(certify_here(tmp_path/'log.tsv', lambda x: mean_of(x)), first)
    with pytest.raises(ValueError, match='another setting .answers: '): certify_here(tmp_path/'log.tsv', lambda x: -mean_of(x))

def test_the_setup_says_what_identifies_a_log(tmp_path):
    assert SETUP[-2:] == ['weights', 'answers'] and COLUMNS[-2:] == ['data', 'answers']
    with pytest.raises(ValueError, match='the setup of a log is'): LogWriter(tmp_path/'log.tsv', {k: v for k, v in SETTING.items() if k != 'answers'})
