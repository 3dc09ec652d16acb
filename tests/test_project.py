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

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
BOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
RUNS = ['train', 'train_deterministic', 'certify', 'compare', 'benchmark']
PAGES = [p for p in BOOKS if p.parent.name == 'explore' and not p.stem[0].isdigit()]         # they run in a browser
STORIES = [*RUNS, 'index', 'any_model', 'papers', 'course', 'exercises', 'teacher']
LIBRARY = [p for p in BOOKS if p not in PAGES and p.stem not in STORIES]
HOW = [p for p in BOOKS if p.parent.name == 'how']
PROGRAMS = sorted([ROOT/'setup.py', *(ROOT/'tests').glob('*.py'), *(ROOT/'tools').glob('*.py')])

def named(path): return str(path.relative_to(ROOT).with_suffix(''))

each_book = pytest.mark.parametrize('path', BOOKS, ids=named)
each_library_book = pytest.mark.parametrize('path', LIBRARY, ids=named)

def run(*command, cwd=ROOT, **env):
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)} | env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout

def code_cells(path): return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == 'code']

def is_parameters(cell): return 'parameters' in cell.metadata.get('tags', [])

# --- notebooks ---

@pytest.mark.parametrize('path', [*LIBRARY, ROOT/'nbs/deterministic/teacher.ipynb'], ids=named)
def test_notebook_runs(path):
    code, said = forked(execute, path)
    assert code == 0, said[-4000:]

def test_package_and_notebooks_are_in_sync_and_clean(tmp_path):
    copy = tmp_path/'copy'
    left_out = shutil.ignore_patterns('.git', '.venv', 'data', 'runs', 'build', '*.egg-info', '__pycache__',
                                      '.ipynb_checkpoints')
    shutil.copytree(ROOT, copy, ignore=left_out)
    run(BIN/'nbdev_export', cwd=copy, PYTHONPATH=str(copy))
    run(BIN/'nbdev_clean', cwd=copy, PYTHONPATH=str(copy))
    files = [path.relative_to(copy) for place in ('rs_toolkit/**/*.py', 'nbs/**/*.ipynb') for path in copy.glob(place)]
    stale = [str(path) for path in sorted(files) if (copy/path).read_bytes() != (ROOT/path).read_bytes()]
    assert files
    assert stale == [], 'run nbdev_export && nbdev_clean'

@each_book
def test_notebook_form(path):
    nb = nbformat.read(path, 4)
    assert nb.metadata.kernelspec.name == 'python3'
    assert 'widgets' not in nb.metadata
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    if path.stem in RUNS or path in PAGES or path in HOW:
        assert outputs == [], 'run notebooks and pages of the laboratory are committed without outputs'
    assert [output for output in outputs if output.output_type == 'error'] == []

@each_book
def test_run_notebooks_have_one_cell_of_parameters(path):
    tagged = [cell.source for cell in code_cells(path) if is_parameters(cell)]
    assert len(tagged) == (1 if path.stem in RUNS else 0)

@each_book
def test_imports_stand_in_cells_of_their_own(path):
    "Documentation tools run the cells that import, and nothing else."
    for cell in code_cells(path):
        if is_parameters(cell): continue
        source = re.sub(r'^(\s*)[%!].*', r'\1pass', cell.source, flags=re.M)
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body}
        assert len(kinds) < 2, cell.source

@each_library_book
def test_library_notebooks_end_with_words_for_help(path):
    exported = [cell.source for cell in code_cells(path) if cell.source.startswith('#| export')]
    assert exported[-1] == '#| export\ndocument(__name__)'

# --- house rules ---

def test_ruff_finds_nothing():
    run(BIN/'ruff', 'check', '--no-cache', '--output-format', 'concise', '.')

@pytest.mark.parametrize('path', [*BOOKS, *PROGRAMS], ids=named)
def test_code_has_at_most_120_columns(path):
    if path.suffix == '.ipynb': source = '\n'.join(cell.source for cell in code_cells(path))
    else: source = path.read_text(encoding='utf-8')
    assert [line for line in source.split('\n') if len(line) > 120] == []

@pytest.mark.parametrize('name', ['CONTRIBUTING.md', 'CHANGELOG.md'])
def test_readme_leads_to_the_house_rules(name):
    assert (ROOT/name).exists()
    assert f'({name})' in (ROOT/'README.md').read_text(encoding='utf-8')

def test_contributing_places_every_library_notebook():
    "By name, by its folder, or between the ends of a range such as `13_gradients` to `16_acr`."
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    ranges = [(int(first), int(last)) for first, last in re.findall(r'`(\d\d)_\w+` to `(\d\d)_\w+`', text)]
    for path in LIBRARY:
        if path.parent != ROOT/'nbs':
            assert f'`{path.parent.name}/`' in text, path.parent.name
            continue
        number = int(path.stem[:2])
        in_range = any(first <= number <= last for first, last in ranges)
        assert in_range or f'`{path.stem}`' in text, path.stem

# --- help ---

# Every argument of what people call says what it is
CALLED = ['train.fit', 'certify.certify', 'certify.certify_dataset', 'certify.predict', 'data.load', 'models.build',
          'log.read_log', 'metrics.summary', 'checkpoint.save', 'checkpoint.load', 'curriculum.EasyData',
          'attacks.smoothed_pgd', 'attacks.ddn', 'attacks.sphere_attack',
          'methods.core.Method', 'methods.gaussian.Gaussian', 'methods.stability.Stability', 'methods.macer.MACER',
          'methods.consistency.Consistency', 'methods.smoothmix.SmoothMix', 'methods.catrs.CATRS',
          'methods.sodm.SODM', 'methods.crt.CRT',
          'deterministic.verify.verify_dataset', 'deterministic.verify.largest_eps',
          *(f'deterministic.training.{name}' for name in (
              'Adversarial', 'NFGSM', 'IBP', 'CCIBP', 'MTLIBP', 'ExpIBP', 'SABR', 'CROWNIBP', 'CCDist', 'ADCert'))]

METHODS = [name for name in CALLED if name.startswith('methods.') and name != 'methods.core.Method']

def called(name):
    "What a name of `CALLED` means."
    module, name = name.rsplit('.', 1)
    return getattr(import_module(f'rs_toolkit.{module}'), name)

@pytest.mark.parametrize('name', CALLED)
def test_help_says_what_each_argument_is(name):
    thing = called(name)
    lines = re.findall(r'^    ([\w*, ]+): .', thing.__doc__.split('Arguments:')[1], re.M)
    told = {word.strip('*') for names in lines for word in names.split(', ')}
    assert set(inspect.signature(thing).parameters) - told == set()
    assert 'Arguments:' in pydoc.render_doc(thing)

@pytest.mark.parametrize('name', METHODS)
def test_help_names_what_every_method_takes(name):
    method = called(name)
    parameters = set(inspect.signature(method).parameters)
    assert {'sigma', 'num_noise', 'seed', 'attack', 'ramp'} - parameters == set()
    assert 'kwargs' not in parameters
    assert 'num_noise: noise copies per image' in method.__doc__

def test_a_method_without_kwargs_takes_what_it_says():
    class Own(called('methods.crt.CRT')):
        def __init__(self, sigma, depth): pass
    assert list(inspect.signature(Own).parameters) == ['sigma', 'depth']

# --- imports ---

def test_modules_are_found_without_importing_them():
    run(sys.executable, '-c', """
import sys
import rs_toolkit
heavy = {'torch', 'numpy', 'plotly'} & set(sys.modules)
assert heavy == set(), heavy
missing = {'bounds', 'certify', 'train', 'methods', 'explore'} - set(dir(rs_toolkit))
assert missing == set(), missing
assert 'consistency' in dir(rs_toolkit.methods)
assert '_modidx' not in dir(rs_toolkit)
assert rs_toolkit.bounds.max_radius(.25, 100, .001) > 0
assert 'torch' not in sys.modules
assert rs_toolkit.methods.consistency.Consistency(.25, num_noise=2).sigma == .25
assert rs_toolkit.explore.core.Explorer
assert callable(rs_toolkit.certify.certify)
assert rs_toolkit.__version__
try: rs_toolkit.certfy
except AttributeError as e: assert "module 'rs_toolkit' has no attribute 'certfy'" in str(e)
else: raise AssertionError('a misspelt module should not be found')
""")

def test_without_its_source_a_module_still_works(tmp_path):
    "Compiled files alone, as some installations keep them: no words, no harm."
    shutil.copytree(ROOT/'rs_toolkit', tmp_path/'rs_toolkit', ignore=shutil.ignore_patterns('__pycache__'))
    run(sys.executable, '-m', 'compileall', '-q', '-b', tmp_path/'rs_toolkit')
    for source in (tmp_path/'rs_toolkit').rglob('*.py'): source.unlink()
    run(sys.executable, '-c', """
from rs_toolkit.bounds import lower_bound
assert lower_bound(5, 10, .1) > 0
assert 'Arguments' not in lower_bound.__doc__
""", cwd=tmp_path, PYTHONPATH=str(tmp_path))

@pytest.mark.parametrize('modules, banned', [
    (['common'], ['torch', 'numpy', 'plotly']),
    (['catalogue', 'command'], ['torch', 'plotly', 'ipywidgets']),
    (['bounds', 'sequential', 'log', 'metrics', 'paired'], ['torch', 'scipy.stats']),
    (['certify', 'train', 'checkpoint'], ['plotly', 'ipywidgets']),
    (['explore.radius', 'explore.sequential', 'explore.p_a', 'explore.acr', 'explore.methods'], ['torch'])])
def test_imports_stay_light(modules, banned):
    names = ', '.join(f'rs_toolkit.{module}' for module in modules)
    loaded = run(sys.executable, '-c', f"import sys, {names}; print(*sys.modules)").split()
    assert set(banned) & set(loaded) == set()

# --- README ---

def words(readme):
    "All but outputs: their last digits are the processor's."
    return [line for line in readme.read_text(encoding='utf-8').splitlines() if not line.startswith('    ')]

def test_readme_is_the_index(tmp_path):
    if shutil.which('chromium') is None and not os.environ.get('CI'):
        pytest.skip('figures become pictures in a Chromium, and there is none')
    run(sys.executable, ROOT/'tools/readme.py', tmp_path)
    assert words(tmp_path/'README.md') == words(ROOT/'README.md'), 'run python tools/readme.py'
    made = {picture.name for picture in (tmp_path/'nbs/images').glob('*.png')}
    assert made - {picture.name for picture in (ROOT/'nbs/images').glob('*.png')} == set()
