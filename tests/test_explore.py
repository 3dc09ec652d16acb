"""Explorers: every notebook by a kernel, one slider of each in a real browser. Every control by hand: test_explore_NAME.py."""
import json, os, statistics
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import lab

ROOT = Path(__file__).resolve().parents[1]
EXPLORERS = sorted((ROOT / 'nbs/explore').glob('[a-z]*.ipynb'))                 # 00_core is what they share
each_explorer = pytest.mark.parametrize('path', EXPLORERS, ids=lambda p: p.stem)


# --- by a kernel ---

@each_explorer
def test_runs_in_a_kernel(path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    nb = nbformat.read(path, 4)
    NotebookClient(nb, kernel_name='python3', store_widget_state=False, timeout=300, resources={'metadata': {'path': str(path.parent)}}).execute()
    assert 'application/vnd.jupyter.widget-view+json' in json.dumps(nb), 'no explorer was shown'

@each_explorer
def test_is_committed_without_outputs_and_opens_with_a_picture(path):
    nb = nbformat.read(path, 4)
    assert 'widgets' not in nb.metadata
    assert not [c.source for c in nb.cells if c.get('outputs')]
    prose = ''.join(c.source for c in nb.cells[:3])
    assert nb.cells[0].source.splitlines()[0].endswith('?') and f'](images/{path.stem}.png)' in prose
    assert (path.parent / f'images/{path.stem}.png').read_bytes().startswith(b'\x89PNG')


# --- in a real browser ---

@pytest.fixture(scope='module')
def browser():
    if not Path(lab.CHROMIUM).exists():
        (pytest.fail if os.environ.get('CI') else pytest.skip)(f'no browser at {lab.CHROMIUM}: apt-get install chromium, or set CHROMIUM')
    with lab.chromium() as browser: yield browser

@pytest.fixture(scope='module')
def server(browser):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT))
        with lab.lab(ROOT) as server: yield server

@each_explorer
def test_lives_in_a_browser(server, browser, path, capsys):
    committed = path.read_bytes()
    with server.notebook(browser, path.relative_to(ROOT)) as page:
        lab.run(page)
        first, last = zip(*[lab.press(page, 0, key) for key in ['ArrowLeft'] * 10 + ['ArrowRight'] * 10])
    with capsys.disabled(): print(f'\n{path.stem}: {statistics.median(first):.0f} ms from key press to the first redraw (median of {len(first)}; slowest {max(first):.0f}), '
                                  f'{statistics.median(last):.0f} to the last')
    assert path.read_bytes() == committed

@pytest.fixture(scope='module')
def pages(browser):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT))
        with lab.voila(ROOT/'nbs/explore') as server: yield server

@each_explorer
def test_is_a_page_of_its_own(pages, browser, path):
    "Under Voilà: no code, and the figure follows its slider."
    with pages.page(browser, f'voila/render/{path.name}') as page:
        lab.loaded(page, 180)
        assert 'explorer.view' not in page.inner_text('body')
        lab.press(page, 0, 'ArrowLeft', 30)

def notebook(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(name='python3', display_name='python3'))), path)

def test_a_page_that_is_loaded_again_shows_what_it_showed(tmp_path_factory, browser, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    root = tmp_path_factory.mktemp('again')
    notebook(root/'again.ipynb', f'import os; os.chdir({str(ROOT)!r})\nfrom rs_toolkit.explore.p_a import PAExplorer\nPAExplorer().view')
    with lab.lab(root) as server, server.notebook(browser, 'again.ipynb') as page:
        lab.run(page)
        lab.press(page, 0, 'ArrowRight')                             # more samples than there are votes: lines that were not there before
        before = page.evaluate(lab.DRAWN)
        lab.reload(page)
        same = page.evaluate(lab.DRAWN) == before
        assert same, 'the figure does not show the lines that it showed before'
        lab.press(page, 0, 'ArrowLeft')

BROKEN = {
    'cell': ('1/0', 'ZeroDivisionError'),
    'callback': ('slider.observe(lambda _: 1/0, "value")', 'ZeroDivisionError'),
    'dead slider': ('', 'no plotted data changed'),
    'complaint': ('slider.observe(lambda _: setattr(words, "value", "<p role=alert>too steep</p>"), "value")', 'too steep'),
}

@pytest.mark.parametrize('fault', BROKEN)
def test_the_browser_test_can_fail(tmp_path_factory, browser, fault):
    source, message = BROKEN[fault]
    root = tmp_path_factory.mktemp('broken')
    shown = ('import ipywidgets as W, plotly.graph_objects as go\nslider, words = W.IntSlider(), W.HTML()\n'
             'view = W.VBox([slider, words, go.FigureWidget(go.Figure(go.Scatter(y=[1, 2])))])')
    notebook(root/'broken.ipynb', shown, source, 'view')
    with lab.lab(root) as server, server.notebook(browser, 'broken.ipynb') as page, pytest.raises(AssertionError, match=message):
        lab.run(page)
        lab.press(page, 0, 'ArrowRight', seconds=3)
