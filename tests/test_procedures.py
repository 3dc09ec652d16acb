"""Certification that stops early: a prefix of the fixed samples, in any company, killed anywhere, as sure as told."""
import os
import signal

import numpy as np
import pytest
import torch
from forked import forked
from scipy.special import ndtr

from rs_toolkit.bounds import certified_radius, lower_bound, round_down
from rs_toolkit.certify import ABSTAIN, certify, certify_dataset
from rs_toolkit.checkpoint import load as load_checkpoint
from rs_toolkit.common import data_folder, same_answers
from rs_toolkit.data import load
from rs_toolkit.log import COLUMNS, STOPPED, read_log
from rs_toolkit.metrics import certified_accuracy, p_a, results, summary
from rs_toolkit.models import HalfSpace
from rs_toolkit.noise import CHUNK, ESTIMATION, SELECTION, noise_chunk
from rs_toolkit.sequential import PROCEDURES, STOPS

HALF = HalfSpace()
DISTANCES = [.45, .05, -.2, .3, .01, 0., -.35, .2, .4, -.02, .1, .5]
IMAGES = torch.stack([HALF.point_at(distance) for distance in DISTANCES])
LABELS = [1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1]
N = 1500
ALL = {'fixed': {}, 'sequential': {}, 'one radius': dict(radii=.25), 'anytime': {}, 'pilot': {},
       'randomized': dict(randomized=True)}
NAMES = {'one radius': 'sequential', 'randomized': 'fixed'}
every = pytest.mark.parametrize('kind', ALL)


def asked(kind): return dict(procedure=NAMES.get(kind, kind), procedure_args=ALL[kind])

def logged(path, kind, images=IMAGES, labels=LABELS, model=HALF, **kwargs):
    "The bytes of a log, but for the times."
    settings = dict(sigma=.5, n=N, log=path, progress=False) | asked(kind) | kwargs
    certify_dataset(model, images, labels, **settings)
    return untimed(path)

def untimed(path):
    rows = [line.split('\t') for line in path.read_text().splitlines()]
    return [row[:COLUMNS.index('time')] + row[COLUMNS.index('time') + 1:] for row in rows]


def noise_of(idx, phase, size):
    "The noise of an image, [size, C, H, W]."
    c, h, w = IMAGES.shape[1:]
    chunks = [noise_chunk(torch.empty(CHUNK, h, w, c), 0, idx, phase, k) for k in range(-(-size // CHUNK))]
    return torch.cat(chunks)[:size].permute(0, 3, 1, 2)

def votes_of(idx, phase, size):
    return np.bincount(HALF(IMAGES[idx] + .5*noise_of(idx, phase, size)).argmax(1), minlength=2)


def test_the_fixed_log_is_what_it_was(tmp_path):
    "The columns before there were procedures, and CERTIFY written out."
    header, *rows = logged(tmp_path/'log.tsv', 'fixed', n=250)
    assert ' '.join(header) == ('idx label predict radius correct n_a n_true n0 n alpha sigma seed split '
                                'precision device selected weights data answers')
    for idx, (label, row) in enumerate(zip(LABELS, rows)):
        top = int(votes_of(idx, SELECTION, 100).argmax())
        votes = votes_of(idx, ESTIMATION, 250)
        p = lower_bound(votes[top], 250, .001)
        radius = float(round_down(certified_radius(p, .5))) if p >= .5 else 0.
        predict = top if p >= .5 else ABSTAIN
        expected = [idx, label, predict, repr(radius), int(predict == label), votes[top], votes[label],
                    100, 250, .001, .5, 0, 'test', 'float32', 'cpu', top]
        assert row[:-3] == [*map(str, expected)]


def test_a_shipped_log_is_written_again(tmp_path):
    "A file that was made before there were other procedures: each byte of a row, but for the time."
    header, *rows = untimed(data_folder()/'digits-gaussian'/'certify.tsv')
    idx = [int(row[0]) for row in rows[:3]]
    images, labels = load('digits', 'test')
    model = load_checkpoint(data_folder()/'digits-gaussian')
    again = logged(tmp_path/'log.tsv', 'fixed', images[idx], labels[idx], model, idx=idx, sigma=.25, n=10_000)
    assert again[0] == header and len(again) == 4
    for old, new in zip(rows, again[1:]):
        assert old[:-1] == new[:-1]
        assert same_answers(old[-1], new[-1]), (old[-1], new[-1])                # to a few digits, on any processor


@every
def test_samples_are_a_prefix_of_the_fixed_ones(kind):
    stopped = certify(HALF, IMAGES, .5, n=N, seed=3, **asked(kind))
    whole = certify(HALF, IMAGES, .5, n=N, seed=3)
    for idx, (c, fixed) in enumerate(zip(stopped, whole)):
        assert c.n <= N and sum(c.counts) == c.n and c.n0 == 100 and c.selected == fixed.selected and c.stop in STOPS
        assert all(few <= many for few, many in zip(c.counts, fixed.counts))
        if c.n: assert c.counts == certify(HALF, IMAGES[idx], .5, n=c.n, seed=3, idx=idx).counts
        assert c.procedure.startswith(NAMES.get(kind, kind))
    if 'fixed' not in stopped[0].procedure: assert np.mean([c.n for c in stopped]) < .8*N


@every
def test_the_rule_that_was_asked_for_decides(kind):
    "The state machine on its own, fed with the votes of longer and longer fixed runs."
    args = {name: value for name, value in ALL[kind].items() if name != 'randomized'}
    procedure = PROCEDURES[NAMES.get(kind, kind)](.5, 1000, .001, **args)
    for idx, c in enumerate(certify(HALF, IMAGES[:6], .5, n=1000, **asked(kind))):
        selection = votes_of(idx, SELECTION, 100)
        assert c.selected == selection.argmax()
        at = procedure.begin(int(selection.max()), 100, c.u)
        while str(at.stop) == '':
            at = procedure.look(at, int(votes_of(idx, ESTIMATION, int(at.wanted))[c.selected]))
        assert (c.n, c.stop, c.p_a_lower) == (int(at.n), str(at.stop), float(at.p_lower))
        assert c.prediction == (c.selected if at.p_lower >= .5 else ABSTAIN)
        assert c.radius == (float(procedure.radius(at.p_lower)) if at.p_lower >= .5 else 0)

@every
def test_batch_size_order_and_company_change_nothing(tmp_path, kind):
    header, *rows = logged(tmp_path/'log.tsv', kind)
    for size in [50, 200, 333, 100_000]:
        assert logged(tmp_path/f'{size}.tsv', kind, batch_size=size) == [header, *rows], size
    order = np.random.default_rng(0).permutation(len(IMAGES)).tolist()
    labels = [LABELS[i] for i in order]
    assert logged(tmp_path/'order.tsv', kind, IMAGES[order], labels, idx=order) == [header, *(rows[i] for i in order)]
    half = logged(tmp_path/'half.tsv', kind, IMAGES[::2], LABELS[::2], idx=range(0, len(IMAGES), 2))
    assert half == [header, *rows[::2]]


@pytest.mark.parametrize('n0, n, batch_size', [(1, 10, 1), (33, 250, 64), (100, 100, 7), (250, 1234, 1000), (1, 1, 50)])
@pytest.mark.filterwarnings('ignore:n=')
def test_odd_sizes(n0, n, batch_size):
    for kind in ALL:
        stopped = certify(HALF, IMAGES[:6], .5, n0=n0, n=n, batch_size=batch_size, **asked(kind))
        assert stopped == certify(HALF, IMAGES[:6], .5, n0=n0, n=n, **asked(kind)) and all(c.n0 == n0 for c in stopped)
        for idx, c in enumerate(stopped):
            if c.n: assert c.counts == certify(HALF, IMAGES[idx], .5, n0=n0, n=c.n, idx=idx).counts


@pytest.mark.parametrize('batch_size', [50, 150, 1000])
def test_batches_are_full(batch_size):
    sizes = []
    def model(x):
        sizes.append(len(x))
        return HALF(x)

    images = IMAGES.repeat(8, 1, 1, 1)
    drawn = sum(c.n0 + c.n for c in certify(model, images, .5, n=N, batch_size=batch_size, procedure='sequential'))
    assert drawn <= sum(sizes) <= drawn + 3*batch_size + 20                       # and a look at the model
    assert sizes.count(batch_size) * batch_size > .9*drawn


# Kills

class Killed:
    "A model that kills its process, or stops it as Ctrl-C would, at some call."
    def __init__(self, after, hard):
        self.after = after
        self.hard = hard

    def __call__(self, x):
        self.after -= 1
        if self.after < 0 and self.hard: os.kill(os.getpid(), signal.SIGKILL)
        if self.after < 0: raise KeyboardInterrupt
        return HALF(x)

def never(x): return HALF(x)

def until_it_is_done(path, kind, moments):
    "Kill one process after another, each at its moment, in a process of its own; prints the lines that they left."
    torch.set_num_threads(1)
    for after in moments:
        if os.fork() == 0:
            try: logged(path, kind, model=Killed(after, hard=True), n=1000, batch_size=50)
            finally: os._exit(0)
        _, status = os.wait()
        print(len(path.read_bytes().splitlines()) if path.exists() else 0)
        if status == 0: return
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    raise AssertionError(f'still not done after {len(moments)} kills')

@pytest.mark.parametrize('kind', ['fixed', 'sequential', 'anytime', 'pilot'])
def test_killed_again_and_again(tmp_path, kind):
    "At random moments, by the signal that cannot be caught."
    whole = logged(tmp_path/'whole.tsv', kind, model=never, n=1000, batch_size=333)
    moments = np.random.default_rng(1).integers(5, 60, 100).tolist()
    code, said = forked(until_it_is_done, tmp_path/'killed.tsv', kind, moments)
    assert code == 0, said
    lines = [int(line) for line in said.splitlines()]
    assert len(lines) > 3 and lines == sorted(lines) and len({*lines}) > 2, lines           # killed, and it went on
    assert untimed(tmp_path/'killed.tsv') == whole

@every
def test_stopped_again_and_again(tmp_path, kind):
    "By Ctrl-C, which ends an image or drops it."
    whole = logged(tmp_path/'whole.tsv', kind, model=never, n=1000)
    stops = 0
    for after in np.random.default_rng(0).integers(6, 40, 100):
        try: logged(tmp_path/'stopped.tsv', kind, model=Killed(after, hard=False), n=1000, batch_size=100)
        except KeyboardInterrupt: stops += 1
        else: break
    assert stops >= 2
    assert untimed(tmp_path/'stopped.tsv') == whole

@pytest.mark.parametrize('kind', ['sequential', 'anytime', 'pilot'])
def test_cut_anywhere_and_gone_on_with(tmp_path, kind):
    "All that a kill leaves is the file, up to some byte."
    path = tmp_path/'log.tsv'
    whole = logged(path, kind, n=300)
    content = path.read_bytes()
    for cut in [1, len(content) - 1, *np.random.default_rng(2).integers(0, len(content), 8)]:
        path.write_bytes(content[:cut])
        assert logged(path, kind, n=300) == whole, cut


# Logs

def refused(words, f, *args, **kwargs):
    with pytest.raises(ValueError, match=words): f(*args, **kwargs)

def test_a_log_knows_its_procedure(tmp_path):
    for kind in ALL: logged(tmp_path/f'{kind}.tsv', kind, n=200)
    for was in ALL:
        path = tmp_path/f'{was}.tsv'
        before = path.read_bytes()
        for now in {*ALL} - {was}: refused('another setting .procedure: .* there, .* now', logged, path, now, n=200)
        refused('(n|budget): 200 there, 300 now', logged, path, was, n=300)
        logged(path, was, n=200)                                                 # which is complete
        assert path.read_bytes() == before

@every
def test_what_the_log_says(tmp_path, kind):
    logged(tmp_path/'log.tsv', kind)
    log = read_log(tmp_path/'log.tsv')
    stopped = certify(HALF, IMAGES, .5, n=N, **asked(kind))
    assert list(log) == (COLUMNS if kind == 'fixed' else COLUMNS + STOPPED)
    assert log.n.tolist() == [c.n for c in stopped] and log.radius.tolist() == [c.radius for c in stopped]
    assert log.n_a.tolist() == [c.counts[c.selected] for c in stopped]
    assert log.n_true.tolist() == [c.counts[label] for c, label in zip(stopped, LABELS)]
    assert log.correct.tolist() == [int(c.prediction == label) for c, label in zip(stopped, LABELS)]
    if kind == 'fixed': return
    for column, name in dict(stop='stop', p_lower='p_a_lower', u='u', procedure='procedure').items():
        assert log[column].tolist() == [getattr(c, name) for c in stopped]
    assert (log.budget == N).all() and {*log.stop} <= {*STOPS}
    assert np.isnan(p_a(log)).tolist() == (log.n == 0).tolist()
    assert summary({'it': log}, [0, .25]).loc['it', .25] == certified_accuracy(log, .25)
    assert (results(log, [0])['acr'] is None) == (NAMES.get(kind, kind) == 'sequential')

@pytest.mark.parametrize('procedure, args, words', [
    ('sequental', {}, "unknown procedure 'sequental': did you mean 'sequential'"),
    ('sequential', dict(radius=1), "unknown option of the procedure sequential 'radius': did you mean 'radii'"),
    ('anytime', dict(randomized=True), "unknown option of the procedure anytime 'randomized'"),
    ('sequential', dict(radii=[1., .5]), 'the radii of a table increase')])
def test_what_goes_wrong_says_so(procedure, args, words):
    refused(words, certify, None, IMAGES, .5, procedure=procedure, procedure_args=args)


# The promise

SIGMA = .5
WIDTH = 3**.5*SIGMA                               # half of the cube that uniform noise fills
DIAGONAL = HalfSpace(torch.ones(2, 1, 1))
# norm -> classifier, l2 length of what is 1 in the norm, share of votes at a distance
PLANES = {'2': (HALF, 1., lambda d: ndtr(d/SIGMA)),
          '1': (HALF, 1., lambda d: (WIDTH + d)/(2*WIDTH)),
          'inf': (DIAGONAL, 2**.5, lambda d: ndtr(2**.5*d/SIGMA))}

@every
@pytest.mark.parametrize('norm, distance', [('2', .05), ('2', .25), ('2', .4), ('1', .25), ('inf', .25)])
def test_overclaims(kind, norm, distance):
    "2,000 certificates of a point whose radius is known, with an alpha large enough to see errors."
    trials = 2000
    alpha = .1
    n = 400 if kind in ('sequential', 'anytime', 'pilot') else 200               # room for several looks
    beyond = distance * (1 + 1e-6)                                                # a radius that may not be certified
    args = ALL[kind] | {'sequential': dict(radii=[0, beyond, 2*beyond]), 'one radius': dict(radii=beyond)}.get(kind, {})
    plane, length, share = PLANES[norm]
    images = plane.point_at(length*distance).expand(trials, *IMAGES.shape[1:])
    setting = asked(kind) | dict(procedure_args=args, norm=norm)
    found = certify(plane, images, SIGMA, n0=20, n=n, alpha=alpha, seed=5, batch_size=10_000, **setting)
    wrong = np.mean([c.radius > distance and c.prediction == 1 for c in found])
    print(f'{kind} at {distance} in {norm}: {wrong:.2%} of {alpha:.0%}, {np.mean([c.n for c in found]):.0f} of {n}')
    assert 0 < wrong <= alpha + 4*np.sqrt(alpha*(1 - alpha) / trials)
    if kind == 'fixed': assert abs(share(distance) - np.mean([c.counts[1] for c in found]) / n) < .005
