"Parts of one's own: named by their module, checked before any work, usable to the end."
import json
import sys

import pytest

from forked import forked
from rs_toolkit import catalogue
from rs_toolkit.attacks import ATTACKS
from rs_toolkit.catalogue import Entry
from rs_toolkit.data import load
from rs_toolkit.models import build
from rs_toolkit.recipe import Parts, arguments
from rs_toolkit.run import open_run
from rs_toolkit.train import fit
from test_recipes import asked, choose_parts, prepare
from test_runs import record, succeed

MODULE = '''
import torch
from torch import nn

from rs_toolkit.attacks import smoothed_pgd
from rs_toolkit.methods.consistency import Consistency
from rs_toolkit.methods.core import Method
from rs_toolkit.noise import noisy_logits

class Brier(Method):
    "The distance to the label in place of the cross-entropy."
    def __init__(self, sigma, weight, **kwargs):
        super().__init__(sigma, **kwargs)
        self.weight = weight

    def forward(self, model, x, y, index=None):
        p = noisy_logits(model, x, self.noise(model, x, y, index)).softmax(-1)
        return {'brier': self.weight * (p - nn.functional.one_hot(y, p.shape[-1])).square().sum(-1).mean()}

class Calm(Consistency):
    "A subclass that passes everything on."
    def __init__(self, sigma, calm=1., **kwargs): super().__init__(sigma, **kwargs)

class Alone(Method):
    "A subclass that passes nothing on."
    def __init__(self, sigma): super().__init__(sigma)

def shift(model, x, y, noise, strength=1., by=.1): return noise + by*strength
def flat(model, x, y, noise, strength=1.): return noise.flatten()
def weak(model, x, y, noise): return noise

class Odd:
    "Every second image."
    def __init__(self, sigma, step=2): self.step = step
    def __call__(self, model, data, epoch, augment=None, part=(0, 1)): return torch.arange(len(data[0])) % self.step
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

class Forgetful:
    def __call__(self, model, data, epoch, augment=None, part=(0, 1)): return None

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, image_size, hidden=16):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(in_channels*image_size**2, hidden), nn.ReLU(),
                                  nn.Linear(hidden, num_classes))

    def forward(self, x): return self.body(x)
'''

@pytest.fixture
def own(tmp_path, monkeypatch):
    "A package of one's own, importable here and in the processes that are started."
    package = tmp_path/'my_package'
    package.mkdir()
    (package/'__init__.py').touch()
    (package/'my_module.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, 'my_package', None)             # each test imports its own copy
    monkeypatch.delitem(sys.modules, 'my_package')
    monkeypatch.delitem(sys.modules, 'my_package.my_module', raising=False)
    return tmp_path

def parts(**given):
    plain = dict(sigma=.25, seed=0, num_noise=2, method='gaussian', method_args={}, attack='none', attack_args={},
                 ramp={}, curriculum='none', curriculum_args={})
    return Parts(**plain | given)

def test_a_run_of_own_parts_trains_certifies_and_compares(own):
    run = own/'run'
    finer = own/'finer'
    given = dict(method='my_package.my_module:Brier', method_args=dict(weight=2),
                 attack='my_package.my_module:shift', attack_args=dict(by=.05),
                 curriculum='my_package.my_module:Odd', curriculum_args=dict(step=3),
                 arch='my_package.my_module:Net', arch_args=dict(hidden=40), epochs=3, n=300, every=40)
    succeed('train', run, path=own, out=str(run), **given)
    asked_for = json.loads((run/'config.json').read_text())['parameters']
    assert {name: asked_for[name] for name in given} == given                          # names as they were given
    assert [record(run)[name] for name in ('weight', 'arch_hidden', 'attack_by')] == [2, 40, .05]
    assert (run/'history.csv').read_text().startswith('epoch,lr,kept,brier,')
    succeed('certify', finer, path=own, checkpoint=str(run), out=str(finer), n=500, every=40)
    succeed('compare', own/'table', path=own, runs=[str(run), str(run/'certify.tsv')], radii=[0])

def test_arguments_reach_through_subclasses(own):
    calm = parts(method='my_package.my_module:Calm', method_args=dict(calm=2., lbd=7.))
    method = calm.objective()
    assert (method.lbd, method.num_noise) == (7., 2)                 # lbd is Consistency's, num_noise is Method's
    assert {'calm', 'lbd', 'eta', 'form', 'attack', 'ramp', 'seed'} <= set(arguments(calm.maker.func))
    assert {'model', 'x', 'y', 'noise', 'eps', 'steps', 'norm', 'strength'} == set(arguments(ATTACKS['sphere']))

@pytest.mark.parametrize('given, says', [
    (dict(method='my_package.my_modul:Brier'), 'the module my_package.my_modul cannot be imported here'),
    (dict(method='my_package.my_module:Brie'), "has no attribute 'Brie'"),
    (dict(method='my_package.my_module:Brier'),
     "method my_package.my_module:Brier needs weight: pass -y 'method_args: {weight: ...}'"),
    (dict(method='my_package.my_module:Brier', method_args=dict(wieght=1)), "did you mean 'weight'?"),
    (dict(method='my_package.my_module:Net'), 'must be a subclass of rs_toolkit.methods.core.Method'),
    (dict(method='my_package.my_module:shift'), 'must be a subclass of rs_toolkit.methods.core.Method'),
    (dict(method='none'), 'a run needs a method'),
    (dict(method='my_package.my_module:Alone'),
     'takes no num_noise: leave that out, or let its __init__ pass **kwargs on to Method'),
    (dict(method='my_package.my_module:Alone', num_noise=1, attack='sphere', ramp=dict(switch_on=1)),
     'takes no attack and no ramp'),
    (dict(attack='my_package.my_module:flat'),
     'must return the moved noise [m, b, C, H, W], [2, 1, 3, 32, 32] here, got [6144]'),
    (dict(attack='my_package.my_module:weak'),
     "must answer to attack(model, x, y, noise, strength=1.): got an unexpected keyword argument 'strength'"),
    (dict(attack='my_package.my_module:shift', attack_args=dict(bye=1)),
     "unknown argument of attack my_package.my_module:shift 'bye': did you mean 'by'?"),
    (dict(curriculum='my_package.my_module:Forgetful'), 'has no state_dict and no load_state_dict'),
    (dict(curriculum='my_package.my_module:Odd', curriculum_args=dict(steps=3)), "did you mean 'step'?"),
    (dict(curriculum='my_package.my_module:torch'), 'must be a class or a function, got a module')])
def test_a_mistake_in_a_part_is_told(own, given, says):
    with pytest.raises(ValueError) as e: parts(**given).rehearse()
    assert says in str(e.value)

@pytest.mark.parametrize('given, says', [
    (dict(method='my_package.my_module:Brier'), 'needs weight'),
    (dict(arch='my_package.my_modul:Net'), 'cannot be imported here'),
    (dict(arch='my_package.my_module:Net', arch_args=dict(hiden=3)), "did you mean 'hidden'?")])
def test_a_run_stops_before_any_work(own, given, says):
    with pytest.raises(ValueError) as e: prepare(given)
    assert says in str(e.value)

def test_one_entry_brings_a_method_into_the_laboratory(own, monkeypatch):
    entry = Entry('brier', 'Brier', '#123456', 'my_package.my_module:Brier')
    monkeypatch.setitem(catalogue.METHODS, entry.key, entry)
    parts = choose_parts(asked(dict(method='brier', method_args=dict(weight=2.))))
    history = fit(build('mlp', 10, 1, 8), parts.objective(), load('digits', 'train'), 2, device='cpu', progress=False)
    assert history.brier.iloc[-1] < history.brier.iloc[0]
    with pytest.raises(ValueError, match="unknown method 'brir': did you mean 'brier'"):
        choose_parts(asked(dict(method='brir')))

def imported_for_macer():
    parts(method='macer')
    print(*(name for name in sys.modules if name.startswith('rs_toolkit.methods.')))

def test_a_run_imports_the_method_it_needs_and_no_other():
    code, said = forked(imported_for_macer)
    assert code == 0, said
    imported = {name.rpartition('.')[2] for name in said.split()}
    assert 'macer' in imported
    assert imported <= {'core', 'macer', 'gaussian', 'catrs'}, 'teachers and their predictions are made by the last two'

def test_a_default_folder_has_a_legal_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, lock = open_run('', 'folder:my birds-my_package.my_module:Brier-0.25', {})
    lock.release()
    assert folder == tmp_path/'runs'/'folder-my-birds-my_package.my_module-Brier-0.25'
