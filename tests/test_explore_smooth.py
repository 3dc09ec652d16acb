"""The smooth explorer: every control by hand, a run that is stopped, hurried or broken."""
import json, shutil, statistics, threading, time

import numpy as np
import pytest
import torch

from rs_toolkit.bounds import certified_radius, lower_bound, max_radius
from rs_toolkit.certify import certify
from rs_toolkit.checkpoint import load as load_checkpoint
from rs_toolkit.common import package_folder
from rs_toolkit.data import load
from rs_toolkit.explore import smooth
from rs_toolkit.explore.smooth import SmoothExplorer, trained, watch
from rs_toolkit.log import read_log

N = dict(n=1000)                                       # enough to see, and quick

def shown(explorer): return {trace.name: trace for trace in explorer.fig.data}

def reached(explorer, condition, seconds=30):
    "Wait until the run in the background has got there."
    until = time.monotonic() + seconds
    while not condition(): assert time.monotonic() < until and 'alert' not in explorer.words.value, explorer.words.value; time.sleep(.005)

def check_smooth(e, sigma=.25, image=40, folder='data/digits-gaussian', n=1000, alpha=.001):
    "Every part of the finished picture against `certify`, which counts for itself."
    assert e.worker.wait()
    t, (images, labels) = shown(e), load('digits', 'test')
    model = load_checkpoint(package_folder()/folder).to('cuda' if torch.cuda.is_available() else 'cpu')
    c = certify(model, images[image], sigma, n=n, alpha=alpha, seed=e.seed, idx=image)
    assert t['votes chosen'].x.tolist() == [c.selected]
    votes = dict(zip([*t['votes chosen'].x, *t['votes other'].x], [*t['votes chosen'].y, *t['votes other'].y]))
    assert [votes[i] for i in range(10)] == list(c.counts)
    m = t['share'].x
    k = np.rint(np.array(t['share'].y) * m)
    assert (m[0], m[-1], k[-1]) == (1, n, c.counts[c.selected]) and set(np.diff(k) >= 0) == {True} and (np.diff(k) <= np.diff(m)).all()
    np.testing.assert_allclose(t['bound'].y, lower_bound(k, m, alpha))
    np.testing.assert_allclose(t['radius'].y, certified_radius(lower_bound(k, m, alpha), sigma), atol=2e-9)
    np.testing.assert_allclose(t['ceiling'].y, [max_radius(sigma, int(i), alpha) for i in t['ceiling'].x])
    assert list(t['certificate'].y) == ([c.radius] if c.prediction >= 0 else [])
    assert t['share end'].text[0] == f' share {c.counts[c.selected] / n:.4f}' and t['zone'].y[2] == .5
    np.testing.assert_array_equal(t['pictures'].z[2:10, :8, 1], np.rint(images[image, 0].numpy() * 255))
    with torch.inference_mode(): classes = model(torch.tensor(e.now.pictures[1:], device=next(model.parameters()).device)).argmax(1).tolist()
    assert [a or b for a, b in zip(t['said chosen'].text, t['said other'].text)] == [str(v) for v in classes]
    assert set(t['said chosen'].text) <= {'', str(c.selected)} and t['true'].text == (f'the image: {labels[image]}',)
    assert 'role="status"' in e.words.value and f'{c.counts[c.selected]:,} of {n:,}' in e.words.value and f'seed={e.seed}' in e.words.value
    assert ('abstain' in e.words.value) == (c.prediction < 0) and 'no certificate' not in e.words.value
    return c

# --- every control ---

MOVES = dict(sigma=.5, image=118, model='data/digits-crt', n=300, alpha=1e-6, folder='data/digits-methods/equal_epochs/crt')

@pytest.mark.parametrize('control', MOVES)
def test_every_control_starts_a_run(control):
    e = SmoothExplorer(**N)
    check_smooth(e)
    assert e.controls.keys() == MOVES.keys()
    before, value = e.fig.to_json(), MOVES[control]
    e.controls[control].value = str(package_folder()/value) if control == 'model' else value
    check_smooth(e, **{'folder' if control == 'model' else control: value})
    assert e.fig.to_json() != before
    assert e.controls['model'].disabled == (control == 'folder')

def test_start_draws_fresh_noise():
    e = SmoothExplorer(**N)
    before = e.now.pictures
    e.buttons['start'].click()
    check_smooth(e)
    assert e.seed == 1 and (before[0] == e.now.pictures[0]).all() and (before[1:] != e.now.pictures[1:]).any()

def test_all_controls_together():
    e = SmoothExplorer(sigma=.5, image=66, n=10_000, folder='data/digits-methods/equal_epochs/gaussian')
    c = check_smooth(e, .5, 66, 'data/digits-methods/equal_epochs/gaussian', 10_000)
    assert c.prediction == 7 and 'the answer is wrong' in e.words.value           # a two, certified as a seven

@pytest.mark.filterwarnings('ignore:n=10 samples')
def test_controls_clamp():
    e = SmoothExplorer(**N)
    for name, wild, kept in [('sigma', 99, 1), ('sigma', -1, .05), ('image', 999, 359), ('image', -1, 0), ('alpha', 2, .1), ('alpha', 0, 1e-6), ('n', 0, 10)]:
        e.controls[name].value = wild
        assert e.controls[name].value == pytest.approx(kept)
    check_smooth(e, .05, 0, n=10, alpha=1e-6)
    assert 'abstain' in e.words.value                                             # ten votes prove nothing at this alpha

@pytest.mark.parametrize('folder', ['data/digits-gaussian', 'data/digits-crt'])
def test_the_logs_that_ship_are_reproduced(folder):
    "Another program, on another day, wrote these rows."
    log = read_log(package_folder()/folder/'certify.tsv').set_index('idx')
    run = trained(folder)
    for image in [40, 118, 62]:
        *_, w = watch(*run, image, .25, n=10_000)
        row = log.loc[image]
        assert w.now.selected == row.selected and w.label == row.label
        assert abs(w.now.counts[row.selected] - row.n_a) <= (3 if str(next(run[0].parameters()).device) == 'cpu' else 250)      # another processor rounds differently; a GPU draws other noise

def test_many_classes():
    "Of a thousand, the bars show the twelve with most votes; the chosen one is among them."
    w = SmoothExplorer(**N).now
    counts = np.bincount(w.votes, minlength=1000)
    many = smooth.replace(w, num_classes=1000, votes=np.r_[w.votes, np.repeat(np.arange(100, 120), 3)], n=1060)
    t = smooth.smooth_traces(many)
    assert len(t['votes chosen']['x']) == 1 and len(t['votes other']['x']) == 11 and t['votes chosen']['y'][0] == counts.max()
    assert {'8', '1'} < {c.strip('</b>').split('<')[0] for c in smooth.smooth_axes(many)['xaxis2.ticktext']}

# --- a run that does not reach its end ---

def test_a_stopped_run_certifies_nothing():
    e = SmoothExplorer(**N)
    e.controls['n'].value = 1e6
    reached(e, lambda: e.now and len(e.now.votes) > 500)
    assert 'Had N been' in e.words.value and 'no certificate' in e.words.value and not len(shown(e)['certificate'].x)
    e.buttons['stop'].click()
    votes, text = len(e.now.votes), e.words.value
    assert 'Stopped before N = 1,000,000: no certificate' in text and 'Except' not in text and 'Had N been' not in text
    assert not len(shown(e)['certificate'].x) and 'no certificate' in shown(e)['radius end'].text[0]
    assert e.worker.wait(10) and len(e.now.votes) == votes < 1e6 and e.words.value == text            # and nothing comes after
    e.controls['n'].value = 1000
    check_smooth(e)

def test_stop_before_anything_came(monkeypatch):
    e, gate = SmoothExplorer(**N), threading.Event()
    monkeypatch.setattr(smooth, 'watch', lambda *args: gate.wait(30) and iter([]))
    e.buttons['start'].click()
    e.buttons['stop'].click()
    assert 'Stopped before the first vote: no certificate' in e.words.value
    gate.set()
    assert e.worker.wait()

def test_stop_after_the_end_changes_nothing():
    e = SmoothExplorer(**N)
    before = e.words.value, e.fig.to_json()
    e.buttons['stop'].click()
    assert (e.words.value, e.fig.to_json()) == before

def test_fifty_restarts_end_in_one_run():
    e, threads = SmoothExplorer(**N), threading.active_count()
    slow = []
    for i in range(50):
        started = time.perf_counter()
        e.controls['sigma'].value = [.3, .35, .4, .25][i % 4]
        slow.append(time.perf_counter() - started)
    assert e.seed == 50 and statistics.median(slow) < .1                          # a press never waits for the network
    check_smooth(e, sigma=.35)
    until = time.monotonic() + 20
    while threading.active_count() > threads: assert time.monotonic() < until; time.sleep(.02)

# --- what goes wrong ---

def test_a_broken_model_is_said_and_the_next_run_works(monkeypatch):
    e = SmoothExplorer(**N)
    before = e.fig.to_json()
    model, images, labels = e.opened[next(iter(e.opened))]
    def breaks(x): raise RuntimeError('the network has <no> idea')
    breaks.metadata = model.metadata
    e.opened = {place: (breaks, images, labels) for place in e.opened}
    e.controls['sigma'].value = .3
    assert e.worker.wait() and 'role="alert"' in e.words.value and 'the network has &lt;no&gt; idea' in e.words.value
    assert list(shown(e)['radius'].x) == [] and e.fig.to_json() != before         # the noisy copies had come; no votes
    e.opened = {}
    e.buttons['start'].click()
    check_smooth(e, sigma=.3)

def test_infinite_logits_are_said():
    e = SmoothExplorer(**N)
    next(iter(e.opened.values()))[0][1][0].bias.data[0] = float('nan')
    e.buttons['start'].click()
    assert e.worker.wait() and 'role="alert"' in e.words.value and 'NaN or infinite logits' in e.words.value

def run_folder(path, dataset='digits', weights=True):
    path.mkdir()
    (path/'config.json').write_text(json.dumps(dict(parameters=dict(dataset=dataset))))
    if weights: shutil.copy(package_folder()/'data/digits-crt/model.safetensors', path)
    return str(path)

def wrong_folders(tmp_path):
    broken = tmp_path/'broken'
    broken.mkdir()
    (broken/'config.json').write_text('{"parameters": []}')
    return {str(tmp_path/'nowhere'): 'it holds no config.json', str(broken): 'does not say which data set',
            run_folder(tmp_path/'bare', weights=False): 'no checkpoint at', run_folder(tmp_path/'strange', 'digit'): 'did you mean', run_folder(tmp_path/'images', 'folder:gone'): 'gone has no train'}

def test_wrong_folders_are_said_and_survived(tmp_path):
    e = SmoothExplorer(**N)
    before = e.fig.to_json()
    for folder, message in wrong_folders(tmp_path).items():
        e.controls['folder'].value = folder
        assert e.worker.wait() and 'role="alert"' in e.words.value and message.replace("'", '&#x27;') in e.words.value, e.words.value
        assert e.fig.to_json() == before
    e.controls['folder'].value = run_folder(tmp_path/'good')
    check_smooth(e, folder='data/digits-crt')
    e.controls['folder'].value = ''
    check_smooth(e)

def test_another_test_split(tmp_path):
    "A folder of four coloured images: the slider ends with it, and an image that it does not have is refused."
    from PIL import Image
    from rs_toolkit.checkpoint import save
    from rs_toolkit.models import build
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3), np.uint8)
    for split in 'train', 'test':
        for i, image in enumerate(pixels):
            (tmp_path/f'images/{split}/{i % 2}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path/f'images/{split}/{i % 2}/{i}.png')
    folder = run_folder(tmp_path/'run', f'folder:{tmp_path}/images', weights=False)
    save(folder, build('small_cnn', 2, 3, 9), arch='small_cnn', num_classes=2, in_channels=3, image_size=9, mean=None, std=None)
    e = SmoothExplorer(**N)
    e.controls['folder'].value = folder
    assert e.worker.wait() and 'there is no image 40: the test split has 4' in e.words.value
    e.controls['image'].value = 3
    assert e.worker.wait() and e.now.finished and e.controls['image'].max == 3
    np.testing.assert_array_equal(shown(e)['pictures'].z[3:12, :9], pixels[3])
    e.controls['folder'].value = ''
    assert e.worker.wait() and e.now.finished and e.controls['image'].max == 359

def test_a_bug_is_shown(monkeypatch):
    e = SmoothExplorer(**N)
    monkeypatch.setattr(smooth, 'smooth_traces', lambda w: 1/0)
    e.controls['sigma'].value = .5
    assert e.worker.wait() and 'role="alert"' in e.words.value and 'division' in e.words.value
    with pytest.raises(ZeroDivisionError): e.show(e.now)
