"""Everything works from any folder, and `~` is the home folder everywhere."""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from torchvision.transforms.functional import to_pil_image

from test_runs import ROOT, command, record

def from_elsewhere(folder, *words):
    "Run a command in `folder`, which is its home, too."
    env = os.environ | {'PYTHONPATH': str(ROOT), 'HOME': str(folder)}
    done = subprocess.run([str(word) for word in words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{done.stdout[-1000:]}\n{done.stderr[-4000:]}'
    return done

OPEN = '''
from importlib import import_module

for name in ['radius', 'attack', 'sequential', 'p_a', 'acr', 'methods', 'smooth', 'sphere', 'landscape', 'boxes']:
    module = import_module(f'rs_toolkit.explore.{name}')
    things = [thing for title, thing in vars(module).items() if title.endswith('Explorer')]
    [explorer] = [thing for thing in things if thing.__module__ == module.__name__]
    explorer()
    print(name)
'''

def test_explorers_open_from_anywhere(tmp_path):
    from_elsewhere(tmp_path, sys.executable, '-c', OPEN)
    assert not any(tmp_path.glob('*.tsv'))

def write_images(folder):
    "A folder data set: dark and bright images."
    generator = torch.Generator().manual_seed(0)
    for split in 'train', 'test':
        for label, shift in ('bright', .5), ('dark', 0.):
            place = folder/split/label
            place.mkdir(parents=True)
            for i in range(20): to_pil_image(torch.rand(3, 8, 8, generator=generator)/2 + shift).save(place/f'{i}.png')

def test_runs_from_anywhere_with_home_folders(tmp_path):
    write_images(tmp_path/'birds')
    images = dict(dataset='folder:~/birds', every=4, device='cpu')
    training = images | dict(arch='mlp', epochs=2, n=100)
    teacher = training | dict(out='~/runs/teacher')
    student = training | dict(out='~/runs/student', method='crt', teacher='~/runs/teacher')
    finer = images | dict(out='~/runs/finer', checkpoint='~/runs/student', n=200)
    from_elsewhere(tmp_path, *command('train', tmp_path/'teacher', **teacher))
    from_elsewhere(tmp_path, *command('train', tmp_path/'student', **student))
    from_elsewhere(tmp_path, *command('certify', tmp_path/'finer', **finer))
    assert record(tmp_path/'runs/finer')['images'] == 10
    assert not (tmp_path/'~').exists()

def test_runs_from_anywhere_find_what_comes_with_the_package(tmp_path):
    shipped = dict(checkpoint='data/digits-crt', n=100, every=60, device='cpu')
    from_elsewhere(tmp_path, *command('certify', tmp_path/'executed', **shipped))
    assert (tmp_path/'runs/certify-digits-crt-0.25/metrics.json').exists()               # runs/ of where one works

def markdown(path):
    "The text of a page or a notebook."
    if path.suffix == '.md': return path.read_text()
    return '\n'.join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == 'markdown')

@pytest.mark.parametrize('name', ['nbs/train.ipynb', 'nbs/certify.ipynb', 'nbs/compare.ipynb', 'recipes/README.md'])
def test_commands_can_be_copied(name):
    blocks = re.findall(r'```bash\n(.*?)```', markdown(ROOT/name), re.S)
    commands = [line for block in blocks for line in block.splitlines() if not line.startswith('#')]
    assert commands
    for line in commands:
        made, book, executed = re.fullmatch(r"mkdir -p (\S+) && .*papermill (\S+) (\S+) .*", line).groups()
        recipe = re.search(r'-f (\S+)', line)
        out = re.search(r'-p out (\S+)', line)
        place = out[1] if out else yaml.safe_load((ROOT/recipe[1]).read_text())['out']
        assert made == place == str(Path(executed).parent), line
        assert (ROOT/book).exists(), line
