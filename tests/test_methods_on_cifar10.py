"""What hours of training would otherwise find out at their end: each setting is one that a run takes."""
import sys
from pathlib import Path

import pytest

from rs_toolkit.recipe import choose_parts
from rs_toolkit.train import check_run

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT/'tools'))
import methods_on_cifar10 as tool  # noqa: E402
from costs import ANNOUNCED  # noqa: E402
from recipes import recipe_of  # noqa: E402

def config_of(key, sigma):
    return ANNOUNCED | recipe_of(tool.recipe_for(key, sigma)) | tool.settings_of(key, sigma, 'runs/start', 'runs')

@pytest.mark.parametrize('sigma', tool.RADII)
@pytest.mark.parametrize('key', tool.RUNS)
def test_every_setting_is_one_that_a_run_takes(key, sigma):
    config = config_of(key, sigma)
    method, curriculum = choose_parts(config).rehearse()
    check_run(config['epochs'], method, schedule=config['schedule'], lr_drops=config['lr_drops'],
              lr_lag=config['lr_lag'], curriculum=curriculum)
    assert config['sigma'] == sigma and config['arch'] == 'cifar_resnet20'

@pytest.mark.parametrize('sigma', tool.RADII)
def test_equal_epochs_on_equal_images_from_one_network(sigma):
    "What a comparison holds fixed."
    fixed = ['epochs', 'train_every', 'start', 'batch_size', 'lr', 'lr_drops', 'precision', 'seed', 'n', 'n0', 'alpha',
             'every', 'procedure', 'procedure_args', 'dataset', 'augment', 'weight_decay']
    for name in fixed: assert len({str(config_of(key, sigma)[name]) for key in tool.RUNS}) == 1, name

def test_a_recipe_begins_at_once():
    "Two epochs have no time for a warm-up; the easy data are chosen in both."
    for key in 'smoothmix', 'smoothadv', 'acr': assert config_of(key, .25)['ramp'] == {}
    assert [config_of('acr', sigma)['curriculum_args']['threshold'] for sigma in tool.RADII] == [.5, .4]
