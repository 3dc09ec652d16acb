"""Every recipe is one that train.ipynb accepts and builds as it says; the published ones hold the published numbers."""
import re
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from papermill.translators import PythonTranslator

from rs_toolkit.attacks import ATTACKS
from rs_toolkit.checkpoint import save
from rs_toolkit.models import build
from rs_toolkit.recipe import CHECKS, Task, choose_parts, find_start, find_teacher
from rs_toolkit.run import parameters
from rs_toolkit.train import check_run

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(p for p in (ROOT/'recipes').rglob('*.yaml') if '_eps' not in p.stem)  # those: test_recipes_of_proofs
PUBLISHED = [p for p in RECIPES if p.parent.name != 'digits']        # digits: our own settings, for a laptop
DIGITS = [p for p in RECIPES if p.parent.name == 'digits']
MUST = {'dataset', 'arch', 'method', 'num_noise', 'sigma', 'epochs', 'batch_size', 'optimizer', 'lr', 'weight_decay',
        'schedule', 'lr_drops', 'augment', 'normalization', 'precision', 'n0', 'n', 'alpha', 'every', 'out'}
STAND_IN = dict(teacher=torch.nn.Identity(), predictions=torch.ones(1, 2, dtype=torch.long), num_classes=2)

def announced_by(book):
    "The cell of a run notebook that announces its parameters."
    found = nbformat.read(ROOT/'nbs'/f'{book}.ipynb', 4).cells
    [cell] = [cell.source for cell in found if 'parameters' in cell.metadata.get('tags', [])]
    return cell

PARAMETERS = announced_by('train')
ANNOUNCED = [line.split(':')[0] for line in PARAMETERS.splitlines()]

def asked(given, announced=PARAMETERS, checks=CHECKS):
    "The configuration of a run that papermill gives these values."
    cells = ['', announced, PythonTranslator.codify(given, 'Parameters')]
    space = {}
    for source in cells: exec(source, space)
    return parameters(cells, space, checks)

def prepare(given):
    "What train.ipynb does before the run has a folder: parts, images, teacher."
    config = asked(given)
    parts = choose_parts(config)
    task = Task(config['dataset'], augment=config['augment'], normalization=config['normalization'])
    task.network(config['arch'], config['arch_args'])
    return find_teacher(config, parts, task)

def name(path): return f'{path.parent.name}/{path.stem}'
def read(path): return yaml.safe_load(path.read_text())
def mappings(recipe): return [v for v in recipe.values() if isinstance(v, dict)]

@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_a_recipe_is_read_as_it_is_written(path):
    recipe = read(path)
    assert path.read_text().startswith('# ')
    assert path.parent.name == recipe['dataset']
    assert path.stem.endswith(f"_{recipe['sigma']}")
    assert set(recipe) <= set(ANNOUNCED), 'a key that nothing reads'
    for value in [*recipe.values(), *(v for part in mappings(recipe) for v in part.values())]:
        assert value is not None
        number = isinstance(value, str) and value[:1].isdigit()
        assert not number, f'{value!r}: YAML takes 1e-4 for a string; write 0.0001'

@pytest.mark.parametrize('path', PUBLISHED, ids=name)
def test_a_published_recipe_is_whole(path):
    recipe = read(path)
    comment = [line for line in path.read_text().splitlines() if line.startswith('#')]
    assert 1 <= len(comment) <= 3
    assert max(map(len, comment)) <= 160
    assert MUST <= set(recipe)
    assert [key for key in ANNOUNCED if key in recipe] == list(recipe), 'in the order of train.ipynb'
    folder = f"runs/{recipe['dataset']}-{path.stem.rpartition('_')[0]}-{recipe['sigma']}"
    assert recipe['out'] == folder, 'no two recipes share a folder'

def ramp(given, epoch, epochs):
    "What the names in a recipe promise, written anew; a number below 1 is a part of the run."
    at = {name: when * epochs if when < 1 else when for name, when in given.items()}
    strength = min(1., (epoch + 1) / at['warm_up']) if 'warm_up' in at else 1.
    if 'switch_on' in at and epoch < at['switch_on']: return 0.
    return 2*strength if epoch >= at.get('double_from', 10**9) else strength

@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_train_builds_what_the_recipe_says(path):
    recipe = read(path)
    config = asked(recipe)
    assert {k: config[k] for k in recipe} == recipe                    # converted: 1 is 1.0, nothing else
    parts = choose_parts(config)
    method = parts.objective(**STAND_IN)
    assert type(method).__name__.lower() == recipe['method']
    assert (method.sigma, method.num_noise) == (recipe['sigma'], recipe['num_noise'])
    args = dict(recipe.get('method_args', {}))
    if recipe['method'] == 'sodm':
        assert type(method.mapping) is import_module('rs_toolkit.methods.sodm').MAPPINGS[args.pop('mapping', 'none')]
        mapping_lr = args.pop('mapping_lr', .001)
        assert method.optimizer is None or method.optimizer.defaults['lr'] == mapping_lr
    assert {k: getattr(method, k) for k in args} == args
    assert (method.attack is None) == ('attack' not in recipe)
    if method.attack:
        assert method.attack.func is ATTACKS[recipe['attack']]
        assert method.attack.keywords == recipe['attack_args']
    choice = parts.choice()
    check_run(recipe['epochs'], method, choice, schedule=recipe.get('schedule'), lr_drops=recipe.get('lr_drops'))
    for epoch in range(0, recipe['epochs'], 5):
        method.start_epoch(epoch)
        promised = ramp(recipe.get('ramp', {}), epoch, recipe['epochs'])
        assert method.strength == pytest.approx(promised), f'in epoch {epoch}'
    assert (choice is None) == ('curriculum' not in recipe)
    if choice:
        assert choice.sigma == recipe['sigma']
        assert {k: getattr(choice, k) for k in recipe['curriculum_args']} == recipe['curriculum_args']
    assert parts.learns == ('teacher' in recipe or recipe['method'] == 'catrs')

TIMED = [('cifar10/acr_0.25', 'switch_on=59'), ('cifar10/smoothadv_0.25', 'warm_up=10'),
         ('cifar10/macer_1.0', 'defer=50'), ('cifar10/sodm_0.25', 'boost_from=35'),
         ('cifar10/gaussian_0.25', 'lr_drops=50'), ('imagenet/catrs_1.0', 'double_from=80')]

@pytest.mark.parametrize('recipe, part', TIMED)
def test_a_published_recipe_that_is_cut_short_says_so(recipe, part):
    "Of a method, its attack, its curriculum or its rate."
    short = asked(read(ROOT/'recipes'/f'{recipe}.yaml') | dict(epochs=5))
    with pytest.raises(ValueError, match=f'{part} is never reached in a run of 5 epochs.*a part of the run'):
        choose_parts(short)

@pytest.mark.parametrize('path', DIGITS, ids=name)
@pytest.mark.parametrize('epochs', [2, 20, 50])
def test_a_shortened_recipe_for_digits_is_a_shortened_recipe(path, epochs):
    recipe = read(path)
    method = choose_parts(asked(recipe | dict(epochs=epochs))).objective(**STAND_IN)
    method.start_run(epochs)
    strengths = [method.strength_at(epoch) for epoch in range(epochs)]
    assert max(strengths) == 1
    assert strengths.count(0) == (int(.4*epochs) if 'switch_on' in recipe.get('ramp', {}) else 0)

@pytest.mark.parametrize('change', re.findall("-y '(.*?)'`", (ROOT/'recipes/README.md').read_text()))
def test_the_acr_recipe_can_lose_a_part_as_its_readme_says(change):
    parts = choose_parts(asked(read(ROOT/'recipes/cifar10/acr_0.25.yaml') | yaml.safe_load(change)))
    choice = parts.choice()
    kept = bool(parts.mover), bool(choice and choice.threshold), bool(choice and choice.reweigh)
    assert False in kept and True in kept

@pytest.mark.parametrize('recipe, change, says', [
    ('gaussian_0.5', dict(num_nose=2), "unknown parameter 'num_nose': did you mean 'num_noise'"),
    ('gaussian_0.5', dict(method='gausian'), "unknown method 'gausian': did you mean 'gaussian'"),
    ('macer_0.5', dict(method_args=dict(lbda=4.)), "unknown argument of method macer 'lbda': did you mean 'lbd'"),
    ('macer_0.5', dict(method='consistency'), "unknown argument of method consistency 'gamma'"),  # of another method
    ('macer_0.5', dict(method_args=dict(lbd='four')), 'lbd'),
    ('consistency_0.5', dict(num_noise=1), 'num_noise'),
    ('consistency_0.5', dict(method_args=dict(form='kl+entropie')), "did you mean 'kl+entropy'"),
    ('catrs_0.5', dict(method_args=dict(confidence='nosy')), "did you mean 'noisy'"),
    ('sodm_0.5', dict(method_args=dict(mapping='temprature')), "did you mean 'temperature'"),
    ('sodm_0.5', dict(optimizer='sdg'), "unknown optimizer 'sdg': did you mean 'sgd'"),
    ('smoothadv_0.5', dict(attack='smooth_pgd'), "unknown attack 'smooth_pgd': did you mean 'smoothed_pgd'"),
    ('smoothadv_0.5', dict(attack_args=dict(eps=1., step=10)),
     "unknown argument of attack smoothed_pgd 'step': did you mean 'steps'"),
    ('smoothadv_0.5', dict(attack='none'), 'but no attack'),
    ('smoothadv_0.5', dict(attack_args=dict(eps=-1., steps=10)), 'eps'),
    ('smoothadv_0.5', dict(ramp=dict(warmup=10)), "unknown ramp 'warmup': did you mean 'warm_up'"),
    ('acr_0.5', dict(curriculum='easydata'), "unknown curriculum 'easydata': did you mean 'easy_data'"),
    ('acr_0.5', dict(curriculum='none'), 'but no curriculum'),
    ('acr_0.5', dict(curriculum_args=dict(start=70, treshold=.4)),
     "unknown argument of curriculum easy_data 'treshold': did you mean 'threshold'"),
    ('acr_0.5', dict(curriculum_args=dict(start=70, threshold=40)), 'threshold'),
    ('gaussian4_0.5', dict(teacher='runs/cifar10-smoothmix-0.5'),
     "method gaussian learns from no teacher, got 'runs/cifar10-smoothmix-0.5'"),
])
def test_a_mistake_in_a_recipe_is_named_before_any_data_is_read(recipe, change, says):
    given = read(ROOT/'recipes/cifar10'/f'{recipe}.yaml')
    with pytest.raises(ValueError) as e: choose_parts(asked(given | change))
    assert says in str(e.value)

@pytest.mark.parametrize('given, says', [
    (dict(method='crt', method_args=dict(mach='softmax')),
     "unknown argument of method crt 'mach': did you mean 'match'?"),
    (dict(method='crt', method_args=dict(match='sofmax')), "unknown space to match 'sofmax': did you mean 'softmax'?"),
    (dict(attack='sfere', attack_args=dict(steps=2)), "unknown attack 'sfere': did you mean 'sphere'?"),
    (dict(attack='sphere', attack_args=dict(steps=0)), 'steps must be a whole number of at least 1'),
    (dict(curriculum='easy'), "unknown curriculum 'easy': did you mean 'easy_data'?"),
    (dict(method='macer', method_args=dict(eps=1.)), "unknown argument of method macer 'eps'"),
    (dict(method='smoothmix', attack='sphere'), 'brings an attack of its own'),
    (dict(teacher='small_cnn'), 'method gaussian learns from no teacher'),
    (dict(method='crt', teacher='nowhere'), 'no checkpoint at'),
    (dict(arch='resnet19'), "unknown model 'resnet19'"),
    (dict(arch_args=dict(depth=3)), "unknown argument of model small_cnn 'depth'"),
    (dict(dataset='folder:/nowhere'), 'has no train and no test'),
    (dict(epochs='many'), "parameter epochs must be of type int, got 'many'"),
    (dict(sigma=-1), 'sigma must be a positive number'),
    (dict(alpha=5), 'alpha is the chance that a certificate is wrong'),
    (dict(every=0), 'every must be a whole number of at least 1'),
    (dict(lr=-1), 'lr must be a number of at least 0'),
    (dict(schedule='cosin'), "did you mean 'cosine'?"),
    (dict(augment='crop'), "unknown augmentation 'crop'"),
    (dict(epochs=20, attack='sphere', ramp=dict(switch_on=40)), 'switch_on=40 is never reached in a run of 20 epochs'),
    (dict(epochs=20, curriculum='easy_data', curriculum_args=dict(start=40)),
     'start=40 is never reached in a run of 20 epochs'),
    (dict(epochs=20, lr_drops=[10, 30]), 'is never reached in a run of 20 epochs'),
])
def test_a_mistake_is_told_before_the_run_has_a_folder(given, says):
    with pytest.raises((ValueError, FileNotFoundError)) as e: prepare(given)
    assert says in str(e.value)

def test_a_run_that_asks_for_nothing_is_ready():
    assert prepare({}) is None

@pytest.mark.parametrize('given, sigma, arch', [
    (dict(method='crt', sigma=.5), .5, 'small_cnn'),
    (dict(method='crt', teacher='mlp'), .25, 'mlp'),
    (dict(method='catrs', num_noise=2, sigma=.5), .25, 'small_cnn')])
def test_a_teacher_that_is_trained_first(given, sigma, arch):
    "CRT's has the noise of its student; that of CAT-RS has little noise, always."
    teacher = prepare(given)
    assert (teacher.sigma, teacher.arch, teacher.net) == (sigma, arch, None)

def test_a_teacher_that_is_opened_must_agree():
    teacher = 'data/digits-methods/equal_epochs/smoothmix'
    assert prepare(dict(method='crt', sigma=.5, teacher=teacher)).net.metadata['method'] == 'smoothmix'
    with pytest.raises(ValueError, match='teacher and student must agree: sigma is 0.5'):
        prepare(dict(method='crt', sigma=.25, teacher=teacher))

# --- the published numbers, typed from the papers: a change of a recipe that leaves its setting fails here ---

# network, epochs, lr, its drops, weight decay, noisy images per optimizer step
SCHEDULE = {
    'cifar10': ('cifar_resnet110', 150, .1, [50, 100], 1e-4, 256),
    'mnist': ('lenet', 90, .01, [30, 60], 1e-4, 256),
    'imagenet': ('resnet50', 90, .1, [30, 60], 1e-4, 400),
    'cifar10/gaussian_original': ('cifar_resnet110', 90, .1, [30, 60], 1e-4, 400),
    'cifar10/macer': ('cifar_resnet110', 150, .1, [50, 100], 1e-4, 256*16),
    'cifar10/macer_original': ('cifar_resnet110', 440, .01, [200, 400], 5e-4, 64*16),
    'cifar10/sodm': ('cifar_resnet110', 55, .01, [35, 50], 1e-4, 64*16),
    'cifar10/crt': ('cifar_resnet110', 200, .1, [100, 150], 1e-4, 128),
    'mnist/macer': ('lenet', 90, .01, [30, 60], 1e-4, 256*16),
    'imagenet/consistency': ('resnet50', 90, .1, [30, 60], 1e-4, 200),
    'imagenet/catrs': ('resnet50', 90, .1, [30, 60, 85], 1e-4, 256),
    'imagenet/sodm': ('resnet50', 30, .01, [20, 25], 1e-4, 64*2),
    'imagenet/crt': ('resnet50', 90, .1, [45, 68], 1e-4, 400),
    'imagenet/acr': ('resnet50', 90, .1, [50], 1e-4, 256)}

SETTING = """
    recipe                        key                               .25          .5           1.0
    cifar10/gaussian              method                            gaussian     gaussian     gaussian
    cifar10/gaussian              num_noise                         1            1            1
    cifar10/gaussian_original     num_noise                         1            1            1
    cifar10/gaussian4             method                            gaussian     gaussian     gaussian
    cifar10/gaussian4             num_noise                         4            4            4
    cifar10/stability             method                            stability    stability    stability
    cifar10/stability             num_noise                         1            1            1
    cifar10/stability             method_args.lbd                   2            2            1
    cifar10/smoothadv             method                            gaussian     gaussian     gaussian
    cifar10/smoothadv             attack                            smoothed_pgd smoothed_pgd smoothed_pgd
    cifar10/smoothadv             attack_args.eps                   1            1            2
    cifar10/smoothadv             attack_args.steps                 10           10           10
    cifar10/smoothadv             num_noise                         4            8            2
    cifar10/smoothadv             ramp.warm_up                      10           10           10
    cifar10/macer                 num_noise                         16           16           16
    cifar10/macer                 method_args.lbd                   12           4            12
    cifar10/macer                 method_args.gamma                 8            8            8
    cifar10/macer                 method_args.beta                  16           16           16
    cifar10/macer                 method_args.defer                 0            0            50
    cifar10/macer                 normalization                     standard     standard     standard
    cifar10/macer_original        num_noise                         16           16           16
    cifar10/macer_original        method_args.lbd                   12           4            12
    cifar10/macer_original        method_args.defer                 0            0            200
    cifar10/macer_original        normalization                     none         none         none
    cifar10/consistency           num_noise                         2            2            2
    cifar10/consistency           method_args.lbd                   20           10           10
    cifar10/consistency           method_args.eta                   .5           .5           .5
    cifar10/consistency_smoothadv num_noise                         4            2            2
    cifar10/consistency_smoothadv method_args.lbd                   2            1            1
    cifar10/consistency_smoothadv method_args.eta                   .5           .5           .5
    cifar10/consistency_smoothadv attack_args.eps                   .99609375    2            2
    cifar10/consistency_smoothadv attack_args.steps                 10           10           10
    cifar10/consistency_smoothadv ramp.warm_up                      10           10           10
    cifar10/smoothmix             num_noise                         2            2            2
    cifar10/smoothmix             method_args.steps                 4            4            4
    cifar10/smoothmix             method_args.step_size             .5           1            2
    cifar10/smoothmix             method_args.eta                   5            5            5
    cifar10/smoothmix             method_args.mix_step              0            1            1
    cifar10/smoothmix             ramp.warm_up                      10           10           10
    cifar10/catrs                 num_noise                         4            4            4
    cifar10/catrs                 method_args.eps                   1            1            1
    cifar10/catrs                 method_args.steps                 4            4            4
    cifar10/catrs                 method_args.lbd                   .5           1            2
    cifar10/catrs                 teacher_noise                     .25          .25          .25
    cifar10/catrs                 teacher_samples                   10000        10000        10000
    cifar10/sodm                  num_noise                         16           16           16
    cifar10/sodm                  method_args.mapping_noise         128          128          128
    cifar10/sodm                  method_args.interval              5            5            5
    cifar10/sodm                  method_args.rho                   .99          .99          .99
    cifar10/sodm                  method_args.beta                  6            6            6
    cifar10/sodm                  method_args.boost                 10           10           10
    cifar10/sodm                  method_args.boost_from            35           35           35
    cifar10/sodm                  optimizer                         sgd          sgd          sgd
    cifar10/crt                   method_args.match                 logits       logits       logits
    cifar10/crt                   method_args.norm                  l2           l2           l2
    cifar10/acr                   method                            gaussian     gaussian     gaussian
    cifar10/acr                   num_noise                         4            4            4
    cifar10/acr                   attack                            sphere       sphere       sphere
    cifar10/acr                   attack_args.eps                   .25          .25          .5
    cifar10/acr                   attack_args.steps                 3            6            4
    cifar10/acr                   attack_args.norm                  2            2            2
    cifar10/acr                   ramp.switch_on                    59           69           59
    cifar10/acr                   curriculum_args.start             59           69           59
    cifar10/acr                   curriculum_args.threshold         .5           .4           .4
    cifar10/acr                   curriculum_args.every             10           10           10
    cifar10/acr                   curriculum_args.discard_noise     100          100          100
    cifar10/acr                   curriculum_args.count_noise       16           16           16
    cifar10/acr                   curriculum_args.alpha             .1           .1           .1
    mnist/gaussian                num_noise                         1            1            1
    mnist/stability               method_args.lbd                   2            2            2
    mnist/smoothadv               num_noise                         4            4            4
    mnist/smoothadv               attack_args.eps                   .99609375    .99609375    .99609375
    mnist/smoothadv               attack_args.steps                 10           10           10
    mnist/smoothadv               ramp.warm_up                      10           10           10
    mnist/macer                   num_noise                         16           16           16
    mnist/macer                   method_args.lbd                   16           16           6
    mnist/macer                   method_args.defer                 30           30           30
    mnist/consistency             num_noise                         2            2            2
    mnist/consistency             method_args.lbd                   10           5            5
    mnist/consistency_smoothadv   num_noise                         4            4            4
    mnist/consistency_smoothadv   method_args.lbd                   1            1            1
    mnist/consistency_smoothadv   attack_args.eps                   .99609375    .99609375    .99609375
    mnist/smoothmix               num_noise                         4            4            4
    mnist/smoothmix               method_args.steps                 2            4            8
    mnist/smoothmix               method_args.step_size             1            1            1
    mnist/smoothmix               method_args.eta                   5            5            5
    imagenet/gaussian             num_noise                         1            1            1
    imagenet/smoothadv            attack                            smoothed_pgd smoothed_pgd smoothed_pgd
    imagenet/smoothadv            attack_args.eps                   .99609375    .99609375    2
    imagenet/smoothadv            attack_args.steps                 1            1            1
    imagenet/smoothadv_ddn        attack                            ddn          ddn          ddn
    imagenet/smoothadv_ddn        attack_args.eps                   .99609375    .99609375    2
    imagenet/smoothadv_ddn        attack_args.steps                 2            2            2
    imagenet/consistency          num_noise                         -            2            2
    imagenet/consistency          method_args.lbd                   -            5            5
    imagenet/consistency          method_args.eta                   -            .5           .1
    imagenet/catrs                num_noise                         -            -            2
    imagenet/catrs                method_args.steps                 -            -            1
    imagenet/catrs                method_args.lbd                   -            -            2
    imagenet/catrs                method_args.confidence            -            -            stored
    imagenet/catrs                ramp.double_from                  -            -            80
    imagenet/sodm                 num_noise                         2            2            -
    imagenet/sodm                 method_args.beta                  2.5          2.5          -
    imagenet/sodm                 method_args.boost_from            25           25           -
    imagenet/sodm                 optimizer                         adam         adam         -
    imagenet/crt                  method_args.match                 logits       -            -
    imagenet/acr                  num_noise                         1            1            2
    imagenet/acr                  attack_args.eps                   .5           1            2
    imagenet/acr                  attack_args.steps                 2            2            1
    imagenet/acr                  curriculum_args.threshold         .2           .2           .1
    imagenet/acr                  curriculum_args.reweigh           false        false        false
"""
ROWS = [line.split() for line in SETTING.strip().splitlines()[1:]]

def kind(path): return f"{path.parent.name}/{path.stem.rpartition('_')[0]}"

def at(recipe, key):
    "The value at a key, such as method_args.lbd."
    for name in key.split('.'): recipe = recipe[name]
    return recipe

@pytest.mark.parametrize('path', PUBLISHED, ids=name)
def test_a_recipe_holds_the_published_numbers(path):
    recipe = read(path)
    rows = [row for row in ROWS if row[0] == kind(path)]
    assert rows, 'a new recipe needs its numbers in the table'
    for _, key, *values in rows:
        value = values[[.25, .5, 1.].index(recipe['sigma'])]
        assert at(recipe, key) == yaml.safe_load(value), key
    schedule = [recipe[key] for key in ('arch', 'epochs', 'lr', 'lr_drops', 'weight_decay')]
    noisy_images = recipe['batch_size'] * recipe['num_noise']
    assert (*schedule, noisy_images) == SCHEDULE.get(kind(path), SCHEDULE[path.parent.name])
    certified = [recipe[key] for key in ('n0', 'n', 'alpha', 'every', 'precision')]
    assert certified == [100, 100_000, .001, 100 if path.parent.name == 'imagenet' else 1, 'float32']

def test_every_published_setting_has_its_recipe():
    settings = set()
    for recipe, _, *values in ROWS:
        settings |= {f'{recipe}_{sigma}' for sigma, value in zip(['0.25', '0.5', '1.0'], values) if value != '-'}
    assert settings == {name(p) for p in PUBLISHED}

def test_a_teacher_is_another_recipe_at_the_same_noise():
    runs = {read(p)['out']: read(p) for p in PUBLISHED}
    students = [recipe for recipe in runs.values() if recipe['method'] == 'crt']
    assert students
    for student in students:
        teacher = runs[student['teacher']]
        for key in 'dataset', 'sigma', 'normalization': assert teacher[key] == student[key], (student['out'], key)

def test_a_network_that_training_goes_on_from_keeps_its_own_normalisation(tmp_path):
    constants = dict(mean=[.2], std=[.4])
    begun = build('mlp', 10, 1, 8, **constants)
    save(tmp_path, begun, arch='mlp', num_classes=10, in_channels=1, image_size=8, normalization='center', **constants)
    config = dict(start=str(tmp_path), arch='mlp', arch_args={}, normalization='center')
    task = Task('digits', normalization='center')
    assert task.mean != [.2]
    start = find_start(config, task)
    ours = task.network('mlp', {})
    ours.load_state_dict(start.state_dict())
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(ours.eval()(x), begun.eval()(x))

    with pytest.raises(ValueError, match='start and network must agree: normalization is center'):
        find_start(config | dict(normalization='standard'), Task('digits'))
