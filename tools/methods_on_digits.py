"""Train and certify every method on digits, at equal epochs and at equal training cost: python tools/methods_on_digits.py (half an hour on one core)."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Epochs that cost as much as 800 epochs of Gaussian training with one noise: 800 / ideal slow-down (`passes_of(method, ...).slow_down()`).
# acr: 40 epochs at 4, then 53 at 12. crt: without its teacher. catrs: without its stored predictions.
EQUAL_COST = dict(gaussian=800, gaussian4=200, stability=400, smoothadv=109, macer=50, consistency=400, smoothmix=86, catrs=43, sodm=33, crt=600, acr=93)

# The recipes count in parts of the run; at equal cost the ramps and starts stay what they are in 100 epochs.
SAME_EPOCHS = {'acr': '{ramp: {switch_on: 40}, curriculum_args: {start: 40, threshold: 0.4}}', 'macer': '{method_args: {lbd: 4.0, defer: 34}}',
               'smoothadv': '{ramp: {warm_up: 10}}', 'smoothmix': '{ramp: {warm_up: 10}}'}

for budget in 'equal_epochs', 'equal_cost':
    for name in EQUAL_COST:
        out = Path('data/digits-methods')/budget/name
        (ROOT/out).mkdir(parents=True, exist_ok=True)
        given = ['-p', 'epochs', str(EQUAL_COST[name]), '-y', SAME_EPOCHS.get(name, '{}')] if budget == 'equal_cost' else []
        print(out, flush=True)
        subprocess.run([sys.executable, '-m', 'papermill', 'nbs/train.ipynb', str(out/'train.ipynb'), '--no-progress-bar',
                        '-f', f'recipes/digits/{name}_0.5.yaml', *given, '-p', 'out', str(out), '-p', 'device', 'cpu'], cwd=ROOT, check=True)
