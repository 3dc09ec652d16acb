"""Explorers in a real browser: one slider of each.

Every control by hand: test_explore_NAME.py. Every cell by a kernel: test_project.py.
"""
import statistics
from pathlib import Path

import nbformat
import pytest

import lab

ROOT = Path(__file__).resolve().parents[1]
EXPLORERS = sorted(p for p in (ROOT / 'nbs/explore').glob('[a-z]*.ipynb') if p.stem != 'index')
SMOOTH = ROOT / 'nbs/explore/smooth.ipynb'                                      # its pictures come from the background
each_explorer = pytest.mark.parametrize('path', EXPLORERS, ids=lambda path: path.stem)
each_at_once = pytest.mark.parametrize('path', [p for p in EXPLORERS if p != SMOOTH], ids=lambda path: path.stem)


@each_explorer
def test_is_committed_without_outputs_and_opens_with_a_picture(path):
    nb = nbformat.read(path, 4)
    assert 'widgets' not in nb.metadata
    assert not [cell.source for cell in nb.cells if cell.get('outputs')]
    question = nb.cells[0].source.splitlines()[0]
    assert question.endswith('?')
    assert f'](images/{path.stem}.png' in ''.join(cell.source for cell in nb.cells)
    assert (path.parent / f'images/{path.stem}.png').read_bytes().startswith(b'\x89PNG')


# --- what a test needs: one browser; a server for the notebooks, one for pages, one for what tests write ---

@pytest.fixture(scope='module')
def kernels_import_the_checkout():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT))
        patch.delenv('JUPYTER_PATH', raising=False)               # kernels as people have them
        yield

@pytest.fixture(scope='module')
def server(browser, kernels_import_the_checkout):
    with lab.lab(ROOT) as server: yield server

@pytest.fixture(scope='module')
def pages(browser, kernels_import_the_checkout):
    with lab.voila(ROOT/'nbs/explore') as server: yield server

@pytest.fixture(scope='module')
def written(browser, kernels_import_the_checkout, tmp_path_factory):
    "(JupyterLab over an empty folder, the folder)."
    root = tmp_path_factory.mktemp('written')
    with lab.lab(root) as server: yield server, root

def write_notebook(path, *cells):
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3'))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


# --- in JupyterLab ---

def tell(capsys, *words):
    with capsys.disabled(): print('\n' + ' '.join(words))

def median_of(milliseconds): return f'{statistics.median(milliseconds):.0f} ms'

@each_at_once
def test_lives_in_a_browser(server, browser, path, capsys):
    committed = path.read_bytes()
    with server.notebook(browser, path.relative_to(ROOT)) as page:
        lab.run(page)
        times = [lab.press(page, 0, key) for key in ['ArrowLeft'] * 5 + ['ArrowRight'] * 5]
        lost = page.evaluate(lab.LOST)
        unnamed = page.evaluate(lab.UNNAMED)
        width = page.evaluate(lab.WIDTH)
        page.set_viewport_size(dict(width=900, height=800))
        lab.wait(page, f'() => ({lab.WIDTH})() < {width} - 300', 'the figure kept its width', 20)
    assert lost == [0]
    assert unnamed == [], 'sliders without name, or with another value than they show'
    first = [time for time, _ in times]
    last = [time for _, time in times]
    tell(capsys, f'{path.stem}: {median_of(first)} from key press to the first redraw',
         f'(median of {len(first)}; slowest {max(first):.0f}), {median_of(last)} to the last')
    assert path.read_bytes() == committed

@pytest.mark.parametrize('name, slider', [('acr', 2), ('landscape', 0), ('boxes', 0)])
def test_what_does_not_move_stays_in_a_browser(server, browser, name, slider):
    "One that moves a part of the lines of one panel, and two that change what lies beneath them."
    with server.notebook(browser, f'nbs/explore/{name}.ipynb') as page:
        lab.run(page)
        before = page.evaluate(lab.PICTURES)
        lab.press(page, slider, 'ArrowLeft')
        lost = page.evaluate(lab.LOST)
        wanted, drawn = page.evaluate(lab.PICTURES)
    assert lost == [0] and drawn == wanted
    assert ([wanted, drawn] == before) == (name == 'acr')               # which has none

FIRST = '''() => {
    const plot = document.querySelector('.js-plotly-plot');
    const data = () => JSON.stringify(plot.data.map(t => [t.x, t.y, t.z]));
    const before = data(), watch = window.first = {pressed: null, ms: null};
    document.addEventListener('keydown', () => { watch.pressed = performance.now(); }, {capture: true, once: true});
    plot.removeAllListeners('plotly_afterplot');
    plot.on('plotly_afterplot', () => {
        if (watch.pressed && watch.ms === null && data() !== before) watch.ms = performance.now() - watch.pressed;
    });
}'''

def says(words): return f'() => document.querySelector("[role=status]").innerText.includes("{words}")'

def first_sign(page, key):
    "Milliseconds from a press on the first slider to the first new picture; the run before it is still busy."
    handle = page.locator('[role=slider]').nth(0)
    handle.focus()
    page.evaluate(FIRST)
    handle.press(key)
    lab.wait(page, '() => window.first.ms !== null', f'no sign of life after {key}', 30)
    return page.evaluate('() => window.first.ms')

def test_progress_of_smooth_is_seen_at_once_in_a_browser(server, browser, capsys):
    "A press, the first new picture, the next press; a run that is stopped, and one that ends."
    committed = SMOOTH.read_bytes()
    with server.notebook(browser, SMOOTH.relative_to(ROOT)) as page:
        lab.run(page)
        times = [first_sign(page, key) for key in ['ArrowLeft'] * 4 + ['ArrowRight'] * 8 + ['ArrowLeft'] * 4]
        page.locator('button[title=Stop]').click()
        lab.wait(page, says('no certificate'), 'Stop did nothing', 30)
        page.locator('button[title^="a new run"]').click()
        lab.wait(page, says('Except with chance'), 'no certificate came', 60)
        lab.check(page)
    tell(capsys, f'smooth: {median_of(times)} from key press to the first new picture of a run',
         f'(median of {len(times)}; slowest {max(times):.0f})')
    assert SMOOTH.read_bytes() == committed

def test_the_point_is_dragged_in_a_browser(server, browser):
    with server.notebook(browser, 'nbs/explore/landscape.ipynb') as page:
        lab.run(page)
        grip = page.locator('.shapelayer path').first
        grip.scroll_into_view_if_needed()
        box = grip.bounding_box()
        x = box['x'] + box['width'] / 2
        y = box['y'] + box['height'] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 60, y + 30, steps=5)
        page.mouse.up()
        readouts = "[...document.querySelectorAll('.rs-controls .widget-readout')].slice(-2).map(e => e.textContent)"
        lab.wait(page, f"() => {readouts}.every((value, i) => value !== ['0.28', '0.62'][i])", 'no slider followed', 30)
        right, up = map(float, page.evaluate(f'() => {readouts}'))
        lab.check(page)
    assert right > .28 and up < .62

def test_a_page_that_is_loaded_again_shows_what_it_showed(written, browser):
    server, root = written
    write_notebook(root/'again.ipynb', f'import os; os.chdir({str(ROOT)!r})\n'
                   'from rs_toolkit.explore.p_a import PAExplorer\n'
                   'page = PAExplorer()\npage.toggle.value = "all"\npage.view')
    with server.notebook(browser, 'again.ipynb') as page:
        lab.run(page)
        lab.press(page, 0, 'ArrowRight')                     # more samples than votes: lines that were not there before
        before = page.evaluate(lab.DRAWN)
        lab.reload(page)
        same = page.evaluate(lab.DRAWN) == before
        assert same, 'the figure does not show the lines that it showed before'
        lab.press(page, 0, 'ArrowLeft')

SLOW = '''() => {
    const make = URL.createObjectURL;
    URL.createObjectURL = blob => {
        const until = performance.now() + (blob.size > 1e6 ? 3000 : 0);
        while (performance.now() < until);
        return make.call(URL, blob);
    };
}'''

def test_a_browser_that_takes_seconds_to_load_plotly_shows_a_figure_that_moves(server, browser):
    with server.notebook(browser, 'nbs/explore/radius.ipynb') as page:
        page.evaluate(SLOW)                                  # before the 5 MB of plotly become a module
        lab.run(page)
        assert page.evaluate("document.querySelector('.js-plotly-plot').data.length") > 1
        lab.press(page, 0, 'ArrowLeft')

BROKEN = {  # fault -> the cell that makes it, what the test then says
    'cell': ('1/0', 'ZeroDivisionError'),
    'callback': ('slider.observe(lambda _: 1/0, "value")', 'ZeroDivisionError'),
    'dead slider': ('', 'no plotted data changed'),
    'complaint': ('slider.observe(complain, "value")', 'too steep'),
}
WIDGETS = '''import ipywidgets as W, plotly.graph_objects as go
slider = W.IntSlider()
words = W.HTML()
def complain(_): words.value = "<p role=alert>too steep</p>"
view = W.VBox([slider, words, go.FigureWidget(go.Figure(go.Scatter(y=[1, 2])))])'''

@pytest.mark.parametrize('fault', BROKEN)
def test_the_browser_test_can_fail(written, browser, fault):
    server, root = written
    source, message = BROKEN[fault]
    name = f'{fault.replace(" ", "-")}.ipynb'
    write_notebook(root/name, WIDGETS, source, 'view')
    with server.notebook(browser, name) as page, pytest.raises(AssertionError, match=message):
        lab.run(page)
        lab.press(page, 0, 'ArrowRight', seconds=3)


# --- under Voilà ---

@pytest.mark.parametrize('name', ['acr', 'smooth'])                             # files alone; work in the background
def test_is_a_page_of_its_own(pages, browser, name):
    "No code, and the figure follows its slider."
    with pages.page(browser, f'voila/render/{name}.ipynb') as page:
        lab.loaded(page, 180)
        assert 'explorer.view' not in page.inner_text('body')
        lab.press(page, 0, 'ArrowLeft', 30)
