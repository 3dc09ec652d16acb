"""The field's published logs and tables, read and recomputed.

They lie beside the checkout, in ../shared/reference; without them these tests are skipped.
"""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rs_toolkit.bounds import max_radius
from rs_toolkit.log import COLUMNS, read_log
from rs_toolkit.metrics import average_certified_radius, certified_accuracy, check_comparable, p_a_survival, summary

REFERENCE = Path(__file__).resolve().parents[2]/'shared'/'reference'
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no published logs at {REFERENCE}")
PAPER = REFERENCE/'logs'/'acr_paper'
LOGS = sorted(PAPER.rglob('*.tsv'))


def open_paper(name, sigma):
    return read_log(PAPER/'cifar10'/f'{name}_{sigma}.tsv', sigma=sigma, n0=100, n=100_000, alpha=.001, split='test')


@pytest.mark.parametrize('path', LOGS, ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_every_log_opens(path):
    log = read_log(path)
    images = {'cifar10': 10_000, 'imagenet': 500}[path.parent.name]
    assert list(log) == COLUMNS
    assert len(log) == log.idx.nunique() == images
    assert log[COLUMNS[:6]].notna().all(axis=None)
    assert log[COLUMNS[6:]].isna().all(axis=None)
    assert ((log.predict == log.label) == (log.correct == 1)).all()
    assert (log.radius[log.predict == -1] == 0).all()
    assert log.time.dt.total_seconds().between(.1, 1000).all()
    sigma = float(path.stem.rpartition('_')[2])
    explained = read_log(path, sigma=sigma, n=100_000, alpha=.001)  # what these allow, in three digits, is the most
    assert explained.radius.equals(log.radius)
    assert log.radius.max() == float(f'{max_radius(sigma, 100_000, .001):.3}')
    with pytest.raises(ValueError, match='at most'): read_log(path, sigma=sigma, n=10_000, alpha=.001)


ROWS = [('ours', 'Ours', .25), ('ours', 'Ours', .5), ('ours', 'Ours', 1.), ('macer', 'MACER', 1.),
        ('smoothmix', 'SmoothMix', .5)]

@pytest.mark.parametrize('name, method, sigma', ROWS)
def test_rows_of_the_paper(name, method, sigma):
    table = pd.read_csv(REFERENCE/'published'/'acr_paper_table2.csv')
    row = table[(table.method == method) & (table.sigma == sigma)]
    log = open_paper(name, sigma)
    assert len(row) == 11
    assert abs(average_certified_radius(log) - row.acr.iloc[0]) <= .001
    assert np.abs(100*certified_accuracy(log, row.radius) - row.certified_accuracy).max() <= .1 + 1e-9


@pytest.mark.parametrize('name', ['gaussian', 'ours'])
def test_released_p_a_curves(name):
    released = pd.read_csv(PAPER/'ecdf'/f'{name}_0.5.csv', sep='\t')
    curve = p_a_survival(open_paper(name, .5), released.x)
    below_one = released.x < 1
    assert np.abs(curve - released.y)[below_one].max() <= .003


def test_published_logs_compare_once_they_are_explained():
    paths = {method: PAPER/'cifar10'/f'{method}_1.0.tsv' for method in ('gaussian', 'ours')}
    bare = {method: read_log(path) for method, path in paths.items()}
    with pytest.raises(ValueError, match=r'n, alpha, n0, split.*read_log'): check_comparable(bare)
    table = summary({method: open_paper(method, 1.) for method in paths}, [0, 2])
    assert table.ACR['ours'] > table.ACR['gaussian']
    assert table[0]['ours'] < table[0]['gaussian']
    assert table[2]['ours'] > table[2]['gaussian']
