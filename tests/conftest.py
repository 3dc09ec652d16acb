"""One thread per process: pytest runs two, and so do the processes that tests start.

Ctrl-C means something, whoever started pytest, and a notebook's kernel does not import torch for the hundredth time.
"""
import os
import signal
from pathlib import Path

import pytest

from kernels import forked_kernels

os.environ['OMP_NUM_THREADS'] = '1'

# a shell's background job hands ignored signals on to what tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture(scope='session', autouse=True)
def kernels():
    "Whoever reads the environment from now on forks its kernels; `test_runs.start` has kernels of the usual kind."
    with forked_kernels() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv('JUPYTER_PATH', folder, prepend=os.pathsep)
        yield

@pytest.fixture
def digits_first(monkeypatch):
    "Pages open on digits, also on a machine where CIFAR-10 is at hand."
    for page in 'smooth', 'attack', 'sphere':
        monkeypatch.setattr(f'rs_toolkit.explore.{page}.is_real', lambda folder: False)

@pytest.fixture(scope='module')
def browser():
    "A Chromium, or a reason to go without."
    import lab                                  # playwright: few tests need it
    if not Path(lab.CHROMIUM).exists():
        give_up = pytest.fail if os.environ.get('CI') else pytest.skip
        give_up(f'no browser at {lab.CHROMIUM}: apt-get install chromium, or set CHROMIUM')
    with lab.chromium() as browser: yield browser
