"""The project as a whole: notebooks and package agree, imports are light, README is what the index says."""
import os, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pytest

ROOT, BIN = Path(__file__).resolve().parents[1], Path(sys.executable).parent
BOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
RUNS = ['train', 'certify', 'compare', 'benchmark']
each_book = pytest.mark.parametrize('path', BOOKS, ids=lambda p: p.stem)

def run(*command, cwd=ROOT, **env):
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)} | env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout

@pytest.mark.parametrize('path', [p for p in BOOKS if p.stem not in [*RUNS, 'index']], ids=lambda p: p.stem)
def test_notebook_runs(path):
    run(BIN/'nbdev_test', '--path', path, '--n_workers', 0)

def test_package_and_notebooks_are_in_sync_and_clean(tmp_path):
    copy = tmp_path/'copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', 'data', 'runs', '*.egg-info', '.venv', '__pycache__', '.ipynb_checkpoints'))
    for tool in 'nbdev_export', 'nbdev_clean': run(BIN/tool, cwd=copy, PYTHONPATH=str(copy))
    files = {p.relative_to(copy) for g in ('rs_toolkit/**/*.py', 'nbs/**/*.ipynb') for p in copy.glob(g)}
    stale = [str(p) for p in sorted(files) if (copy/p).read_bytes() != (ROOT/p).read_bytes()]
    assert files and not stale, f'run nbdev_export && nbdev_clean: {stale}'

@each_book
def test_notebook_form(path):
    nb = nbformat.read(path, 4)
    assert nb.metadata.kernelspec.name == 'python3' and 'widgets' not in nb.metadata
    tagged = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == (path.stem in RUNS), 'run notebooks have one cell tagged parameters'
    if path.stem in RUNS or path.parent.name == 'explore':
        assert not any(c.get('outputs') for c in nb.cells), 'run notebooks and explorers are committed without outputs'
    assert not any(o.output_type == 'error' for c in nb.cells for o in c.get('outputs', []))

@pytest.mark.parametrize('module, banned', [('bounds', 'torch'), ('log', 'torch'), ('metrics', 'torch'), ('certify', 'plotly'), ('certify', 'ipywidgets'),
                                            ('train', 'plotly'), ('train', 'ipywidgets'), ('checkpoint', 'plotly'), *((f'explore.{name}', 'torch') for name in ('radius', 'p_a', 'acr', 'methods'))])
def test_imports_stay_light(module, banned):
    run(sys.executable, '-c', f"import sys, rs_toolkit.{module}; assert '{banned}' not in sys.modules")

def test_readme_is_the_index(tmp_path):
    if shutil.which('chromium') is None and not os.environ.get('CI'): pytest.skip('figures become pictures in a Chromium, and there is none')
    run(sys.executable, ROOT/'tools/readme.py', tmp_path)
    words = lambda path: [line for line in path.read_text().splitlines() if not line.startswith('    ')]     # all but outputs: their last digits are the processor's
    assert words(tmp_path/'README.md') == words(ROOT/'README.md'), 'run python tools/readme.py'
    for picture in (tmp_path/'nbs/images').glob('*.png'): assert (ROOT/'nbs/images'/picture.name).exists()
