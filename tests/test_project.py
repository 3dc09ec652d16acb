"""The project as a whole: notebooks and package agree, imports are light, README is what the index says."""
import ast
import inspect
import os
import pydoc
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

from forked import execute, forked

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
    code, said = forked(execute, path)
    assert code == 0, said[-4000:]

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

@each_book
def test_imports_stand_in_cells_of_their_own(path):
    "Documentation tools run the cells that import, and nothing else."
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != 'code' or 'parameters' in cell.metadata.get('tags', []): continue
        source = re.sub(r'^(\s*)[%!].*', r'\1pass', cell.source, flags=re.M)
        assert len({isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body}) < 2, cell.source

@pytest.mark.parametrize('path', [p for p in BOOKS if p.stem not in [*RUNS, 'index']], ids=lambda p: p.stem)
def test_library_notebooks_end_with_words_for_help(path):
    exported = [c.source for c in nbformat.read(path, 4).cells if c.source.startswith('#| export')]
    assert exported[-1] == '#| export\ndocument(__name__)'

# Every argument of what people call says what it is
CALLED = ['train.fit', 'certify.certify', 'certify.certify_dataset', 'certify.predict', 'data.load', 'models.build', 'log.read_log', 'metrics.summary',
          'checkpoint.save', 'checkpoint.load', 'curriculum.EasyData', 'attacks.smoothed_pgd', 'attacks.ddn', 'attacks.sphere_attack',
          'methods.core.Method', 'methods.gaussian.Gaussian', 'methods.stability.Stability', 'methods.macer.MACER', 'methods.consistency.Consistency',
          'methods.smoothmix.SmoothMix', 'methods.catrs.CATRS', 'methods.sodm.SODM', 'methods.crt.CRT']

@pytest.mark.parametrize('name', CALLED)
def test_help_says_what_each_argument_is(name):
    module, name = name.rsplit('.', 1)
    thing = getattr(import_module(f'rs_toolkit.{module}'), name)
    told = re.findall(r'^    ([\w*, ]+): .', thing.__doc__.split('Arguments:')[1], re.M)
    told = {word.strip('*') for names in told for word in names.split(', ')}
    assert set(inspect.signature(thing).parameters) <= told
    assert 'Arguments:' in pydoc.render_doc(thing)

def test_help_names_what_every_method_takes():
    core, *methods = [name for name in CALLED if name.startswith('methods.')]
    for name in methods:
        module, name = name.rsplit('.', 1)
        method = getattr(import_module(f'rs_toolkit.{module}'), name)
        assert {'sigma', 'num_noise', 'seed', 'attack', 'ramp'} <= set(inspect.signature(method).parameters), name
        assert 'kwargs' not in inspect.signature(method).parameters and 'num_noise: noise copies per image' in method.__doc__

    class Own(method):
        def __init__(self, sigma, depth): pass
    assert list(inspect.signature(Own).parameters) == ['sigma', 'depth']

def test_modules_are_found_without_importing_them():
    run(sys.executable, '-c', """
import sys
import rs_toolkit
assert not {'torch', 'numpy', 'plotly'} & set(sys.modules)
assert {'bounds', 'certify', 'train', 'methods', 'explore'} <= set(dir(rs_toolkit)) and 'consistency' in dir(rs_toolkit.methods)
assert '_modidx' not in dir(rs_toolkit)
assert rs_toolkit.bounds.max_radius(.25, 100, .001) > 0 and 'torch' not in sys.modules
assert rs_toolkit.methods.consistency.Consistency(.25, num_noise=2).sigma == .25 and rs_toolkit.explore.core.Explorer
assert callable(rs_toolkit.certify.certify) and rs_toolkit.__version__
try: rs_toolkit.certfy
except AttributeError as e: assert "module 'rs_toolkit' has no attribute 'certfy'" in str(e)
else: raise AssertionError('a misspelt module should not be found')
""")

def test_without_its_source_a_module_still_works(tmp_path):
    "Compiled files alone, as some installations keep them: no words, no harm."
    shutil.copytree(ROOT/'rs_toolkit', tmp_path/'rs_toolkit', ignore=shutil.ignore_patterns('__pycache__'))
    run(sys.executable, '-m', 'compileall', '-q', '-b', tmp_path/'rs_toolkit')
    for source in (tmp_path/'rs_toolkit').rglob('*.py'): source.unlink()
    code = "from rs_toolkit.bounds import lower_bound; assert lower_bound(5, 10, .1) > 0 and 'Arguments' not in lower_bound.__doc__"
    run(sys.executable, '-c', code, cwd=tmp_path, PYTHONPATH=str(tmp_path))

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
