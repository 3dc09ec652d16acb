"""One thread per process: pytest runs two, and so do the processes that tests start.

And Ctrl-C means something, whoever started pytest.
"""
import os
import signal

os.environ['OMP_NUM_THREADS'] = '1'

# a shell's background job hands ignored signals on to what tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
