"""Every recipe of train_deterministic.ipynb is one that it accepts and builds as it says."""
import pytest
import torch
from test_recipes import ROOT, announced_by, name, read
from test_recipes import asked as asked_of

from rs_toolkit.models import model_names
from rs_toolkit.recipe import (CHECKS_OF_PROOFS, Task, choose_parts, find_teacher, introduce, plain_objective,
                               without_noise)

RECIPES = sorted((ROOT/'recipes').rglob('*_eps*.yaml'))
OURS = ('digits', 'mnist-t10k', 'cifar10-jpeg')        # settings of our own, for a laptop
PUBLISHED = [p for p in RECIPES if p.parent.name not in OURS]
PARAMETERS = announced_by('train_deterministic')
ANNOUNCED = [line.split(':')[0] for line in PARAMETERS.splitlines()]
STAND_IN = dict(teacher=torch.nn.Identity(), num_classes=2)

def asked(given): return asked_of(given, PARAMETERS, CHECKS_OF_PROOFS)

def prepare(given):
    "What the notebook does before the run has a folder."
    config = without_noise(asked(given))
    parts = choose_parts(config)
    task = Task(config['dataset'], augment=config['augment'], normalization=config['normalization'])
    teacher = find_teacher(config, parts, task)
    introduce(parts, task, teacher, config)
    return teacher

@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_a_recipe_is_built_as_it_is_written(path):
    recipe = read(path)
    comment = [line for line in path.read_text().splitlines() if line.startswith('#')]
    assert 1 <= len(comment) <= 3 and max(map(len, comment)) <= 160
    assert [key for key in ANNOUNCED if key in recipe] == list(recipe), 'in the order of train_deterministic.ipynb'
    assert recipe['dataset'].removeprefix('folder:data/cache/') == path.parent.name
    assert recipe['out'] == f"runs/{path.parent.name}-{path.stem.replace('_eps', '-eps')}"
    config = asked(recipe)
    assert {key: config[key] for key in recipe} == recipe                    # converted: 1 is 1.0, nothing else
    method = choose_parts(without_noise(config)).objective(**STAND_IN)
    assert type(method).__name__.lower() == recipe['method'].replace('_', '')
    assert (method.eps, method.seed) == (recipe['eps'], 0)
    args = recipe.get('method_args', {})
    assert {key: getattr(method, key) for key in args} == args
    assert recipe['arch'] in model_names()

# --- the published numbers, typed from the authors' README: a recipe that leaves its setting fails here ---

# eps, epochs, box grows (first epoch, epochs), lr drops, batch size, eps in training, lambda of the warm-up
SCHEDULE = {
    'mnist/0.1': (.1, 70, 0, 20, [50, 60], 256, .2, .5),
    'mnist/0.3': (.3, 70, 0, 20, [50, 60], 256, .4002, .5),
    'cifar10/2_255': (2/255, 160, 1, 80, [120, 140], 128, 2/255, .5),
    'cifar10/8_255': (8/255, 260, 1, 80, [180, 220], 128, 8/255, .5),
    'tinyimagenet/1_255': (1/255, 160, 1, 80, [120, 140], 128, 1/255, .2),
    'imagenet64/1_255': (1/255, 80, 1, 20, [60, 70], 128, 1/255, .2)}

NUMBERS = """
    setting              method    alpha    l1
    mnist/0.1            cc_ibp    0.1      0.000002
    mnist/0.1            mtl_ibp   0.01     0.00001
    mnist/0.3            cc_ibp    0.3      0.000003
    mnist/0.3            mtl_ibp   0.08     0.000001
    cifar10/2_255        cc_ibp    0.01     0.000003
    cifar10/2_255        mtl_ibp   0.004    0.000003
    cifar10/2_255        exp_ibp   0.095    0.000004
    cifar10/2_255        cc_dist   0.01     0.000003
    cifar10/8_255        cc_ibp    0.5      0
    cifar10/8_255        mtl_ibp   0.5      0.0000001
    cifar10/8_255        exp_ibp   0.5      0
    cifar10/8_255        cc_dist   0.5      0
    tinyimagenet/1_255   cc_ibp    0.01     0.00005
    tinyimagenet/1_255   mtl_ibp   0.01     0.00005
    tinyimagenet/1_255   exp_ibp   0.04     0.00005
    tinyimagenet/1_255   cc_dist   0.01     0.00005
    imagenet64/1_255     cc_ibp    0.05     0.00001
    imagenet64/1_255     mtl_ibp   0.05     0.00001
    imagenet64/1_255     exp_ibp   0.05     0.00001
    imagenet64/1_255     cc_dist   0.05     0.00001
"""
ROWS = {(setting, method): (float(alpha), float(l1)) for setting, method, alpha, l1
        in (line.split() for line in NUMBERS.strip().splitlines()[1:])}
SHARES = {'mnist/0.1': .4, 'mnist/0.3': .6, 'cifar10/2_255': .1, 'cifar10/8_255': .7, 'tinyimagenet/1_255': .4}

def setting_of(path): return f"{path.parent.name}/{path.stem.partition('_eps')[2]}"

@pytest.mark.parametrize('path', PUBLISHED, ids=name)
def test_a_recipe_holds_the_published_numbers(path):
    recipe = read(path)
    setting = setting_of(path)
    method = choose_parts(without_noise(asked(recipe))).objective(**STAND_IN)
    grows = method.eps_start, method.eps_epochs
    found = (method.eps, recipe['epochs'], *grows, recipe['lr_drops'], recipe['batch_size'],
             pytest.approx(method.eps * method.eps_factor), method.lbd)
    assert found == SCHEDULE[setting]
    optimizer = [recipe[key] for key in ('arch', 'optimizer', 'lr', 'lr_factor', 'weight_decay', 'clip')]
    assert optimizer == ['cnn7', 'adam', .0005, .2, 0, 10]
    if recipe['method'] == 'sabr': assert method.share == SHARES[setting]
    elif recipe['method'] != 'ibp': assert (method.alpha, method.l1) == ROWS[setting, recipe['method']]
    attack = (8, .25, 2.1) if setting == 'cifar10/2_255' and recipe['method'] != 'ibp' else (1, 10, 1)
    assert (method.steps, method.step_size, method.reach) == attack

def test_every_published_setting_has_its_recipe():
    shares = {(setting, 'sabr') for setting in SHARES}
    plain = {(setting, 'ibp') for setting in SHARES}
    assert {(setting_of(p), read(p)['method']) for p in PUBLISHED} == {*ROWS} | shares | plain

# --- mistakes ---

@pytest.mark.parametrize('given, says', [
    (dict(eps=8), '8/255, not 8'),
    (dict(eps=0), 'eps must be positive'),
    (dict(eps=-.1), 'eps (in [0,1]-pixel units: 8/255, not 8) must be a number from 0 to 1, got -0.1'),
    (dict(method='cc_dits'), "unknown method 'cc_dits': did you mean 'cc_dist'?"),
    (dict(method='gaussian'), "unknown argument of method gaussian 'eps'"),
    (dict(method_args=dict(eps=.2)), 'is left out of method_args'),
    (dict(method_args=dict(bta=1)), "unknown argument of method cc_dist 'bta': did you mean 'beta'?"),
    (dict(method='ibp', method_args=dict(steps=8)), 'attacks nothing: leave out steps'),
    (dict(method='ibp', teacher='cnn_digits'), 'learns from no teacher'),
    (dict(teacher_args=dict(stps=8)), "unknown argument of method adversarial 'stps': did you mean 'steps'?"),
    (dict(epochs=20, method_args=dict(eps_epochs=30)), 'eps_epochs=30 is never reached in a run of 20 epochs'),
    (dict(teacher_epochs=5, lr_drops=[10]), 'is never reached in a run of 5 epochs'),
    (dict(arch='torch.nn:GELU'), 'GELU'),
    (dict(teacher='small_cnn'), 'teacher and student must have as many features: got'),
    (dict(teacher='data/digits-gaussian'), 'teacher and student must agree: sigma is')])
def test_a_mistake_is_told_before_the_run_has_a_folder(given, says):
    with pytest.raises((ValueError, FileNotFoundError)) as e: prepare(given)
    assert says in str(e.value)

def test_a_layer_without_bounds_is_told_before_the_run_has_a_folder(tmp_path, monkeypatch):
    source = ('from torch import nn\n\n'
              'def curved(num_classes, in_channels, image_size):\n'
              '    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.GELU(), nn.Linear(9, num_classes))\n')
    (tmp_path/'networks_of_mine.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match='no bounds are known for GELU.*Known layers: Linear'):
        prepare(dict(arch='networks_of_mine:curved', method='ibp'))

def test_a_teacher_is_trained_as_its_own_arguments_say():
    teacher = prepare(dict(teacher_args=dict(steps=3), teacher_epochs=2, seed=5))
    assert (teacher.arch, teacher.net, teacher.training['epochs']) == ('cnn_digits', None, 2)
    method = plain_objective(without_noise(asked(dict(seed=5))) | teacher.training)
    assert (type(method).__name__, method.eps, method.steps, method.seed) == ('Adversarial', .1, 3, 5)
    as_long = prepare(dict(teacher_epochs=0, epochs=9))
    assert as_long.training['epochs'] == 9
