"""The smooth explorer: every control by hand, a run that is stopped, hurried or broken."""
import json
import re
import shutil
import statistics
import threading
import time
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch

from explorer import HOSTILE, clamps, coloured_images, coloured_run, complains, move, shown, written
from forked import until
from rs_toolkit.bounds import certified_radius, lower_bound, max_radius
from rs_toolkit.certify import certify
from rs_toolkit.checkpoint import load as load_checkpoint
from rs_toolkit.common import package_folder
from rs_toolkit.data import load, statistics as statistics_of
from rs_toolkit.explore import smooth
from rs_toolkit.explore.door import Network, guests
from rs_toolkit.explore.smooth import SmoothExplorer, trained, watch
from rs_toolkit.log import read_log
from rs_toolkit.models import build, device_of

N = dict(n=1000)                                       # enough to see, and quick
pytestmark = pytest.mark.usefixtures('digits_first')

def reached(explorer, condition, seconds=30):
    "Wait until the run in the background has got there."
    def there():
        assert 'alert' not in explorer.words.value, explorer.words.value
        return condition()
    until(there, seconds)

def on_device(model): return model.to('cuda' if torch.cuda.is_available() else 'cpu')

def check_curves(t, c):
    "Every point of the three curves, the ceiling and the certificate at their end."
    n = c.n
    m = t['share'].x
    k = np.rint(np.array(t['share'].y) * m)
    assert (m[0], m[-1], k[-1]) == (1, n, c.counts[c.selected])
    assert np.diff(k).min() >= 0
    assert (np.diff(k) <= np.diff(m)).all()
    bound = lower_bound(k, m, c.alpha)
    np.testing.assert_allclose(t['bound'].y, bound)
    np.testing.assert_allclose(t['radius'].y, certified_radius(bound, c.sigma), atol=2e-9)
    ceiling = [max_radius(c.sigma, int(i), c.alpha) for i in t['ceiling'].x]
    np.testing.assert_allclose(t['ceiling'].y, ceiling)
    assert list(t['certificate'].y) == ([c.radius] if c.prediction >= 0 else [])
    assert t['share end'].text[0] == f'share {c.counts[c.selected] / n:.4f} '
    assert t['zone'].y[2] == .5

def check_votes(t, c):
    "The bars."
    assert t['votes chosen'].x.tolist() == [c.selected]
    votes = dict(zip([*t['votes chosen'].x, *t['votes other'].x], [*t['votes chosen'].y, *t['votes other'].y]))
    assert [votes[i] for i in range(10)] == list(c.counts)

def check_pictures(e, model, image, label, selected):
    "The image, and what the network calls its noisy copies."
    t = shown(e)
    np.testing.assert_array_equal(t['pictures'].z[2:10, :8, 1], np.rint(image[0].numpy() * 255))
    copies = torch.tensor(e.now.pictures[1:], device=device_of(model))
    with torch.inference_mode(): classes = model(copies).argmax(1).tolist()
    said = [chosen or other for chosen, other in zip(t['said chosen'].text, t['said other'].text)]
    assert said == [str(v) for v in classes]
    assert set(t['said chosen'].text) <= {'', str(selected)}
    assert t['true'].text == (f'the image: {label}',)

def check_smooth(e, sigma=.25, image=40, folder='data/digits-gaussian', n=1000, alpha=.001):
    "Every part of the finished picture against `certify`, which counts for itself."
    assert e.worker.wait()
    images, labels = load('digits', 'test')
    model = on_device(load_checkpoint(package_folder()/folder))
    c = certify(model, images[image], sigma, n=n, alpha=alpha, seed=e.seed, idx=image)
    check_curves(shown(e), c)
    check_votes(shown(e), c)
    check_pictures(e, model, images[image], labels[image], c.selected)
    said = ['role="status"', f'{c.counts[c.selected]:,} of {n:,}', f'seed={e.seed}']
    for words in said: assert words in e.words.value
    assert ('abstain' in e.words.value) == (c.prediction < 0)
    assert 'no certificate' not in e.words.value
    return c

# --- every control ---

MOVES = dict(sigma=.5, image=118, model='data/digits-crt', n=300, alpha=1e-6,
             folder=guests('data/digits-methods/equal_epochs/crt', Network))

@pytest.mark.parametrize('control', MOVES)
def test_every_control_starts_a_run(control):
    e = SmoothExplorer(**N)
    check_smooth(e)
    assert e.controls.keys() == MOVES.keys()
    before = e.fig.to_json()
    value = MOVES[control]
    if control == 'model':
        move(e, model=str(package_folder()/value))
        check_smooth(e, folder=value)
    else:
        move(e, **{control: value})
        check_smooth(e, **{control: value[0].path if control == 'folder' else value})
    assert e.fig.to_json() != before

def test_start_draws_fresh_noise():
    e = SmoothExplorer(**N)
    before = e.now.pictures
    e.buttons['start'].click()
    check_smooth(e)
    assert e.seed == 1
    np.testing.assert_array_equal(before[0], e.now.pictures[0])
    assert (before[1:] != e.now.pictures[1:]).any()

def test_all_controls_together():
    setting = dict(sigma=.5, image=66, n=10_000, folder='data/digits-methods/equal_epochs/gaussian')
    e = SmoothExplorer(**setting)
    assert check_smooth(e, **setting).prediction == 7                             # a two, certified as a seven
    assert 'the answer is wrong' in e.words.value

@pytest.mark.filterwarnings('ignore:n=10 samples')
def test_controls_clamp():
    e = SmoothExplorer(**N)
    for name, wild, kept in [('sigma', 99, 1), ('sigma', -1, .05), ('image', 999, 359), ('image', -1, 0),
                             ('alpha', 2, .1), ('alpha', 0, 1e-6), ('n', 0, 10)]:
        assert clamps(e, name, wild) == pytest.approx(kept), name
    check_smooth(e, .05, 0, n=10, alpha=1e-6)
    assert 'abstain' in e.words.value           # ten votes prove nothing at this alpha

@pytest.mark.parametrize('folder', ['data/digits-gaussian', 'data/digits-crt'])
def test_the_logs_that_ship_are_reproduced(folder):
    "Another program, on another day, wrote these rows."
    log = read_log(package_folder()/folder/'certify.tsv').set_index('idx')
    run = trained(folder)
    here = device_of(run[0]).type
    away = 3 if here == 'cpu' else 250      # votes: another processor rounds differently; a GPU draws other noise
    for image in [40, 118, 62]:
        *_, w = watch(*run, image, .25, n=10_000)
        row = log.loc[image]
        assert w.now.selected == row.selected, image
        assert w.label == row.label, image
        np.testing.assert_allclose(w.now.counts[row.selected], row.n_a, rtol=0, atol=away, err_msg=f'image {image}')

def test_many_classes():
    "Of a thousand, the bars show the twelve with most votes; the chosen one is among them."
    w = SmoothExplorer(**N).now
    strays = np.repeat(np.arange(100, 120), 3)
    many = replace(w, classes=tuple(map(str, range(1000))), votes=np.r_[w.votes, strays], n=1060)
    t = smooth.smooth_traces(many)
    assert len(t['votes chosen']['x']) == 1
    assert len(t['votes other']['x']) == 11
    assert t['votes chosen']['y'][0] == np.bincount(w.votes).max()
    names = [re.search(r'\d+', name)[0] for name in smooth.smooth_axes(many)['xaxis2.ticktext']]
    assert {'8', '1'} < {*names}

# --- a run that does not reach its end ---

def test_a_stopped_run_certifies_nothing():
    e = SmoothExplorer(**N)
    move(e, n=1e6)
    reached(e, lambda: e.now and len(e.now.votes) > 500)
    for words in 'Had N been', 'no certificate': assert words in e.words.value
    assert not len(shown(e)['certificate'].x)
    e.buttons['stop'].click()
    votes = len(e.now.votes)
    text = e.words.value
    assert 'Stopped before N = 1,000,000: no certificate' in text
    for words in 'Except', 'Had N been': assert words not in text
    assert not len(shown(e)['certificate'].x)
    assert 'no certificate' in shown(e)['radius end'].text[0]
    assert e.worker.wait(10)
    assert len(e.now.votes) == votes < 1e6                                        # and nothing comes after
    assert e.words.value == text
    move(e, n=1000)
    check_smooth(e)

def test_stop_before_anything_came(monkeypatch):
    e = SmoothExplorer(**N)
    gate = threading.Event()
    def late(*args):
        gate.wait(30)
        return iter([])
    monkeypatch.setattr(smooth, 'watch', late)
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
    e = SmoothExplorer(**N)
    threads = threading.active_count()
    slow = []
    for i in range(50):
        started = time.perf_counter()
        move(e, sigma=[.3, .35, .4, .25][i % 4])
        slow.append(time.perf_counter() - started)
    assert e.seed == 50
    assert statistics.median(slow) < .1                                           # a press never waits for the network
    check_smooth(e, sigma=.35)
    until(lambda: threading.active_count() <= threads, 20)

# --- what goes wrong ---

def test_a_broken_model_is_said_and_the_next_run_works(monkeypatch):
    e = SmoothExplorer(**N)
    before = e.fig.to_json()
    [place] = e.opened
    model, images, labels = e.opened[place]
    def breaks(x): raise RuntimeError('the network has <no> idea')
    breaks.metadata = model.metadata
    e.opened = {place: (breaks, images, labels)}
    move(e, sigma=.3)
    assert e.worker.wait()
    assert complains(e, 'the network has &lt;no&gt; idea')
    assert list(shown(e)['radius'].x) == []
    assert e.fig.to_json() != before                                              # the noisy copies had come; no votes
    e.opened = {}
    e.buttons['start'].click()
    check_smooth(e, sigma=.3)

def test_infinite_logits_are_said():
    e = SmoothExplorer(**N)
    [(model, _, _)] = e.opened.values()
    model[1][0].bias.data[0] = float('nan')
    e.buttons['start'].click()
    assert e.worker.wait()
    assert complains(e, 'NaN or infinite logits')

def run_folder(path, dataset='digits', weights=True):
    path.mkdir()
    (path/'config.json').write_text(json.dumps(dict(parameters=dict(dataset=dataset))))
    if weights: shutil.copy(package_folder()/'data/digits-crt/model.safetensors', path)
    return str(path)

def wrong_folders(tmp_path):
    broken = tmp_path/'broken'
    broken.mkdir()
    (broken/'config.json').write_text('{"parameters": []}')
    return {str(tmp_path/'nowhere'): 'it holds no config.json',
            str(broken): 'does not say which data set',
            run_folder(tmp_path/'bare', weights=False): 'no checkpoint at',
            run_folder(tmp_path/'strange', 'digit'): 'did you mean',
            run_folder(tmp_path/'images', 'folder:gone'): 'gone has no train'}

def test_wrong_folders_are_said_and_survived(tmp_path):
    e = SmoothExplorer(**N)
    before = e.fig.to_json()
    for folder, message in wrong_folders(tmp_path).items():
        move(e, folder=(Network('mine', Path(folder)),))
        assert e.worker.wait()
        assert complains(e, escape(message)), e.words.value
        assert e.fig.to_json() == before, message
    move(e, folder=guests(run_folder(tmp_path/'good'), Network))
    check_smooth(e, folder='data/digits-crt')
    move(e, folder=())
    check_smooth(e)

def test_another_test_split(tmp_path):
    "A folder of four coloured images: the slider ends with it, and shows the last for one that it does not have."
    folder, pixels = coloured_run(tmp_path)
    e = SmoothExplorer(**N)
    move(e, folder=guests(folder, Network))
    assert e.worker.wait()
    assert e.now.finished
    assert e.controls['image'].value == e.controls['image'].max == 3              # there is no image 40
    np.testing.assert_array_equal(shown(e)['pictures'].z[3:12, :9, :3], pixels[3])    # class 1: after those of class 0
    move(e, folder=())
    assert e.worker.wait()
    assert e.now.finished
    assert e.controls['image'].max == 359

def test_a_folder_has_names_for_its_classes_and_they_are_text(tmp_path):
    "In the words, above the copies, and below the bars."
    folder, _ = coloured_run(tmp_path, [HOSTILE, 'a "cat"'])
    e = SmoothExplorer(folder=folder, image=0, **N)
    name = '&lt;img src=x onerror=alert(1)&gt;'
    shown(e)
    assert f'Image 0, class <b>{name}</b>' in e.words.value and '<img' not in written(e)
    assert e.fig.layout.xaxis2.ticktext == (f'<b>{name}</b>, true', 'a "cat"')
    assert shown(e)['true'].text == ('the image: &lt;img src=…',)
    move(e, image=3)
    assert e.worker.wait() and 'class <b>a "cat"</b>' in e.words.value and '<img' not in written(e)
    assert smooth.class_names(dict(dataset=f'folder:{tmp_path}/images', num_classes=3)) == ('0', '1', '2')

def test_photographs_stand_in_for_images_that_are_not_here(monkeypatch):
    "Their class is not known, so no answer is called wrong."
    monkeypatch.setattr(smooth, 'is_here', lambda dataset: dataset == 'digits')
    e = SmoothExplorer(model=str(package_folder()/'data/cifar10-gaussian'), image=8, n=100)
    assert (e.now.size, e.now.label, e.now.pictures.shape[1:]) == (20, -1, (3, 32, 32))
    assert 'of no class' in e.words.value and 'wrong' not in e.words.value and '-1' not in shown(e)['true'].text[0]
    name = smooth.CIFAR10[e.now.now.selected]
    assert f'votes chose class {name}' in e.words.value
    assert name in shown(e)['said chosen'].text
    assert e.fig.layout.xaxis2.ticktext[e.now.now.selected] == name

def test_a_network_of_other_classes_sees_digits_of_no_class():
    images, labels = smooth.pictures_for(dict(in_channels=1, image_size=8, num_classes=2))
    assert len(images) == 360 and (labels == -1).all()

def test_torchvisions_images_go_first(monkeypatch):
    monkeypatch.setattr(smooth, 'is_here', lambda dataset: dataset == 'cifar10')
    asked = []
    monkeypatch.setattr(smooth, 'load', lambda *name: asked.append(name) or (torch.zeros(2, 3, 32, 32), torch.zeros(2)))
    size = dict(in_channels=3, image_size=32)
    cifar = size | dict(num_classes=10, dataset='folder:gone/cifar10-jpeg')
    assert len(smooth.pictures_for(cifar, 'folder:gone/cifar10-jpeg')[0]) == 2 and asked == [('cifar10', 'test')]
    _, labels = smooth.pictures_for(size | dict(num_classes=100), 'cifar100')            # class 3 is no cat there
    assert len(labels) == 20 and (labels == -1).all() and len(asked) == 1

def test_a_checkpoint_is_asked_for_its_images(tmp_path):
    "A file of weights alone, through the door: it gets what ships for its size, or what is named; others are refused."
    shutil.copy(package_folder()/'data/digits-crt/model.safetensors', tmp_path/'theirs.safetensors')
    coloured_images(tmp_path/'images')
    e = SmoothExplorer(**N)
    door = e.controls['folder']
    door.typed.value = str(tmp_path/'theirs.safetensors')
    assert not door.value
    assert [box.description for box in door.questions.children[1:5]] == ['images', 'network', 'normalised', 'constants']
    door.answer.click()
    assert e.values['model'].name == 'my theirs.safetensors'
    check_smooth(e, folder='data/digits-crt')                                      # the digits: by its size
    door.leaving.children[0].click()
    door.typed.value = str(tmp_path/'theirs.safetensors')
    door.fields['dataset'].value = f'folder:{tmp_path}/images'
    door.answer.click()
    assert e.worker.wait() and complains(e, 'are [3, 9, 9], the network takes [1, 8, 8]')
    door.leaving.children[0].click()
    door.typed.value = str(tmp_path/'theirs.safetensors')
    door.fields['dataset'].value = 'digits'
    door.answer.click()
    assert e.values['model'].name == 'my theirs.safetensors'
    check_smooth(e, folder='data/digits-crt')

def test_a_checkpoint_of_the_field_is_told_by_whose_constants_it_normalises(tmp_path):
    "Tensors alone, as the published scripts leave them, and images of a folder, which has no constants of its own."
    model = build('cifar_resnet20', 2, 3, 32, *statistics_of('cifar10', 'standard')).eval()
    torch.save({'arch': 'cifar_resnet20', 'state_dict': model[1].state_dict()}, tmp_path/'theirs.pth')
    coloured_images(tmp_path/'images', size=48)
    e = SmoothExplorer(**N)
    door = e.controls['folder']
    door.fields['dataset'].value = f'folder:{tmp_path}/images'
    door.fields['normalization'].value = 'standard'

    door.typed.value = str(tmp_path/'theirs.pth')
    door.answer.click()
    assert e.worker.wait() and complains(e, 'fill in the fields constants and normalised')

    door.leaving.children[0].click()
    door.fields['constants'].value = 'cifar10'
    door.typed.value = str(tmp_path/'theirs.pth')
    door.answer.click()
    assert e.worker.wait()
    network, images, _ = e.open(e.values['model'])
    x = images[:].to(device_of(network))
    torch.testing.assert_close(network(x), model.to(x.device)(x))

def test_a_bug_is_shown(monkeypatch):
    e = SmoothExplorer(**N)
    monkeypatch.setattr(smooth, 'smooth_traces', lambda w: 1/0)
    e.controls['sigma'].value = .5
    assert e.worker.wait()
    assert complains(e, 'division')
    with pytest.raises(ZeroDivisionError): e.show(e.now)
