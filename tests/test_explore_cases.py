"""The images behind a curve: where they come from, and where there are none."""
import json

import numpy as np
import pytest

from rs_toolkit.common import data_folder
from rs_toolkit.distribution import open_log
from rs_toolkit.explore.cases import Cases

@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run on MNIST in a project of its own, and rows of its log."
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(dict(parameters=dict(dataset='mnist'))))
    log = data_folder()/'digits-crt/certify.tsv'
    (tmp_path/'certify.tsv').write_bytes(log.read_bytes())
    return tmp_path, open_log(log).assign(data=None)[:3]

def write_mnist(folder):
    "Ten images, in the four files of torchvision."
    folder.mkdir(parents=True)
    for part in 'train', 't10k':
        images = bytes([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 28, 0, 0, 0, 28])
        (folder/f'{part}-images-idx3-ubyte').write_bytes(images + np.arange(7840).astype(np.uint8).tobytes())
        (folder/f'{part}-labels-idx1-ubyte').write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 10, *range(10)]))

def test_torchvisions_files_are_shown_and_nothing_is_downloaded(run):
    folder, rows = run
    cases = Cases(ask=print)
    cases.show('mine', folder, rows, 'here')
    assert 'the images of mnist are not here' in cases.title.value and 'image/png' not in cases.tiles.children[0].value
    write_mnist(folder/'data/cache/MNIST/raw')
    cases.show('mine', folder, rows, 'here')
    assert 'alert' not in cases.title.value
    assert ['image/png' in tile.value for tile in cases.tiles.children] == (rows.idx < 10).tolist()

def test_a_place_without_images(run):
    folder, rows = run
    cases = Cases(ask=print)
    cases.show('<i>', folder, rows[:0], 'here')
    assert '&lt;i&gt;: no image stands there' in cases.title.value and not cases.tiles.children
