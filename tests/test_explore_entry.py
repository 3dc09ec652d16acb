"""One entry of the catalogue and a run folder bring a method into the explorers: no other list of methods is kept."""
import json
import shutil
from pathlib import Path

import pytest

from explorer import move, shown
from rs_toolkit.catalogue import METHODS, Entry

ROOT = Path(__file__).resolve().parents[1]
LABEL = 'My method'
COLOUR = '#123456'

@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    "A package whose data has one run more, of a method of one's own."
    methods = shutil.copytree(ROOT/'data/digits-methods', tmp_path/'data/digits-methods')
    runs = methods/'equal_epochs'
    shutil.copytree(runs/'macer', runs/'mine')
    config = json.loads((runs/'mine/config.json').read_text())
    config['parameters']['method'] = 'mine'
    (runs/'mine/config.json').write_text(json.dumps(config))
    monkeypatch.setitem(METHODS, 'mine', Entry('mine', LABEL, COLOUR))
    monkeypatch.setattr('rs_toolkit.common.package_folder', lambda: tmp_path)
    monkeypatch.chdir(tmp_path)

def test_p_a():
    from rs_toolkit.explore.p_a import PAExplorer
    e = PAExplorer()
    move(e, runs=(LABEL,))
    assert 'role="status"' in e.words.value
    assert shown(e)['survival 1'].line.color == COLOUR

def test_acr():
    from rs_toolkit.explore.acr import ACRExplorer
    e = ACRExplorer()
    move(e, second=f'{LABEL} (digits, equal epochs)')
    assert LABEL in e.words.value
    assert shown(e)['curve B'].line.color == COLOUR

def test_methods():
    from rs_toolkit.explore.methods import MethodsExplorer
    e = MethodsExplorer('digits, equal epochs')
    trace = [t for t in e.fig.data if str(t.hovertemplate).startswith(f'{LABEL}:')][0]
    assert trace.line.color == COLOUR

def test_sphere():
    from rs_toolkit.explore.sphere import digits_model, networks
    assert networks()[LABEL] == 'mine'
    assert digits_model('mine').metadata == digits_model('macer').metadata

def test_smooth():
    from rs_toolkit.explore.smooth import networks
    assert 'mine, σ = 0.5' in dict(networks())
