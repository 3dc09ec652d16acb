"""Kernels that need not import torch again: each is a fork of one process that has done so.

    kernels.py serve ADDRESS                    the process that forks
    kernels.py ADDRESS -f CONNECTION_FILE       the program that Jupyter starts as a kernel

The program hands its arguments, folder, environment and streams over, and stands for its kernel from then on: it passes
signals on, ends as the kernel ends, and takes it along when it is killed.
"""
import gc
import json
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory

# without ipywidgets, which makes itself known to the kernel that imports it
IMPORTED = ['torch', 'torch._dynamo', 'torchvision', 'accelerate', 'pandas', 'scipy.stats', 'sklearn.datasets',
            'plotly.graph_objects', 'plotly.io', 'ipykernel.kernelapp']

# --- the program that Jupyter starts: it imports next to nothing ---

def stand_in(address, *argv):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b'.'], [0, 1, 2])
        asked = json.dumps(dict(argv=argv, folder=os.getcwd(), env=dict(os.environ)))
        connection.sendall(asked.encode() + b'\n')
        answers = connection.makefile()
        kernel = int(answers.readline())
        def pass_on(number, _): os.kill(kernel, number)
        for number in signal.SIGINT, signal.SIGTERM: signal.signal(number, pass_on)
        status = int(answers.readline())
    if status < 0:                                                        # ended by a signal: so are we
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)

# --- the process that forks ---

def serve(address):
    "Fork a kernel for everyone who asks, until killed; a fork returns from here as a kernel."
    kernels = {}
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        del sys.path[0]                                                   # the folder of this file
        for name in IMPORTED: import_module(name)
        gc.freeze()                                                       # so no kernel looks at them when it ends
        door.settimeout(.02)
        while True:
            report(kernels)
            try: connection, _ = door.accept()
            except TimeoutError: continue
            connection.setblocking(True)
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            asked = json.loads(connection.makefile().readline())
            pid = os.fork()
            if pid == 0: break
            for stream in streams: os.close(stream)
            connection.sendall(f'{pid}\n'.encode())
            kernels[pid] = connection
    become(connection, streams, **asked)

def report(kernels):
    "Tell those whose kernel has ended how it did."
    while kernels:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0: return
        with kernels.pop(pid) as connection:
            try: connection.sendall(f'{os.waitstatus_to_exitcode(status)}\n'.encode())
            except BrokenPipeError: pass                                  # killed, and its kernel with it

def become(connection, streams, argv, folder, env):
    "A kernel, in place of the program at the other end of the connection."
    os.setsid()
    for number, stream in enumerate(streams): os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get('PYTHONPATH', '').split(os.pathsep) if path]
    threading.Thread(target=end_with, args=(connection,), daemon=True).start()
    sys.argv[1:] = argv
    from ipykernel.kernelapp import launch_new_instance
    launch_new_instance(parent_handle=os.getppid())                       # the server: without it, no kernel

def end_with(connection):
    while connection.recv(1): pass
    os.kill(os.getpid(), signal.SIGKILL)

# --- for the tests ---

@contextmanager
def forked_kernels():
    "A folder for JUPYTER_PATH in which `python3` is a kernel of this kind."
    with TemporaryDirectory(prefix='kernels_') as folder:
        address = f'{folder}/door'
        env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        server = Popen([sys.executable, __file__, 'serve', address], env=env, start_new_session=True)
        spec = Path(folder)/'kernels/python3/kernel.json'
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps(dict(argv=[sys.executable, '-I', '-S', __file__, address, '-f', '{connection_file}'],
                                        display_name='Python 3 (ipykernel)', language='python')))
        try: yield folder
        finally:
            server.kill()
            server.wait()

if __name__ == '__main__':
    if sys.argv[1] == 'serve': serve(sys.argv[2])
    else: stand_in(*sys.argv[1:])
