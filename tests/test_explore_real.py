"""Where CIFAR-10 is at hand, pages with a network open on it, and not on digits."""
import numpy as np
import pytest
from PIL import Image

from rs_toolkit.explore.attack import AttackExplorer
from rs_toolkit.explore.smooth import CIFAR10, SmoothExplorer, is_real, networks
from rs_toolkit.explore.sphere import SphereExplorer, real_subject

@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    "Ten images, one of each class, at the place that recipes name."
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    for split in 'train', 'test':
        for name, image in zip(CIFAR10, pixels):
            folder = tmp_path/'data/cache/cifar10-jpeg'/split/name
            folder.mkdir(parents=True)
            Image.fromarray(image).save(folder/'0.png')
    monkeypatch.setattr('rs_toolkit.data.project_folder', lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    real_subject.cache_clear()
    yield pixels
    real_subject.cache_clear()

def test_only_networks_of_cifar10_are_real(cifar10):
    real = [name.partition(',')[0] for name, folder in networks() if is_real(folder)]
    assert real == ['cifar10-gaussian', 'cifar10-crt', 'cifar10-acr', 'cifar10-catrs', 'cifar10-smoothadv']

def test_smooth_opens_with_few_samples_of_a_real_image(cifar10):
    e = SmoothExplorer(image=3)
    assert e.values['model'].endswith('data/cifar10-gaussian') and e.values['n'] == 1_000
    assert e.now.finished and (e.now.size, e.now.label) == (10, 3)
    np.testing.assert_array_equal(np.rint(e.now.pictures[0] * 255).transpose(1, 2, 0), cifar10[3])
    assert 'class <b>cat</b>' in e.words.value

def test_attack_opens_with_the_budget_that_is_looked_at(cifar10):
    e = AttackExplorer(image=3)
    assert e.values['model'].endswith('data/cifar10-gaussian') and e.values['n'] == 1_000
    assert e.now.certificate is not None and 6 in e.now.tried                       # .3, the budget under the slider
    assert 'in truth <b>cat</b>' in e.words.value
    assert 'a photograph' not in [tip.title for tip in e.tips]                      # it speaks of one that is not there
    assert e.worker.wait(120) and len(e.now.tried) > 6                              # the rest came beside it
    assert 'role="alert"' not in e.words.value, e.words.value

def test_sphere_opens_on_a_real_image(cifar10):
    e = SphereExplorer()
    assert e.values['model'] == 'cifar10-gaussian'
    assert '<b>Image 2, bird</b> (CIFAR-10, Gaussian)' in e.words.value

def test_whoever_asks_for_digits_gets_digits(cifar10):
    e = SmoothExplorer(model=networks()[0][1])
    assert (e.now.size, e.values['n']) == (360, 10_000)
