"""Killed at any moment, gone on with, in memory that does not grow, at the batch size that suits the machine."""
import math
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
from forked import forked
from tqdm.std import tqdm

from rs_toolkit import certify as library
from rs_toolkit.certify import certify, certify_dataset
from rs_toolkit.log import COLUMNS, read_log
from rs_toolkit.models import HalfSpace

HALF = HalfSpace()
IMAGES = torch.stack([HALF.point_at(distance) for distance in [.45, .05, -.2, .3, .01, 0., -.35, .2]])
LABELS = [1, 1, 0, 1, 1, 0, 0, 1]
TIME = COLUMNS.index('time')

def plain(x): return HALF(x)

def untimed(path):
    rows = [line.split('\t') for line in path.read_text().splitlines()]
    return [row[:TIME] + row[TIME + 1:] for row in rows]

def logged(path, model=plain, **given):
    settings = dict(sigma=.5, n=1000, log=path, progress=False) | given
    certify_dataset(model, IMAGES, LABELS, **settings)
    return untimed(path)


# Kills

def begun(path, procedure):
    "A run in a process of its own, for others to kill."
    child = os.fork()
    if child == 0:
        code = 1
        try:
            logged(path, procedure=procedure)
            code = 0
        finally: os._exit(code)
    return child

def kill_at_random(path, procedure, kills):
    "Kill runs from outside until so many have died, begin again where a log was whole; prints the lines they left."
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                                               # its own lock outlives who held it
    logged(path.with_name('first.tsv'), procedure=procedure)                       # finds thresholds, for the others
    began = time.perf_counter()
    assert os.waitpid(begun(path.with_name('whole.tsv'), procedure), 0)[1] == 0
    longest = time.perf_counter() - began                                          # with what a new process costs
    whole = untimed(path.with_name('whole.tsv'))
    rng = np.random.default_rng(0)
    while kills:
        child = begun(path, procedure)
        time.sleep(longest*rng.random())
        os.kill(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)[1]
        assert ended in (0, signal.SIGKILL), ended
        kills -= os.WIFSIGNALED(ended)
        print(len(path.read_bytes().splitlines()) if path.exists() else 0)
        if path.exists() and untimed(path) == whole: path.unlink()
    assert logged(path, procedure=procedure) == whole

@pytest.mark.parametrize('procedure', ['fixed', 'sequential', 'anytime', 'pilot'])
def test_fifty_kills_at_random_moments(tmp_path, procedure):
    code, said = forked(kill_at_random, tmp_path/'log.tsv', procedure, 50)
    assert code == 0, said
    left = [int(line) for line in said.splitlines()]
    assert len(left) >= 50 and len({*left}) > 3, left                              # in many states


# Memory

class Photos(torch.utils.data.Dataset):
    "Pairs (image, label), made when they are asked for."
    def __init__(self, size): self.size = size
    def __len__(self): return self.size
    def __getitem__(self, i):
        if i >= self.size: raise IndexError(i)
        return torch.full((3, 64, 64), i % 7 / 7), i % 2

def brightness(x):
    mean = x.mean((1, 2, 3))
    return torch.stack([mean, 1 - mean], 1)

class Stops:
    "A model that is stopped at some call, as by Ctrl-C."
    def __init__(self, after): self.after = after
    def __call__(self, x):
        self.after -= 1
        if self.after < 0: raise KeyboardInterrupt
        return brightness(x)

def say_peak(path, size, n, after):
    "Certify images until they are done or stopped; prints the peak of memory in kilobytes."
    torch.set_num_threads(1)
    try: certify_dataset(Stops(after), Photos(size), sigma=.5, n0=1, n=n, log=path, progress=False)
    except KeyboardInterrupt: assert len(read_log(path)) > 20
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

def peak(*args):
    code, said = forked(say_peak, *args)
    assert code == 0, said
    return int(said.splitlines()[-1])

@pytest.mark.filterwarnings('ignore')
def test_memory_does_not_grow(tmp_path):
    "2,000 decoded images would be 98 MB, 5,000 noisy ones 250."
    few = peak(tmp_path/'few', 300, 10, 20)
    assert peak(tmp_path/'many', 2000, 10, 20) < 1.05*few
    assert peak(tmp_path/'long', 1, 5000, 10_000) < 1.05*few


# What suits the machine

class Prefers:
    "A model whose price for an image depends on the batch size and on the precision."
    def __init__(self, size, bfloat16=1.):
        self.size = size
        self.bfloat16 = bfloat16       # its price there, of that in float32
        self.sizes = []

    def __call__(self, x):
        global price
        self.sizes.append(len(x))
        price = (1 + (len(x) != self.size)) * (self.bfloat16 if torch.is_autocast_enabled('cpu') else 1)
        return HALF(x)

@pytest.fixture
def long_runs(monkeypatch):
    "Each run is long enough, and the processor has instructions for bfloat16."
    monkeypatch.setattr(library, 'PAYS', 1)
    monkeypatch.setattr(library, '_computes_in_bfloat16', lambda device: True)

@pytest.fixture
def priced(long_runs, monkeypatch):
    "No clock: this machine may have other work."
    def seconds(run, x):
        run(x)
        return price

    monkeypatch.setattr(library, '_seconds', seconds)

def mostly(model): return max(model.sizes, key=model.sizes.count)

def test_a_short_run_is_not_tried():
    model = Prefers(200)
    certify(model, IMAGES[0], .5, n=1000)
    assert len(model.sizes) < 20 and max(model.sizes) == 100

def test_the_faster_size_is_taken_and_stays(tmp_path, priced):
    "Also by a run that goes on where another size has become faster."
    path = tmp_path/'log.tsv'
    whole = logged(tmp_path/'usual.tsv', batch_size=100)
    model = Prefers(200)
    assert logged(path, model) == whole
    assert mostly(model) == 200
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:3]))
    later = Prefers(50)
    assert logged(path, later) == whole
    assert mostly(later) == 200 and 50 not in later.sizes
    given = Prefers(200)
    logged(tmp_path/'given.tsv', given, batch_size=50)
    assert mostly(given) == 50 and 200 not in given.sizes

def test_what_a_batch_takes_is_measured():
    def slow(x):
        time.sleep(.02)
        return HALF(x)

    assert library._seconds(slow, IMAGES) > .02/len(IMAGES)
    assert library._seconds(lambda x: 1/0, IMAGES) == math.inf

def test_a_model_for_one_size_keeps_it(long_runs):
    def of_100(x):
        if len(x) != 100: raise RuntimeError('exported for batches of 100')
        return HALF(x)

    assert certify(of_100, IMAGES, .5, n=1000) == certify(plain, IMAGES, .5, n=1000, batch_size=100)

def precisions(path): return {*read_log(path).precision}

def cut(path): path.write_text(''.join(path.read_text().splitlines(keepends=True)[:3]))

def test_automatic_precision_is_what_the_log_says(tmp_path, priced):
    path = tmp_path/'log.tsv'
    logged(path, Prefers(100, bfloat16=.5), precision='auto')
    assert precisions(path) == {'bfloat16'}
    cut(path)
    logged(path, Prefers(100, bfloat16=2.), precision='auto')                  # goes on as it was begun
    assert precisions(path) == {'bfloat16'} and len(read_log(path)) == len(IMAGES)

    logged(tmp_path/'slower.tsv', Prefers(100, bfloat16=2.), precision='auto')
    assert precisions(tmp_path/'slower.tsv') == {'float32'}

def test_a_log_in_float32_stays_so(tmp_path, priced):
    path = tmp_path/'log.tsv'
    logged(path, precision='float32')
    cut(path)
    logged(path, Prefers(100, bfloat16=.5), precision='auto')
    assert precisions(path) == {'float32'} and len(read_log(path)) == len(IMAGES)

def test_without_its_instructions_bfloat16_is_not_tried(tmp_path, priced, monkeypatch):
    monkeypatch.setattr(library, '_computes_in_bfloat16', lambda device: False)
    logged(tmp_path/'log.tsv', Prefers(100, bfloat16=.5), precision='auto')
    assert precisions(tmp_path/'log.tsv') == {'float32'}

def test_a_short_run_is_in_float32(tmp_path):
    logged(tmp_path/'log.tsv', Prefers(100, bfloat16=.5), precision='auto')
    assert precisions(tmp_path/'log.tsv') == {'float32'}


# What the bar says

def test_the_bar_has_speed_and_certified_accuracies(tmp_path, capsys):
    certify_dataset(plain, IMAGES, LABELS, sigma=.5, n=1000, log=tmp_path/'log.tsv')
    last = capsys.readouterr().err.split('\r')[-1]
    log = read_log(tmp_path/'log.tsv')
    assert '8/8' in last and 'evaluations/s' in last and 'img/s' in last, last
    for radius in 0, .5, 1:
        share = ((log.correct == 1) & (log.radius >= radius)).mean()
        assert f'{share:.0%}≥{radius:g}' in last, last
