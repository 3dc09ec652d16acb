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
    assert done.returncode == 0, done.stderr[-4000:]
    return done

@pytest.mark.parametrize('name', ['radius', 'p_a', 'acr', 'methods', 'smooth', 'sphere', 'landscape'])
def test_an_explorer_opens_from_anywhere(tmp_path, name):
    code = f"import rs_toolkit.explore.{name} as m; [E] = [v for k, v in vars(m).items() if k.endswith('Explorer') and v.__module__ == m.__name__]; E()"
    from_elsewhere(tmp_path, sys.executable, '-c', code)
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
    setting = dict(dataset='folder:~/birds', arch='mlp', epochs=2, n=100, every=4, device='cpu')
    from_elsewhere(tmp_path, *command('train', tmp_path/'teacher', out='~/runs/teacher', **setting))
    from_elsewhere(tmp_path, *command('train', tmp_path/'student', out='~/runs/student', method='crt', teacher='~/runs/teacher', **setting))
    from_elsewhere(tmp_path, *command('certify', tmp_path/'finer', out='~/runs/finer', checkpoint='~/runs/student', dataset='folder:~/birds', n=200, every=4, device='cpu'))
    assert record(tmp_path/'runs/finer')['images'] == 10 and not (tmp_path/'~').exists()

def test_runs_from_anywhere_find_what_comes_with_the_package(tmp_path):
    from_elsewhere(tmp_path, *command('certify', tmp_path/'executed', checkpoint='data/digits-crt', n=100, every=60, device='cpu'))
    assert (tmp_path/'runs/certify-digits-crt-0.25/metrics.json').exists()               # runs/ of where one works

def markdown(path):
    return path.read_text() if path.suffix == '.md' else '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')

@pytest.mark.parametrize('name', ['nbs/train.ipynb', 'nbs/certify.ipynb', 'nbs/compare.ipynb', 'recipes/README.md'])
def test_commands_can_be_copied(name):
    blocks = re.findall(r'```bash\n(.*?)```', markdown(ROOT/name), re.S)
    commands = [line for block in blocks for line in block.splitlines() if not line.startswith('#')]
    assert commands
    for line in commands:
        made, book, executed = re.fullmatch(r"mkdir -p (\S+) && .*papermill (\S+) (\S+) .*", line).groups()
        recipe, out = re.search(r'-f (\S+)', line), re.search(r'-p out (\S+)', line)
        place = out[1] if out else yaml.safe_load((ROOT/recipe[1]).read_text())['out']
        assert made == place == str(Path(executed).parent) and (ROOT/book).exists()
