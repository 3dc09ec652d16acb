"""CRT: the formula's values are in its notebook, in both spaces and norms; their gradients are here."""
from functools import partial

import numpy as np
import pytest
from slow import (BATCH, COMMON, D, M, SIGMA, Net, at_the_ends, average, bad, check_finite, check_gradients, check_learns,
                  check_mean, check_refused, counts, every, make_batch, softmax, torch_net, with_noise)

from rs_toolkit import checkpoint
from rs_toolkit.common import data_folder
from rs_toolkit.methods.crt import CRT

TEACHER = make_batch(seed=7).net

def crt(net, x, noise, teacher, match, norm):
    "Vaishnavi et al. (2022): distance of teacher and student, in their code of logits, in their text of softmax outputs."
    def space(z): return softmax(z) if match == 'softmax' else z
    gaps = []
    for delta in noise:
        for i in range(len(x)):
            noisy = x[i] + delta[i]
            gaps.append(np.linalg.norm(space(net(noisy)) - space(teacher(noisy))))
    return {'transfer': average([gap**2 if norm == 'l2_squared' else gap for gap in gaps])}

SETTINGS = {f'{match} {norm}': dict(match=match, norm=norm) for match in ('logits', 'softmax') for norm in ('l2', 'l2_squared')}

def case_of(match, norm):
    def case(batch):
        method = with_noise(CRT(SIGMA, torch_net(TEACHER), match=match, norm=norm, num_noise=M), batch.given)
        return method, lambda net: crt(net, batch.x, batch.noise, TEACHER, match, norm)
    return case

@every(SETTINGS)
def test_gradients(name): check_gradients(case_of(**SETTINGS[name]))

@every(SETTINGS)
def test_a_batch_is_the_mean_of_its_images(name): check_mean(case_of(**SETTINGS[name]))

@at_the_ends
@every(SETTINGS)
def test_finite_gradients(name, scale, labels):
    check_finite(partial(CRT, teacher=torch_net(TEACHER), **SETTINGS[name]), scale, labels)

@pytest.mark.parametrize('match, epochs', [('logits', 8), ('softmax', 20)])
def test_learns_digits(match, epochs):
    check_learns(CRT(.25, checkpoint.load(data_folder()/'digits-gaussian'), match=match), epochs=epochs)

@bad(COMMON, counts('num_noise'), [
    pytest.param(dict(match='logit'), 'logit.*logits', id='misspelt match'),
    pytest.param(dict(norm='l1'), 'l1.*l2', id='another norm')])
def test_bad_arguments(arguments, message): check_refused(partial(CRT, teacher=torch_net(TEACHER)), arguments, message)

def test_a_teacher_with_other_classes_is_refused():
    method = CRT(.25, torch_net(Net(np.ones((7, D)), np.ones(7))))
    with pytest.raises(ValueError, match='7 and 3'): method(torch_net(BATCH.net), *BATCH.tensors)
