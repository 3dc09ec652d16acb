"""Pages without a kernel: opened from a file, moved in a browser, and compared with the explorer itself."""
import gzip
import json
import re
from base64 import b64decode

import numpy as np
import pytest

from explorer import shown
from rs_toolkit.command import explorers
from rs_toolkit.explore.core import moves
from rs_toolkit.explore.page import stops_of
from rs_toolkit.explore.radius import RadiusExplorer

# the curve as it is drawn, and the words
SEEN = '''() => {
    const curves = document.getElementById('plot').calcdata;
    return [curves.find(points => points[0].trace.name === 'radius').map(point => point.y),
            document.getElementById('words').innerText];
}'''

def test_a_slider_moves_without_a_kernel(browser, tmp_path):
    "Every place of two sliders shows what the explorer shows there. Nothing is fetched."
    class Small(RadiusExplorer): travels = dict(sigma=3, n=2)
    explorer = Small()
    before = explorer.values
    explorer.export(tmp_path/'radius.html')
    assert explorer.values == before, 'the page went through its places, and should be back where it was'
    assert (tmp_path/'radius.html').stat().st_size < 4e6

    page = browser.new_page(viewport=dict(width=1100, height=900))
    asked, errors = [], []
    page.on('request', lambda request: asked.append(request.url))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.goto((tmp_path/'radius.html').as_uri())
    page.wait_for_selector('body[data-ready]', timeout=120_000)
    sigma = page.locator('input').nth(0)
    curves = []
    sigma.focus()
    for _ in range(3): sigma.press('ArrowLeft')
    for value in stops_of(explorer.controls['sigma'], 3).values:
        explorer.controls['sigma'].value = value
        curve, words = page.evaluate(SEEN)
        np.testing.assert_allclose(curve, shown(explorer)['radius'].y, err_msg=f'at sigma = {value}')
        assert words.split('.')[0] in explorer.words.value.replace('<b>', '').replace('</b>', '')
        assert sigma.get_attribute('aria-valuetext') == f'{value:.2f}'
        curves.append((max(curve), words))
        sigma.press('ArrowRight')
    assert len(set(curves)) == 3, 'neither the curve nor the words have changed'
    assert errors == []
    assert [url for url in asked if not url.startswith(('file:', 'blob:', 'data:'))] == []

DRAWN = "[...document.querySelectorAll('#plot .overplot :is(path, image)')].map(part => part.outerHTML).join()"

def content_of(path):
    "What a page shows at each place of its sliders, unpacked."
    packed = re.search('id="pictures">([^<]+)', path.read_text())[1]
    return json.loads(gzip.decompress(b64decode(packed)))

def elsewhere(content, slider, stop):
    "The picture with one slider at another stop."
    place = [each['start'] for each in content['sliders']]
    place[slider] = stop
    return content['pictures'][','.join(map(str, place))]

def few_stops(explorer):
    "As its page is, but for two or three stops of each slider."
    first = next(name for name, control in explorer.controls.items() if moves(control))
    explorer.travels = dict.fromkeys(explorer.travels or [first], 2)
    return {name: stops_of(explorer.controls[name], 2) for name in explorer.travels}

@pytest.mark.parametrize('name', explorers())
def test_every_page_is_whole_and_every_slider_moves_its_drawing(browser, tmp_path, name):
    explorer = explorers()[name]()
    stops = few_stops(explorer)
    view = explorer.toggle.value
    path = explorer.export(tmp_path/f'{name}.html')
    content = content_of(path)
    assert explorer.toggle.value == view
    still = [control for key, control in explorer.controls.items() if key not in stops and control.value != ()]
    assert all(f'{control.description}: ' in path.read_text() for control in still)
    seen = {trace['name'] for trace in content['first']['data'] if trace.get('visible', True)}
    assert seen == {trace.name for trace in shown(explorer).values() if trace.visible is not False}, 'not all panels'
    for i, each in enumerate(stops.values()):
        changes = [keys for stop in range(len(each.values)) for keys in elsewhere(content, i, stop)['data'].values()]
        assert any(keys.keys() & set('xyz') for keys in changes), f'{each.name} moves nothing that is drawn'
    key, first = next(iter(stops.items()))
    explorer.go({key: first.values[0]})
    assert elsewhere(content, 0, 0)['legend'] == explorer.key.value

    page = browser.new_page()
    errors = []
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector('body[data-ready]', timeout=120_000)
    assert 'add runs' not in page.inner_text('#fixed')                    # nobody came through that door
    labels = page.locator('#sliders label').all_inner_texts()
    assert all(label.startswith(each.name) for label, each in zip(labels, stops.values(), strict=True))
    for i, each in enumerate(stops.values()):
        before = page.evaluate(DRAWN)
        page.locator('input').nth(i).press('ArrowLeft' if each.start else 'ArrowRight')
        page.wait_for_function(f'before => {DRAWN} !== before', arg=before, timeout=20_000)
    assert errors == []
    page.close()

@pytest.mark.parametrize('name', ['boxes', 'landscape'])
def test_the_largest_pages_have_a_few_megabytes(tmp_path, name):
    assert explorers()[name]().export(tmp_path/'page.html').stat().st_size < 5e6

def test_the_button_says_where_the_page_lies(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    class Small(RadiusExplorer): travels = dict(alpha=2)
    explorer = Small()
    explorer.save()
    written = tmp_path/'export/test_export.html'
    assert written.exists() and f'Written: <b>{written}</b>' in explorer.words.value

def test_names_from_elsewhere_are_text(browser, tmp_path):
    trap = '<img src=x onerror="document.trapped = true">'
    explorer = RadiusExplorer()
    explorer.travels = dict(share=2)
    explorer.controls['share'].description = trap
    explorer.controls['sigma'].description = trap                        # one that does not move
    explorer.export(tmp_path/'trap.html')
    page = browser.new_page()
    page.goto((tmp_path/'trap.html').as_uri())
    page.wait_for_selector('body[data-ready]', timeout=120_000)
    assert trap in page.inner_text('#sliders') and trap in page.inner_text('#fixed')
    assert page.evaluate('document.trapped') is None
    assert page.locator('#sliders img, #fixed img').count() == 0
