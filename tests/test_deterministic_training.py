"Training with bounds: what the loop does for it, and what a batch leaves behind."
import copy

import pytest
import torch
from torch import nn

from rs_toolkit.data import load
from rs_toolkit.deterministic.boxes import BATCH_NORMS, Box, propagate, read
from rs_toolkit.deterministic.training import (CCIBP, IBP, NFGSM, SABR, Adversarial, Best, CCDist, initialise,
                                               warm_up_term)
from rs_toolkit.methods.core import Method
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.models import CifarResNet, build, weights_hash
from rs_toolkit.train import fit

X, Y = (t[:100] for t in load('digits', 'train'))

def network(seed=0):
    torch.manual_seed(seed)
    return build('cnn_digits', 10, 1, 8)

class Clocked(IBP):
    "Notes the half-width of the box in each step."
    def start_step(self, step, steps):
        super().start_step(step, steps)
        self._seen = [*getattr(self, '_seen', []), (self.epoch, step, steps, self.radius)]

def test_the_box_grows_from_step_to_step():
    method = Clocked(.1, eps_factor=2., eps_start=1, eps_epochs=2)
    history = fit(network(), method, (X, Y), 4, batch_size=30, lr=1e-4, progress=False)
    seen = method._seen
    assert [s[:3] for s in seen] == [(epoch, step, 4) for epoch in range(4) for step in range(4)]
    radii = [s[3] for s in seen]
    assert radii == sorted(radii) and radii[4] == 0 < radii[5] and radii[11] < .2 and radii[12:] == [.2]*4
    assert (history.warm_up.iloc[:3] >= 0).all() and 'noisy_accuracy' not in history

class Diary(Gaussian):
    "Notes what the loop calls."
    def __init__(self):
        super().__init__(.25)
        self._calls = []

    def start_run(self, epochs): self._calls.append(f'run of {epochs}')
    def meet(self, model, x): self._calls.append(f'meet {len(x)}')
    def start_step(self, step, steps): self._calls.append(f'step {step} of {steps}')
    def end_epoch(self, model, data): self._calls.append(f'end {[len(x) for x, *_ in data()]}')
    def after_step(self, model, x, y, index=None): self._calls.append(f'after {len(x)}')
    def start_epoch(self, epoch):
        super().start_epoch(epoch)
        if hasattr(self, '_calls'): self._calls.append(f'epoch {epoch}')

    def forward(self, model, x, y, index=None):
        self._calls.append(f'forward {len(x)}')
        return super().forward(model, x, y, index)

def test_the_loop_calls_a_method_in_the_order_that_it_says():
    method = Diary()
    fit(network(), method, (X, Y), 1, batch_size=60, micro_batch=50, lr=.01, progress=False)
    assert method._calls == ['run of 1', 'meet 2', 'epoch 0', 'step 0 of 2', 'forward 50', 'forward 10', 'after 60',
                             'step 1 of 2', 'forward 40', 'after 40', 'end [60, 40]']

@pytest.mark.parametrize('length', [.01, .1])
def test_a_long_gradient_is_cut_to_its_length(length):
    class Steep(Method):
        noisy = False
        def __init__(self): super().__init__(0.)
        def forward(self, model, x, y, index=None): return {'sum': 1e3 * model[1].weight.sum()}

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = model[1].weight.detach().clone()
    fit(model, Steep(), (X, Y), 1, batch_size=100, lr=1., weight_decay=0., clip=length, progress=False)
    change = (model[1].weight.detach() - before).norm().item()
    assert change == pytest.approx(length, rel=1e-3)

def test_a_limit_that_no_gradient_reaches_changes_nothing():
    hashes = set()
    for clip in None, 1e6:
        model = network()
        fit(model, Gaussian(.25), (X, Y), 2, lr=.01, clip=clip, progress=False)
        hashes.add(weights_hash(model))
    assert len(hashes) == 1
    for wrong in 0, -1, float('nan'):
        with pytest.raises(ValueError, match='clip'):
            fit(network(), Gaussian(.25), (X, Y), 1, clip=wrong, progress=False)

def test_a_layer_behind_a_sum_starts_half_as_wide():
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 3, width=32)
    initialise(model, read(model, torch.rand(1, 3, 32, 32)))
    def scale(layer): return layer.weight.std().item() * layer.weight[0].numel() / (2*torch.pi)**.5
    for layer, wanted in ((model.layer1[0].conv2, 1), (model.layer2[0].conv1, .5), (model.layer3[0].conv1, .5),
                          (model.layer2[0].downsample[0], .5), (model.layer2[0].conv2, 1)):
        assert scale(layer) == pytest.approx(wanted, rel=.1)

def test_a_state_from_before_the_factor_could_be_chosen_goes_on(tmp_path):
    def go_on(**kwargs):
        return fit(network(), Gaussian(.25), (X, Y), 1, lr=.01, resume=tmp_path/'state.pt', progress=False, **kwargs)

    go_on()
    state = torch.load(tmp_path/'state.pt', weights_only=True)
    del state['setup']['lr_factor'], state['setup']['clip']
    torch.save(state, tmp_path/'state.pt')
    assert len(go_on()) == 1
    with pytest.raises(ValueError, match='lr_factor was None, is 0.2'): go_on(lr_factor=.2)

class Seen(CCIBP):
    "Keeps the last view."
    def losses(self, view):
        self._view = view
        return super().losses(view)

def dropping():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(.5),
                         nn.Flatten(), nn.Linear(512, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 10))

@pytest.mark.parametrize('mode', ['train', 'eval', 'mixed'])
@pytest.mark.parametrize('bn', ['adv', 'clean'])
def test_worst_points_pass_inside_their_box(bn, mode):
    model = dropping()
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS): nn.init.normal_(layer.weight)
    model.train(mode != 'eval')
    if mode == 'mixed': model[1].eval()
    method = Seen(.1, bn=bn)
    method(model, X[:20], Y[:20], torch.arange(20))
    view = method._view
    inside = view.worst.features
    tolerance = 1e-5 * inside.abs().max()
    assert (inside >= view.features.lower - tolerance).all() and (inside <= view.features.upper + tolerance).all()
    assert (view.bounds <= view.leads + 1e-4 * view.leads.abs().max()).all()
    assert model[3].training == (mode != 'eval')                                        # as it was

def test_clean_statistics_are_those_of_all_clean_images():
    model = network()
    fit(model, CCIBP(.1, bn='clean'), (X, Y), 2, batch_size=50, lr=1e-3, optimizer='adam', progress=False)
    fresh = copy.deepcopy(model)
    mean = fresh[1][0](X).mean((0, 2, 3))
    torch.testing.assert_close(model[1][1].running_mean, mean, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('make', [lambda: CCIBP(.1, restarts=2), lambda: SABR(.1, steps=2, step_size=.5, reach=2.),
                                  lambda: Adversarial(.1), lambda: NFGSM(.1)])
def test_worst_points_do_not_depend_on_the_batch(make):
    method = make()
    model = network().eval()
    index = torch.tensor([7, 3, 50])
    whole = method.worst(model, X[index], Y[index], index)
    alone = torch.cat([method.worst(model, X[i:i+1], Y[i:i+1], torch.tensor([i])) for i in index.tolist()])
    assert (whole - alone).abs().gt(1e-4).float().mean() < .02              # but for signs of gradients next to zero
    assert not torch.equal(whole, X[index])

def test_a_wide_start_leaves_the_box_and_not_the_pixels():
    method = NFGSM(.1)
    points = method.worst(network().eval(), X, Y, torch.arange(100))
    assert points.min() >= 0 and points.max() <= 1 and (points - X).abs().max() <= .3 + 1e-6
    assert (points - X).abs().max() > .15

def test_the_best_point_of_each_image_is_kept():
    best = Best()
    best.offer(torch.zeros(2, 1, 1, 1), torch.tensor([1., 3.]))
    best.offer(torch.ones(2, 1, 1, 1), torch.tensor([2., 2.]))
    assert best.x.flatten().tolist() == [1, 0] and best.loss.tolist() == [2, 3]

def test_a_network_goes_on_from_where_it_is_if_asked():
    model = network()
    start = model[1][0].weight.detach().clone()
    IBP(.1, initialised=False).meet(model, X[:2])
    assert torch.equal(model[1][0].weight, start)
    IBP(.1).meet(model, X[:2])
    assert not torch.equal(model[1][0].weight, start)

def test_every_way_to_match_is_another_loss():
    teacher = network(1)
    def distance(**given):
        terms = CCDist(.1, teacher, **given)(copy.deepcopy(network()).train(), X[:20], Y[:20], torch.arange(20))
        return terms['distill'].item()
    box, adversarial, clean = (distance(match=match) for match in ('box', 'adversarial', 'clean'))
    assert len({box, adversarial, clean}) == 3 and adversarial <= box
    assert distance(alpha_dist=0.) == pytest.approx(adversarial)
    assert distance(beta=10.) == pytest.approx(2 * box)
    target = CCDist(.1, teacher).told(X[:20]).features
    assert distance(normalize=True) == pytest.approx(box / target.square().mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match='did you mean'): CCDist(.1, teacher, match='adversarail')
    with pytest.raises(ValueError, match='checkpoint.load'): CCDist(.1, 'teacher.pt')

def test_clean_features_have_gradients_when_they_are_matched():
    model = network()
    terms = CCDist(.1, network(1), match='clean')(model, X[:20], Y[:20], torch.arange(20))
    terms['distill'].backward()
    assert model[1][0].weight.grad.abs().sum() > 0

def test_the_warm_up_term_is_finite_for_a_box_without_width():
    model = network()
    steps = read(model, X[:1])
    boxes = propagate(steps, Box(X[:5], X[:5]))
    value = warm_up_term(steps, boxes)
    value.backward()
    assert value.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('bn', ['adv', 'clean'])
def test_bounds_are_float32_whatever_the_network_computes_in(bn):
    method = Seen(.1, bn=bn)
    model = network()
    model.train()
    with torch.autocast('cpu', torch.bfloat16):
        method(model, X[:20], Y[:20], torch.arange(20))
        view = method._view
        assert view.bounds.dtype == view.features.lower.dtype == view.leads.dtype == torch.float32
        found = view.bounds
    torch.testing.assert_close(found, view.bounds, rtol=0, atol=0)
    history = fit(network(), CCDist(.1, network(1), bn=bn), (X, Y), 2, precision='bfloat16', lr=1e-3, progress=False)
    assert history.notna().all(axis=None)
