"""Installed from a wheel, without the checkout: data is found, and `rs-toolkit` works from any folder."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from forked import until

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ['data/README.md', 'data/digits-gaussian/model.safetensors', 'data/published/sodm_table1.csv',
           'recipes/digits/crt_0.5.yaml', 'nbs/train.ipynb', 'nbs/certify.ipynb', 'nbs/compare.ipynb',
           'nbs/benchmark.ipynb', 'nbs/05_certify.ipynb', 'nbs/explore/radius.ipynb',
           'nbs/explore/how/radius.ipynb', 'nbs/explore/images/radius.png']

def run(*command, cwd, **env):
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env or None, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project: building leaves files behind."
    left_out = shutil.ignore_patterns('.git', '.venv', 'build', 'runs', 'cache', '*.egg-info', '__pycache__')
    return shutil.copytree(ROOT, tmp_path_factory.mktemp('checkout')/'project', ignore=left_out)

@pytest.fixture(scope='module')
def wheel(copy, tmp_path_factory):
    "Built from the source distribution, so that both are complete."
    folder = tmp_path_factory.mktemp('wheel')
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, '-c', build, folder, cwd=copy)
    [source] = folder.glob('*.tar.gz')
    run(sys.executable, '-m', 'pip', 'wheel', source, '--no-deps', '--no-build-isolation', '-w', folder, cwd=folder)
    [built] = folder.glob('*.whl')
    return built

@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    "The wheel alone, in a folder of its own; what it needs comes from the environment of the tests."
    folder = tmp_path_factory.mktemp('site')
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--target', folder, wheel, cwd=folder)
    return folder

@pytest.fixture
def env(site): return os.environ | {'PYTHONPATH': str(site), 'JUPYTER_RUNTIME_DIR': str(site/'runtime')}

def test_the_wheel_carries_data_recipes_and_notebooks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in SHIPPED: assert f'rs_toolkit/shipped/{name}' in names, name
    assert [name for name in names if name.endswith('/licenses/LICENSE')], 'the license travels'
    hidden = [name for name in names if '/.' in name or name.endswith('.lock') or '/cache/' in name]
    assert hidden == []

def test_the_source_distribution_is_the_project(wheel):
    [source] = wheel.parent.glob('*.tar.gz')
    names = {name.partition('/')[2] for name in tarfile.open(source).getnames()}
    wanted = {*SHIPPED, 'LICENSE', 'README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'settings.ini', 'tools/readme.py',
              'tests/test_installed.py'}
    assert wanted - names == set()

def test_an_installed_package_finds_what_it_came_with(site, env, tmp_path):
    code = """
from rs_toolkit.common import data_folder, locate, package_folder
for path in package_folder(), data_folder(), locate('recipes/README.md'): print(path)
"""
    home = site/'rs_toolkit/shipped'
    told = run(sys.executable, '-c', code, cwd=tmp_path, **env).splitlines()
    assert told == [str(home), str(home/'data'), str(home/'recipes/README.md')]

def test_compare_runs_from_anywhere(site, env, tmp_path):
    told = run(site/'bin/rs-toolkit', 'compare', cwd=tmp_path, **env)
    folder = tmp_path/'runs/comparison'
    assert f'fills {folder}' in told
    assert {'compare.ipynb', 'table.csv', 'table.md'} <= {path.name for path in folder.iterdir()}

def test_train_runs_from_anywhere_with_a_recipe(site, env, tmp_path):
    values = '{arch: mlp, epochs: 1, n: 100, every: 60}'
    options = ['-f', 'recipes/digits/gaussian_0.5.yaml', '-y', values, '-p', 'out', 'mine']
    told = run(site/'bin/rs-toolkit', 'train', *options, cwd=tmp_path, **env)
    assert 'done, in mine' in told
    record = json.loads((tmp_path/'mine/metrics.json').read_text())
    assert (record['sigma'], record['arch'], record['images']) == (.5, 'mlp', 6)
    assert (tmp_path/'mine/train.ipynb').exists()

@pytest.mark.parametrize('words, status, says', [
    (['certify', '-p', 'chekpoint', 'x'], 2, "unknown parameter 'chekpoint': did you mean 'checkpoint'?"),
    (['train', '-f', 'nowhere.yaml'], 2, 'no recipe at nowhere.yaml'),
    (['compare', '-p', 'runs', '[nowhere]'], 1, 'nowhere')])
def test_a_mistake_is_one_line(site, env, tmp_path, words, status, says):
    done = subprocess.run([site/'bin/rs-toolkit', *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert 'Traceback' not in done.stderr

def test_ctrl_c_says_how_to_go_on(site, env, tmp_path):
    command = [site/'bin/rs-toolkit', 'train', '-p', 'epochs', '1000', '-p', 'arch', 'mlp', '-p', 'out', 'long']
    env = {name: value for name, value in env.items() if name != 'JUPYTER_PATH'}          # a kernel as everybody has it
    with open(tmp_path/'words', 'w') as words:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=words, stderr=words, start_new_session=True)
        try: until(lambda: (tmp_path/'long/resume/state.pt').exists() or process.poll() is not None)
        finally: os.killpg(process.pid, signal.SIGINT)                 # as a terminal does: the kernel gets it, too
        status = process.wait(timeout=60)
    told = (tmp_path/'words').read_text()
    assert status != 0
    assert 'the same command goes on from there' in told.split('stopped by Ctrl-C')[-1], told[-2000:]

def test_lab_fills_a_folder_and_opens_jupyterlab_there(site, env, tmp_path):
    command = [site/'bin/rs-toolkit', 'lab', 'mine', '--no-browser', '--allow-root', '--ServerApp.port=0']
    with open(tmp_path/'words', 'w') as words:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=words, stderr=words)
        address = re.compile(r'http://\S+/lab/tree/nbs/index.ipynb\?token')
        try: until(lambda: address.search((tmp_path/'words').read_text()) or process.poll() is not None, 60)
        finally:
            process.terminate()
            process.wait(timeout=30)
    told = (tmp_path/'words').read_text()
    assert address.search(told), told[-2000:]
    assert 'files new' in told
    assert f'Serving notebooks from local directory: {tmp_path}/mine' in told
    code = 'from rs_toolkit.common import project_folder; print(project_folder())'
    assert run(sys.executable, '-c', code, cwd=tmp_path/'mine/nbs/explore', **env).strip() == str(tmp_path/'mine')
