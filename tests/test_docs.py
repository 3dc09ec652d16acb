"""The documentation site: it builds, strictly, and whoever breaks a link is told."""
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not os.environ.get('CI') and not all(map(find_spec, ['sphinx', 'myst_nb', 'furo', 'latex2mathml'])):
    pytest.skip("no generator here: pip install -e '.[docs]'", allow_module_level=True)

sys.path.insert(0, str(ROOT/'tools'))
import docs

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run([sys.executable, ROOT/'tools/docs.py', folder], capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder

def page(site, name): return (site/name).read_text(encoding='utf-8')

def test_every_notebook_has_a_page(site):
    books = [path for path in (ROOT/'nbs').rglob('*.ipynb') if path != ROOT/'nbs/index.ipynb']
    books = [path for path in books if not {'.ipynb_checkpoints', 'runs'} & {*path.parts}]
    missing = [path for path in books if not (site/path.relative_to(ROOT).with_suffix('.html')).exists()]
    assert missing == []

def test_the_reference_says_what_help_says(site):
    reference = page(site, 'reference/rs_toolkit.bounds.html')
    for word in ['lower_bound', 'certified_radius', 'chance that the true probability lies below the bound']:
        assert word in reference

def test_formulas_need_no_script(site):
    method = page(site, 'nbs/methods/consistency.html')
    assert '<math' in method
    assert '$$' not in method
    assert not [script for script in re.findall('<script[^>]*>', method) if 'mathjax' in script.lower()]

def test_nothing_speaks_to_nbdev(site):
    for name in ['nbs/00_bounds.html', 'nbs/train.html']:
        assert '#|' not in page(site, name) and 'skip_exec' not in page(site, name)

BROKEN = {  # a page -> what is said of it
    '<a href="gone.html">x</a>': 'page.html: nothing lies at gone.html',
    '<a href="#gone">x</a>': 'page.html: nothing lies at #gone',
    '<img src="gone.png">': 'page.html: nothing lies at gone.png',
    '<script src="https://example.org/x.js"></script>': 'page.html fetches https://example.org/x.js',
    '<a href="https://example.org">x</a><a href="#here" id="here">x</a><a href="page.html#here">x</a>': None,
}

@pytest.mark.parametrize('html', BROKEN)
def test_what_is_broken_is_said(tmp_path, html):
    (tmp_path/'page.html').write_text(html)
    assert [*docs.broken(tmp_path)] == [BROKEN[html]] * (BROKEN[html] is not None)
