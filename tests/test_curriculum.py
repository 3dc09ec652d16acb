"""The curriculum of the ACR paper on a plane whose votes are known: what it drops and draws, and when it counts."""
from functools import partial

import numpy as np
import pytest
import torch
from slow import check_refused

from rs_toolkit.curriculum import EasyData, count_weights
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.models import HalfSpace
from rs_toolkit.train import fit

PLANE = HalfSpace()
POINTS = torch.stack([PLANE.point_at(d) for d in np.linspace(-.35, .45, 60).astype('f4')])
LABELS = torch.ones(60, dtype=torch.int64)
easy = partial(EasyData, .25, start=3)

def weights_of(curriculum, epoch, net=PLANE, images=POINTS, labels=LABELS):
    return np.asarray(curriculum(net, (images, labels), epoch), dtype=float)

def test_another_number_of_noises_has_weights_too():
    ten = np.asarray(count_weights(np.arange(11), 10, .1), dtype=float)
    assert (ten > 0).all()
    assert (np.diff(ten) >= 0).all()

def test_easy_data():
    chosen = easy()
    assert [chosen(PLANE, (POINTS, LABELS), epoch) for epoch in range(3)] == [None]*3
    w = weights_of(chosen, 3)
    kept = w > 0
    assert w.shape == (60,)
    assert w.min() >= 0
    assert not kept[:15].any()
    assert kept[45:].all()
    ratios = set(np.unique(np.round(w[kept] / w[kept].min(), 3)))
    assert ratios <= {1, 2.138, 3.42, 4.976, 7.206}
    assert len(ratios) >= 4
    np.testing.assert_array_equal(w, weights_of(chosen, 4))
    np.testing.assert_array_equal(w, weights_of(easy(), 3))

def test_easy_data_counts_again_ten_epochs_later_and_resumes():
    chosen = easy()
    w = weights_of(chosen, 3)
    blind = HalfSpace(offset=5.)                                                 # from now on every image is wrong
    np.testing.assert_array_equal(w, weights_of(chosen, 12, blind))
    again = easy()
    again.load_state_dict(chosen.state_dict())
    np.testing.assert_array_equal(w, weights_of(again, 12, blind))
    for resumed in chosen, again:
        later = weights_of(resumed, 13, blind)
        np.testing.assert_array_equal(later > 0, w > 0)
        assert len(np.unique(later[w > 0])) == 1, later

def test_easy_data_parts():
    uniform = weights_of(easy(reweigh=False), 3)
    assert set(np.unique(uniform / uniform.max())) == {0, 1}
    assert (weights_of(easy(threshold=0.), 3) > 0).all(), 'threshold 0 keeps even an image that is always wrong'
    with pytest.raises(ValueError, match='threshold'):
        weights_of(easy(threshold=.9), 3, images=POINTS[45:], labels=1 - LABELS[45:])

def test_easy_data_keeps_equality():
    "Shares are hundredths: the largest one that still keeps an image is its own, and a hair more drops it."
    images = torch.stack([PLANE.point_at(.1), PLANE.point_at(.45)])               # the second always stays
    def keeps(threshold): return weights_of(easy(threshold=threshold), 3, images=images, labels=LABELS[:2])[0] > 0
    kept = [keeps(k / 100) for k in range(91)]
    share = max(k for k in range(91) if kept[k])
    assert 50 < share < 80
    assert kept == [k <= share for k in range(91)]
    assert not keeps(share / 100 + 1e-6)

@pytest.mark.parametrize('key, value', [('threshold', -.1), ('threshold', 1.1), ('every', 0), ('discard_noise', 0),
                                        ('alpha', 1.), ('sigma', 0.)])
def test_bad_arguments(key, value): check_refused(EasyData, {key: value}, f'{key}.*{value:g}')

def test_a_history_says_how_many_images_are_kept():
    "All of them before the discard, and then the share that it leaves."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2))
    data = torch.rand(40, 2, 1, 1), torch.arange(40) % 2                       # so half of its answers are wrong
    curriculum = EasyData(.25, start=2, threshold=.5, every=1)
    history = fit(net, Gaussian(.25), data, 4, curriculum=curriculum, lr=0., progress=False)
    assert history.kept.tolist() == [1, 1, curriculum.kept.double().mean(), curriculum.kept.double().mean()]
    assert 0 < history.kept[3] < 1
