"""What tools share that make runs from recipes."""
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]

def recipe_of(name):
    "The settings in a file of recipes/."
    return yaml.safe_load((ROOT/f'recipes/{name}.yaml').read_text())

def merged(setting, change):
    "The setting with the change, mapping by mapping."
    both = {k: setting[k] | v for k, v in change.items() if isinstance(v, dict) and k in setting}
    return setting | change | both

def run(book, recipe, out, **given):
    "Run a recipe with a run notebook; `given` are parameters that win over it. What is finished is left alone."
    folder = ROOT/out
    if (folder/'metrics.json').exists(): return
    folder.mkdir(parents=True, exist_ok=True)
    print(out, flush=True)
    command = [sys.executable, '-m', 'papermill', f'nbs/{book}.ipynb', f'{out}/executed.ipynb', '--no-progress-bar',
               '-f', f'recipes/{recipe}.yaml', '-y', json.dumps(given | {'out': str(out)})]
    subprocess.run(command, cwd=ROOT, check=True)

def pack(log, place):
    "Copy a log, packed: the same bytes for the same log."
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(gzip.compress(log.read_bytes(), mtime=0))

def ship(run, place, weights=False):
    "Copy a run, as far as tables and pages read it; its weights only for those who show the network."
    place.mkdir(parents=True, exist_ok=True)
    files = ['certify.tsv', 'config.json', 'history.csv', 'metrics.json'] + ['model.safetensors']*weights
    for file in files: shutil.copy(run/file, place/file)
