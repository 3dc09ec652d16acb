"""The run notebooks through papermill: what is passed arrives, a misspelt name stops, a kill costs nothing."""
import json, os, shlex, shutil, signal, subprocess, sys, time
from importlib.metadata import version
from pathlib import Path

import nbformat
import pandas as pd
import psutil
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

def mill(book, folder, path=None, **parameters):
    "Run it; `path` is a folder with modules of one's own."
    env = ENV if path is None else ENV | {'PYTHONPATH': f"{ENV['PYTHONPATH']}{os.pathsep}{path}"}
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

def test_every_parameter_arrives_after_cleaning(tmp_path, teacher):
    book = tmp_path/'train.ipynb'
    shutil.copy(ROOT/'nbs/train.ipynb', book)
    subprocess.run([BIN/'nbdev_clean', '--fname', book], cwd=ROOT, env=ENV, check=True)
    given = dict(dataset='digits', arch='mlp', arch_args=dict(width=32), method='crt', method_args=dict(match='softmax', norm='l2_squared'), num_noise=2,
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
    assert record(tmp_path/'run')['arch_width'] == 32

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
    ('train', dict(epochs=20, attack='sphere', ramp=dict(switch_on=40)), 'switch_on=40 is never reached in a run of 20 epochs'),
    ('train', dict(epochs=20, curriculum='easy_data', curriculum_args=dict(start=40)), 'start=40 is never reached in a run of 20 epochs'),
    ('train', dict(epochs=20, lr_drops=[10, 30]), 'is never reached in a run of 20 epochs'),
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

# --- two hands, and stops that can be answered ---

def wait_for(ready, process, seconds=240):
    end = time.monotonic() + seconds
    while not ready() and process.poll() is None and time.monotonic() < end: time.sleep(.02)
    assert ready() and process.poll() is None, 'the run should be under way'

def start(*args, **kwargs):
    return subprocess.Popen(command(*args, **kwargs), cwd=ROOT, env=ENV, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def test_a_second_run_in_the_folder_is_refused_and_harms_nothing(tmp_path):
    setting = dict(out=str(tmp_path), epochs=60, every=40, n=500, arch='mlp')
    first = start('train', tmp_path, **setting)
    wait_for((tmp_path/'resume/state.pt').exists, first)
    [kernel] = psutil.Process(first.pid).children()
    kernel.suspend()                                                                           # until the others have tried
    second = mill('train', tmp_path, **setting)                                                # the very same command
    other = mill('certify', tmp_path/'elsewhere', out=str(tmp_path), n=500, every=40)
    kernel.resume()
    for refused in second, other:
        assert refused.returncode == 1 and f'{tmp_path} is being written by process {kernel.pid} on ' in refused.stderr, refused.stderr[-2000:]
    _, words = first.communicate(timeout=120)
    assert first.returncode == 0, words[-4000:]
    cells = nbformat.read(tmp_path/'executed.ipynb', 4).cells
    assert cells[-1].outputs and not any(o.output_type == 'error' for c in cells for o in c.get('outputs', []))
    assert len(read_log(tmp_path/'certify.tsv')) == record(tmp_path)['images'] == 9
    succeed('train', tmp_path, **setting)                                                      # done, and free again

def stop(process, who, number):
    "Signal papermill, its kernel, or both; the exit status, what stands on stderr, and whether the kernel is gone."
    kernels = psutil.Process(process.pid).children()
    targets = dict(papermill=[process], kernel=kernels, both=[*kernels, process])[who]
    for target in targets: target.send_signal(number)
    _, words = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(kernels, timeout=30)
    return process.returncode, words, alive

def test_a_stopped_run_says_how_to_go_on_and_does(tmp_path):
    setting = dict(out=str(tmp_path), epochs=60, every=4, n=3000, arch='mlp')
    state, log = tmp_path/'resume/state.pt', tmp_path/'certify.tsv'
    written = lambda: state.stat().st_mtime_ns if state.exists() else 0
    in_training = [('kernel', signal.SIGTERM), ('papermill', signal.SIGINT), ('papermill', signal.SIGTERM)]
    for number, (who, what) in enumerate([*in_training, ('kernel', signal.SIGINT), ('both', signal.SIGTERM)]):
        certifying = number >= len(in_training)
        before = lines(log) if certifying else written()
        process = start('train', tmp_path, **setting)
        wait_for(lambda: lines(log) > before + 2 if certifying else written() > before, process)
        status, words, alive = stop(process, who, what)
        told = words.rstrip().splitlines()[-1] if who == 'kernel' else words               # papermill may have something to add
        assert status != 0 and not alive and 'the same command goes on from there' in told, (who, what, words[-2000:])
        assert who == 'papermill' or f"stopped by {'Ctrl-C' if what == signal.SIGINT else 'SIGTERM'}" in words
        assert (tmp_path/'model.safetensors').exists() == certifying
    succeed('train', tmp_path, **setting)
    assert len(pd.read_csv(tmp_path/'history.csv')) == 60 and len(read_log(log)) == 90

def test_processes_of_one_run_share_its_folder(tmp_path):
    words = ' '.join(shlex.quote(word) for word in command('train', tmp_path, out=str(tmp_path), processes=2, device='cpu', arch='mlp', **QUICK))
    words = words.replace('executed.ipynb', 'executed.$RANK.ipynb')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '--no-python', 'bash', '-c', words],
                          cwd=ROOT, env=ENV | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert record(tmp_path)['images'] == 9 and {p.name for p in tmp_path.glob('*.ipynb')} == {'executed.0.ipynb', 'executed.1.ipynb'}

def test_only_the_packages_own_commit_is_recorded(tmp_path):
    git = ['git', '-c', 'user.name=me', '-c', 'user.email=me@example.org']
    code = 'from rs_toolkit.run import revision; print(revision())'
    def revision(folder):
        env = ENV | {'PYTHONPATH': str(folder)}
        return subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.strip()
    def commit(folder):
        for words in ['init', '-q'], ['add', '-A'], ['commit', '-q', '-m', 'all']: subprocess.run([*git, *words], cwd=folder, check=True)
        return subprocess.run(['git', 'rev-parse', '--short=12', 'HEAD'], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    site, clone = tmp_path/'theirs/site-packages', tmp_path/'clone'
    for folder in site, clone: shutil.copytree(ROOT/'rs_toolkit', folder/'rs_toolkit', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path/'theirs/settings.ini').write_text('[DEFAULT]\nlib_name = theirs\n')
    commit(tmp_path/'theirs')
    assert revision(site) == 'None'                                                           # installed within somebody else's repository
    shutil.copy(ROOT/'settings.ini', site)
    assert revision(site) == 'None'                                                           # even with our settings beside it
    assert revision(clone) == 'None'                                                          # no repository
    shutil.copy(ROOT/'settings.ini', clone)
    (clone/'.gitignore').write_text('__pycache__\n')
    assert revision(clone) == 'None'
    own = commit(clone)
    assert revision(clone) == own
    with open(clone/'rs_toolkit/__init__.py', 'a') as file: file.write('# changed\n')
    assert revision(clone) == own + '-dirty'
