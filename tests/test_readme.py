"""README as a stranger reads it: from the top, each block of Python and each command, in a copy of the project."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rs_toolkit.catalogue import METHODS
from rs_toolkit.log import read_log

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PATH = os.pathsep.join([str(BIN), os.environ['PATH']])
README = (ROOT/'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(python|bash)\n(.*?)^```', README, re.M | re.S)
PROSE = re.sub(r'^```.*?^```', '', README, flags=re.M | re.S)

# Programs that come first in PATH. They make the real commands short, or stand in for a cluster.
PROGRAMS = {
    'papermill': f'''
case "$*" in
    *--help-notebook*) more=() ;;
    *nbs/train_deterministic.ipynb*) more=(-p epochs 2 -p teacher_epochs 1 -p every 90 --no-progress-bar) ;;
    *nbs/train.ipynb*) more=(-p epochs 1 -p every 90 -p n 300 --no-progress-bar) ;;
    *) more=(--no-progress-bar) ;;
esac
exec {shlex.quote(str(BIN/'papermill'))} "$@" "${{more[@]}}"
''',
    'sbatch': '''
for word in "$@"; do
    case "$word" in --wrap=*) SLURM_ARRAY_TASK_ID=0 bash -euo pipefail -c "${word#--wrap=}" ;; esac
done
''',
    'srun': 'exec "$@"'}

@pytest.fixture
def project(tmp_path):
    "A copy of the project's folder, with README's own files and some pictures in it."
    ignored = shutil.ignore_patterns('.git', 'runs', 'cache', '*.egg-info', '.venv', '__pycache__')
    folder = shutil.copytree(ROOT, tmp_path/'project', ignore=ignored)
    for _kind, block in BLOCKS:
        name = re.match(r'# (\w+\.py)\n', block)
        if name: (folder/name[1]).write_text(block, encoding='utf-8')
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    for i, image in enumerate(pixels):
        path = folder/'pictures'/('test' if i % 5 == 0 else 'train')/('cat' if i < 20 else 'dog')/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder

@pytest.fixture
def loggers(monkeypatch):
    "What README's loggers were given; stand-ins, where the packages of that name are not ours to install."
    written = []
    tensorboard = ModuleType('torch.utils.tensorboard')
    wandb = ModuleType('wandb')

    class SummaryWriter:
        def __init__(self, folder): pass
        def add_scalar(self, name, value, step): written.append(('tensorboard', step, name, float(value)))

    tensorboard.SummaryWriter = SummaryWriter
    def log(row):
        for name, value in row.items(): written.append(('wandb', int(row['epoch']), name, float(value)))

    wandb.init = lambda project: None
    wandb.log = log
    for module in tensorboard, wandb:
        module.__spec__ = ModuleSpec(module.__name__, None)              # others ask whether it is installed
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return written

def test_python_runs_from_the_top(project, loggers, monkeypatch):
    monkeypatch.chdir(project)
    names = {'__name__': 'readme'}
    blocks = [block for kind, block in BLOCKS if kind == 'python']
    assert len(blocks) > 10
    for number, block in enumerate(blocks): exec(compile(block, f'README.md, block {number} of Python', 'exec'), names)

    assert len(names['log']) == 72
    assert len(read_log(project/'runs/certify.tsv')) == 72
    acr = names['at_cost'].query("measure == 'ACR'").set_index('method').value
    assert {*acr.index, 'gaussian4'} == {*METHODS}
    for key in acr.index:
        files = [*(ROOT/'data/digits-seeds/equal_cost'/key).glob('*.tsv.gz')]
        assert len(files) == 5
        seeds = [pd.read_csv(file, sep='\t') for file in files]
        assert acr[key] == pytest.approx(np.mean([(log.radius*log.correct).mean() for log in seeds])), key
    for logger in 'tensorboard', 'wandb':
        assert {step for who, step, *_ in loggers if who == logger} == set(range(5))
        assert {'ce', 'lr', 'seconds'} <= {name for who, _, name, _ in loggers if who == logger}
    losses = {step: value for who, step, name, value in loggers if who == 'tensorboard' and name == 'ce'}
    assert list(losses.values()) == names['history'].ce.tolist()

LONG = '-p dataset cifar10'              # a block that takes hours is checked for what it names
SWEEP = 'for sigma in 0.25 0.5; do'      # one noise level of the sweep shows what two would

def test_commands_run_from_the_top(project):
    programs = project.parent/'programs'
    programs.mkdir()
    for name, source in PROGRAMS.items():
        (programs/name).write_text('#!/usr/bin/env bash\n' + source)
        (programs/name).chmod(0o755)
    env = os.environ | {'PYTHONPATH': str(project), 'PATH': os.pathsep.join([str(programs), PATH])}
    blocks = [block for kind, block in BLOCKS if kind == 'bash']
    installing = [block for block in blocks if block.startswith('pip install')]
    assert len(installing) == 2, 'continuous integration runs these two, as they stand'
    assert sum(SWEEP in block for block in blocks) == 1
    for block in blocks:
        if block in installing or LONG in block: continue
        command = block.replace(SWEEP, 'for sigma in 0.25; do')
        done = subprocess.run(['bash', '-euo', 'pipefail', '-c', command], cwd=project, env=env, capture_output=True,
                              text=True)
        assert done.returncode == 0, f'{block}\n{done.stderr[-4000:]}'
        if '--help-notebook' in block:
            assert 'dataset' in done.stdout
            assert 'noise level' in done.stdout

    def record(name): return json.loads((project/'runs'/name/'metrics.json').read_text())

    assert record('brier')['method'] == 'my_method:Brier'
    assert record('brier')['images'] == 4
    assert 'brier' in pd.read_csv(project/'runs/brier/history.csv')
    assert len(read_log(project/'runs/brier/certify.tsv')) == 4
    assert record('proofs')['verified_PGD'] >= record('proofs')['verified_CROWN']
    assert record('pictures')['dataset'] == 'folder:pictures'
    assert record('consistency')['sigma'] == .5
    for seed in 0, 1: assert record(f'sweep/0.25-seed{seed}')['seed'] == seed
    assert record('array/seed0')['seed'] == 0
    assert pd.read_csv(project/'runs/sweep/table.csv').seeds.tolist() == [2]                # one method, not two

def check_names(command):
    "A command's program, files and parameters are there."
    program, *words = shlex.split(command)
    assert shutil.which(program, path=PATH), command
    for word in words:
        if re.match(r'(nbs|tools|recipes|data)/', word): assert (ROOT/word).exists(), command
    books = [word for word in words if word.startswith('nbs/') and word.endswith('.ipynb')]
    if program != 'papermill' or not books: return                        # the others take no parameters
    cells = nbformat.read(ROOT/books[0], 4).cells
    [cell] = [cell.source for cell in cells if 'parameters' in cell.metadata.get('tags', [])]
    for name in re.findall(r'-p (\w+)', command): assert re.search(rf'^{name}: ', cell, re.M), command

def test_commands_that_take_long_name_what_exists():
    blocks = [block for _, block in BLOCKS if LONG in block]
    assert blocks
    for block in blocks:
        for command in block.split(' && '): check_names(command)

def test_commands_in_the_text_name_what_exists():
    "Those that take long, and those that open a page."
    programs = ('papermill', 'python', 'jupyter', 'voila', 'pip')
    commands = []
    for text in re.findall(r'`([^`\n]+)`', PROSE):
        commands += [part for part in text.split(' && ') if part.split()[0] in programs]
    assert len(commands) >= 4
    for command in commands: check_names(command)

def test_every_command_can_be_copied():
    assert not re.search(r'\bOUT\b', README), 'a name in capitals, copied, is a file of that name'

def test_links_within_the_page_lead_somewhere():
    links = re.findall(r'\]\(#([\w-]+)\)', README)
    assert links
    titles = set()
    for title in re.findall(r'^#+ (.*)', README, re.M):
        titles.add(re.sub(r'[^\w\s-]', '', title).strip().lower().replace(' ', '-'))
    assert set(links) <= titles, set(links) - titles
