"""The run notebooks through papermill: what is passed arrives, a misspelt name stops, a kill costs nothing."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import torch

from forked import until
from rs_toolkit import run
from rs_toolkit.certify import certify_dataset
from rs_toolkit.checkpoint import load, save
from rs_toolkit.common import same_answers
from rs_toolkit.data import load as load_data
from rs_toolkit.log import read_log
from rs_toolkit.models import build

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ENV = os.environ | {'PYTHONPATH': str(ROOT)}
QUICK = dict(epochs=2, every=40, n=500)

def command(book, folder, **parameters):
    "A papermill command; values go as YAML, as a recipe would give them."
    folder.mkdir(parents=True, exist_ok=True)
    source = book if Path(book).is_absolute() else ROOT/'nbs'/f'{book}.ipynb'
    words = [BIN/'papermill', source, folder/'executed.ipynb', '--no-progress-bar', '-y', json.dumps(parameters)]
    return [str(word) for word in words]

def mill(book, folder, path=None, **parameters):
    "Run it; `path` is a folder with modules of one's own."
    folders = [str(ROOT)] if path is None else [str(ROOT), str(path)]
    env = os.environ | {'PYTHONPATH': os.pathsep.join(folders)}           # with kernels that fork
    return subprocess.run(command(book, folder, **parameters), cwd=ROOT, env=env, capture_output=True, text=True)

def succeed(*args, **kwargs):
    done = mill(*args, **kwargs)
    assert done.returncode == 0, done.stderr[-4000:]

def record(folder): return json.loads((folder/'metrics.json').read_text())

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')/'teacher'
    succeed('train', folder, out=str(folder), **QUICK | dict(epochs=8))
    return folder

def begun(folder):
    "A network to start from."
    make = dict(arch='mlp', num_classes=10, in_channels=1, image_size=8, mean=None, std=None, arch_args=dict(width=32))
    save(folder, build('mlp', 10, 1, 8, width=32), **make)
    return str(folder)

def test_every_parameter_arrives_after_cleaning(tmp_path, teacher):
    book = tmp_path/'train.ipynb'
    shutil.copy(ROOT/'nbs/train.ipynb', book)
    subprocess.run([BIN/'nbdev_clean', '--fname', book], cwd=ROOT, env=ENV, check=True)
    folder = tmp_path/'run'
    given = dict(dataset='digits', arch='mlp', arch_args=dict(width=32),
                 method='crt', method_args=dict(match='softmax', norm='l2_squared'), num_noise=2,
                 attack='sphere', attack_args=dict(eps=.1, steps=2), ramp=dict(switch_on=1),
                 curriculum='easy_data', curriculum_args=dict(start=1, threshold=.1, every=1),
                 teacher=str(teacher), teacher_noise=.5, teacher_samples=9, sigma=.25,
                 epochs=3, batch_size=32, micro_batch=20, optimizer='adam', lr=.005, weight_decay=5e-4,
                 schedule='cosine', lr_drops=[2], lr_lag=1, augment='none', normalization='none', train_every=2,
                 held_out=5, start=begun(tmp_path/'begun'), seed=3, processes=1, device='cpu', precision='bfloat16',
                 n0=50, n=300, alpha=.01, exact_noise=True, procedure='anytime', procedure_args=dict(tol=.5), every=60,
                 out=str(folder))
    [parameters] = [c.source for c in nbformat.read(book, 4).cells if 'parameters' in c.metadata.get('tags', [])]
    announced = [line.split(':')[0] for line in parameters.splitlines()]
    assert announced == list(given), 'the test should pass every parameter'
    succeed(book, folder, **given | dict(lr='5e-3', n='300'))             # as strings, as YAML 1.1 would read 5e-2
    assert json.loads((folder/'config.json').read_text())['parameters'] == given
    log = read_log(folder/'certify.tsv')
    assert log.idx.tolist() == [0, 300, 600, 900, 1200] and log.split.unique().tolist() == ['train']
    settings = log[['n0', 'budget', 'alpha', 'sigma', 'seed', 'precision']].iloc[0].tolist()
    assert settings == [50, 300, .01, .25, 3, 'bfloat16 exact'] and log.procedure[0].startswith('anytime tol=0.5 ')
    assert len(pd.read_csv(folder/'history.csv')) == 3
    assert record(folder)['match'] == 'softmax' and record(folder)['arch_width'] == 32
    net = load(folder)                                                    # a width is an argument
    assert net.metadata['arch_args'] == {'width': 32}
    assert next(net.parameters()).shape == torch.Size([32, 64])

def test_a_run_folder_is_complete(teacher):
    files = {'executed.ipynb', 'config.json', 'history.csv', 'model.safetensors', 'resume', 'certify.tsv',
             'metrics.json'}
    assert files <= {p.name for p in teacher.iterdir()}
    config = json.loads((teacher/'config.json').read_text())
    assert config['weights'] == read_log(teacher/'certify.tsv').weights[0]
    assert config['environments'][0]['versions']['torch'] == version('torch')

def test_the_executed_notebook_holds_curves_and_progress(teacher):
    nb = nbformat.read(teacher/'executed.ipynb', 4)
    outputs = [output for cell in nb.cells for output in cell.get('outputs', [])]
    figures = [output for output in outputs if 'application/vnd.plotly.v1+json' in output.get('data', {})]
    assert len(figures) == 4 and 'widgets' not in nb.metadata                 # one of them twice: where it begins, too
    assert (teacher/'executed.ipynb').stat().st_size < 500_000
    bars = [output.data['text/plain'] for output in outputs if 'text/plain' in output.get('data', {})]
    text = '\n'.join(bars)
    for words in 'training: 100%', 'certifying: 100%', 'ce=', 'certified ': assert words in text
    assert text.count('certifying:') == 1, 'a bar is one line'
    assert not [output for output in outputs if output.get('name') == 'stderr'], 'nothing is red'

def test_certify_ours(tmp_path, teacher):
    succeed('certify', tmp_path, checkpoint=str(teacher), out=str(tmp_path), n=500, every=40)
    first = read_log(teacher/'certify.tsv')
    again = read_log(tmp_path/'certify.tsv')
    changing = ['time', 'answers']
    pd.testing.assert_frame_equal(again.drop(columns=changing), first.drop(columns=changing))    # the same noise
    assert same_answers(again.answers[0], first.answers[0])

def test_certify_theirs(tmp_path):
    theirs = tmp_path/'theirs.pth.tar'
    weights = build('small_cnn', 10, 1, 8).state_dict()
    torch.save(dict(epoch=90, arch='small_cnn', state_dict=weights, optimizer={}), theirs)
    succeed('certify', tmp_path, checkpoint=str(theirs), out=str(tmp_path), n=200, every=60,
            dataset='digits', normalization='none', sigma=.5)
    assert record(tmp_path)['sigma'] == .5

def test_every_parameter_of_a_run_without_noise_arrives(tmp_path):
    folder = tmp_path/'run'
    given = dict(dataset='digits', arch='cnn4', arch_args=dict(width=4), method='cc_dist', method_args=dict(beta=2.),
                 eps=.05, teacher='', teacher_args=dict(steps=2), teacher_epochs=1, epochs=2, batch_size=200,
                 optimizer='sgd', lr=.01, weight_decay=1e-4, clip=5., schedule='cosine', lr_drops=[1], lr_factor=.5,
                 augment='none', normalization='none', train_every=2, seed=3, processes=1, device='cpu',
                 precision='bfloat16', proofs=['ibp'], attack_steps=3, restarts=1, search=['ibp'], every=60,
                 out=str(folder))
    book = nbformat.read(ROOT/'nbs/train_deterministic.ipynb', 4)
    [parameters] = [c.source for c in book.cells if 'parameters' in c.metadata.get('tags', [])]
    announced = [line.split(':')[0] for line in parameters.splitlines()]
    assert announced == list(given), 'the test should pass every parameter'
    succeed('train_deterministic', folder, **given | dict(eps='5e-2'))
    assert json.loads((folder/'config.json').read_text())['parameters'] == given
    asked = read_log(folder/'verify.tsv')
    largest = read_log(folder/'certify.tsv')
    assert len(asked) == len(largest) == len(read_log(folder/'teacher.tsv')) == 6
    for log in asked, largest: assert (log.norm[0], log.seed[0], log.precision[0]) == ('inf', 3, 'float32')
    assert (asked.eps[0], asked.verifier[0]) == (.05, 'ibp, attack 1x3 by 0.1')
    assert largest.eps.isna().all() and largest.verifier[0].endswith('largest up to 0.2 within 0.0005')
    metadata = load(folder).metadata
    assert (metadata['eps'], metadata['sigma'], metadata['method']) == (.05, 0, 'cc_dist')
    assert load(folder/'teacher').metadata['method'] == 'adversarial'
    again = tmp_path/'again'
    succeed('train_deterministic', again, **given | dict(teacher=str(folder/'teacher'), out=str(again)))
    assert not (again/'teacher.tsv').exists(), 'what another run has trained is verified there'
    assert (again/'history.csv').read_text().splitlines()[0] == (folder/'history.csv').read_text().splitlines()[0]
    ours = load(folder).state_dict()
    theirs = load(again).state_dict()
    for name in ours: torch.testing.assert_close(theirs[name], ours[name])     # of the same teacher, the same student
    succeed('compare', tmp_path/'both', runs=[str(folder), str(again)], out=str(tmp_path/'both'))
    assert (tmp_path/'both/table.md').exists()

def beginning(folder):
    "What is seen first of an executed notebook."
    nb = nbformat.read(folder/'executed.ipynb', 4)
    return [output.data for cell in nb.cells[:3] for output in cell.get('outputs', [])]

def check_beginning(folder, column):
    "The result: a table, and a picture with something in it."
    table, picture = beginning(folder)
    assert column in table['text/html']
    assert picture['application/vnd.plotly.v1+json']['data']

@pytest.mark.parametrize('book, column', [
    ('train_deterministic', 'CROWN-IBP'), ('certify', 'abstention'), ('compare', 'abstention')])
def test_without_arguments(tmp_path, book, column):
    "And train, which `.ci/run` runs as README's first command."
    succeed(book, tmp_path, out=str(tmp_path))                                             # all but where to put it
    check_beginning(tmp_path, column)

def test_training_begins_with_its_result(teacher): check_beginning(teacher, 'abstention')

def test_compare(tmp_path, teacher):
    succeed('compare', tmp_path/'same', runs=[str(teacher), str(teacher/'certify.tsv')], radii=[0, .5])
    refused = mill('compare', tmp_path/'refused', runs=[str(teacher), 'data/digits-gaussian'])
    assert refused.returncode == 1
    for n in '500', '10000': assert n in refused.stderr, refused.stderr[-2000:]

def test_benchmark(tmp_path):
    succeed('benchmark', tmp_path, archs=['cifar_resnet20'], samples=[100], batches=[50], images=16, rounds=2,
            loops=[100], methods=['crt, equal teacher'], budget=2000, logs=['digits-gaussian'], certified=3, shared=16,
            proved=['cnn4'])
    for wrong, says in [(dict(rounds=1), 'at least two rounds'), (dict(parts=['lop']), "did you mean 'loop'")]:
        refused = mill('benchmark', tmp_path, **wrong)
        assert refused.returncode == 1 and says in refused.stderr

@pytest.mark.parametrize('book, given, says', [
    ('train', dict(sigm=.5), "unknown parameter 'sigm': did you mean 'sigma'?"),
    ('certify', dict(chekpoint='x'), "unknown parameter 'chekpoint': did you mean 'checkpoint'?"),
    ('certify', dict(checkpoint='nowhere'), 'no checkpoint at')])
def test_a_mistake_stops_the_run_and_says_so(tmp_path, book, given, says):
    "Those that a notebook itself must find; what its library finds is in test_recipes."
    done = mill(book, tmp_path/'run', out=str(tmp_path/'run'), **given)
    assert done.returncode == 1 and says in done.stderr, done.stderr[-2000:]
    assert not (tmp_path/'run/config.json').exists()                      # so the corrected command may use the folder

def test_other_parameters_are_refused_in_the_same_folder(teacher):
    done = mill('train', teacher, out=str(teacher), **QUICK | dict(epochs=9))
    assert done.returncode == 1 and 'epochs: 8 then, 9 now' in done.stderr

# --- kills and stops, then the same command again ---

def start(words):
    "Kernels as everybody has them: this environment was read before there were others."
    return subprocess.Popen(words, cwd=ROOT, env=ENV, start_new_session=True, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

def wait_for(ready, process, seconds=240):
    until(lambda: ready() or process.poll() is not None, seconds)
    assert ready() and process.poll() is None, 'the run should be under way'

def stop(process, who, number):
    "Signal papermill, its kernel, or both; the exit status and what stands on stderr, once the kernel is gone."
    kernels = psutil.Process(process.pid).children()
    targets = dict(papermill=[process], kernel=kernels, both=[*kernels, process])[who]
    for target in targets: target.send_signal(number)
    _, words = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(kernels, timeout=30)
    assert not alive, 'the kernel outlives its papermill'
    return process.returncode, words

def lines(path): return path.read_bytes().count(b'\n') if path.exists() else 0

def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    setting = dict(epochs=40, every=4, n=3000, arch='mlp')
    whole = tmp_path/'whole'
    killed = tmp_path/'killed'
    succeed('train', whole, out=str(whole), **setting)
    again = command('train', killed, out=str(killed), **setting)

    in_training = start(again)
    wait_for((killed/'resume/state.pt').exists, in_training)
    os.killpg(in_training.pid, signal.SIGKILL)
    in_training.communicate()
    assert not (killed/'model.safetensors').exists()

    certifying = start(again)
    wait_for(lambda: lines(killed/'certify.tsv') > 3, certifying)
    status, words = stop(certifying, 'kernel', signal.SIGTERM)
    assert status != 0 and 'stopped by SIGTERM' in words and 'the same command goes on from there' in words
    assert lines(killed/'certify.tsv') < 91 and not (killed/'metrics.json').exists()

    succeed('train', killed, out=str(killed), **setting)
    logs = [read_log(folder/'certify.tsv').sort_values('idx', ignore_index=True) for folder in (whole, killed)]
    logs = [log.drop(columns=['time', 'answers']) for log in logs]        # whose last digits may differ
    pd.testing.assert_frame_equal(*logs)                                  # weights are in the log, by hash
    assert len(logs[0]) == 90 and record(whole)['acr'] == record(killed)['acr']
    assert len(pd.read_csv(killed/'history.csv')) == 40

BUSY = """
import time
from pathlib import Path

from rs_toolkit.run import open_run, stoppable

folder, lock = open_run(out, '', {})
with stoppable(folder):
    (folder/'busy').touch()
    time.sleep(120)
"""

STOPS = [('kernel', signal.SIGTERM), ('kernel', signal.SIGINT), ('both', signal.SIGTERM),
         ('papermill', signal.SIGINT), ('papermill', signal.SIGTERM)]

@pytest.mark.parametrize('who, number', STOPS)
def test_a_stopped_run_says_how_to_go_on(tmp_path, who, number):
    book = nbformat.v4.new_notebook()
    book.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    book.cells = [nbformat.v4.new_code_cell('out = ""', metadata=dict(tags=['parameters'])),
                  nbformat.v4.new_code_cell(BUSY)]
    nbformat.write(book, tmp_path/'busy.ipynb')
    process = start(command(tmp_path/'busy.ipynb', tmp_path, out=str(tmp_path)))
    wait_for((tmp_path/'busy').exists, process)
    status, words = stop(process, who, number)
    told = words.rstrip().splitlines()[-1] if who == 'kernel' else words  # papermill may have something to add
    assert status != 0
    assert 'the same command goes on from there' in told, words[-2000:]
    if who != 'papermill':
        assert f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}" in words, words[-2000:]

# --- two hands ---

def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(tmp_path):
    setting = dict(out=str(tmp_path), epochs=30, every=40, n=500, arch='mlp')
    first = start(command('train', tmp_path, **setting))
    wait_for((tmp_path/'resume/state.pt').exists, first)
    [kernel] = psutil.Process(first.pid).children()
    kernel.suspend()                                                      # until the others have tried
    second = mill('train', tmp_path, **setting)                           # the very same command
    says = f'{tmp_path} is being written by process {kernel.pid} on '
    assert second.returncode == 1 and says in second.stderr, second.stderr[-2000:]
    with pytest.raises(RuntimeError, match=says): run.open_run(tmp_path, '', {})    # as certify.ipynb would
    kernel.resume()
    _, words = first.communicate(timeout=120)
    assert first.returncode == 0, words[-4000:]
    cells = nbformat.read(tmp_path/'executed.ipynb', 4).cells
    assert [cell for cell in cells if cell.cell_type == 'code'][-1].outputs
    assert not [o for c in cells for o in c.get('outputs', []) if o.output_type == 'error']
    assert len(read_log(tmp_path/'certify.tsv')) == record(tmp_path)['images'] == 9

def by_two_processes(book, folder, **parameters):
    words = command(book, folder, out=str(folder), device='cpu', **parameters)
    words = ' '.join(shlex.quote(word) for word in words).replace('executed.ipynb', 'executed.$RANK.ipynb')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    done = subprocess.run([*torchrun, '--no-python', 'bash', '-c', words], cwd=ROOT,
                          env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {p.name for p in folder.glob('*.ipynb')} == {'executed.0.ipynb', 'executed.1.ipynb'}

def test_processes_of_one_run_share_its_folder(tmp_path):
    "And its teacher, which they train first, and the images that they certify."
    both = tmp_path/'both'
    by_two_processes('train', both, processes=2, arch='small_cnn', method='crt', teacher='mlp', **QUICK)
    assert record(both)['images'] == 9
    assert load(both/'teacher').metadata['method'] == 'gaussian'
    again = tmp_path/'again'
    by_two_processes('certify', again, checkpoint=str(both), every=4, n=300)
    log = read_log(again/'certify.tsv').drop(columns=['time', 'answers'])
    alone = certify_dataset(load(both), *load_data('digits', 'test'), sigma=log.sigma[0], every=4, n=300)
    pd.testing.assert_frame_equal(log, alone.drop(columns=['time', 'answers']))

# --- the code that was run ---

def git(folder, *words):
    command = ['git', '-c', 'user.name=me', '-c', 'user.email=me@example.org', *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

def commit(folder):
    "All there is in a folder, in a repository of its own; its hash."
    git(folder, 'init', '-q')
    git(folder, 'add', '-A')
    git(folder, 'commit', '-q', '-m', 'all')
    return git(folder, 'rev-parse', '--short=12', 'HEAD')

def test_only_the_packages_own_commit_is_recorded(tmp_path, monkeypatch):
    tmp_path = tmp_path.resolve()
    site = tmp_path/'theirs'/'site-packages'
    clone = tmp_path/'clone'

    def revision(folder):
        monkeypatch.setattr(run, 'package_folder', lambda: folder)
        return run.revision()

    for folder in site, clone:
        (folder/'rs_toolkit').mkdir(parents=True)
        (folder/'rs_toolkit/__init__.py').write_text('# ours\n')
    (tmp_path/'theirs/settings.ini').write_text('[DEFAULT]\nlib_name = theirs\n')
    commit(tmp_path/'theirs')
    assert revision(site) is None                                         # installed within somebody else's repository
    shutil.copy(ROOT/'settings.ini', site)
    assert revision(site) is None                                         # even with our settings beside it
    assert revision(clone) is None                                        # no repository
    shutil.copy(ROOT/'settings.ini', clone)
    assert revision(clone) is None
    own = commit(clone)
    assert revision(clone) == own
    (clone/'rs_toolkit/__init__.py').write_text('# changed\n')
    assert revision(clone) == own + '-dirty'
