"""JupyterLab in a real browser: open a notebook, run it, press keys, see what moves.

    with lab(ROOT) as server, chromium() as browser, server.notebook(browser, 'nbs/explore/radius.ipynb') as page:
        run(page)
        first, last = press(page, slider=0, key='ArrowLeft')

Every failure is an `AssertionError` that names what the page or the kernel said: a raising cell, a widget that does
not load, an exception in a callback (JupyterLab hides those in a log), a dialog that waits for an answer, a figure that
does not follow its slider.
"""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from playwright.sync_api import TimeoutError as Late, sync_playwright

CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium') or '/usr/bin/chromium'
SETTINGS = {'docmanager-extension/plugin': {'autosave': False},              # a test leaves the notebook as it was
            'notebook-extension/tracker': {'windowingMode': 'none'},         # outputs out of view are in the page, too
            'apputils-extension/notification': {'checkForUpdates': False, 'fetchNews': 'false',
                                                'doNotDisturbMode': True}}

READY = '''() => {
    const dialog = document.querySelector('.jp-Dialog');
    if (dialog) return dialog.innerText;
    const panel = window.jupyterapp?.shell.currentWidget, session = panel?.sessionContext;
    return panel?.context?.isReady && session.isReady && session.session && 'ready';
}'''

# `said` collects every error that the kernel reports, from cells and from callbacks; `done` comes when it is idle again
RUN = '''() => {
    const app = window.jupyterapp, kernel = app.shell.currentWidget.sessionContext.session.kernel;
    window.said = []; window.done = false;
    kernel.iopubMessage.connect((_, {header, content}) => {
        if (header.msg_type === 'error') window.said.push(`${content.ename}: ${content.evalue}`);
        if (header.msg_type === 'stream' && content.text.includes('Traceback')) window.said.push(content.text);
    });
    app.commands.execute('notebook:run-all-cells')
        .then(() => kernel.requestKernelInfo())
        .then(() => { window.done = true; });
}'''

# what is wrong with the page, in words; an explorer marks its own complaints with role="alert"
COMPLAINTS = '''() => {
    const outputs = [...document.querySelectorAll('.jp-OutputArea-output')];
    const errors = document.querySelectorAll('.jupyter-widgets-error-widget.icon-error');
    errors.forEach(icon => icon.click());                                              // unfolds its message
    const unloaded = /Error (displaying|creating) widget|Failed to load|Could not create|model not found/i;
    const broken = outputs.map(o => o.innerText).filter(t => unloaded.test(t));
    const alerting = '[role=alert], .jupyter-widgets-error-widget';
    const alerts = outputs.flatMap(o => [...o.querySelectorAll(alerting)]).map(e => e.innerText);
    return [...(window.said || []), ...broken, ...alerts];
}'''

LOADED = '''() => {
    const plots = [...document.querySelectorAll('.js-plotly-plot')];
    const outputs = [...document.querySelectorAll('.jp-OutputArea-output')];
    const loading = outputs.some(o => /Loading widget/i.test(o.innerText));
    return !loading && plots.length && plots.every(p => p.querySelector('.main-svg'));
}'''

DRAWN = '''() => {
    const plots = [...document.querySelectorAll('.js-plotly-plot')];
    return JSON.stringify(plots.map(p => p.data.map(t => [t.name, t.x, t.y, t.z])));
}'''

# how many of the lines that are in sight each figure has lost
LOST = '''() => [...document.querySelectorAll('.js-plotly-plot')].map(p =>
    p._fullData.filter(t => t.type === 'scatter' && t.visible === true).length
        - p.querySelectorAll('.scatterlayer > .trace').length)'''

# the pictures beneath the lines of the figure: those of its layout, and those that are drawn
PICTURES = '''() => {
    const plot = document.querySelector('.js-plotly-plot');
    const wanted = (plot.layout.images || []).filter(i => i.visible !== false).map(i => i.source).sort();
    return [wanted, [...plot.querySelectorAll('.imagelayer image')].map(i => i.getAttribute('href')).sort()];
}'''

# sliders that a screen reader would not name, or read as something else than they show
UNNAMED = '''() => [...document.querySelectorAll('.rs-controls .jupyter-widgets')]
    .filter(box => box.querySelector('[role=slider]')).filter(box => {
        const handle = box.querySelector('[role=slider]');
        const value = box.querySelector('.widget-readout').textContent.trim();
        return !handle.getAttribute('aria-label') || handle.getAttribute('aria-valuetext') !== value;
    }).map(box => box.innerText)'''
WIDTH = "() => document.querySelector('.js-plotly-plot .main-svg').getBoundingClientRect().width"

# clocks the first and the last redraw after a key press, and tells whether the plotted data differ from those before it
WATCH = '''() => {
    const plots = [...document.querySelectorAll('.js-plotly-plot')], data = ''' + DRAWN + ''';
    const watch = window.watch = {before: data(), pressed: null, first: null, drawn: null};
    watch.settled = () => watch.drawn && performance.now() - watch.drawn > 150 && data() !== watch.before;
    document.addEventListener('keydown', () => { watch.pressed = performance.now(); }, {capture: true, once: true});
    plots.forEach(p => {
        for (const drawn of ['plotly_afterplot', 'plotly_transitioned']) {
            p.removeAllListeners(drawn);
            p.on(drawn, () => {
                watch.drawn = performance.now();
                watch.first ??= watch.pressed && watch.drawn;
            });
        }
    });
}'''


@dataclass
class Server:
    url: str
    token: str

    @contextmanager
    def notebook(self, browser, path):
        "A page with the notebook open and its kernel ready."
        with self.page(browser, f'doc/tree/{path}') as page:
            state = page.wait_for_function(READY, timeout=90_000).json_value()
            assert state == 'ready', f'JupyterLab asks: {state}'
            yield page

    @contextmanager
    def page(self, browser, address, width=1280, height=1000):
        "Any page of the server."
        page = browser.new_page(viewport=dict(width=width, height=height))
        try:
            url = f'{self.url}/{address}?token={self.token}'
            page.goto(url, wait_until='commit', timeout=120_000)           # Voilà also asks for addresses outside
            yield page
        finally: page.close()


@contextmanager
def lab(root):
    "JupyterLab over `root`."
    with tempfile.TemporaryDirectory(prefix='lab_') as home:
        home = Path(home)
        for name, values in SETTINGS.items():
            file = home / 'settings/@jupyterlab' / f'{name}.jupyterlab-settings'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        server_app = dict(ip='127.0.0.1', port_retries=0, root_dir=root, allow_root=True)
        lab_app = dict(user_settings_dir=home/'settings', workspaces_dir=home/'workspaces',
                       extension_manager='readonly', news_url='None',
                       check_for_updates_class='jupyterlab.NeverCheckForUpdate')
        flags = [f'--ServerApp.{name}={value}' for name, value in server_app.items()]
        flags += [f'--LabApp.{name}={value}' for name, value in lab_app.items()]
        with serve(home, 'api', 'jupyterlab', '--no-browser', '--expose-app-in-browser', *flags) as server: yield server

@contextmanager
def voila(folder):
    "Voilà over a folder of notebooks; each is run when its page is asked for."
    flags = ['--no-browser', '--Voila.ip=127.0.0.1', '--show_tracebacks=True']
    with tempfile.TemporaryDirectory(prefix='voila_') as home:
        with serve(Path(home), 'voila/static/none', 'voila', folder, *flags) as server: yield server

@contextmanager
def serve(home, probe, *command, timeout=90):
    "A server on a free port of this machine, behind a random token, up once `probe` answers; gone when the block ends."
    port = free_port()
    server = Server(f'http://127.0.0.1:{port}', secrets.token_hex(24))
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTEST_CURRENT_TEST')}    # no kernel under test
    env |= dict(JUPYTER_TOKEN=server.token, JUPYTER_CONFIG_DIR=str(home/'config'),
                JUPYTER_RUNTIME_DIR=str(home/'runtime'), IPYTHONDIR=str(home/'ipython'))
    command = [sys.executable, '-m', *map(str, command), f'--port={port}']
    with open(home/'log', 'w+') as log:
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        process = subprocess.Popen(command, env=env, start_new_session=True, **streams)
        try:
            until = time.monotonic() + timeout
            while not answers(f'{server.url}/{probe}'):
                alive = process.poll() is None and time.monotonic() < until
                assert alive, f"{command[2]} did not start:\n{(home/'log').read_text()[-3000:]}"
                time.sleep(.1)
            yield server
        finally: stop(process)

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def answers(url):
    try: return urlopen(url, timeout=5)
    except HTTPError as error: return error               # it answers, whatever it says
    except (URLError, OSError): return None

def stop(process, patience=15):
    process.send_signal(signal.SIGTERM)              # ends its kernels first
    try: process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def chromium():
    "Debian's headless browser."
    with sync_playwright() as play:
        flags = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        try: yield browser
        finally: browser.close()


def check(page):
    "Fail with whatever the kernel, the widgets or the explorer complained about."
    complaints = page.evaluate(COMPLAINTS)
    assert not complaints, '\n'.join(complaints)

def wait(page, condition, what, seconds):
    "Wait for a condition in the page; if it does not come, say why. Asked at every frame, the page would paint each."
    try: page.wait_for_function(condition, timeout=1000 * seconds, polling=100)
    except Late:
        check(page)
        raise AssertionError(f'{what} within {seconds} s') from None

def loaded(page, seconds=60):
    "Wait until every widget and figure is on the page."
    wait(page, LOADED, 'the widgets did not load', seconds)
    page.wait_for_timeout(500)
    check(page)

def run(page, seconds=300):
    "Run all cells and wait until every widget and figure is on the page."
    page.evaluate(RUN)
    wait(page, '() => window.done', 'the cells did not finish', seconds)
    check(page)
    loaded(page)

def reload(page):
    "Save the notebook, load its page again, and wait until the widgets are back from the kernel."
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.reload(wait_until='commit')
    page.wait_for_function(READY, timeout=90_000)
    loaded(page)

def press(page, slider, key, seconds=30):
    "Press a key on a slider, and see the data change; milliseconds until the first and the last redraw."
    handle = page.locator('[role=slider]').nth(slider)
    handle.focus()
    page.evaluate(WATCH)
    handle.press(key)
    wait(page, '() => window.watch.settled()', f'slider {slider}: no plotted data changed after {key}', seconds)
    check(page)
    return page.evaluate('() => [watch.first - watch.pressed, watch.drawn - watch.pressed]')
