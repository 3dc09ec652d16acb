"A method of one's own is one entry: tables and figures call it by its label and draw it in its colour."
import json
import shutil

import pytest

from rs_toolkit import tables
from rs_toolkit.catalogue import METHODS, Entry, entries
from rs_toolkit.common import data_folder
from rs_toolkit.distribution import open_log
from rs_toolkit.plots import certified_accuracy_curve, colours

@pytest.fixture
def brier(monkeypatch):
    "An entry that no module knows of."
    entry = Entry('brier', 'Brier score', '#123456', 'my_methods:Brier', also=('proper',))
    monkeypatch.setitem(METHODS, entry.key, entry)
    return entry

@pytest.fixture
def run(tmp_path, brier):
    "The folder of a run that was trained by it: the log of another one."
    folder = tmp_path/'proper-0.5'
    folder.mkdir()
    source = data_folder()/'digits-methods/equal_epochs/macer'
    shutil.copy(source/'certify.tsv', folder)
    config = json.loads((source/'config.json').read_text())
    config['parameters']['method'] = brier.key
    (folder/'config.json').write_text(json.dumps(config))
    return folder

def test_tables_call_it_by_its_label(run, brier):
    rows = tables.read_runs([data_folder()/'digits-methods/equal_epochs/gaussian4', run])
    table = tables.table_of(rows)
    assert list(table.loc[.5].index) == ['Gaussian m=4', brier.label]
    text = tables.write_table(table, tables.marks(table, 'Gaussian m=4'), 'markdown')
    assert brier.label in text

def test_published_tables_know_its_words(brier):
    assert tables.published_label('theirs/proper/noise_0.50') == brier.label

def test_what_it_costs_is_said_by_its_key(monkeypatch, brier):
    monkeypatch.setitem(tables.IDEAL, brier.key, 2.5)
    assert tables._ideal('CIFAR-10', 'Sun et al., Table 2', brier.label, .5) == 2.5

def test_figures_draw_it_in_its_colour(run, brier):
    fig = certified_accuracy_curve({run.name: open_log(run), '24 hours of training': open_log(run)})
    drawn = {trace.name: trace.line.color for trace in fig.data}
    assert drawn[run.name] == brier.colour
    assert drawn['24 hours of training'] not in {entry.colour for entry in METHODS.values()}

@pytest.mark.parametrize('key', entries())
def test_label_and_key_have_one_colour(key):
    entry = entries()[key]
    assert colours([entry.label, entry.key, f'digits-{entry.key}']) == dict.fromkeys(
        [entry.label, entry.key, f'digits-{entry.key}'], entry.colour)
