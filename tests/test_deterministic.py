"Bounds through networks: sound for every layer and every network that is accepted, whatever is asked of them."
import copy
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rs_toolkit.deterministic import boxes, crown
from rs_toolkit.deterministic.boxes import BATCH_NORMS, Box, ball
from rs_toolkit.models import CifarResNet, Normalized, build

INTERMEDIATE = ['ibp', 'crown']

def unsettled(model, seed=0):
    "Batch-norms with statistics, factors and shifts of all signs."
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS):
            nn.init.normal_(layer.running_mean, std=.3)
            nn.init.uniform_(layer.running_var, .2, 2)
            for weight in layer.parameters(): nn.init.normal_(weight)
    return model.eval()

class Branches(nn.Module):
    "What CROWN accepts, and a box must get right: groups, dilation, strides, odd padding, pools, sums, differences."
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, padding_mode='reflect')
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding='same', dilation=2, groups=3, bias=False)
        self.bn2 = nn.BatchNorm2d(6, affine=False)
        self.conv3 = nn.Conv2d(6, 4, 4, stride=(2, 3), padding=1)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)
        self.hidden = nn.Linear(4, 9)
        self.bn3 = nn.BatchNorm1d(9)
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        a = F.relu(self.bn1(self.conv1(x)))
        b = F.relu(self.bn2(self.conv2(a)))
        x = self.pool(self.conv3(b + a - F.relu(a - b)))
        return self.head(torch.relu(self.bn3(self.hidden(x.mean((2, 3))))))

def in_place():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(),
                         nn.Linear(192, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))

def torchvisions():
    block = build('resnet18', 5, 3, 32)[1].layer1[0]
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 3))

def no_head():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

NETWORKS = {   # name -> network, shape of an image
    'branches': (Branches, (2, 8, 8)),
    'in place': (in_place, (2, 8, 8)),
    'grey and normalised': (lambda: build('cnn_digits', 10, 1, 8, [.3], [.25]), (1, 8, 8)),
    'residual': (lambda: Normalized(CifarResNet(8, 10, 3), [.5, .4, .3], [.2, .2, .1]), (3, 8, 8)),
    "torchvision's": (torchvisions, (64, 4, 4)),
    'no linear head': (no_head, (1, 8, 8))}
each_network = pytest.mark.parametrize('name', NETWORKS)

def network(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = unsettled(make())
    return model, torch.rand(3, *shape), torch.tensor([0, 2, 1])

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_ball_holds_all_that_is_asked_for(dtype):
    "In exact numbers, also where eps is no number of single precision, and the end of the box is near 0."
    torch.manual_seed(0)
    x = torch.cat([torch.rand(500), torch.arange(17)/16]).to(dtype).reshape(-1, 1, 1, 1)
    for eps in .06, .0600001, 1/255, 8/255, .1, 1e-9:
        box = ball(x, eps)
        for pixel, low, high in zip(*(t.flatten().tolist() for t in (x, *box))):
            assert Fraction(low) <= max(Fraction(pixel) - Fraction(eps), 0), (pixel, eps)
            assert Fraction(high) >= min(Fraction(pixel) + Fraction(eps), 1), (pixel, eps)
            assert high - low <= 2*eps + 3e-7
    assert all(torch.equal(end, x) for end in ball(x, 0.))

def worst(margins, y): return margins.scatter(1, y[:, None], torch.inf).amin(1)

def values(steps, x):
    found = [x]
    for step in steps[1:]: found.append(step.layer(*(found[i] for i in step.inputs)))
    return found

@torch.no_grad()
def inside(steps, bounds, points):
    "No value of any layer leaves its box, for `points` images of the first one."
    low, high = bounds[0]
    for some in torch.arange(points).split(1000):
        share = torch.rand(len(some), *low.shape[1:])
        share[::2] = share[::2].round()                                                # corners
        for step, box, value in zip(steps, bounds, values(steps, low + share*(high - low))):
            slack = 1e-5 * (box.lower.abs() + box.upper.abs()).max()
            assert (value >= box.lower - slack).all() and (value <= box.upper + slack).all(), step.name

@each_network
@torch.no_grad()
def test_no_value_leaves_its_box(name):
    model, x, _ = network(name)
    points = 1000 if name == "torchvision's" else 10_000
    steps = boxes.read(model, x[:1])
    for eps in .01, .2:
        box = ball(x[:1], eps)
        inside(steps, boxes.propagate(steps, box), points)
        inside(steps, crown.layer_boxes(steps, box, 'crown', 500), points)

@each_network
@torch.no_grad()
def test_no_margin_is_below_its_bound(name):
    model, x, y = network(name)
    for eps in 0., .01, .1:
        found = {i: crown.margin_bounds(model, x, y, eps, i) for i in INTERMEDIATE}
        found['ibp boxes'] = boxes.margin_bounds(model, x, y, eps)
        box = ball(x, eps)
        share = torch.rand(500, *x.shape)
        share[::2] = share[::2].round()
        logits = model((box.lower + share*(box.upper - box.lower)).flatten(0, 1)).unflatten(0, (500, 3))
        true = (logits.gather(2, y.expand(500, 3)[..., None]) - logits).amin(0)
        for bound in found.values():
            slack = 1e-5 * logits.abs().max()
            assert (bound <= true + slack).all() and (bound.gather(1, y[:, None]) == 0).all()
            if eps == 0: torch.testing.assert_close(bound, true, rtol=1e-4, atol=slack.item())
        assert (found['crown'].sum() > found['ibp boxes'].sum()) or eps == 0

LAYERS = [nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2),
          nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular'), nn.Conv2d(4, 2, 3, dilation=2, bias=False),
          nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.MaxPool2d(3, stride=1),
          nn.MaxPool2d(2, stride=3, ceil_mode=True), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3),
          nn.AdaptiveMaxPool2d(2), nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(.3), nn.ELU(), nn.SELU(), nn.CELU(),
          nn.Sigmoid(), nn.LogSigmoid(), nn.Tanh(),
          nn.Softplus(), nn.Softsign(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Linear(7, 5)]

@pytest.mark.parametrize('layer', LAYERS, ids=str)
@torch.no_grad()
def test_the_rule_of_each_layer_is_sound_and_exact(layer):
    "Nothing leaves the box of a layer, and its ends are reached, at a corner."
    torch.manual_seed(1)
    unsettled(layer, 1)
    low = torch.randn(1, 4, 7, 7)
    box = Box(low, low + torch.rand_like(low))
    kept = [end.clone() for end in box]
    fixed = boxes.fixed(layer, low)
    found = boxes.RULES[boxes.entry(fixed, boxes.RULES)](fixed, box)
    share = torch.rand(2000, *low.shape[1:])
    out = layer(low + share*(box.upper - low))
    assert (out >= found.lower - 1e-5).all() and (out <= found.upper + 1e-5).all()
    for at, sign in ((0, 1), (-1, -1)):                                     # the corner that gradients point to
        with torch.enable_grad():
            centre = box.centre.requires_grad_()
            value = layer(centre).flatten()[at]
            [slope] = torch.autograd.grad(value, centre)
        if isinstance(layer, (nn.MaxPool2d, nn.AdaptiveMaxPool2d)): slope = torch.ones_like(slope)
        corner = torch.where(sign*slope >= 0, box.upper, box.lower)
        end = (found.upper if sign > 0 else found.lower).flatten()[at]
        torch.testing.assert_close(layer(corner).flatten()[at], end, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, box))

@pytest.mark.parametrize('bound', [boxes.margin_bounds, crown.margin_bounds], ids=['ibp', 'crown'])
def test_modes_batches_and_the_callers_module(bound):
    "Eval mode always, the other images do not matter, one eps for each image, and nothing of the caller's is changed."
    model, x, y = network('grey and normalised')
    eval_bounds = bound(model, x, y, .05)
    model.train()
    model[1][1].eval()                                     # somebody keeps one layer fixed on purpose
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    pixels = x.clone()
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(bound(model, x, y, .05), eval_bounds)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and torch.equal(x, pixels)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    radii = [.01, .05, .2]
    alone = torch.cat([bound(model, x[i:i+1], y[i:i+1], r) for i, r in enumerate(radii)])
    torch.testing.assert_close(bound(model, x, y, radii), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bound(model, x, y, torch.tensor(radii)), alone, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('bound', [boxes.margin_bounds, crown.margin_bounds], ids=['ibp', 'crown'])
def test_fixed_pixels_and_saturated_boxes(bound):
    model, x, y = network('grey and normalised')
    frame = ball(x, .1)
    inner = Box(frame.lower.clone(), frame.upper.clone())
    for end in inner: end[..., :4] = x[..., :4]
    assert bound(model, inner, y).sum() > bound(model, frame, y).sum()
    point = bound(model, Box(x, x), y)
    torch.testing.assert_close(point, bound(model, x, y, 0.), rtol=1e-5, atol=1e-5)
    whole = bound(model, Box(torch.zeros_like(x), torch.ones_like(x)), y)
    torch.testing.assert_close(bound(model, x, y, 1.), whole, rtol=1e-5, atol=1e-3)   # cut off at 0 and 1
    assert whole.isfinite().all()

@pytest.mark.parametrize('bound', [boxes.margin_bounds, crown.margin_bounds], ids=['ibp', 'crown'])
def test_what_makes_no_sense_is_refused(bound):
    model, x, y = network('grey and normalised')
    ending_in = lambda layer: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), layer)
    cases = [((model, 255*x, y, .1), r'\[0, 1\]'),
             ((model, x*torch.nan, y, .1), r'\[0, 1\]'),
             ((model, x, y, 8), '8/255, not 8'),
             ((model, x, y, -.1), '8/255, not 8'),
             ((model, x, y, float('nan')), 'nan'),
             ((model, x, y, [.1, .2]), '3 images, got 2'),
             ((model, x, y), 'eps=None'),
             ((model, ball(x, .1), y, .1), 'Box'),
             ((model, Box(*reversed(ball(x, .1))), y), 'lower > upper'),
             ((model, x, y + 8, .1), 'labels'),
             ((lambda x: x, x, y, .1), 'torch.nn.Module'),
             ((ending_in(nn.GELU()), x, y, .1), "GELU.*'2'.*Known layers: Linear"),
             ((ending_in(nn.SiLU()), x, y, .1), 'must be increasing')]
    for wrong, words in cases:
        with pytest.raises(ValueError, match=words): bound(*wrong)
    with pytest.raises(ValueError, match='precision'): bound(model, x, y, .1, precision='float8')

def test_overflow_proves_nothing():
    "Boxes beyond float32 become infinite or no numbers at all, and no ReLU takes those for decided."
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.fill_(3e38)
        net[1].bias.fill_(-3e38)
        net[2].weight.fill_(1e-38)
        net[4].weight.copy_(torch.tensor([[0.]*4, [-1.]*4]))
        net[4].bias.copy_(torch.tensor([1., 0]))
    x = torch.full((1, 1, 2, 2), .25)
    y = torch.tensor([0])
    assert net(x).isfinite().all()
    bounds = [crown.margin_bounds(net, x, y, .5, i) for i in INTERMEDIATE]
    for found in [boxes.margin_bounds(net, x, y, .5), *bounds]: assert found.tolist() == [[0, -torch.inf]]

@pytest.mark.parametrize('bound', [boxes.margin_bounds, crown.margin_bounds], ids=['ibp', 'crown'])
def test_single_precision_does_not_promise_more(bound):
    "At the largest eps that double precision proves, single precision claims no more than `proved` forgives."
    torch.manual_seed(0)
    model = build('cnn_digits', 10, 1, 8).eval()
    x = torch.rand(24, 1, 8, 8)
    with torch.no_grad(): logits = model(x)
    y = logits.argmax(1)
    low = torch.zeros(24, dtype=torch.float64)
    high = torch.full((24,), .2, dtype=torch.float64)
    for _ in range(20):
        middle = (low + high) / 2
        holds = worst(bound(model, x, y, middle, precision='float64'), y) > 0
        low = torch.where(holds, middle, low)
        high = torch.where(holds, high, middle)
    assert 0 < low.min() < 1e-3 and low.max() < .2
    excess = worst(bound(model, x, y, low), y) - worst(bound(model, x, y, low, precision='float64'), y)
    assert (excess <= 1e-6*logits.abs().amax(1)).all()
    assert not boxes.proved(bound(model, x, y, high), logits, y).any()

def test_saturated_margins_have_finite_gradients():
    "Bounds of all sizes, and of no size at all, can be learned from; also through CROWN-IBP."
    model, x, y = network('grey and normalised')
    steps = boxes.read(model, x[:1])
    model.train()
    for scale in 1., 1e4:
        for eps in 0., .1:
            with boxes.recorded(steps) as statistics: model(x)
            seen = boxes.folded(steps, x, statistics)
            found = boxes.propagate(seen, ball(x, eps))
            leads = [boxes.margins(seen[-1].layer, found[seen[-1].inputs[0]], y),
                     crown.margins(seen, found, y)]
            for lead in leads:
                model.zero_grad()
                F.cross_entropy(-scale*lead, y).backward(retain_graph=True)
                assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

def test_margins_agree_with_auto_lirpa():
    lirpa = pytest.importorskip('auto_LiRPA', reason='auto_LiRPA cannot be imported here')
    model, x, y = network('grey and normalised')
    box = ball(x, .02)
    bounded = lirpa.BoundedModule(copy.deepcopy(model), x)
    image = lirpa.BoundedTensor(x, lirpa.PerturbationLpNorm(norm=torch.inf, x_L=box.lower, x_U=box.upper))
    lead = torch.eye(10)[y][:, None] - torch.eye(10)
    ours = {'IBP': boxes.margin_bounds(model, x, y, .02), 'CROWN-IBP': crown.margin_bounds(model, x, y, .02),
            'CROWN': crown.margin_bounds(model, x, y, .02, 'crown')}
    for method, found in ours.items():
        lower, _ = bounded.compute_bounds(x=(image,), C=lead, method=method, bound_upper=False)
        torch.testing.assert_close(found, lower.detach(), rtol=1e-4, atol=1e-4)

def test_many_classes_come_in_parts(monkeypatch):
    model, x, y = network('grey and normalised')
    whole = boxes.margin_bounds(model, x, y, .05)
    monkeypatch.setattr(boxes, 'LARGEST', 1000)
    torch.testing.assert_close(boxes.margin_bounds(model, x, y, .05), whole)
    torch.testing.assert_close(boxes.margin_bounds(model, x, y, .05, batch_size=2), whole)

def test_a_few_images_at_a_time_have_the_same_bounds_and_gradients(monkeypatch):
    torch.manual_seed(0)
    sizes = []
    plain = crown.margins
    monkeypatch.setattr(crown, 'margins', lambda steps, boxes, y: sizes.append(len(y)) or plain(steps, boxes, y))
    model = build('cnn_digits', 10, 1, 8).double().eval()
    x = torch.rand(7, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(7)
    steps = boxes.read(model, x)
    widest = 10 * 8 * max(box.lower[0].numel() for box in boxes.propagate(steps, ball(x, .05)))   # bytes for an image
    found = []
    for images in 7, 3, 1:
        model.zero_grad()
        around = boxes.propagate(steps, ball(x, .05))
        bounds = crown.margins_in_parts(steps, around, y, memory=images * widest / 2**20)
        F.softplus(-bounds).sum().backward()
        found.append([bounds.detach(), *(p.grad.clone() for p in model.parameters())])
    assert sizes == [7, 3, 3, 1] + [1] * 7
    assert found[0][1].abs().max() > 0
    for part in found[1:]: torch.testing.assert_close(part, found[0])
    torch.testing.assert_close(found[0][0], plain(steps, around, y).detach())
