"""The page `boxes`: every proof that it shows against the network itself, sampled; every control by hand."""
import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import beta

from explorer import clamps, click, complains, drag_about, move, move_to, shown
from rs_toolkit.deterministic import boxes, crown
from rs_toolkit.explore.boxes import ROOMS, TIPS, BoxesExplorer, Comparison
from rs_toolkit.explore.core import EVERY, middles
from rs_toolkit.explore.landscape import scene
from rs_toolkit.explore.toy import PROBLEMS
from rs_toolkit.explore.toy_boxes import ALPHAS, BETWEEN, LADDER, TRAININGS, boxed

NETWORKS = [(problem, training, alpha) for problem in PROBLEMS for training in TRAININGS
            for alpha in (ALPHAS if training in BETWEEN else [None])]
each_network = pytest.mark.parametrize('network', NETWORKS, ids=lambda n: ', '.join(map(str, n)))
BOUNDS = {'ibp': boxes.margin_bounds,
          'crown': lambda *args: crown.margin_bounds(*args, intermediate='crown')}

def images_of(points): return torch.tensor(np.asarray(points), dtype=torch.float32).reshape(-1, 2, 1, 1)

def answers(model, points):
    with torch.no_grad(): return model(images_of(points)).argmax(1).numpy()

def inside(points, eps, count, seed=0):
    "Points of boxes, corners first [count, n, 2]; the square is all there is."
    share = np.random.default_rng(seed).uniform(-1, 1, (count, len(points), 2))
    share[:4] = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])[:, None]
    return np.clip(points + share * np.reshape(eps, (-1, 1)), 0, 1)

def middles_of_map(): return np.stack(np.meshgrid(*[(np.arange(50) + .5) / 50] * 2), -1).reshape(-1, 2)


# --- what the shipped file says ---

@each_network
def test_what_is_said_to_be_proved_holds(network):
    "No point that is sampled in a proved box gets another answer, and no proved cell is refuted."
    one = boxed(*network)
    points = middles_of_map()
    reach = one.on_map
    own = answers(one.model, points)
    np.testing.assert_array_equal(reach.answers, own)
    for _, wide in reach.proved.items():
        rows = np.flatnonzero(wide)[::7]
        for seen in inside(points[rows], wide[rows], 24):
            np.testing.assert_array_equal(answers(one.model, seen), own[rows])
    for eps in LADDER: assert not ((reach.best >= eps) & (reach.refuted <= eps + 1e-6)).any(), eps

@each_network
def test_the_shipped_file_is_what_the_bounds_say(network):
    "Proved once more, for some cells; a step farther it fails, or the ladder ends."
    one = boxed(*network)
    rows = np.arange(13, 2500, 171)
    x = images_of(middles_of_map()[rows])
    y = torch.from_numpy(answers(one.model, middles_of_map()[rows]))
    for proof, bound in BOUNDS.items():
        wide = one.on_map.proved[proof][rows]
        lead = bound(one.model, x, y, torch.from_numpy(wide))[range(len(rows)), 1 - y]
        assert (lead > -1e-5).all(), proof
        more = bound(one.model, x, y, torch.from_numpy(np.minimum(wide + .005, .12)))[range(len(rows)), 1 - y]
        assert ((more < 1e-5) | torch.from_numpy(wide == .12)).all(), proof

def values_by_hooks(model, points):
    "What the linear layers answer, the last one as lead and sum."
    seen = []
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    def keep(layer, given, value): seen.append(value.detach().double().numpy())
    hooks = [layer.register_forward_hook(keep) for layer in linear]
    answers(model, points)
    for hook in hooks: hook.remove()
    scores = seen[-1]
    return [*seen[:-1], np.stack([scores[:, 0] - scores[:, 1], scores.sum(1)], 1)]

@pytest.mark.parametrize('network', NETWORKS[::4], ids=lambda n: ', '.join(map(str, n)))
def test_layer_boxes_hold_what_comes_up(network):
    "Of all numbers of all layers, and the lower bound of the lead is below its true minimum."
    one = boxed(*network)
    for point in [(.28, .62), (.5, .5), (.99, .02)]:
        near = one.at(point)
        for step in 0, 7, 23:
            low, high = np.clip([np.array(point) - LADDER[step], np.array(point) + LADDER[step]], 0, 1)
            seen = np.stack(np.meshgrid(*np.linspace(low, high, 41).T), -1).reshape(-1, 2)
            values = values_by_hooks(one.model, seen)
            least = (near.sign * values[-1][:, 0]).min()
            for proof, belief in near.belief(LADDER[step]).items():
                assert near.leads(proof)[step] <= least + 1e-4, (point, step, proof)
                for layer, (value, (lower, upper)) in enumerate(zip(values, belief)):
                    slack = 1e-5 * np.abs(value).max()
                    where = point, step, proof, layer
                    assert (value >= lower - slack).all(), where
                    assert (value <= upper + slack).all(), where


# --- what the page shows ---

def corners(trace):
    "(Lower, upper) of each rectangle of a broken line."
    x, y = (np.reshape(trace[key], (-1, 6))[:, :5] for key in 'xy')
    return np.stack([x.min(1), y.min(1)], 1), np.stack([x.max(1), y.max(1)], 1)

def box_of(point, eps): return np.clip([[np.array(point) - eps], [np.array(point) + eps]], 0, 1)

def check_map(e, one, eps):
    "Colours of the left half, cell by cell: from the network's answers, and from bounds computed here for some."
    z = shown(e)['map'].z.ravel()
    points = middles_of_map()
    own = answers(one.model, points)
    refuted = np.zeros(2500, bool)
    for seen in inside(points, np.full(2500, eps - .004), 60, seed=3): refuted |= answers(one.model, seen) != own
    assert not (refuted & (z >= 2)).any()
    rows = np.arange(5, 2500, 119)
    x = images_of(points[rows])
    y = torch.from_numpy(own[rows])
    leads = {proof: bound(one.model, x, y, eps)[range(len(rows)), 1 - y].numpy() for proof, bound in BOUNDS.items()}
    for row, *lead in zip(rows, *leads.values()):
        if min(np.abs(lead)) < 1e-3: continue                                           # a matter of rounding
        level = 3 if lead[0] > 0 else 2 if lead[1] > 0 else int(not refuted[row])
        if level < 2: assert z[row] < 2 and z[row] <= level, row                        # sampling may miss a refutation
        else: assert z[row] == level + 2*own[row], row

def check_certificates(e, one, problem):
    "Squares of each tenth point that nobody trained on: as large as is proved."
    t = shown(e)
    points, labels = (part.numpy() for part in PROBLEMS[problem](200, seed=1))
    points = points.reshape(-1, 2)
    own = answers(one.model, points)
    for label, name in enumerate(['blue', 'orange']):
        np.testing.assert_allclose(middles(t[f'{name} points']), points[labels == label], atol=1e-6)
        rows = np.flatnonzero(own == label)
        rows = rows[rows % 10 == 0]
        wide = one.on_points.best[rows]
        rows = rows[wide > 0]
        wide = wide[wide > 0][:, None]
        low, high = corners(t[f'{name} certificates'])
        np.testing.assert_allclose(low, np.clip(points[rows] - wide, 0, 1), atol=1e-6)
        np.testing.assert_allclose(high, np.clip(points[rows] + wide, 0, 1), atol=1e-6)
        for seen in inside(points[rows], wide, 24): np.testing.assert_array_equal(answers(one.model, seen), label)

def check_point(e, one, eps, x, y):
    "The box, the largest one that is proved, and the worst point."
    t = shown(e)
    np.testing.assert_allclose(corners(t['box']), box_of((x, y), eps), atol=1e-9)
    own = answers(one.model, [(x, y)])[0]
    image = images_of([(x, y)])
    label = torch.tensor([own])
    def leads(wide): return max(bound(one.model, image, label, wide)[0, 1 - own] for bound in BOUNDS.values())
    proved = [wide for wide in LADDER if leads(wide) > 1e-5]
    if proved: np.testing.assert_allclose(corners(t['largest box']), box_of((x, y), max(proved)), atol=1e-9)
    else: assert not len(t['largest box'].x)
    worst = np.array([t['worst'].x[0], t['worst'].y[0]])
    assert np.abs(worst - [x, y]).max() <= eps + 1e-9
    seen = inside(np.array([[x, y]]), [eps], 500)[:, 0]
    def lead(points):
        with torch.no_grad(): scores = one.model(images_of(points))
        return (scores[:, own] - scores[:, 1 - own]).numpy()
    assert lead([worst])[0] <= lead(seen).min() + .05*np.abs(lead(seen)).max()
    named = ['blue', 'orange'][own]
    assert f'>{named}</b>; in the box' in e.words.value

def check_vote(e, problem, sigma, eps, x, y):
    "The right half: no vote changes in a box that a ball is said to hold; balls from shares that are counted here."
    t = shown(e)
    model = scene(problem, 'Gaussian').model
    noise = sigma * np.random.default_rng(7).standard_normal((4000, 2))
    def share(point): return answers(model, noise + point).mean()
    z = t['vote: map'].z.ravel()
    points = middles_of_map()
    for row in np.flatnonzero(z >= 2)[::60]:
        label = int(z[row] == 5)
        assert z[row] in (3, 5)
        for corner in inside(points[[row]], [eps], 4)[:, 0]: assert abs(share(corner) - (1 - label)) > .5 - .04, row
    if len(t['vote: ball'].x):
        p = share((x, y))
        top = max(p, 1 - p)
        slack = 5 * np.sqrt(top*(1 - top) / len(noise)) + 2e-3
        k = np.round(10_000 * np.clip([top - slack, top + slack], 0, 1))
        with np.errstate(divide='ignore'): low, high = sigma * ndtri(beta.ppf(.001, k, 10_001 - k))
        radius = np.hypot(t['vote: ball'].x[0] - x, t['vote: ball'].y[0] - y)
        assert np.nan_to_num(low) - .01 <= radius <= (np.inf if np.isnan(high) else high + .01)
    np.testing.assert_allclose(corners(t['vote: box']), box_of((x, y), eps), atol=1e-9)

def check_layers(e, one, eps, x, y):
    "Nets lie in their boxes, CROWN's in IBP's; the answer's panel has the margins of the library."
    t = shown(e)
    for layer in range(4):
        net = np.stack([t[f'layer {layer}: net'].x, t[f'layer {layer}: net'].y], 1)
        net = net[~np.isnan(net).any(1)]
        ibp, linear = (corners(t[f'layer {layer}: {proof}']) for proof in ('ibp', 'crown'))
        for low, high in ibp, linear: assert (net >= low - 1e-4).all() and (net <= high + 1e-4).all(), layer
        assert (ibp[0] <= linear[0] + 1e-6).all() and (linear[1] <= ibp[1] + 1e-6).all(), layer
        for axis, (low, high) in zip('xy', zip(ibp[0][0], ibp[1][0])):
            shown_range = e.fig.layout[f'{axis}axis{4 + layer}'].range
            assert shown_range[0] < low and high < shown_range[1], layer
    for proof, bound in BOUNDS.items():
        both = [bound(one.model, images_of([(x, y)]), torch.tensor([label]), eps)[0, 1 - label] for label in range(2)]
        low, high = corners(t[f'layer 3: {proof}'])
        if proof == 'ibp': np.testing.assert_allclose([low[0, 0], high[0, 0]], [both[0], -both[1]], atol=1e-4)
        else: assert low[0, 0] >= both[0] - 1e-4 and high[0, 0] <= -both[1] + 1e-4

def check_shares(e, problem, alpha, eps):
    "The curves of all networks at one half-width, counted; at 0 the accuracy."
    t = shown(e)
    images, labels = PROBLEMS[problem](200, seed=1)
    for training in TRAININGS:
        one = boxed(problem, training, alpha if training in BETWEEN else None)
        right = answers(one.model, images.reshape(-1, 2)) == labels.numpy()
        drawn = t[f'share: {training}']
        assert drawn.y[0] == right.mean()
        step = int(np.flatnonzero(np.isclose(drawn.x, eps))[0])
        held = {proof: bound(one.model, images, labels, eps)[range(200), 1 - labels].numpy() > 1e-6
                for proof, bound in BOUNDS.items()}
        assert abs(t[f'share: {training}, IBP'].y[step] - (right & held['ibp']).mean()) < .011, training
        assert abs(drawn.y[step] - (right & (held['ibp'] | held['crown'])).mean()) < .011, training
        assert (np.diff(drawn.y) <= 0).all()
    for name in 'smoothed', 'not refuted': assert (np.diff(t[f'share: {name}'].y) <= 0).all()
    assert set(t['share: eps'].x) == {eps}

def axes_in_sight(e): return {n for n in range(1, 8) if e.fig.layout[f'xaxis{n if n > 1 else ""}'].visible}

def axes_with_lines(e):
    return {int((trace.xaxis or 'x')[1:] or 1) for trace in e.fig.data if trace.visible is not False}

def check(e, eps=.05, training='CC-IBP', alpha=.3, problem='two moons', sigma=.1, x=.28, y=.62):
    "The whole page."
    move_to(e, EVERY)
    one = boxed(problem, training, alpha if training in BETWEEN else None)
    check_map(e, one, eps)
    check_certificates(e, one, problem)
    check_point(e, one, eps, x, y)
    check_vote(e, problem, sigma, eps, x, y)
    check_layers(e, one, eps, x, y)
    check_shares(e, problem, alpha, eps)
    assert axes_in_sight(e) == axes_with_lines(e) == {*range(1, 8)}
    assert 'role="status"' in e.words.value and e.words.value.count('<br>') == 2

MOVES = dict(eps=.08, training='plain', alpha=.9, problem='spirals', sigma=.05, x=.7, y=.4)

@pytest.mark.parametrize('control', MOVES)
def test_every_control_moves_the_picture(control):
    e = BoxesExplorer()
    assert e.controls.keys() == MOVES.keys()
    before = e.fig.to_json()
    move(e, **{control: MOVES[control]})
    check(e, **{control: MOVES[control]})
    assert e.fig.to_json() != before

def test_all_controls_together_and_back():
    e = BoxesExplorer()
    move(e, **MOVES)
    check(e, **MOVES)
    fresh = BoxesExplorer()
    move(e, **fresh.values)
    check(e)
    move_to(fresh, EVERY)
    for name, trace in shown(e).items():                       # sending only what has changed leaves nothing behind
        for key in {*'xyz'} & {*trace}: np.testing.assert_array_equal(trace[key], shown(fresh)[name][key])
    assert e.words.value == fresh.words.value

VIEWS = {'a ball beside it': {1, 2}, 'layer by layer': {1, 4, 5, 6, 7}, 'all networks': {1, 3}}

def test_views():
    "Each shows its panels, draws nothing elsewhere, and shows the setting of now."
    e = BoxesExplorer()
    assert ROOMS.keys() == VIEWS.keys()
    for view, panels in VIEWS.items():
        move_to(e, view)
        move(e, training='plain', x=.7)
        assert axes_in_sight(e) == axes_with_lines(e) == panels, view
        move(e, training='CC-IBP', x=.28)
    check(e)
    assert e.fig.layout.annotations[3].text.startswith('<span') and 'layer 1' in e.fig.layout.annotations[3].text

def test_tips_set_what_they_speak_of():
    for number, tip in enumerate(TIPS):
        e = BoxesExplorer()
        e.tip_buttons[number].click()
        assert tip.words in e.hint.value
        assert e.toggle.value == tip.view
        assert {name: e.values[name] for name in tip.sets} == tip.sets
        assert 'role="status"' in e.words.value

@pytest.mark.parametrize('problem', PROBLEMS)
def test_corners(problem):
    "Nothing overflows at the edges of what can be asked."
    for x, y in [(0, 0), (1, 0), (.5, .5), (1, 1)]:
        for eps in LADDER[[0, -1]]:
            e = BoxesExplorer(problem=problem, x=x, y=y, eps=eps, sigma=.3)
            move_to(e, EVERY)
            for word in 'inf', 'nan', 'alert': assert word not in e.words.value, (x, y, e.words.value)

VERDICTS = [('proved by IBP', {}), ('proved by CROWN alone', dict(training='plain', eps=.03)),
            ('neither proved nor refuted', dict(training='Adversarial')), ('refuted', dict(training='plain'))]

@pytest.mark.parametrize('verdict, setting', VERDICTS)
def test_words(verdict, setting): assert f'<b>{verdict}</b>' in BoxesExplorer(**setting).words.value

def test_controls_clamp_and_offer_everything():
    e = BoxesExplorer()
    for name, wild, kept in [('sigma', 9, .3), ('sigma', 0, .02), ('x', 2, 1), ('y', -1, 0)]:
        assert clamps(e, name, wild) == pytest.approx(kept), name
    assert e.controls['training'].options == tuple(TRAININGS)
    assert e.controls['problem'].options == tuple(PROBLEMS)
    with pytest.raises(ValueError, match='unknown network'): boxed('moons', 'plain', None).model.eval()

@pytest.mark.parametrize('panel', [0, 1])
def test_the_point_can_be_dragged(panel):
    e = BoxesExplorer()
    drag_about(e, panel)
    assert (e.controls['x'].value, e.controls['y'].value) == (.9, .52)
    check(e, x=.9, y=.52)

@pytest.mark.parametrize('map_name', ['map', 'vote: map'])
def test_a_click_moves_the_point(map_name):
    e = BoxesExplorer()
    number = [trace.name for trace in e.fig.data].index(map_name)
    e.fig._js2py_pointsCallback = click(number, .41, .71)
    assert (e.controls['x'].value, e.controls['y'].value) == (.41, .71)
    check(e, x=.41, y=.71)

def test_what_a_comparison_knows_of_its_box():
    "A worked point: the worst point of the box is at most as good as its middle, bounds are below both."
    s = Comparison()
    with torch.no_grad(): scores = s.network.model(images_of([s.point]))[0]
    lead = float(scores[s.near.answer] - scores[1 - s.near.answer])
    assert s.near.leads('ibp')[s.step] <= s.worst[0] <= lead
    assert s.near.leads('crown')[s.step] <= s.worst[0]

def test_a_bug_is_shown_and_raised(monkeypatch):
    e = BoxesExplorer()
    monkeypatch.setattr('rs_toolkit.explore.boxes.boxes_traces', lambda *given: 1/0)
    with pytest.raises(ZeroDivisionError): move(e, sigma=.2)
    assert complains(e, 'division')
