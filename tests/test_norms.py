"""Balls of other norms: the same votes or other noise, the same log with one column more, and no mixing."""
import math

import numpy as np
import pytest
import torch

from rs_toolkit.bounds import lower_bound, round_down
from rs_toolkit.certify import certify, certify_dataset, predict
from rs_toolkit.log import COLUMNS, STOPPED, read_log
from rs_toolkit.metrics import as_l1, as_l2, certified_accuracy, recertify, summary
from rs_toolkit.models import HalfSpace
from rs_toolkit.noise import CHUNK, ESTIMATION, fill_uniform, noise_chunk

HALF = HalfSpace()
IMAGES = torch.stack([HALF.point_at(distance) for distance in [.45, .05, -.2, .3]])
LABELS = [1, 1, 0, 1]
PROCEDURES = ['fixed', 'sequential', 'anytime', 'pilot']

def logged(path, norm, procedure='fixed', **given):
    settings = dict(sigma=.5, n=1000, log=path, progress=False, norm=norm, procedure=procedure) | given
    return certify_dataset(HALF, IMAGES, LABELS, **settings).drop(columns='time')


def test_l1_by_the_definition():
    "Votes on uniform noise, counted by hand, and the radius 2 width (p - 1/2)."
    width = math.sqrt(3)*.5
    for idx, c in enumerate(certify(HALF, IMAGES, .5, n=250, norm=1)):
        chunks = [noise_chunk(torch.empty(CHUNK, 1, 1, 2), 0, idx, ESTIMATION, k, fill_uniform) for k in range(3)]
        noisy = IMAGES[idx] + .5*torch.cat(chunks)[:250].permute(0, 3, 1, 2)
        assert abs(noisy - IMAGES[idx]).max() <= width
        votes = np.bincount(HALF(noisy).argmax(1), minlength=2)
        p = lower_bound(votes[c.selected], 250, .001)
        assert c.counts == tuple(votes) and c.norm == '1'
        assert c.radius == (round_down(2*width*(p - .5)) if p > .5 else 0)

def test_names_of_norms():
    assert certify(HALF, IMAGES, .5, n=100, norm=1) == certify(HALF, IMAGES, .5, n=100, norm='l1')
    assert certify(HALF, IMAGES, .5, n=100, norm=math.inf) == certify(HALF, IMAGES, .5, n=100, norm='linf')

def test_l_inf_is_a_part_of_l2():
    "The same votes; a box of half-width r/sqrt(d)."
    for ball, box in zip(certify(HALF, IMAGES, .5, n=1000), certify(HALF, IMAGES, .5, n=1000, norm=math.inf)):
        assert box.counts == ball.counts and box.prediction == ball.prediction and box.norm == 'inf'
        assert abs(box.radius - ball.radius/2**.5) <= 1e-9

@pytest.mark.parametrize('procedure', PROCEDURES)
@pytest.mark.parametrize('norm', ['1', 'inf'])
def test_the_log_says_so_and_goes_on(tmp_path, norm, procedure):
    path = tmp_path/'log.tsv'
    whole = logged(path, norm, procedure)
    content = path.read_bytes()
    stopped = [] if procedure == 'fixed' else STOPPED
    assert content.decode().splitlines()[0].split('\t') == [*COLUMNS, *stopped, 'norm']
    found = certify(HALF, IMAGES, .5, n=1000, norm=norm, procedure=procedure)
    assert whole.radius.tolist() == [c.radius for c in found] and set(whole.norm) == {norm}
    for cut in 150, len(content) - 30:
        path.write_bytes(content[:cut])
        assert logged(path, norm, procedure, batch_size=333).equals(whole)
    for other in {'1', '2', 'inf'} - {norm}:
        with pytest.raises(ValueError, match=f'another setting .*norm: {norm} there, {other} now'):
            logged(path, other, procedure)

def test_tables_are_of_one_norm(tmp_path):
    logs = {norm: logged(tmp_path/norm, norm) for norm in ('1', '2', 'inf')}
    assert 'norm' not in logs['2']
    with pytest.raises(ValueError, match=r'different norms .*as_l1\(log\) makes of the others holds in the norm 1'):
        summary(logs, [0.])
    table = summary({norm: as_l1(log) for norm, log in logs.items()}, [0, .2])
    assert table.loc['2', .2] == certified_accuracy(logs['2'], .2)
    with pytest.raises(ValueError, match='does not contain the l2 ball'): as_l2(logs['1'])
    again = recertify(logs['1'], alpha=.01)
    by_hand = [c.radius for c in certify(HALF, IMAGES, .5, n=1000, norm='1', alpha=.01)]
    assert again.radius.tolist() == by_hand
    assert read_log(tmp_path/'1').norm.tolist() == ['1']*4

def test_a_table_of_boxes():
    "Its radii are those of pictures of 8 bits."
    space = HalfSpace(torch.ones(1, 2, 2))
    c = certify(space, space.point_at(.2), .25, n=2000, procedure='sequential', norm='inf')
    assert c.radius == 16/255                                        # of .1
    radii = c.procedure.split()[1].removeprefix('radii=').split(',')
    assert [float(r)*255 for r in radii] == [0, 1, 2, 4, 8, 16, 32, 64]

def test_uniform_noise_ends():
    "Farther from the plane than its width each vote is for the right class; under Gaussian noise some are not."
    far = HALF.point_at(math.sqrt(3)*.25 + .01)
    assert certify(HALF, far, .25, n=2000, norm='1').counts == (0, 2000)
    assert certify(HALF, far, .25, n=2000).counts[0] > 0
    assert predict(HALF, far, .25, n=11, norm='1') == 1               # so few suffice, as no vote is lost

@pytest.mark.parametrize('given, says', [
    (dict(norm='l7'), "unknown norm '7'"), (dict(norm=3), "unknown norm '3'"),
    (dict(norm='1', exact_noise=True), 'exact noise is Gaussian')])
def test_what_goes_wrong_says_so(given, says):
    with pytest.raises(ValueError, match=says): certify(None, IMAGES, .5, **given)
