"""Consistency read twice, in each of its forms; the value of the first is in its notebook."""
from functools import partial

import numpy as np
import pytest
from slow import (COMMON, at_the_ends, average, bad, check_finite, check_gradients, check_learns, check_mean, check_refused,
                  check_terms, counts, every, gaussian, given_noise, kl, log_softmax, smoothed, weights, xent)

from rs_toolkit.attacks import smoothed_pgd
from rs_toolkit.methods.consistency import Consistency

def consistency(net, x, y, noise, form, lbd=10., eta=.5):
    "Jeong & Shin (2020), consistency regularization; the other forms are options of their code."
    agree = []
    entropy = []
    for i in range(len(x)):
        mean = smoothed(net, x[i], noise[:, i])
        logs = [log_softmax(net(x[i] + delta[i])) for delta in noise]
        if form == 'mse': agree.append(lbd * ((np.exp(logs[0]) - np.exp(logs[1]))**2).sum())
        elif form == 'xent': agree.append(lbd * average([xent(mean, log) for log in logs]))
        else: agree.append(lbd * average([kl(mean, log) for log in logs]))
        entropy.append(eta * xent(mean, np.log(np.maximum(mean, 1e-20))))
    terms = gaussian(net, x, y, noise) | {'agree': average(agree)}
    if form == 'kl+entropy': terms['entropy'] = average(entropy)
    return terms

OTHERS = ('kl', 'xent', 'mse')
FORMS = ('kl+entropy', *OTHERS)

def case(form): return given_noise(Consistency, consistency, form=form)

@every(OTHERS)
def test_terms(name): check_terms(case(name))

@every(FORMS)
def test_gradients(name): check_gradients(case(name))

@every(FORMS)
def test_a_batch_is_the_mean_of_its_images(name): check_mean(case(name))

FINITE = {form: partial(Consistency, form=form) for form in FORMS}
FINITE['attacked'] = partial(Consistency, attack=partial(smoothed_pgd, eps=.5, steps=2))

@at_the_ends
@every(FINITE)
def test_finite_gradients(name, scale, labels): check_finite(FINITE[name], scale, labels)

@every(FORMS)
def test_learns_digits(name): check_learns(Consistency(.25, num_noise=2, lbd=1., form=name))

@bad(COMMON, counts('num_noise'), weights('lbd', 'eta'), [
    pytest.param(dict(num_noise=1), 'at least 2.*1', id='one noise'),
    pytest.param(dict(form='kl-entropy'), r'kl-entropy.*kl\+entropy', id='misspelt form')])
def test_bad_arguments(arguments, message): check_refused(partial(Consistency, **dict(num_noise=2)), arguments, message)
