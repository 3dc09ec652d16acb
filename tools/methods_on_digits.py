"""Train and certify every method on digits, at equal epochs and at equal training cost.

    python tools/methods_on_digits.py                        (half an hour on one core)
"""
import subprocess
import sys
from pathlib import Path

from rs_toolkit.catalogue import METHODS

ROOT = Path(__file__).resolve().parents[1]

# Epochs that cost as much as 800 epochs of Gaussian training with one noise: 800 / ideal slow-down,
# as `passes_of(method, ...).slow_down()` counts it.
EQUAL_COST = {
    'gaussian': 800,
    'gaussian4': 200,
    'stability': 400,
    'smoothadv': 109,
    'macer': 50,
    'consistency': 400,
    'smoothmix': 86,
    'catrs': 43,      # without its stored predictions
    'sodm': 100,      # a third of them plain
    'crt': 600,       # without its teacher
    'acr': 93,        # 40 epochs at 4, then 53 at 12
}

# The recipes count in parts of the run; at equal cost the ramps and starts stay what they are in 100 epochs.
SAME_EPOCHS = {
    'acr': '{ramp: {switch_on: 40}, curriculum_args: {start: 40, threshold: 0.4}}',
    'macer': '{method_args: {lbd: 4.0, defer: 34}}',
    'smoothadv': '{ramp: {warm_up: 10}}',
    'smoothmix': '{ramp: {warm_up: 10}}',
}

def train(key, out, *given):
    "Run the recipe of a method; `given` are more words for papermill."
    (ROOT/out).mkdir(parents=True, exist_ok=True)
    print(out, flush=True)
    command = [sys.executable, '-m', 'papermill', 'nbs/train.ipynb', f'{out}/train.ipynb', '--no-progress-bar',
               '-f', f'recipes/digits/{key}_0.5.yaml', *given, '-p', 'out', str(out), '-p', 'device', 'cpu']
    subprocess.run(command, cwd=ROOT, check=True)

if __name__ == '__main__':
    runs = Path('data/digits-methods')
    for key in METHODS: train(key, runs/'equal_epochs'/key)
    for key, epochs in EQUAL_COST.items():
        train(key, runs/'equal_cost'/key, '-p', 'epochs', str(epochs), '-y', SAME_EPOCHS.get(key, '{}'))
