"""Noise on a grid: the same votes as by hand, nothing for a network to read, and what it costs is taken from alpha."""
import numpy as np
import pytest
import torch

from rs_toolkit.bounds import lower_bound
from rs_toolkit.certify import ABSTAIN, certify, certify_dataset, noisy_copies, predict
from rs_toolkit.exact_noise import STEPS, noise_table, total_variation, whole_chunk
from rs_toolkit.log import read_log
from rs_toolkit.noise import CHUNK, ESTIMATION, SELECTION

GREY = 5/255
BLACK = torch.zeros(3, 32, 32)
DARK = torch.full((3, 32, 32), GREY)

def reads_traces(x):
    "Class 1 where the values near zero are multiples of the last place of GREY: over grey images, in float32."
    steps = x.flatten(1).double() / np.spacing(np.float32(GREY))
    near = steps.abs() < GREY/np.spacing(np.float32(GREY))/8
    votes = (near & (steps == steps.round())).sum(1) - near.sum(1)/2
    return torch.stack([-votes, votes], 1)

def brightness(x):
    "Ten classes, by the mean of an image."
    return -(x.mean((1, 2, 3))[:, None] - torch.linspace(0, 1, 10)).abs()

@pytest.fixture(scope='module')
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 4, 4))
    return torch.tensor(pixels, dtype=torch.float32)/255


def test_the_usual_certificate_of_a_network_that_reads_traces_is_false():
    black, dark = certify(reads_traces, torch.stack([BLACK, DARK]), .5, n=1000)
    assert (black.prediction, dark.prediction) == (0, 1)
    apart = float((BLACK - DARK).norm())
    assert apart < min(black.radius, dark.radius)

@pytest.mark.parametrize('procedure', ['fixed', 'anytime'])
def test_exact_noise_leaves_it_nothing_to_read(procedure):
    black, dark = certify(reads_traces, torch.stack([BLACK, DARK]), .5, n=1000, exact_noise=True, procedure=procedure)
    assert black.prediction == dark.prediction == 0

@pytest.mark.parametrize('batch_size', [1, 50, 333])
def test_votes_are_those_of_the_formula(images, batch_size):
    "One noisy image at a time: rounded noise, whole numbers, then the network."
    sigma = .7
    found = certify(brightness, images, sigma, n0=30, n=270, seed=3, idx=[5, 6, 7, 8], batch_size=batch_size,
                    exact_noise=True)
    for idx, image, certificate in zip([5, 6, 7, 8], images, found):
        counts = {}
        for phase, size in ((SELECTION, 30), (ESTIMATION, 270)):
            chunks = [whole_chunk(torch.empty(CHUNK, 4, 4, 1, dtype=torch.int64), sigma, 3, idx, phase, chunk)
                      for chunk in range(3)]
            noise = torch.cat(chunks)[:size].permute(0, 3, 1, 2)
            copies = [((image*STEPS).round() + one) / STEPS for one in noise]
            votes = [int(brightness(copy[None]).argmax()) for copy in copies]
            counts[phase] = np.bincount(votes, minlength=10)
        assert certificate.counts == tuple(counts[ESTIMATION])
        assert certificate.selected == counts[SELECTION].argmax()

def test_what_the_table_may_be_off_by_is_taken_from_alpha(images):
    unanimous = lambda x: torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1)
    certificate = certify(unanimous, images[0], .5, n=1000, alpha=.001, exact_noise=True)
    left = .001 - 1100*total_variation(.5, 16)
    assert certificate.p_a_lower == lower_bound(1000, 1000, left) < lower_bound(1000, 1000, .001)
    assert certificate.alpha == .001
    with pytest.raises(ValueError, match='take fewer samples, or a larger alpha'):
        certify(unanimous, images[0], .5, n=100, alpha=1e-14, exact_noise=True)

@pytest.mark.parametrize('sigma', [.01, .25, 1.])
def test_the_table_is_the_normal_distribution(sigma):
    "Its probabilities, each relative to itself, against arithmetic of 30 digits; and what lies beyond its ends."
    mpmath = pytest.importorskip('mpmath')
    table = noise_table(sigma).numpy()
    reach = len(table)//2
    with mpmath.workdps(30):
        step = 1/(mpmath.mpf(sigma)*STEPS)
        for k in sorted({*np.linspace(-reach + 1, reach - 1, 40).astype(int).tolist(), -1, 0, 1}):
            upper, lower = (mpmath.ncdf((k + side)*step) for side in (mpmath.mpf(.5), -mpmath.mpf(.5)))
            probability = float(upper - lower)
            drawn = int(table[k + reach]) - int(table[k + reach - 1])
            allowed = probability*(4 + float(k*step)**2)*2**-52 + 2**-62
            if k == 0: allowed = total_variation(sigma, 1)                        # what is missing elsewhere
            assert abs(drawn/2**63 - probability) < allowed, k
        assert 2*mpmath.ncdf(-(reach + mpmath.mpf(.5))*step) < 2**-63

def test_sums_of_the_table_stay_below_one():
    table = noise_table(.5)
    assert (table.diff() >= 0).all()
    assert table[0] >= 0 and table[-1] <= 2**63 - 1
    assert torch.equal(table + table.flip(0), torch.full_like(table, 2**63 - 1))

def test_it_is_not_the_float_noise_rounded_twice(images):
    copies = noisy_copies(images[0], .5, 200, exact_noise=True)
    steps = copies.double()*STEPS
    assert (steps - steps.round()).abs().max() < 1e-2
    assert abs(float((copies - images[0]).std()) - .5) < .02

def test_images_beside_the_grid_are_refused(images):
    looked = []
    def model(x):
        looked.append(len(x))
        return brightness(x)
    for call in certify, predict:
        with pytest.raises(ValueError, match='1/4080 beside the grid'):
            call(model, images*.9, .5, n=200, exact_noise=True)
    assert sum(looked) < 300                                             # the first look at a model, and no votes

def test_its_log_is_not_continued_without_it(images, tmp_path):
    log = tmp_path/'log.tsv'
    given = dict(sigma=.25, n=200, log=log, progress=False)
    labels = [0, 1, 2, 3]
    certify_dataset(brightness, images[:2], labels[:2], exact_noise=True, **given)
    assert set(read_log(log).precision) == {'float32 exact'}
    with pytest.raises(ValueError, match='precision'):
        certify_dataset(brightness, images, labels, **given)
    whole = certify_dataset(brightness, images, labels, exact_noise=True, **given)
    assert len(whole) == 4

def test_a_coarse_network_answers_alike(images):
    "Rounding to a sixteenth of a grey level is no change to speak of."
    usual = certify(brightness, images, .5, n=2000)
    exact = certify(brightness, images, .5, n=2000, exact_noise=True)
    for one, other in zip(usual, exact):
        assert one.selected == other.selected or ABSTAIN in (one.prediction, other.prediction)
        assert np.abs(np.subtract(one.counts, other.counts)).max() < 6*np.sqrt(2000/2)
