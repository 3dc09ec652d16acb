"""One thread per process: pytest runs two, and so do the processes that tests start.

Ctrl-C means something, whoever started pytest, and a notebook's kernel does not import torch for the hundredth time.
"""
import os
import signal

import pytest

from kernels import forked_kernels

os.environ['OMP_NUM_THREADS'] = '1'

# a shell's background job hands ignored signals on to what tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture(scope='session', autouse=True)
def kernels():
    "What reads the environment from now on forks its kernels; kernels of the usual kind are those of `test_runs.start`."
    with forked_kernels() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv('JUPYTER_PATH', folder, prepend=os.pathsep)
        yield
