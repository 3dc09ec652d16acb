"""Models, numbers and images as people bring them: what is unambiguous is certified with the right votes, the rest is refused by name."""
import copy
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rs_toolkit.certify import certify, certify_dataset, predict, vote_stream
from rs_toolkit.data import Items, check_images, load
from rs_toolkit.log import read_log
from rs_toolkit.models import HalfSpace, build, frozen
from rs_toolkit.noise import gaussian_noise

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return build('small_cnn', 3, 1, 8).eval()

@pytest.fixture(scope='module')
def x():
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))

def votes(model, x, **kwargs): return [c.counts for c in certify(model, x, **dict(sigma=.5, n=250) | kwargs)]

def quiet(): return warnings.catch_warnings(action='error')


# numbers

@pytest.mark.parametrize('sigma', [np.float32(.12), np.float16(.12), np.array(.12), torch.tensor(.12), torch.tensor(.12, dtype=torch.float64)])
def test_a_number_is_the_one_that_was_meant(tmp_path, net, x, sigma):
    log, y = tmp_path/'log.tsv', [0, 1, 2, 0]
    begun = certify_dataset(net, x, y, sigma=sigma, n0=np.int64(100), n=torch.tensor(200), alpha=np.float32(.001), seed=np.int64(3), every=np.int32(2), log=log, progress=False)
    assert begun.sigma.tolist() == [.12] * 2 and begun.alpha.tolist() == [.001] * 2
    whole = certify_dataset(net, x, y, sigma=.12, n0=100, n=200, alpha=.001, seed=3, log=log, progress=False)
    assert len(whole) == 4 and (whole.n == 200).all()
    c = certify(net, x[0], sigma, n=200)
    assert c == certify(net, x[0], .12, n=200) and type(c.sigma) is float and type(c.alpha) is float

def test_sigma_in_other_units_gets_a_warning(x):
    half_space = HalfSpace()
    for f in [certify, predict, lambda *a, **k: list(vote_stream(*a, **k))]:
        with pytest.warns(UserWarning, match=r'sigma=64 is in \[0,1\]-pixel units.*give sigma=0.251') as said: f(half_space, half_space.point_at(.3), 64, n=100)
        assert len(said) == 1
    with quiet(): certify(half_space, half_space.point_at(.3), 2, n=100)
    with pytest.warns(UserWarning, match='pixel units'): certify_dataset(half_space, half_space.point_at(.3)[None], [1], sigma=64, n=100, progress=False)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_noise_is_float32_under_any_default(net, x, dtype):
    right, keys = votes(net, x), [(0, i) for i in range(4)]
    noise = gaussian_noise(x, .5, 2, keys)
    torch.set_default_dtype(dtype)
    try: assert gaussian_noise(x, .5, 2, keys).equal(noise) and votes(net, x) == right
    finally: torch.set_default_dtype(torch.float32)


# images and labels

def test_arrays_lists_and_data_sets_are_certified_alike(tmp_path, net, x):
    y, right = torch.tensor([0, 1, 2, 0]), votes(net, x)
    assert votes(net, x.numpy()) == right and certify(net, x[0].numpy(), .5, n=250) == certify(net, x[0], .5, n=250)
    pairs = TensorDataset(x, y)
    assert votes(net, pairs) == votes(net, DataLoader(pairs, 2, shuffle=True)) == right
    settings = dict(sigma=.5, n=200, progress=False)
    first = certify_dataset(net, x, y, **settings).drop(columns='time')
    for images, labels in [(x.numpy(), y.numpy()), (x, y.tolist()), (x, y.int()), (pairs, None), (DataLoader(pairs, 3), None), (pairs, y)]:
        pd.testing.assert_frame_equal(certify_dataset(net, images, labels, **settings).drop(columns='time'), first)
    few = certify_dataset(net, pairs, every=2, **settings).drop(columns='time')
    pd.testing.assert_frame_equal(few, first[::2].reset_index(drop=True))

class Counting(Dataset):
    "Remembers which items were read."
    def __init__(self, size): self.size, self.read = size, []
    def __len__(self): return self.size
    def __getitem__(self, i):
        self.read.append(i)
        return torch.full((1, 8, 8), i / self.size), i % 3

def test_a_data_set_is_streamed(monkeypatch, net):
    "Only the images to certify are read, and a few to look at; never many at once."
    at_once, read = [], Items.__getitem__
    def watched(items, index):
        images = read(items, index)
        at_once.append(len(images) if images.dim() == 4 else 1)
        return images
    monkeypatch.setattr(Items, '__getitem__', watched)
    data = Counting(10_000)
    log = certify_dataset(net, data, sigma=.5, n=100, every=2000, progress=False)
    assert log.idx.tolist() == list(range(0, 10_000, 2000)) and log.label.tolist() == [i % 3 for i in range(0, 10_000, 2000)]
    assert set(data.read) == set(range(0, 10_000, 2000)) | set(range(8)) and max(at_once) == 8
    certify_dataset(net, Counting(600), sigma=.5, n0=1, n=11, progress=False)
    assert max(at_once) <= 256

def test_a_random_transform_is_refused(net):
    class Noisy(Counting):
        def __getitem__(self, i): return torch.rand(1, 8, 8), 0
    with pytest.raises(ValueError, match='another image each time'): certify_dataset(net, Noisy(20), sigma=.5, n=100, progress=False)

@pytest.mark.parametrize('images, labels, words', [
    ((np.zeros((2, 1, 8, 8)) * 255).astype('uint8'), None, 'got uint8 Tensor of shape .* 255'),
    (np.zeros((2, 1, 8, 8)), None, 'got float64 Tensor .*astype'),
    (torch.full((1, 1, 8, 8), 1 + 1.2e-7), None, r'got \[1.00000012, 1.00000012\]: that little is rounding: .clamp'),
    (torch.zeros(2, 1, 8, 8) - .5, None, 'normalise inside the model'),
    ([np.zeros((1, 8, 8))] * 2, None, 'got list: give one tensor'),
    (torch.zeros(2, 1, 8, 8), np.array([0., 1.]), 'labels must be 2 whole numbers.*got float64 Tensor'),
    (torch.zeros(2, 1, 8, 8), [[0, 1]], r'got int64 Tensor of shape \[1, 2\]'),
    (torch.zeros(2, 1, 8, 8), 'ab', 'got str'),
    (TensorDataset(torch.zeros(2, 1, 8, 8)), None, 'pairs .image, label., got tuple for item 0'),
    (DataLoader(TensorDataset(torch.zeros(2, 1, 8, 8), torch.zeros(2)), collate_fn=list), None, 'collate_fn')])
def test_a_refusal_names_what_came(images, labels, words):
    with pytest.raises(ValueError, match=words): check_images(images, labels)


# models

class Wrapped(nn.Module):
    "Answers as other libraries do."
    def __init__(self, net, answer):
        super().__init__()
        self.net, self.answer = net, answer
    def forward(self, x): return self.answer(self.net(x))

ANSWERS = dict(object=lambda z: SimpleNamespace(logits=z, loss=None), dict=lambda z: dict(features=z @ z.T, logits=z), tuple=lambda z: (z, z[:, :, None, None]),
               list=lambda z: [z], half=lambda z: (z, z.argmax(1)), numpy=lambda z: z.numpy())

@pytest.mark.parametrize('kind', ANSWERS)
def test_logits_are_found_in_what_a_model_answers(net, x, kind):
    right = votes(net, x)
    assert votes(Wrapped(net, ANSWERS[kind]), x) == votes(lambda x: ANSWERS[kind](net(x)), x) == right

def test_unclear_answers_are_refused(net, x):
    for unclear in [lambda z: (z, z), lambda z: dict(a=z, b=z), lambda z: z[None], lambda z: None]:
        with pytest.raises(ValueError, match='^a classifier maps images .* to logits'): certify(Wrapped(net, unclear), x, .5, n=100)

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('arch', ['small_cnn', 'cifar_resnet20'])
def test_scripted_frozen_and_compiled_modules(tmp_path, x, arch):
    torch.manual_seed(0)
    net = build(arch, 3, 1, 8).eval()
    right, y = votes(net, x), [0, 1, 2, 0]
    scripted = torch.jit.script(net)
    forms = dict(script=scripted, trace=torch.jit.trace(net, x), frozen=torch.jit.freeze(scripted), optimised=torch.jit.optimize_for_inference(scripted),
                 compiled=torch.compile(net, backend='eager'))
    for name, form in forms.items():
        assert votes(form, x) == right, name
        log = tmp_path/f'{name}.tsv'
        for _ in range(2): assert len(certify_dataset(form, x, y, sigma=.5, n=200, log=log, progress=False)) == 4
    other = torch.jit.freeze(torch.jit.script(build(arch, 3, 1, 8).eval()))          # no tensor tells them apart
    with pytest.raises(ValueError, match='another setting'): certify_dataset(other, x, y, sigma=.5, n=200, log=tmp_path/'frozen.tsv', progress=False)

@pytest.mark.parametrize('precision', ['bfloat16', 'float16'])
@pytest.mark.parametrize('arch', ['small_cnn', 'cifar_resnet20'])
def test_half_weights_under_their_precision(tmp_path, x, arch, precision):
    torch.manual_seed(0)
    dtype = getattr(torch, precision)
    half = build(arch, 3, 1, 8).eval().to(dtype)
    sure = lambda model: certify(model, x, .5, n=400, precision=precision)
    for a, b in zip(sure(half), sure(lambda x: half(x.to(dtype)))):                  # by hand: rounding may move a vote or two
        assert sum(abs(m - n) for m, n in zip(a.counts, b.counts)) <= 12
    assert len(certify_dataset(half, x, [0, 1, 2, 0], sigma=.5, n=100, precision=precision, progress=False)) == 4
    with pytest.raises(ValueError, match=f'the model has {precision} weights, and should run in float32'): certify(half, x, .5, n=100)
    with pytest.raises(ValueError, match='float64 weights'): certify(half.double(), x, .5, n=100)

def test_a_model_for_one_batch_size(tmp_path, net, x):
    "As an ONNX file that was exported for 32 images: every smaller batch is filled up."
    def of_32(x):
        assert x.shape == (32, 1, 8, 8), 'INVALID_ARGUMENT: Got invalid dimensions for input'
        return net(x)
    right, settings = votes(net, x), dict(sigma=.5, n=200, batch_size=32, progress=False)
    with quiet():
        assert votes(of_32, x, batch_size=32) == right
        assert certify(of_32, x[0], .5, n0=5, n=11, batch_size=32).counts == certify(net, x[0], .5, n0=5, n=11).counts       # less than one batch
    log = certify_dataset(of_32, x, [0, 1, 2, 0], log=tmp_path/'log.tsv', **settings)
    mine = certify_dataset(net, x, [0, 1, 2, 0], **settings)
    pd.testing.assert_frame_equal(log.drop(columns=['time', 'weights', 'answers']), mine.drop(columns=['time', 'weights', 'answers']))
    with pytest.raises(ValueError, match='INVALID_ARGUMENT'): certify(of_32, x, .5, n=200)

def test_a_network_that_looks_at_the_rest_of_the_batch_is_refused(x):
    torch.manual_seed(0)
    moving, centred = build('cifar_resnet20', 3, 1, 8).train(), build('small_cnn', 3, 1, 8)
    for precision in ['float32', 'bfloat16']:
        for function in [lambda x: moving(x), lambda x: centred(x - x.mean(0))]:
            for batch_size in [100, 7]:
                with pytest.raises(ValueError, match='depends on the images beside it'): certify(function, x, .5, n=100, precision=precision, batch_size=batch_size)
    class Centred(nn.Module):
        def forward(self, x): return (x - x.mean(0)).flatten(1)[:, :3]
    with pytest.raises(ValueError, match='depends on the images beside it'): certify(Centred(), x, .5, n=100)

@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_honest_networks_pass_the_probe(precision):
    torch.manual_seed(0)
    colour = torch.rand(2, 3, 32, 32)
    with quiet():
        for arch in ['cifar_resnet20', 'resnet18', 'cifar_resnet110' if precision == 'bfloat16' else 'cifar_resnet32']:
            certify(build(arch, 10), colour[:1], .25, n0=2, n=11, batch_size=4, precision=precision)

def test_random_answers_get_a_warning(net, x):
    drop = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64, 3)).train()
    with pytest.warns(UserWarning, match='differently when the same images come again'): certify(lambda x: drop(x), x, .5, n=100)
    with quiet(): certify(drop, x, .5, n=100)                                         # a module is put into eval mode, and back
    assert drop.training


# frozen, by several at once

def test_frozen_in_threads_leaves_a_model_as_it_was(x):
    model = build('cifar_resnet20', 3, 1, 8).train()
    model[1].bn1.eval()
    right = {name: m.training for name, m in model.named_modules()}
    begin = threading.Barrier(4)
    def look(seed):
        begin.wait()
        for i in range(30):
            with frozen(model):
                assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
                time.sleep(.0005 * ((seed + i) % 3))
                assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
    failed = []
    def work(seed):
        try: look(seed)
        except BaseException as e: failed.append(e)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed
    assert {name: m.training for name, m in model.named_modules()} == right and all(p.requires_grad for p in model.parameters())

def test_frozen_keeps_nothing_alive():
    import gc, weakref
    from rs_toolkit import models
    model = build('mlp', 3, 1, 8)
    gone = weakref.ref(model)
    with pytest.raises(RuntimeError, match='inside'), frozen(model), frozen(model): raise RuntimeError('inside')
    assert model.training and not models._held
    del model
    gc.collect()
    assert gone() is None

def test_training_meanwhile_is_not_certified(net, x):
    class Views(nn.Module):                                                           # runs as it is, not as a copy
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(net)
        def forward(self, x):
            if len(x) == 0: return x
            return self.net(x)
    model = Views().eval()
    steps = vote_stream(model, x[0], .5, n=1000)
    next(steps)
    model.train()
    with pytest.raises(RuntimeError, match='training mode while it was being certified'): list(steps)


# logs

def test_no_file_unless_one_is_named(tmp_path, monkeypatch, net, x):
    monkeypatch.chdir(tmp_path)
    settings = dict(sigma=.5, n=200, progress=False)
    named = certify_dataset(net, x, [0, 1, 2, 0], log='named.tsv', **settings)
    Path('named.tsv').unlink()
    for model in [net, build('small_cnn', 3, 1, 8)]:
        frame = certify_dataset(model, x, [0, 1, 2, 0], **settings)
        assert (frame.columns == named.columns).all() and (frame.dtypes == named.dtypes).all()
    pd.testing.assert_frame_equal(certify_dataset(net, x, [0, 1, 2, 0], **settings).drop(columns='time'), named.drop(columns='time'))
    assert not [p for p in tmp_path.iterdir() if p.suffix != '.lock']

class PlainNormalize(nn.Module):
    "As in the field's code: constants that `state_dict` does not know."
    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std
    def forward(self, x): return (x - self.mean) / self.std

def test_a_mended_normalisation_does_not_go_on_in_the_old_log(tmp_path, net, x):
    settings = dict(sigma=.25, n=200, log=tmp_path/'log.tsv', progress=False)
    model = nn.Sequential(PlainNormalize(0., 1.), net)
    certify_dataset(model, x, [0, 1, 2, 0], every=2, **settings)
    model[0].mean, model[0].std = .3, .35
    with pytest.raises(ValueError, match='another setting .answers'): certify_dataset(model, x, [0, 1, 2, 0], **settings)
    model[0].mean, model[0].std = 0., 1.
    assert len(certify_dataset(model, x, [0, 1, 2, 0], **settings)) == 4

def test_a_plain_function_is_recognised_by_its_answers(tmp_path, net, x):
    settings = dict(sigma=.25, n=200, log=tmp_path/'log.tsv', progress=False)
    certify_dataset(lambda x: net(x), x, [0, 1, 2, 0], every=2, **settings)
    whole = certify_dataset(lambda x: net(x), x, [0, 1, 2, 0], **settings)
    assert len(whole) == 4 and whole.weights.isna().all()
    with pytest.raises(ValueError, match='another setting .answers'): certify_dataset(lambda x: -net(x), x, [0, 1, 2, 0], **settings)

SLOW = '''
import sys, time, torch
from rs_toolkit.certify import certify, certify_dataset
def slow(x):
    time.sleep(.05)
    print('called', flush=True)
    return x.flatten(1)[:, :3]
x, log = torch.rand(40, 1, 8, 8), sys.argv[1]
if log == 'certify': certify(slow, x, .5, n=300)
else: certify_dataset(slow, x, [0, 1] * 20, sigma=.5, n=300, log=None if log == 'none' else log, progress=False)
'''

@pytest.mark.parametrize('number, name, log, words', [
    (signal.SIGTERM, 'SIGTERM', 'log.tsv', 'of 40 images: the same call goes on from there'), (signal.SIGTERM, 'SIGTERM', 'none', 'Nothing is kept: with log=PATH'),
    (signal.SIGINT, 'Ctrl-C', 'log.tsv', 'of 40 images: the same call goes on from there'), (signal.SIGINT, 'Ctrl-C', 'certify', 'Nothing is kept')])
def test_a_stopped_run_says_how_to_go_on(tmp_path, number, name, log, words):
    child = subprocess.Popen([sys.executable, '-c', SLOW, log], cwd=tmp_path, env={'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PATH': '/usr/bin:/bin'},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(30): child.stdout.readline()                                       # the first looks at the function are over
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode != 0 and f'stopped by {name}. ' in said and words in said
    if log == 'log.tsv': assert f"log.tsv holds {len(read_log(tmp_path/'log.tsv'))} of 40" in said

def test_the_shipped_certificates_come_out_again(tmp_path):
    from rs_toolkit.checkpoint import load as load_checkpoint
    shipped = read_log(ROOT/'data/digits-gaussian/certify.tsv')
    model = load_checkpoint(ROOT/'data/digits-gaussian')
    row = shipped.iloc[0]
    images, labels = load('digits', 'test')
    again = certify_dataset(model, images, labels, sigma=row.sigma, n0=row.n0, n=row.n, alpha=row.alpha, seed=row.seed,
                            every=90, progress=False).set_index('idx')
    columns = ['label', 'predict', 'radius', 'correct', 'n_a', 'n_true', 'selected', 'weights', 'data']
    pd.testing.assert_frame_equal(again[columns], shipped.set_index('idx').loc[again.index, columns])
