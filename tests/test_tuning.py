"""Settings are chosen on training images that were held out: the test images are not even read."""
import gzip
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from rs_toolkit import recipe
from rs_toolkit.catalogue import METHODS
from rs_toolkit.data import load
from rs_toolkit.log import read_log
from rs_toolkit.recipe import CHECKS, Task

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT/'tools'))
import tuned_on_digits as tool  # noqa: E402

@pytest.fixture
def no_test_images(monkeypatch):
    "Whoever opens the test split fails."
    def only_training(name, split, *rest):
        assert split == 'train', 'the test images were read'
        return load(name, split, *rest)
    monkeypatch.setattr(recipe, 'load', only_training)

def rows(images): return {image.numpy().tobytes() for image in images}

@pytest.mark.parametrize('train_every', [1, 3])
def test_what_is_held_out(train_every, no_test_images):
    "Each fifth training image, with its label; none of them is learnt from."
    images, labels = load('digits', 'train')
    task = Task('digits', held_out=5, train_every=train_every)
    assert torch.equal(task.test[0], images[::5]) and torch.equal(task.test[1], labels[::5])
    assert task.split == 'train' and list(task.idx) == list(range(0, len(images), 5))
    learnt = [i for i in range(len(images)) if i % 5][::train_every]
    assert torch.equal(task.train[0], images[learnt]) and torch.equal(task.train[1], labels[learnt])

def test_no_test_image_is_among_them():
    assert rows(Task('digits', held_out=5).test[0]).isdisjoint(rows(load('digits', 'test')[0]))
    assert Task('digits').split == 'test' and torch.equal(Task('digits').test[0], load('digits', 'test')[0])

def test_everything_cannot_be_held_out():
    assert CHECKS['held_out'](0) == 0
    with pytest.raises(ValueError, match='held_out=1 would leave no image'): CHECKS['held_out'](1)
    with pytest.raises(ValueError, match='held_out must be a number of at least 0'): CHECKS['held_out'](-5)

def test_every_method_has_as_many_trials():
    assert set(tool.TRIALS) == set(METHODS)
    for key in METHODS:
        settings = tool.settings_of(key, 30)
        assert len(settings) == 3 and all(setting['epochs'] == 30 for setting in settings), key
        assert len({json.dumps(setting, sort_keys=True) for setting in settings}) == 3, f'{key}: two are alike'

def test_a_trial_reads_no_test_image(tmp_path, no_test_images):
    setting = tool.settings_of('gaussian', 1)[0] | tool.TUNING | dict(n=20, every=40)
    tool.run(setting, tmp_path)
    log = read_log(tmp_path/'certify.tsv')
    assert log.split.unique().tolist() == ['train'] and log.idx.tolist() == list(range(0, 1437, 200))
    written = (tmp_path/'metrics.json').read_text()
    tool.run(setting, tmp_path)                                                      # finished: left alone
    assert (tmp_path/'metrics.json').read_text() == written

def test_the_best_trial_is_run_with_every_seed(tmp_path, monkeypatch):
    "Judged by the images that were held out; what follows is certified on the test images."
    for trial, acr in enumerate([.3, .5, .4]):
        folder = tmp_path/'tuning/gaussian'/str(trial)
        folder.mkdir(parents=True)
        (folder/'metrics.json').write_text(json.dumps(dict(acr=acr)))
    asked = []
    plain = tool.run
    def watched(setting, folder):
        if 'tuning' in folder.parts: plain(setting, folder)
        else: asked.append((setting, folder))
    monkeypatch.setattr(tool, 'run', watched)
    tool.main([str(tmp_path), 'gaussian', '--epochs', '30'])
    best = tool.settings_of('gaussian', 30)[1]
    assert [setting for setting, _ in asked] == [best | dict(seed=seed) for seed in range(5)]
    assert [folder for _, folder in asked] == [tmp_path/'equal_epochs/gaussian'/str(seed) for seed in range(5)]
    assert all('held_out' not in setting and setting['n'] == 10_000 for setting, _ in asked)

    asked.clear()
    tool.main([str(tmp_path), 'gaussian', '--epochs', '30', '--cost', '50', '--seeds', '2'])
    assert [setting for setting, _ in asked] == [best | dict(seed=seed, epochs=50) for seed in range(2)]
    assert [folder for _, folder in asked] == [tmp_path/'equal_cost/gaussian'/str(seed) for seed in range(2)]

# Epochs of plain training that 30 epochs of a recipe cost. An attack of T steps on m copies: m (2T + 3)/3 each. The ACR
# recipe begins after twelve, with 100 passes for its discard, and 16 for the weights of each third epoch from there on.
COST = {'gaussian': 30, 'gaussian4': 30*4, 'stability': 30*2, 'smoothadv': 30*2*(2*4 + 3)/3, 'crt': 30*4/3,
        'acr': 12*4 + 18*4*(2*3 + 3)/3 + (100 + 6*16)/3}

@pytest.mark.parametrize('key', COST)
def test_what_a_run_costs(key):
    assert tool.cost_of(tool.settings_of(key, 30)[0]) == pytest.approx(COST[key])

@pytest.mark.parametrize('key, epochs', [('gaussian4', 25), ('smoothadv', 13), ('sodm', 12)])
def test_the_epochs_that_a_cost_pays(key, epochs):
    "As many as fit into 100 epochs of plain training. SODM's first third is plain, with eight copies, as the rest."
    recipe = tool.settings_of(key, 30)[0]
    paid = tool.paid_by(100, recipe)
    assert paid == recipe | dict(epochs=epochs)
    assert tool.cost_of(paid) <= 100 < tool.cost_of(recipe | dict(epochs=epochs + 1))

def test_a_cost_that_pays_nothing():
    recipe = tool.settings_of('gaussian4', 30)[0]
    with pytest.raises(ValueError, match='39 epochs of plain training do not pay 10 of gaussian'):
        tool.paid_by(39, recipe)

def test_what_is_kept_are_the_seeds_that_were_asked_for(tmp_path, monkeypatch):
    place = tmp_path/'kept'
    monkeypatch.setattr(tool, 'KEPT', place)
    for trial in range(3):
        (tmp_path/f'tuning/gaussian/{trial}').mkdir(parents=True)
        (tmp_path/f'tuning/gaussian/{trial}/metrics.json').write_text(json.dumps(dict(acr=.3 + trial/10)))
    for seed in range(4):
        (tmp_path/f'equal_epochs/gaussian/{seed}').mkdir(parents=True)
        for name in 'metrics.json', 'certify.tsv': (tmp_path/f'equal_epochs/gaussian/{seed}'/name).write_text(f'{seed}')
    tool.main([str(tmp_path), 'gaussian', '--epochs', '30', '--seeds', '3', '--keep'])
    kept = place/'equal_epochs'
    assert {path.name for path in (kept/'gaussian').iterdir()} == {'0.tsv.gz', '1.tsv.gz', '2.tsv.gz', 'config.json'}
    asked = json.loads((kept/'gaussian/config.json').read_text())['parameters']
    assert (asked['dataset'], asked['epochs'], asked['lr']) == ('digits', 30, .05), 'of the trial that was chosen'
    assert gzip.decompress((kept/'gaussian/2.tsv.gz').read_bytes()) == b'2'
    assert pd.read_csv(place/'trials.csv').chosen.tolist() == [False, False, True]
    assert pd.read_csv(kept/'costs.csv').to_dict('records') == [dict(method='gaussian', epochs=30, cost=30.)]
