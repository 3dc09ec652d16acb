"""The run notebooks through papermill: what is passed arrives, a misspelt name stops, a kill costs nothing."""
import json, os, shutil, signal, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from rs_toolkit.common import same_answers
from rs_toolkit.log import read_log
from rs_toolkit.models import build

ROOT, BIN = Path(__file__).resolve().parents[1], Path(sys.executable).parent
ENV = os.environ | {'PYTHONPATH': str(ROOT)}
QUICK = dict(epochs=2, every=40, n=500)

def command(book, folder, **parameters):
    "A papermill command; values go as YAML, as a recipe would give them."
    folder.mkdir(parents=True, exist_ok=True)
    return [str(BIN/'papermill'), str(book if Path(book).is_absolute() else ROOT/'nbs'/f'{book}.ipynb'), str(folder/'executed.ipynb'), '--no-progress-bar', '-y', json.dumps(parameters)]

def mill(book, folder, **parameters):
    return subprocess.run(command(book, folder, **parameters), cwd=ROOT, env=ENV, capture_output=True, text=True)

def succeed(*args, **kwargs):
    done = mill(*args, **kwargs)
    assert done.returncode == 0, done.stderr[-4000:]

def record(folder): return json.loads((folder/'metrics.json').read_text())

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')/'teacher'
    succeed('train', folder, out=str(folder), **QUICK | dict(epochs=8))
    return folder

def test_every_parameter_arrives_after_cleaning(tmp_path, teacher):
    book = tmp_path/'train.ipynb'
    shutil.copy(ROOT/'nbs/train.ipynb', book)
    subprocess.run([BIN/'nbdev_clean', '--fname', book], cwd=ROOT, env=ENV, check=True)
    given = dict(dataset='digits', arch='mlp', method='crt', method_args=dict(match='softmax', norm='l2_squared'), num_noise=2,
                 attack='sphere', attack_args=dict(eps=.1, steps=2), ramp=dict(switch_on=1), curriculum='easy_data', curriculum_args=dict(start=1, threshold=.1, every=1), teacher=str(teacher),
                 teacher_noise=.5, teacher_samples=9, sigma=.25, epochs=3, batch_size=32, micro_batch=20, optimizer='adam', lr=.005, weight_decay=5e-4, schedule='cosine', lr_drops=[2],
                 lr_lag=1, augment='none', normalization='none', train_every=2, seed=3, processes=1, device='cpu', precision='bfloat16',
                 n0=50, n=300, alpha=.01, every=60, out=str(tmp_path/'run'))
    parameters = next(c for c in nbformat.read(book, 4).cells if 'parameters' in c.metadata.get('tags', [])).source
    assert [line.split(':')[0] for line in parameters.splitlines()] == list(given), 'the test should pass every parameter'
    succeed(book, tmp_path/'run', **given | dict(lr='5e-3', n='300'))                      # as strings, as YAML 1.1 would read 5e-2
    assert json.loads((tmp_path/'run/config.json').read_text())['parameters'] == given
    log = read_log(tmp_path/'run/certify.tsv')
    assert len(log) == 6 and log[['n0', 'n', 'alpha', 'sigma', 'seed', 'precision']].iloc[0].tolist() == [50, 300, .01, .25, 3, 'bfloat16']
    assert len(pd.read_csv(tmp_path/'run/history.csv')) == 3 and record(tmp_path/'run')['match'] == 'softmax'

def test_a_run_folder_is_complete(teacher):
    assert {p.name for p in teacher.iterdir()} >= {'executed.ipynb', 'config.json', 'history.csv', 'model.safetensors', 'resume', 'certify.tsv', 'metrics.json'}
    config = json.loads((teacher/'config.json').read_text())
    assert config['weights'] == read_log(teacher/'certify.tsv').weights[0] and config['environments'][0]['versions']['torch'] == version('torch')
    nb = nbformat.read(teacher/'executed.ipynb', 4)
    figures = [o for c in nb.cells for o in c.get('outputs', []) if 'application/vnd.plotly.v1+json' in o.get('data', {})]
    assert len(figures) == 3 and 'widgets' not in nb.metadata and (teacher/'executed.ipynb').stat().st_size < 500_000
    text = ''.join(o.text for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'stream')
    assert 'training: 100%' in text and 'certifying: 100%' in text and 'ce=' in text and 'correct=' in text

def test_a_small_teacher_trained_first(tmp_path):
    succeed('train', tmp_path/'run', out=str(tmp_path/'run'), method='crt', arch='small_cnn', teacher='mlp', **QUICK)
    assert (tmp_path/'run/teacher/model.safetensors').exists() and record(tmp_path/'run')['images'] == 9

def test_certify_ours_and_theirs(tmp_path, teacher):
    succeed('certify', tmp_path/'ours', checkpoint=str(teacher), out=str(tmp_path/'ours'), n=500, every=40)
    again, first = (read_log(f/'certify.tsv') for f in (tmp_path/'ours', teacher))
    votes = [frame.drop(columns=['time', 'answers']) for frame in (again, first)]
    pd.testing.assert_frame_equal(*votes)  # the same network, the same noise
    assert same_answers(again.answers[0], first.answers[0])
    torch.save(dict(epoch=90, arch='small_cnn', state_dict=build('small_cnn', 10, 1, 8).state_dict(), optimizer={}), tmp_path/'theirs.pth.tar')
    unknown = mill('certify', tmp_path/'theirs', checkpoint=str(tmp_path/'theirs.pth.tar'), out=str(tmp_path/'theirs'), n=200, every=60)
    assert unknown.returncode == 1 and 'does not hold its normalisation' in unknown.stderr
    succeed('certify', tmp_path/'theirs', checkpoint=str(tmp_path/'theirs.pth.tar'), out=str(tmp_path/'theirs'), n=200, every=60, dataset='digits', normalization='none', sigma=.5)
    assert record(tmp_path/'theirs')['sigma'] == .5

@pytest.mark.parametrize('book', ['train', 'certify', 'compare'])
def test_without_arguments(tmp_path, book):
    succeed(book, tmp_path, out=str(tmp_path))                                             # all but where to put it

def test_compare(tmp_path, teacher):
    succeed('compare', tmp_path/'same', runs=[str(teacher), str(teacher/'certify.tsv')], radii=[0, .5])
    succeed('certify', tmp_path/'other', checkpoint=str(teacher), out=str(tmp_path/'other'), n=300, every=40)
    refused = mill('compare', tmp_path/'refused', runs=[str(teacher), str(tmp_path/'other')])
    assert refused.returncode == 1 and '500' in refused.stderr and '300' in refused.stderr

def test_benchmark(tmp_path):
    succeed('benchmark', tmp_path, archs=['cifar_resnet20'], samples=[100], batches=[50], methods=['crt, equal teacher', 'catrs m=4 T=4', 'sphere m=4 T=3'], images=32, rounds=2)
    refused = mill('benchmark', tmp_path, archs=['cifar_resnet20'], rounds=1)
    assert refused.returncode == 1 and 'at least two rounds' in refused.stderr

@pytest.mark.parametrize('book, given, says', [
    ('train', dict(sigm=.5), "unknown parameter 'sigm': did you mean 'sigma'?"),
    ('certify', dict(chekpoint='x'), "unknown parameter 'chekpoint': did you mean 'checkpoint'?"),
    ('train', dict(method='gausian'), "unknown method 'gausian': did you mean 'gaussian'?"),
    ('train', dict(method='crt', method_args=dict(mach='softmax')), "unknown argument of method crt 'mach': did you mean 'match'?"),
    ('train', dict(attack='sfere', attack_args=dict(steps=2)), "unknown attack 'sfere': did you mean 'sphere'?"),
    ('train', dict(attack_args=dict(steps=2)), 'but no attack'),
    ('train', dict(attack='sphere', attack_args=dict(step=2)), "unknown argument of attack sphere 'step': did you mean 'steps'?"),
    ('train', dict(attack='sphere', attack_args=dict(steps=0)), 'steps must be a whole number of at least 1'),
    ('train', dict(ramp=dict(warmup=3)), "unknown ramp 'warmup': did you mean 'warm_up'?"),
    ('train', dict(curriculum='easy'), "unknown curriculum 'easy': did you mean 'easy_data'?"),
    ('train', dict(curriculum='easy_data', curriculum_args=dict(treshold=.5)), "did you mean 'threshold'?"),
    ('train', dict(method='consistency'), 'num_noise must be at least 2, got 1'),
    ('train', dict(method='macer', method_args=dict(eps=1.)), "unknown argument of method macer 'eps'"),
    ('train', dict(method='smoothmix', attack='sphere'), 'brings an attack of its own'),
    ('train', dict(teacher='small_cnn'), 'method gaussian learns from no teacher'),
    ('train', dict(processes=2), '2 processes were asked for, but 1 run'),
    ('train', dict(arch='resnet19'), "unknown model 'resnet19'"),
    ('train', dict(dataset='folder:/nowhere'), 'has no train and no test'),
    ('train', dict(epochs='many'), "parameter epochs must be of type int, got 'many'"),
    ('train', dict(sigma=-1), 'sigma must be a positive number'),
    ('train', dict(alpha=5), 'alpha is the chance that a certificate is wrong'),
    ('train', dict(every=0), 'every must be a whole number of at least 1'),
    ('train', dict(method='crt', method_args=dict(match='sofmax')), "unknown space to match 'sofmax': did you mean 'softmax'?"),
    ('train', dict(method='crt', teacher='nowhere'), 'no checkpoint at'),
    ('train', dict(schedule='cosin'), "did you mean 'cosine'?"),
    ('train', dict(device='cud'), "did you mean 'cuda'?"),
    ('certify', dict(n=0), 'n must be a whole number of at least 1'),
    ('certify', dict(checkpoint='nowhere'), 'no checkpoint at'),
])
def test_a_mistake_stops_the_run_and_says_so(tmp_path, book, given, says):
    done = mill(book, tmp_path/'run', out=str(tmp_path/'run'), **given)
    assert done.returncode == 1 and says in done.stderr, done.stderr[-2000:]
    assert not (tmp_path/'run/config.json').exists()                                       # so the corrected command may use the folder

def test_other_parameters_are_refused_in_the_same_folder(teacher):
    done = mill('train', teacher, out=str(teacher), **QUICK | dict(epochs=9))
    assert done.returncode == 1 and 'epochs: 8 then, 9 now' in done.stderr

# --- kills: a process that is given SIGKILL, then the same command again ---

def kill_when(ready, command):
    "Start a process, kill it as soon as `ready()`, and say whether it was still running."
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < end: time.sleep(.02)
    running = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running

def lines(path): return path.read_bytes().count(b'\n') if path.exists() else 0

def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    setting = dict(epochs=150, every=4, n=3000, arch='mlp')
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    succeed('train', whole, out=str(whole), **setting)
    again = command('train', killed, out=str(killed), **setting)
    assert kill_when((killed/'resume/state.pt').exists, again) and not (killed/'model.safetensors').exists()     # in training
    assert kill_when(lambda: lines(killed/'certify.tsv') > 3, again) and not (killed/'metrics.json').exists()    # in certification
    assert lines(killed/'certify.tsv') < 91
    succeed('train', killed, out=str(killed), **setting)
    a, b = (read_log(f/'certify.tsv').sort_values('idx', ignore_index=True) for f in (whole, killed))
    a, b = (log.drop(columns=['time', 'answers']) for log in (a, b))  # whose last digits may differ
    pd.testing.assert_frame_equal(a, b)                                                    # weights are in the log, by hash
    assert len(a) == 90 and record(whole)['acr'] == record(killed)['acr']
