"""Processes of their own that need not import torch again: they fork from a server that has done so."""
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['torch', 'torchvision', 'accelerate', 'pandas', 'scipy.stats', 'plotly.graph_objects',
                               'ipywidgets', 'nbdev.test'])


def forked(function, *args):
    "The exit code of a call in a new process (0: it returned), and all that it said."
    with tempfile.NamedTemporaryFile() as said:
        process = SERVER.Process(target=into, args=(said.name, function, *args))
        process.start()
        process.join()
        return process.exitcode, Path(said.name).read_text()


def into(path, function, *args):
    "Call with both outputs in a file."
    with open(path, 'w') as said:
        for stream in sys.stdout, sys.stderr: os.dup2(said.fileno(), stream.fileno())
    function(*args)


def until(condition, seconds=120):
    "Wait for something to happen; to wait in vain is a failure, not a test without an end."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'not within {seconds} seconds'
        time.sleep(.01)


def execute(notebook):
    "Run the cells of a notebook, as `nbdev_test` does; exit code 1 where one fails."
    from nbdev.test import test_nb
    if not test_nb(notebook)[0]: raise SystemExit(1)
