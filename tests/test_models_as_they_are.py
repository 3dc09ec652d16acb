"""Models, numbers and images as people bring them.

What is unambiguous is certified with the right votes, the rest is refused by name.
"""
import copy
import gc
import os
import signal
import threading
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from forked import SERVER, into, until
from rs_toolkit import models
from rs_toolkit.certify import certify, certify_dataset, predict, vote_stream
from rs_toolkit.checkpoint import load as load_checkpoint
from rs_toolkit.data import Items, check_images, load
from rs_toolkit.log import read_log
from rs_toolkit.models import HalfSpace, build, frozen
from rs_toolkit.noise import gaussian_noise

ROOT = Path(__file__).resolve().parents[1]
LABELS = [0, 1, 2, 0]

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

SIGMAS = [np.float32(.12), np.float16(.12), np.array(.12), torch.tensor(.12), torch.tensor(.12, dtype=torch.float64)]

@pytest.mark.parametrize('sigma', SIGMAS)
def test_a_number_is_the_one_that_was_meant(tmp_path, net, x, sigma):
    settings = dict(log=tmp_path/'log.tsv', progress=False)
    theirs = dict(n0=np.int64(100), n=torch.tensor(200), alpha=np.float32(.001), seed=np.int64(3), every=np.int32(2))
    begun = certify_dataset(net, x, LABELS, sigma=sigma, **theirs, **settings)
    assert begun.sigma.tolist() == [.12] * 2
    assert begun.alpha.tolist() == [.001] * 2
    whole = certify_dataset(net, x, LABELS, sigma=.12, n0=100, n=200, alpha=.001, seed=3, **settings)
    assert whole.n.tolist() == [200] * 4

@pytest.mark.parametrize('sigma', SIGMAS)
def test_a_certificate_holds_plain_numbers(net, x, sigma):
    c = certify(net, x[0], sigma, n=200)
    assert c == certify(net, x[0], .12, n=200)
    assert type(c.sigma) is float
    assert type(c.alpha) is float

def test_sigma_in_other_units_gets_a_warning():
    half_space = HalfSpace()
    x = half_space.point_at(.3)
    for f in [certify, predict, lambda *args, **kwargs: list(vote_stream(*args, **kwargs))]:
        with pytest.warns(UserWarning, match=r'sigma=64 is in \[0,1\]-pixel units.*give sigma=0.251') as said:
            f(half_space, x, 64, n=100)
        assert len(said) == 1
    with quiet(): certify(half_space, x, 2, n=100)
    with pytest.warns(UserWarning, match='pixel units'):
        certify_dataset(half_space, x[None], [1], sigma=64, n=100, progress=False)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_noise_is_float32_under_any_default(net, x, dtype):
    right = votes(net, x)
    keys = [(0, i) for i in range(4)]
    noise = gaussian_noise(x, .5, 2, keys)
    torch.set_default_dtype(dtype)
    try:
        assert gaussian_noise(x, .5, 2, keys).equal(noise)
        assert votes(net, x) == right
    finally: torch.set_default_dtype(torch.float32)


# images and labels

def test_arrays_and_data_sets_get_the_same_votes(net, x):
    right = votes(net, x)
    pairs = TensorDataset(x, torch.tensor(LABELS))
    assert votes(net, x.numpy()) == right
    assert votes(net, pairs) == right
    assert votes(net, DataLoader(pairs, 2, shuffle=True)) == right
    assert certify(net, x[0].numpy(), .5, n=250) == certify(net, x[0], .5, n=250)

FORMS = {
    'arrays': lambda x, y: (x.numpy(), y.numpy()),
    'a list of labels': lambda x, y: (x, y.tolist()),
    'other whole numbers': lambda x, y: (x, y.int()),
    'a data set': lambda x, y: (TensorDataset(x, y), None),
    'a loader': lambda x, y: (DataLoader(TensorDataset(x, y), 3), None),
    'a data set and labels': lambda x, y: (TensorDataset(x, y), y),
}

@pytest.mark.parametrize('form', FORMS)
def test_arrays_lists_and_data_sets_are_certified_alike(net, x, form):
    settings = dict(sigma=.5, n=200, progress=False)
    first = certify_dataset(net, x, torch.tensor(LABELS), **settings).drop(columns='time')
    images, labels = FORMS[form](x, torch.tensor(LABELS))
    pd.testing.assert_frame_equal(certify_dataset(net, images, labels, **settings).drop(columns='time'), first)
    few = certify_dataset(net, images, labels, every=2, **settings).drop(columns='time')
    pd.testing.assert_frame_equal(few, first[::2].reset_index(drop=True))

class Counting(Dataset):
    "Remembers which items were read."
    def __init__(self, size):
        self.size = size
        self.read = []
    def __len__(self): return self.size
    def __getitem__(self, i):
        self.read.append(i)
        return torch.full((1, 8, 8), i / self.size), i % 3

def test_a_data_set_is_streamed(monkeypatch, net):
    "Only the images to certify are read, and a few to look at; never many at once."
    at_once = []
    read = Items.__getitem__
    def watched(items, index):
        images = read(items, index)
        at_once.append(len(images) if images.dim() == 4 else 1)
        return images
    monkeypatch.setattr(Items, '__getitem__', watched)
    data = Counting(10_000)
    log = certify_dataset(net, data, sigma=.5, n=100, every=2000, progress=False)
    chosen = [0, 2000, 4000, 6000, 8000]
    assert log.idx.tolist() == chosen
    assert log.label.tolist() == [i % 3 for i in chosen]
    assert set(data.read) == {*chosen, *range(8)}
    assert max(at_once) == 8
    certify_dataset(net, Counting(600), sigma=.5, n0=1, n=11, progress=False)
    assert max(at_once) <= 256

def test_a_random_transform_is_refused(net):
    class Noisy(Counting):
        def __getitem__(self, i): return torch.rand(1, 8, 8), 0
    with pytest.raises(ValueError, match='another image each time'):
        certify_dataset(net, Noisy(20), sigma=.5, n=100, progress=False)

@pytest.mark.parametrize('images, labels, words', [
    ((np.zeros((2, 1, 8, 8)) * 255).astype('uint8'), None, 'got uint8 Tensor of shape .* 255'),
    (np.zeros((2, 1, 8, 8)), None, 'got float64 Tensor .*astype'),
    (torch.full((1, 1, 8, 8), 1 + 1.2e-7), None,
     r'got \[1.00000012, 1.00000012\]: that little is rounding: .clamp'),
    (torch.zeros(2, 1, 8, 8) - .5, None, 'normalise inside the model'),
    ([np.zeros((1, 8, 8))] * 2, None, 'got list: give one tensor'),
    (torch.zeros(2, 1, 8, 8), np.array([0., 1.]), 'labels must be 2 whole numbers.*got float64 Tensor'),
    (torch.zeros(2, 1, 8, 8), [[0, 1]], r'got int64 Tensor of shape \[1, 2\]'),
    (torch.zeros(2, 1, 8, 8), 'ab', 'got str'),
    (TensorDataset(torch.zeros(2, 1, 8, 8)), None, 'pairs .image, label., got tuple for item 0'),
    (DataLoader(TensorDataset(torch.zeros(2, 1, 8, 8), torch.zeros(2)), collate_fn=list), None, 'collate_fn'),
])
def test_a_refusal_names_what_came(images, labels, words):
    with pytest.raises(ValueError, match=words): check_images(images, labels)


# models

class Wrapped(nn.Module):
    "Answers as other libraries do."
    def __init__(self, net, answer):
        super().__init__()
        self.net = net
        self.answer = answer
    def forward(self, x): return self.answer(self.net(x))

ANSWERS = {
    'object': lambda z: SimpleNamespace(logits=z, loss=None),
    'dict': lambda z: dict(features=z @ z.T, logits=z),
    'tuple': lambda z: (z, z[:, :, None, None]),
    'list': lambda z: [z],
    'classes as well': lambda z: (z, z.argmax(1)),
    'numpy': lambda z: z.numpy(),
}

@pytest.mark.parametrize('kind', ANSWERS)
def test_logits_are_found_in_what_a_model_answers(net, x, kind):
    right = votes(net, x)
    assert votes(Wrapped(net, ANSWERS[kind]), x) == right
    assert votes(lambda x: ANSWERS[kind](net(x)), x) == right

UNCLEAR = {
    'two': lambda z: (z, z),
    'two by name': lambda z: dict(a=z, b=z),
    'three dimensions': lambda z: z[None],
    'nothing': lambda z: None,
}

@pytest.mark.parametrize('kind', UNCLEAR)
def test_unclear_answers_are_refused(net, x, kind):
    with pytest.raises(ValueError, match='^a classifier maps images .* to logits'):
        certify(Wrapped(net, UNCLEAR[kind]), x, .5, n=100)

FORMS_OF_TORCH = {
    'script': torch.jit.script,
    'trace': lambda net: torch.jit.trace(net, torch.rand(4, 1, 8, 8)),
    'frozen': lambda net: torch.jit.freeze(torch.jit.script(net)),
    'optimised': lambda net: torch.jit.optimize_for_inference(torch.jit.script(net)),
    'compiled': lambda net: torch.compile(net, backend='eager'),
}

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('form', FORMS_OF_TORCH)
@pytest.mark.parametrize('arch', ['small_cnn', 'cifar_resnet20'])
def test_scripted_frozen_and_compiled_modules(tmp_path, x, arch, form):
    torch.manual_seed(0)
    net = build(arch, 3, 1, 8).eval()
    right = votes(net, x)
    model = FORMS_OF_TORCH[form](net)
    assert votes(model, x) == right
    for _ in range(2):
        log = certify_dataset(model, x, LABELS, sigma=.5, n=200, log=tmp_path/'log.tsv', progress=False)
        assert len(log) == 4

@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('arch', ['small_cnn', 'cifar_resnet20'])
def test_frozen_modules_are_told_apart_though_no_tensor_does(tmp_path, x, arch):
    torch.manual_seed(0)
    settings = dict(sigma=.5, n=200, log=tmp_path/'log.tsv', progress=False)
    one = FORMS_OF_TORCH['frozen'](build(arch, 3, 1, 8).eval())
    other = FORMS_OF_TORCH['frozen'](build(arch, 3, 1, 8).eval())
    certify_dataset(one, x, LABELS, **settings)
    with pytest.raises(ValueError, match='another setting'): certify_dataset(other, x, LABELS, **settings)

@pytest.mark.parametrize('precision', ['bfloat16', 'float16'])
@pytest.mark.parametrize('arch', ['small_cnn', 'cifar_resnet20'])
def test_half_weights_under_their_precision(x, arch, precision):
    torch.manual_seed(0)
    dtype = getattr(torch, precision)
    half = build(arch, 3, 1, 8).eval().to(dtype)
    ours = votes(half, x, n=400, precision=precision)
    by_hand = votes(lambda x: half(x.to(dtype)), x, n=400, precision=precision)
    moved = np.abs(np.array(ours) - np.array(by_hand)).sum(1)
    assert (moved <= 12).all(), moved                               # rounding may move a vote or two
    settings = dict(sigma=.5, n=100, precision=precision, progress=False)
    assert len(certify_dataset(half, x, LABELS, **settings)) == 4
    with pytest.raises(ValueError, match=f'the model has {precision} weights, and should run in float32'):
        certify(half, x, .5, n=100)
    with pytest.raises(ValueError, match='float64 weights'): certify(half.double(), x, .5, n=100)

def test_a_model_for_one_batch_size(tmp_path, net, x):
    "As an ONNX file that was exported for 32 images: every smaller batch is filled up."
    def of_32(x):
        assert x.shape == (32, 1, 8, 8), 'INVALID_ARGUMENT: Got invalid dimensions for input'
        return net(x)
    right = votes(net, x)
    less_than_a_batch = votes(net, x[:1], n0=5, n=11)
    with quiet():
        assert votes(of_32, x, batch_size=32) == right
        assert votes(of_32, x[:1], n0=5, n=11, batch_size=32) == less_than_a_batch
    settings = dict(sigma=.5, n=200, batch_size=32, progress=False)
    log = certify_dataset(of_32, x, LABELS, log=tmp_path/'log.tsv', **settings)
    mine = certify_dataset(net, x, LABELS, **settings)
    other = ['time', 'weights', 'answers']
    pd.testing.assert_frame_equal(log.drop(columns=other), mine.drop(columns=other))
    with pytest.raises(ValueError, match='INVALID_ARGUMENT'): certify(of_32, x, .5, n=200)

class Centred(nn.Module):
    "Its answer for an image depends on the others."
    def forward(self, x): return (x - x.mean(0)).flatten(1)[:, :3]

@pytest.fixture(scope='module')
def functions_of_a_batch():
    torch.manual_seed(0)
    moving = build('cifar_resnet20', 3, 1, 8).train()
    centred = build('small_cnn', 3, 1, 8)
    return dict(moving=lambda x: moving(x), centred=lambda x: centred(x - x.mean(0)), module=Centred())

@pytest.mark.parametrize('batch_size', [100, 7])
@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', ['moving', 'centred', 'module'])
def test_a_network_that_looks_at_the_rest_of_the_batch_is_refused(functions_of_a_batch, x, kind, precision, batch_size):
    with pytest.raises(ValueError, match='depends on the images beside it'):
        certify(functions_of_a_batch[kind], x, .5, n=100, precision=precision, batch_size=batch_size)

@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16'])
def test_honest_networks_pass_the_probe(precision):
    torch.manual_seed(0)
    colour = torch.rand(1, 3, 32, 32)
    with quiet():
        for arch in ['cifar_resnet20', 'resnet18', 'cifar_resnet110' if precision == 'bfloat16' else 'cifar_resnet32']:
            certify(build(arch, 10), colour, .25, n0=2, n=11, batch_size=4, precision=precision)

def test_random_answers_get_a_warning(net, x):
    drop = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64, 3)).train()
    with pytest.warns(UserWarning, match='differently when the same images come again'):
        certify(lambda x: drop(x), x, .5, n=100)
    with quiet(): certify(drop, x, .5, n=100)                       # a module is put into eval mode, and back
    assert drop.training


# frozen, by several at once

def test_frozen_in_threads_leaves_a_model_as_it_was(x):
    model = build('cifar_resnet20', 3, 1, 8).train()
    model[1].bn1.eval()
    right = {name: m.training for name, m in model.named_modules()}
    begin = threading.Barrier(4)
    failed = []

    def check_frozen():
        assert [name for name, m in model.named_modules() if m.training] == []
        assert [name for name, p in model.named_parameters() if p.requires_grad] == []

    def look(seed):
        begin.wait()
        for i in range(30):
            with frozen(model):
                check_frozen()
                time.sleep(.0005 * ((seed + i) % 3))
                check_frozen()

    def work(seed):
        try: look(seed)
        except BaseException as e: failed.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert failed == []
    assert {name: m.training for name, m in model.named_modules()} == right
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == []

def test_frozen_keeps_nothing_alive():
    model = build('mlp', 3, 1, 8)
    gone = weakref.ref(model)
    with pytest.raises(RuntimeError, match='inside'), frozen(model), frozen(model): raise RuntimeError('inside')
    assert model.training
    assert models._held == {}
    del model
    gc.collect()
    assert gone() is None

class Views(nn.Module):
    "Runs as it is, not as a copy: torch.fx cannot trace it."
    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)
    def forward(self, x):
        if len(x) == 0: return x
        return self.net(x)

def test_training_meanwhile_is_not_certified(net, x):
    model = Views(net).eval()
    with pytest.raises(RuntimeError, match='training mode while it was being certified'):
        for _ in vote_stream(model, x[0], .5, n=1000): model.train()


# logs

def test_no_file_unless_one_is_named(tmp_path, monkeypatch, net, x):
    monkeypatch.chdir(tmp_path)
    settings = dict(sigma=.5, n=200, progress=False)
    named = certify_dataset(net, x, LABELS, log='named.tsv', **settings)
    Path('named.tsv').unlink()
    other = certify_dataset(build('small_cnn', 3, 1, 8), x, LABELS, **settings)
    pd.testing.assert_series_equal(other.dtypes, named.dtypes)
    unnamed = certify_dataset(net, x, LABELS, **settings)
    pd.testing.assert_frame_equal(unnamed.drop(columns='time'), named.drop(columns='time'))
    assert [p.name for p in tmp_path.iterdir() if p.suffix != '.lock'] == []

class PlainNormalize(nn.Module):
    "As in the field's code: constants that `state_dict` does not know."
    def __init__(self, mean, std):
        super().__init__()
        self.mean = mean
        self.std = std
    def forward(self, x): return (x - self.mean) / self.std

def test_a_mended_normalisation_does_not_go_on_in_the_old_log(tmp_path, net, x):
    settings = dict(sigma=.25, n=200, log=tmp_path/'log.tsv', progress=False)
    wrong = nn.Sequential(PlainNormalize(0., 1.), net)
    mended = nn.Sequential(PlainNormalize(.3, .35), net)
    certify_dataset(wrong, x, LABELS, every=2, **settings)
    with pytest.raises(ValueError, match='another setting .answers'): certify_dataset(mended, x, LABELS, **settings)
    assert len(certify_dataset(wrong, x, LABELS, **settings)) == 4

def test_a_plain_function_is_recognised_by_its_answers(tmp_path, net, x):
    settings = dict(sigma=.25, n=200, log=tmp_path/'log.tsv', progress=False)
    certify_dataset(lambda x: net(x), x, LABELS, every=2, **settings)
    whole = certify_dataset(lambda x: net(x), x, LABELS, **settings)
    assert len(whole) == 4
    assert whole.weights.isna().all()
    with pytest.raises(ValueError, match='another setting .answers'):
        certify_dataset(lambda x: -net(x), x, LABELS, **settings)

def certify_slowly(log):
    "Certify forty images, each look at them a line."
    def slow(x):
        time.sleep(.05)
        print('called', flush=True)
        return x.flatten(1)[:, :3]

    x = torch.rand(40, 1, 8, 8)
    if log == 'certify': certify(slow, x, .5, n=300)
    else: certify_dataset(slow, x, [0, 1] * 20, sigma=.5, n=300, log=log, progress=False)

@pytest.mark.parametrize('number, name, log, words', [
    (signal.SIGTERM, 'SIGTERM', 'log.tsv', 'of 40 images: the same call goes on from there'),
    (signal.SIGTERM, 'SIGTERM', None, 'Nothing is kept: with log=PATH'),
    (signal.SIGINT, 'Ctrl-C', 'log.tsv', 'of 40 images: the same call goes on from there'),
    (signal.SIGINT, 'Ctrl-C', 'certify', 'Nothing is kept'),
])
def test_a_stopped_run_says_how_to_go_on(tmp_path, number, name, log, words):
    said = tmp_path/'said'
    said.touch()
    path = tmp_path/log if log == 'log.tsv' else log
    child = SERVER.Process(target=into, args=(said, certify_slowly, path))
    child.start()
    until(lambda: said.read_text().count('called') >= 30)           # the first looks at the function are over
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == 1
    assert f'stopped by {name}. ' in said.read_text()
    assert words in said.read_text()
    if log == 'log.tsv':
        kept = len(read_log(path))
        assert f'log.tsv holds {kept} of 40' in said.read_text()

def test_the_shipped_certificates_come_out_again(tmp_path):
    shipped = read_log(ROOT/'data/digits-gaussian/certify.tsv')
    model = load_checkpoint(ROOT/'data/digits-gaussian')
    row = shipped.iloc[0]
    images, labels = load('digits', 'test')
    again = certify_dataset(model, images, labels, sigma=row.sigma, n0=row.n0, n=row.n, alpha=row.alpha, seed=row.seed,
                            every=90, progress=False).set_index('idx')
    columns = ['label', 'predict', 'radius', 'correct', 'n_a', 'n_true', 'selected', 'weights', 'data']
    pd.testing.assert_frame_equal(again[columns], shipped.set_index('idx').loc[again.index, columns])

def test_a_batch_without_memory_is_taken_in_halves():
    "The same votes, and a word."
    torch.manual_seed(0)
    images = torch.rand(3, 1, 8, 8)
    model = build('mlp', 4, 1, 8).eval()
    sizes = []
    def small(x):
        if len(x) > 30: raise torch.OutOfMemoryError('CUDA out of memory')
        sizes.append(len(x))
        return model(x)
    given = dict(n=300, batch_size=100)
    with pytest.warns(UserWarning, match='no memory left on cpu for 50 noisy images at a time: going on with 25'):
        found = certify(small, images, .25, **given)
    assert found == certify(model, images, .25, **given)
    assert max(sizes) == 25
    def none(x): raise torch.OutOfMemoryError('CUDA out of memory')
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError): certify(none, images, .25, **given)
