"""What all pages of the laboratory share: their form, their tips, the room that they take."""
import math
import re
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

from rs_toolkit.explore.core import EVERY, HIDDEN

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in (ROOT/'nbs/explore').glob('[a-z]*.ipynb') if path.stem != 'index')
each_page = pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
WINDOW = 679           # pixels that JupyterLab leaves of 800
ROW = 32               # of controls, or of buttons

def opened(name):
    "The explorer of a page."
    module = import_module(f'rs_toolkit.explore.{name}')
    [explorer] = [thing for title, thing in vars(module).items()
                  if title.endswith('Explorer') and thing.__module__ == module.__name__]
    return explorer()

@each_page
def test_a_page_is_short_and_leads_to_its_source(path):
    cells = nbformat.read(path, 4).cells
    code = [cell.source for cell in cells if cell.cell_type == 'code']
    words = [cell.source for cell in cells if cell.cell_type == 'markdown']
    assert len(code) == 2 and all(len(source.splitlines()) == 1 for source in code)
    assert words[0].splitlines()[0].endswith('?') and f'(how/{path.stem}.ipynb)' in words[0]
    assert f'](images/{path.stem}.png "Where no kernel runs")' in words[1]
    assert words[-1].startswith('## Questions') and words[-1].count('<details>') >= 3
    assert not re.search(r'run all|\bcells?\b', ' '.join(words), re.I), 'a page does not talk of code'
    source = nbformat.read(path.parent/f'how/{path.stem}.ipynb', 4).cells
    assert f'#| default_exp explore.{path.stem}' in [cell.source for cell in source]
    assert f'](../{path.stem}.ipynb)' in source[0].source

def test_the_index_leads_to_every_page():
    [cell] = nbformat.read(ROOT/'nbs/explore/index.ipynb', 4).cells
    links = re.findall(r'^\d+\. \*\*\[(.*\?)\]\((\w+)\.ipynb\)', cell.source, re.M)
    assert sorted(name for _, name in links) == [path.stem for path in PAGES]
    titles = {path.stem: nbformat.read(path, 4).cells[0].source.splitlines()[0][2:] for path in PAGES}
    assert {name: question for question, name in links} == titles
    order = re.findall(r'^nbs/explore/(\w+)$', (ROOT/'docs/lecture.md').read_text(), re.M)
    assert order == ['index', *(name for _, name in links)], 'the site is in the same order'

def check_numbers(fig):
    "Of plain lists JSON takes finite ones only; of arrays plotly sends the bytes."
    parts = [fig._data, fig._layout]
    while parts:
        part = parts.pop()
        if isinstance(part, dict): parts += part.values()
        elif isinstance(part, (list, tuple)): parts += part
        elif isinstance(part, float): assert math.isfinite(part), part

def height(e):
    "Pixels of an explorer from its controls to the words of its tips."
    def wide(control): return 'rs-wide' in control._dom_classes
    rows = -(-sum(not wide(control) for control in e.controls.values()) // 3)
    buttons = sum(2 for control in e.controls.values() if wide(control)) + (len(e.view.children) > 7)
    return ROW * (rows + buttons + 2) + int(e.words.layout.height[:-2]) + e.fig.layout.height + 44

@each_page
def test_tips_set_the_controls_that_they_speak_of(path):
    "And controls, words, two panels and tips fit a small window."
    e = opened(path.stem)
    drawn = [trace for trace in e.drawn.values() if trace is not HIDDEN]
    panels = len(e.views[e.toggle.value]) if e.views else len({(t.xaxis, t.yaxis) for t in e.fig.data})
    assert drawn and panels in (2, 3)
    assert height(e) <= WINDOW + ROW
    assert e.legend() and 'rs-mark' in e.key.value
    assert len(e.tips) >= 4
    check_numbers(e.fig)
    for tip, button in zip(e.tips, e.tip_buttons):
        button.click()
        assert e.worker.wait(600), tip.title
        assert 'role="alert"' not in e.words.value, (tip.title, e.words.value)
        for name, value in tip.sets.items():
            now = e.values[name]
            assert now == (pytest.approx(value) if isinstance(value, float) else value), (tip.title, name)
        check_numbers(e.fig)
        assert tip.words in e.hint.value and (tip.view or e.toggle.value) == e.toggle.value
    if e.views:
        e.toggle.value = EVERY
        assert not [name for name, trace in e.drawn.items() if trace is HIDDEN]
