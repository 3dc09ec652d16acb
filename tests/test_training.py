"Training that is shared by processes, or killed, ends where undisturbed training ends."
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainer import METHODS

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {'OMP_NUM_THREADS': '1'}
SHARED = ['easy_data', 'smoothmix', 'catrs', 'sodm']           # draws, buffers, weights and a second network

def trainer(folder, processes, names): return [sys.executable, 'tests/trainer.py', str(folder), str(processes), *names]

def torchrun(processes, *command):
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes), *command[1:]],
                          cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Every method, in one process, from beginning to end."
    folder = tmp_path_factory.mktemp('undisturbed')
    done = subprocess.run(trainer(folder, 1, METHODS), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    "Some methods, in two processes."
    folder = tmp_path_factory.mktemp('shared')
    done = torchrun(2, *trainer(folder, 2, SHARED))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder

@pytest.mark.parametrize('name', SHARED)
def test_two_processes_train_what_one_does(undisturbed, shared, name):
    one, a, b = (torch.load(path/f'{name}.{rank}.pt', weights_only=True) for path, rank in ((undisturbed, 0), (shared, 0), (shared, 1)))
    assert all(torch.equal(a[k], b[k]) for k in a)                                     # both end with the same weights
    for k in one: torch.testing.assert_close(a[k], one[k], rtol=1e-3, atol=3e-5, msg=lambda m: f'{name}, {k}: {m}')     # sums in another order
    losses = [json.loads((path/f'{name}.json').read_text()) for path in (undisturbed, shared)]
    assert losses[0].keys() == losses[1].keys()
    for term in losses[0]: assert losses[1][term] == pytest.approx(losses[0][term], rel=1e-3, abs=1e-6)

def test_too_few_processes_are_refused(tmp_path):
    done = torchrun(1, *trainer(tmp_path, 2, ['stability']))
    assert done.returncode != 0 and '2 processes were asked for, but 1 run' in done.stderr

def test_every_method_survives_being_killed(undisturbed, tmp_path):
    kills = 0
    for name in METHODS:                                                               # SIGKILL while this one trains
        process = subprocess.Popen(trainer(tmp_path, 1, METHODS), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not (tmp_path/f'{name}.state').exists() and process.poll() is None and time.monotonic() < end: time.sleep(.005)
        time.sleep(random.random() * .3)
        kills += process.poll() is None and not (tmp_path/f'{name}.json').exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(trainer(tmp_path, 1, METHODS), cwd=ROOT, env=ENV, check=True)
    assert kills >= len(METHODS) // 2                                                  # most of them hit the training they were meant for
    for name in METHODS:
        whole, killed = (torch.load(path/f'{name}.0.pt', weights_only=True) for path in (undisturbed, tmp_path))
        assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole), name
