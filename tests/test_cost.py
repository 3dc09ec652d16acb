"""What methods cost: counted by the library, and written down here by the published formulas."""
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from slow import every
from torch import nn

from rs_toolkit.attacks import ddn, gradient_free, smoothed_pgd, sphere_attack
from rs_toolkit.data import load
from rs_toolkit.methods.catrs import CATRS
from rs_toolkit.methods.consistency import Consistency
from rs_toolkit.methods.core import Method, switch_on
from rs_toolkit.methods.cost import Passes, passes_of
from rs_toolkit.methods.crt import CRT
from rs_toolkit.methods.gaussian import Gaussian
from rs_toolkit.methods.macer import MACER
from rs_toolkit.methods.smoothmix import SmoothMix
from rs_toolkit.methods.sodm import SODM
from rs_toolkit.methods.stability import Stability
from rs_toolkit.models import build
from rs_toolkit.noise import noisy_logits

README = Path(__file__).resolve().parents[1]/'README.md'
IMAGES, LABELS = load('digits', 'train')

def network():
    torch.manual_seed(0)
    return build('small_cnn', 10, 1, 8)

def count(method, model=None, labels=LABELS[:6]):
    return passes_of(method, model or network(), IMAGES[:6], labels, torch.arange(6))

def attacked(m, attack, T, **kwargs): return Gaussian(.25, num_noise=m, attack=partial(attack, steps=T), **kwargs)
def votes(): return torch.ones(len(IMAGES), 10).long()

COST = {  # name -> method, its passes for one clean image, and the formula: m noises, T steps of the attack
    'gaussian': (lambda: Gaussian(.25), Passes(1, 1), 1),
    'gaussian m=4': (lambda: Gaussian(.25, num_noise=4), Passes(4, 4), 4),
    'stability': (lambda: Stability(.25), Passes(2, 2), 2),
    'smoothadv m=1': (lambda: attacked(1, smoothed_pgd, 10), Passes(11, 1, 10), (2*10 + 3) / 3),
    'smoothadv m=2': (lambda: attacked(2, smoothed_pgd, 10), Passes(22, 2, 20), 2 * (2*10 + 3) / 3),
    'one noise trained': (lambda: attacked(4, smoothed_pgd, 10, trained=1), Passes(41, 1, 40), (2*4*10 + 3) / 3),
    'ddn': (lambda: attacked(2, ddn, 4), Passes(10, 2, 8), 2 * (2*4 + 3) / 3),
    'gradient-free': (lambda: attacked(2, gradient_free, 10), Passes(22, 2), 2 * (10 + 3) / 3),
    'before the attack': (lambda: attacked(4, sphere_attack, 6, ramp=switch_on(1)), Passes(4, 4), 4),
    'macer': (lambda: MACER(.25, num_noise=16), Passes(16, 16), 16),
    'consistency': (lambda: Consistency(.25, num_noise=2), Passes(2, 2), 2),
    'consistency, attacked': (lambda: Consistency(.25, num_noise=2, attack=partial(smoothed_pgd, steps=10)),
                              Passes(22, 2, 20), 2 * (2*10 + 3) / 3),
    'smoothmix': (lambda: SmoothMix(.25, num_noise=2, steps=4), Passes(12, 4, 8), 2 * (2*4 + 6) / 3),
    'smoothmix one-step': (lambda: SmoothMix(.25, num_noise=2, steps=4, mix_step=1), Passes(12, 4, 8),
                           2 * (2*4 + 6) / 3),
    'catrs': (lambda: CATRS(.25, votes(), num_noise=4, steps=4), Passes(24, 8, 16), 4 * (2*4 + 6) / 3),
    'sodm': (lambda: SODM(.25, 10, mapping='temperature', num_noise=16, mapping_noise=128, interval=5),
             Passes(16 + 128/5, 16), 16 + 128 / (3*5)),
    'sodm, line 11': (lambda: SODM(.25, 10, mapping='temperature', num_noise=16, repeat=True),
                      Passes(16 + 128/5, 16 + 128/5), 16 + 128/5),
    'sodm without mapping': (lambda: SODM(.25, 10, num_noise=16), Passes(16, 16), 16),
    'crt': (lambda: CRT(.25, build('mlp', 10, 1, 8)), Passes(1, 1, teacher=1), 4/3),
}

@every(COST)
def test_published_costs(name):
    make, passes, slow_down = COST[name]
    counted = count(make())
    assert vars(counted) == pytest.approx(vars(passes))
    assert counted.slow_down() == pytest.approx(slow_down)

def test_a_smaller_teacher_costs_less():
    "ResNet-20 teaches ResNet-110: the published factor is 1.05."
    assert count(CRT(.25, network())).slow_down(teacher_cost=1/6.2) == pytest.approx(1 + 1/6.2/3)

def test_sphere_attack_costs_least_where_the_network_is_wrong():
    model = network()
    method = Gaussian(1e-4, num_noise=4, attack=partial(sphere_attack, steps=6, eps=1e-5))
    model.eval()
    with torch.no_grad(): answers = model(IMAGES[:6]).argmax(1)
    right = count(method, model, answers)
    assert right == Passes(4 * (6 + 1), 4, 4 * 6), 'nothing is fooled: m(2T+3)'
    assert right.slow_down() == 4 * (2*6 + 3) / 3
    wrong = count(method, model, (answers + 1) % 10)
    assert wrong.forward == 2*4, 'noises that fool the network from the start are looked at once'
    assert wrong.backward == 4
    assert wrong.input_backward <= 4

# --- parts of one's own

def nudge(model, x, y, noise, strength=1.):
    "Exactly the arguments that an attack must have; it freezes nothing."
    noise = noise.clone().requires_grad_()
    loss = nn.functional.cross_entropy(noisy_logits(model, x, noise).flatten(0, 1), y.repeat(len(noise)))
    slope, = torch.autograd.grad(loss, noise)
    return (noise + strength * slope).detach()

def test_an_attack_of_ones_own(): assert count(Gaussian(.25, num_noise=3, attack=nudge)) == Passes(6, 3, 3)

def test_the_method_of_the_readme():
    code, = re.findall(r'```python\n(# my_method.py\n.*?)```', README.read_text(), re.S)
    namespace = {}
    exec(code, namespace)
    assert count(namespace['Brier'](.25, num_noise=3)) == Passes(3, 3)
    assert count(namespace['Brier'](.25, num_noise=3, attack=nudge)) == Passes(6, 3, 3)

class Both(Method):
    "Clean and noisy images, and two teachers in a list."
    def __init__(self, sigma, **kwargs):
        super().__init__(sigma, **kwargs)
        self.teachers = nn.ModuleList([build('mlp', 10, 1, 8), build('mlp', 10, 1, 8)])

    def forward(self, model, x, y, index=None):
        noise = self.noise(model, x, y, index)
        with torch.no_grad(): target = sum(noisy_logits(teacher, x, noise) for teacher in self.teachers)
        return {'clean': model(x).square().mean(), 'noisy': (noisy_logits(model, x, noise) - target).square().mean()}

def test_a_method_of_ones_own(): assert count(Both(.25, num_noise=3)) == Passes(4, 4, teacher=6)

def test_counting_changes_nothing():
    model = network()
    method = SODM(.25, 10, mapping='temperature', num_noise=2, mapping_noise=8)
    before = [t.clone() for part in (model, method) for t in part.state_dict().values() if isinstance(t, torch.Tensor)]
    model.eval()
    count(method, model)
    after = [t for part in (model, method) for t in part.state_dict().values() if isinstance(t, torch.Tensor)]
    for was, now in zip(before, after, strict=True): assert torch.equal(was, now)
    assert not model.training
    for name, p in model.named_parameters(): assert p.grad is None, name
