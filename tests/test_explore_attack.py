"""The attack explorer: every control by hand, pictures from outside, walls that no attack may pass."""
import json
import shutil
import statistics
import time
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explorer import HOSTILE, coloured_run, complains, move, move_to, shown, written
from rs_toolkit.attacks import pgd_perturbation
from rs_toolkit.certify import ABSTAIN, certify
from rs_toolkit.checkpoint import load as load_checkpoint, save
from rs_toolkit.common import package_folder
from rs_toolkit.data import load
from rs_toolkit.explore import attack
from rs_toolkit.explore.attack import ALL, BUDGETS, GRID, NETWORK, VOTE, AttackExplorer, next_budget
from rs_toolkit.explore.door import Network, guests
from rs_toolkit.explore.smooth import trained
from rs_toolkit.models import HalfSpace, build

QUICK = dict(n=1000, steps=3, num_noise=2)
pytestmark = pytest.mark.usefixtures('digits_first')

@pytest.fixture
def e():
    e = AttackExplorer(**QUICK)
    done(e)                                    # with what it goes on with once it is open
    yield e
    e.worker.stop()

def done(e):
    assert e.worker.wait()
    assert 'role="alert"' not in e.words.value, e.words.value
    return e.now

def check_siege(e, image=40, sigma=.25, n=1000, folder='data/digits-gaussian'):
    "The wall is that of `certify`; the changes are as long as they may be; what is drawn is what was found."
    s = done(e)
    x = load('digits', 'test')[0][image]
    model = load_checkpoint(package_folder()/folder)
    assert s.certificate == certify(model, x, sigma, n=n, idx=image)
    eps = e.controls['eps'].value
    t = s.tried[attack.place_of(eps)]
    np.testing.assert_allclose(np.linalg.norm((t.moved - x.numpy()).reshape(2, -1), axis=1), t.size, atol=1e-6)
    assert (t.size <= eps + 1e-5).all() and (t.moved >= 0).all() and (t.moved <= 1).all()
    with torch.no_grad(): sure = model(torch.tensor(t.moved)).softmax(1).numpy()
    np.testing.assert_allclose(t.sure, sure, atol=1e-5)
    assert (t.votes.sum(1) == 100).all()
    traces = shown(e)
    np.testing.assert_allclose(traces['network'].y, [s.tried[i].sure[NETWORK, s.answer] for i in sorted(s.tried)])
    np.testing.assert_allclose(traces['vote'].y, [s.tried[i].votes[VOTE, s.voted] / 100 for i in sorted(s.tried)])
    if s.certificate.prediction != ABSTAIN: assert traces['wall edge'].x[0] == s.certificate.radius
    return s

# --- every control ---

MOVES = dict(image=2, sigma=.4, model=str(package_folder()/'data/digits-crt'), steps=6, num_noise=5, n=3163,
             folder=guests('data/digits-crt', Network))

@pytest.mark.parametrize('control', MOVES)
def test_every_control_starts_a_siege(e, control):
    before = e.now
    value = MOVES[control]
    move(e, **{control: value})
    assert done(e) is not before
    assert e.now.certificate is not None and next_budget(e.now, e.wanted()) is None
    if control == 'image': check_siege(e, image=2)
    if control == 'sigma': check_siege(e, sigma=.4)
    if control in ('model', 'folder'): check_siege(e, folder='data/digits-crt')
    if control == 'folder': assert e.values['model'] == value[0]
    if control in ('steps', 'num_noise'): assert getattr(e.now, control) == value
    if control == 'n': assert e.now.certificate.n == 3163

def test_the_budget_is_attacked_at_once_and_nothing_else_again(e):
    s = check_siege(e)
    assert e.controls.keys() == {'eps', *MOVES}
    tried = set(s.tried)
    move(e, eps=.75)
    assert f'{.75:.2f}' in e.words.value
    now = check_siege(e)
    assert set(now.tried) == tried | {15}
    assert all(now.tried[i] is s.tried[i] for i in tried)
    assert shown(e)['budget'].x[0] == .75
    took = []
    for eps in [.3, .75] * 10:
        start = time.perf_counter()
        move(e, eps=eps)
        took.append(time.perf_counter() - start)
    assert statistics.median(took) < .1

def test_a_number_in_digits_of_a_browser_begins_nothing(e):
    s = check_siege(e)
    move(e, sigma=np.nextafter(.25, 0))
    move(e, eps=.5)
    assert check_siege(e).look is s.look

def test_many_moves_end_in_the_last_one(e):
    for sigma in np.linspace(.1, .3, 8): move(e, sigma=float(sigma))
    for eps in np.linspace(.1, 1.5, 15): move(e, eps=float(eps))
    s = check_siege(e, sigma=.3)
    assert attack.place_of(e.controls['eps'].value) in s.tried

# --- what a wall is ---

def test_no_attack_passes_a_wall():
    "Of a half-space all is known: the network breaks where its vote does, and the wall stands before it."
    plane = HalfSpace()
    plane.metadata = dict(num_classes=2, in_channels=2, image_size=1)
    x = plane.point_at(.4)[None]
    *_, s = attack.besiege(plane, x, torch.tensor([1]), 0, 'a point', .25, 10, 8, 4000, lambda: 4)
    assert .3 < s.radius < .4
    network, vote = (BUDGETS[min(changed)] for changed in s.changed)
    assert network in (.4, .45)                             # .4 is the boundary itself
    assert .4 <= vote <= .5
    assert s.inside[0] >= 6 and s.inside[1] == 0

def test_a_vote_that_changes_inside_is_counted():
    "The page must be able to say that a wall was passed."
    plane = HalfSpace()
    plane.metadata = dict(num_classes=2, in_channels=2, image_size=1)
    x = plane.point_at(.4)[None]
    *_, s = attack.besiege(plane, x, torch.tensor([1]), 0, 'a point', .25, 10, 8, 4000, lambda: 4)
    lie = attack.Tried(s.tried[0].moved, np.array([.1, .1]), s.tried[0].sure, s.tried[0].votes[:, ::-1])
    broken = attack.replace(s, tried=s.tried | {2: lie})
    assert broken.inside[1] == 2
    assert '2 changed the vote' in attack.siege_in_words(broken, 2)

def test_the_files_of_attacks_keep_to_the_walls():
    files = sorted(package_folder().glob('data/**/attacks.csv'))
    assert files
    for file in files:
        rows = attack.attacked(file.parent)
        assert not (rows.vote < rows.radius - 1e-6).any(), file
        curves = attack.standing(rows, BUDGETS)
        assert (curves['proved'] <= curves['vote'] + 1e-9).all()
        assert (np.diff(curves['network']) <= 0).all() and curves['network'][0] <= 1

def test_a_run_of_files_is_attacked_again(tmp_path):
    "One image of the file, attacked once more."
    rows = attack.attacked('data/digits-gaussian')
    row = rows[rows.network.notna() & (rows.network > 0)].iloc[0]
    model, images, labels = trained('data/digits-gaussian')
    i = int(row.idx)
    x, y = images[i:i + 1], labels[i:i + 1]
    d = pgd_perturbation(model, x, y, torch.zeros_like(x)[None], eps=float(row.network), steps=int(row.steps))
    with torch.no_grad(): assert model((x + d).clamp(0, 1)).argmax(1) != y

def test_all_pictures(e):
    move_to(e, ALL)
    assert 'and <b>0</b> passed one' in e.words.value
    rows = e.rows
    traces = shown(e)
    right = rows[rows.radius > 0]
    np.testing.assert_array_equal(traces['vote broken'].x, right.radius)
    move_to(e, ALL)
    move(e, folder=guests('data/digits-methods/equal_epochs/sodm', Network))
    done(e)
    assert 'has not been attacked' in e.words.value
    assert 'nobody has attacked' in shown(e)['nobody'].text[0]

def test_a_click_on_a_dot_shows_its_image(e):
    trace = next(trace for trace in e.fig.data if trace.name == 'vote broken')
    class Clicked: point_inds = [3]
    class Missed: point_inds = []
    e.go_to(trace, Missed, None)
    assert e.controls['image'].value == 40
    e.go_to(trace, Clicked, None)
    assert done(e).look.image == e.controls['image'].value == trace.customdata[3]
    e.rows = e.rows.assign(idx=e.rows.idx + 1000)                             # of a split that is not here
    e.go_to(trace, Clicked, None)
    assert complains(e, 'not at hand')

# --- pictures from outside ---

def bar():
    paper = np.zeros((GRID, GRID), np.uint8)
    paper[15:95, 50:62] = 255
    return paper.tobytes()

def test_a_drawing(e):
    e.paper.ink = bar()
    s = done(e)
    assert '<b>your drawing</b>' in e.words.value and 'in truth' not in e.words.value
    assert s.look.pictures.shape[1:] == (1, 8, 8) and s.look.pictures[0, 0, :, 3:5].min() > .5
    move(e, eps=.4)
    assert done(e).look is s.look
    e.paper.ink = b''
    assert 'image 40' in done(e).name
    e.paper.ink = bar()
    move(e, image=41)
    assert done(e).name == 'image 41' and e.paper.ink == b''                 # the next stroke does not add to the bar
    e.paper.ink = bytes(GRID * GRID)
    assert done(e).name == 'image 41'

def upload(e, name, content):
    e.upload.value = ({'name': name, 'type': 'image/png', 'size': len(content), 'content': memoryview(content),
                       'last_modified': datetime.now(UTC)},)

def png(size, mode='RGB'):
    out = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).convert(mode).save(out, 'PNG')
    return out.getvalue()

TRAP = f'{HOSTILE}.png'

@pytest.mark.parametrize('size, mode', [((8, 8), 'L'), ((33, 70), 'RGB'), ((3, 2), 'RGB')])
def test_an_upload_of_any_size(e, size, mode):
    e.paper.ink = bar()
    upload(e, TRAP, png(size, mode))
    s = done(e)
    assert s.look.pictures.shape[1:] == (1, 8, 8) and e.paper.ink == b''
    assert '<img' not in e.words.value and '&lt;img src=x' in e.words.value
    e.clear.click()
    assert done(e).name == 'image 40'

def test_a_wrong_file_is_said_and_the_rest_works(e):
    for content in b'', b'no picture', png((9, 9))[:100]:
        upload(e, TRAP, content)
        assert complains(e, 'not an image that can be read') and '<img' not in e.words.value
    move(e, eps=.5)
    check_siege(e)

# --- networks from outside ---

def test_a_checkpoint_alone(tmp_path):
    shutil.copy(package_folder()/'data/digits-crt/model.safetensors', tmp_path/'theirs.safetensors')
    e = AttackExplorer(folder=tmp_path/'theirs.safetensors', **QUICK)
    check_siege(e, folder='data/digits-crt')
    assert e.rows is None

def test_a_network_without_pictures_waits_for_one(e, tmp_path):
    shape = dict(num_classes=2, in_channels=3, image_size=9)
    file = save(tmp_path, build('small_cnn', **shape), arch='small_cnn', **shape, mean=None, std=None)
    move(e, folder=guests(file, Network))
    assert e.worker.wait()
    assert complains(e, 'draw a picture, or upload one')
    upload(e, 'any.png', png((40, 40)))
    assert done(e).look.pictures.shape[1:] == (3, 9, 9)

def test_wrong_places_are_said_and_survived(e, tmp_path):
    before = e.fig.to_json()
    (tmp_path/'broken').mkdir()
    (tmp_path/'broken/config.json').write_text(json.dumps(dict(parameters=[])))
    wrong = {TRAP: 'it holds no config.json', str(tmp_path/'broken'): 'does not say which data set'}
    for place, words in wrong.items():
        move(e, folder=(Network(TRAP, Path(place)),))
        assert e.worker.wait()
        assert complains(e, words) and '<img' not in e.words.value
        assert e.fig.to_json() == before
    move(e, folder=())
    check_siege(e)

def test_names_of_classes_are_text(tmp_path):
    folder, _ = coloured_run(tmp_path, [HOSTILE, 'cat'])
    e = AttackExplorer(folder=folder, image=0, **QUICK)
    done(e)
    name = '&lt;img src=x onerror=alert(1)&gt;'
    assert f'in truth <b>{name}</b>' in e.words.value
    look = attack.replace(e.now.look, classes=(HOSTILE,) * 2)                 # whatever the network says
    e.now = attack.replace(e.now, look=look)
    e.redraw()
    assert 'network: &lt;img src=…<br>' in shown(e)['names'].text[0] and '<img' not in written(e)
