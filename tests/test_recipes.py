"""Every recipe is one that train.ipynb accepts, says in its objective what it says in its file, and holds the published numbers."""
from pathlib import Path

import nbformat
import pytest
import yaml
from papermill.translators import PythonTranslator

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT/'recipes').rglob('*.yaml'))
MUST = {'dataset', 'arch', 'method', 'num_noise', 'sigma', 'epochs', 'batch_size', 'optimizer', 'lr', 'weight_decay', 'schedule', 'lr_drops', 'augment', 'normalization', 'precision',
        'n0', 'n', 'alpha', 'every', 'out'}

def name(path): return f'{path.parent.name}/{path.stem}'
def read(path): return yaml.safe_load(path.read_text())

@pytest.fixture(scope='module')
def cells():
    "The cells of train.ipynb that ask for no data: all code above the heading '## Data'. The first one announces the parameters."
    found = nbformat.read(ROOT/'nbs/train.ipynb', 4).cells
    end = next(i for i, c in enumerate(found) if c.cell_type == 'markdown' and c.source.startswith('## Data'))
    found = [c for c in found[:end] if c.cell_type == 'code']
    assert 'parameters' in found[0].metadata.tags and all('parameters' not in c.metadata.get('tags', []) for c in found[1:])
    return [c.source for c in found]

def run(cells, given):
    "What those cells leave behind when papermill puts `given` after the first."
    space = dict(In=[''])
    for source in [cells[0], PythonTranslator.codify(given, 'Parameters'), *cells[1:]]:
        space['In'].append(source)
        exec(source, space)
    return space

def announced(cells): return [line.split(':')[0] for line in cells[0].splitlines()]

@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_a_recipe_is_whole_and_plain(path, cells):
    comment, recipe = [l for l in path.read_text().splitlines() if l.startswith('#')], read(path)
    assert 1 <= len(comment) <= 3 and path.read_text().startswith('#') and all(len(l) <= 160 for l in comment)
    assert not set(recipe) - set(announced(cells)) and not MUST - set(recipe)
    assert [k for k in announced(cells) if k in recipe] == list(recipe), 'in the order of train.ipynb'
    for value in [*recipe.values(), *(v for w in recipe.values() if isinstance(w, dict) for v in w.values())]:
        assert value is not None and not (isinstance(value, str) and value[:1].isdigit()), f'{value!r}: YAML takes 1e-4 for a string; write 0.0001'
    assert path.parent.name == recipe['dataset'] and path.stem.endswith(f"_{recipe['sigma']}")
    assert recipe['out'] == f"runs/{recipe['dataset']}-{path.stem.replace('_' + str(recipe['sigma']), '')}-{recipe['sigma']}", 'so that no two recipes share a folder'

# --- the published numbers, typed from the papers: a change of a recipe that leaves its setting fails here ---

SCHEDULE = {                                    # network, epochs, lr, its drops, weight decay, noisy images per optimizer step
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
    cifar10/acr                   ramp.switch_on                    60           70           60
    cifar10/acr                   curriculum_args.start             60           70           60
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
def at(recipe, key): return at(recipe[key.partition('.')[0]], key.partition('.')[2]) if '.' in key else recipe[key]

@pytest.mark.parametrize('path', RECIPES, ids=name)
def test_a_recipe_holds_the_published_numbers(path):
    recipe = read(path)
    rows = [row for row in ROWS if row[0] == kind(path)]
    assert rows, 'a new recipe needs its numbers in the table'
    for _, key, *values in rows:
        value = values[[.25, .5, 1.].index(recipe['sigma'])]
        assert at(recipe, key) == yaml.safe_load(value), key
    found = *(recipe[k] for k in ('arch', 'epochs', 'lr', 'lr_drops', 'weight_decay')), recipe['batch_size']*recipe['num_noise']
    assert found == SCHEDULE.get(kind(path), SCHEDULE[path.parent.name])
    assert (recipe['n0'], recipe['n'], recipe['alpha'], recipe['every'], recipe['precision']) == (100, 100_000, .001, 100 if path.parent.name == 'imagenet' else 1, 'float32')

def test_every_published_setting_has_its_recipe():
    assert {f'{row[0]}_{s}' for row in ROWS for s, v in zip(['0.25', '0.5', '1.0'], row[2:]) if v != '-'} == {name(p) for p in RECIPES}

def test_a_teacher_is_another_recipe_at_the_same_noise():
    runs = {read(p)['out']: read(p) for p in RECIPES}
    for recipe in runs.values():
        if recipe['method'] != 'crt': continue
        teacher = runs[recipe['teacher']]
        assert (teacher['dataset'], teacher['sigma'], teacher['normalization']) == (recipe['dataset'], recipe['sigma'], recipe['normalization'])
