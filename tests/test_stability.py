"""Stability training: the formula's value is in its notebook, its gradient here (the clean target is not detached)."""
from slow import (COMMON, at_the_ends, average, bad, check_finite, check_gradients, check_learns, check_mean, check_refused,
                  counts, given_noise, log_softmax, softmax, weights, xent)

from rs_toolkit.methods.stability import Stability

def stability(net, x, y, noise, lbd):
    "Li et al. (2019), stability training with cross-entropy."
    stable = [xent(softmax(net(x[i])), log_softmax(net(x[i] + delta[i]))) for delta in noise for i in range(len(x))]
    return {'ce': average([-log_softmax(net(x[i]))[y[i]] for i in range(len(x))]), 'stable': lbd * average(stable)}

CASE = given_noise(Stability, stability, lbd=2.)

def test_gradients(): check_gradients(CASE)
def test_a_batch_is_the_mean_of_its_images(): check_mean(CASE)

@at_the_ends
def test_finite_gradients(scale, labels): check_finite(Stability, scale, labels)

def test_learns_digits(): check_learns(Stability(.25, lbd=1.))

@bad(COMMON, counts('num_noise'), weights('lbd'))
def test_bad_arguments(arguments, message): check_refused(Stability, arguments, message)
