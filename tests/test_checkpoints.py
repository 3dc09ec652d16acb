"Checkpoints that other hands and tools write: what opens, opens as the same function; everything else says what it is."
import gzip
import json
import re
import sys
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rs_toolkit import checkpoint
from rs_toolkit.data import STATISTICS
from rs_toolkit.models import build, weights_hash

MEAN, STD = STATISTICS['cifar10']
CNN = dict(arch='small_cnn', num_classes=10, in_channels=3, image_size=8)
RAW = CNN | dict(mean=None, std=None)
COLOUR = CNN | dict(mean=MEAN, std=STD)
CIFAR = dict(dataset='cifar10', normalization='standard', image_size=8)
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))

class TheirNormalize(nn.Module):
    "The field's own: constants that no state dict holds."
    def __init__(self, mean, std):
        super().__init__()
        self.means = torch.tensor(mean).reshape(-1, 1, 1)
        self.sds = torch.tensor(std).reshape(-1, 1, 1)
    def forward(self, x): return (x - self.means) / self.sds

class Buffered(nn.Module):
    "Constants that the state dict holds, under names of one's choice."
    def __init__(self, names=('means', 'sds'), shape=(-1, 1, 1), values=(MEAN, STD)):
        super().__init__()
        for name, numbers in zip(names, values): self.register_buffer(name, torch.tensor(numbers).reshape(shape))
    def forward(self, x): return x

class Wrapper(nn.Module):
    "What a training framework puts around a network, by a name that nobody foresees."
    def __init__(self, net):
        super().__init__()
        self.inner_learner = net
    def forward(self, x): return self.inner_learner(x)

def network(mean=None, std=None):
    torch.manual_seed(0)
    return build('small_cnn', 10, 3, 8, mean, std).eval()

def put(path, state, **more):
    torch.save(dict(state_dict=state, **more), path)
    return path

def renamed(state, start): return {start + k.removeprefix('1.'): v for k, v in state.items()}

WRAPS = {
    'plain': lambda m: m,
    'compiled': torch.compile,
    'parallel': nn.DataParallel,
    'parallel compiled': lambda m: nn.DataParallel(torch.compile(m)),
    'wrapped': Wrapper,
    'compiled wrapped parallel': lambda m: torch.compile(Wrapper(nn.DataParallel(m))),
    'parallel inside': lambda m: nn.Sequential(m[0], nn.DataParallel(m[1])),
    'compiled inside': lambda m: nn.Sequential(m[0], torch.compile(m[1])),
    'their normalisation': lambda m: nn.Sequential(TheirNormalize(MEAN, STD), m[1]),
    'float16': lambda m: m.half(),
    'bfloat16': lambda m: m.bfloat16(),
    'in training': lambda m: m.train(),
}

@pytest.mark.parametrize('wrap', WRAPS)
def test_what_is_saved_opens_as_the_same_function(tmp_path, wrap):
    expected = network(MEAN, STD)(X)
    model = WRAPS[wrap](network(MEAN, STD))
    training = {name: m.training for name, m in model.named_modules()}
    opened = checkpoint.load(checkpoint.save(tmp_path, model, **COLOUR))
    tolerance = .02 if wrap in ('float16', 'bfloat16') else 1e-6
    torch.testing.assert_close(opened(X), expected, rtol=0, atol=tolerance*expected.abs().max().item())
    assert {name: m.training for name, m in model.named_modules()} == training
    assert [k for k in opened.state_dict() if not k.startswith('1.') or '_orig_mod' in k] == []

def test_a_plain_network_opens_where_nothing_normalises(tmp_path):
    model = network()
    opened = checkpoint.load(checkpoint.save(tmp_path, model[1], **RAW))
    assert torch.equal(opened(X), model(X))
    assert weights_hash(opened) == weights_hash(model)

@pytest.mark.parametrize('model, recipe, says', [
    (lambda: network(MEAN, STD)[1], COLOUR, 'give different answers'),          # who normalises it?
    (lambda: network(MEAN, STD), RAW, 'give different answers'),
    (lambda: nn.Sequential(TheirNormalize(MEAN, STD), network()[1]), RAW, 'give different answers'),
    (lambda: network([.5]*3, STD), COLOUR, 'give different answers'),
    (lambda: build('mlp', 10, 3, 8), RAW, 'is not a small_cnn'),
    (lambda: build('small_cnn', 9, 3, 8), RAW, 'is not a small_cnn'),
    (lambda: nn.ModuleDict(dict(student=network(), teacher=network())), RAW,
     "holds several networks, under names that begin with"),
    (lambda: network(), RAW | dict(arch='my_cnn'), "unknown model 'my_cnn'"),
    (lambda: network(), RAW | dict(sigma=torch.tensor(.25)), 'sigma cannot be kept'),
    (lambda: lambda x: x, RAW, 'holds a torch.nn.Module, got function'),
])
def test_save_refuses_what_would_not_open(tmp_path, model, recipe, says):
    with pytest.raises(ValueError, match=re.escape(says)): checkpoint.save(tmp_path, model(), **recipe)
    assert not list(tmp_path.iterdir())

def test_saving_moves_no_random_numbers(tmp_path):
    model = network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    checkpoint.save(tmp_path, model, **RAW)
    assert torch.equal(torch.rand(3), expected)

STARTS = ['', '1.', 'module.', 'module.module.', '1.module.', 'module.1.', '_orig_mod.', '_orig_mod.1.',
          'module._orig_mod.1.', 'model.', 'model.1.', 'net.model.module.', 'learner.of.ours.']

@pytest.mark.parametrize('start', STARTS)
def test_any_beginning_of_names(tmp_path, start):
    model = network()
    file = put(tmp_path/'n.pth', renamed(model.state_dict(), start), arch='small_cnn')
    assert torch.equal(checkpoint.load(file, normalization='none', image_size=8)(X), model(X))
    small = build('mlp', 10, 3, 8)                                              # whose own names are numbers, too
    file = put(tmp_path/'mlp.pth', renamed(small.state_dict(), start), arch='mlp')
    assert torch.equal(checkpoint.load(file, normalization='none', image_size=8)(X), small(X))

@pytest.mark.parametrize('change, says', [
    (lambda s: renamed(s, 'model.') | renamed(s, 'ema.'),
     "several networks, under names that begin with ['model.', 'ema.']"),
    (lambda s: s | {'1.extra.weight': torch.zeros(3)}, '1 tensors differ, such as 1.extra.weight'),
    (lambda s: s | {'extra.std': torch.zeros(3)}, '1 tensors differ, such as extra.std'),
    (lambda s: s | {'0.weight': torch.zeros(16, 3, 3, 3)}, '1 tensors differ, such as 0.weight'),
    (lambda s: {k: v for k, v in s.items() if k != '1.2.bias'}, '1 tensors differ, such as 2.bias'),
])
def test_other_tensors_than_the_networks_are_refused(tmp_path, change, says):
    file = put(tmp_path/'n.pth', change(network().state_dict()), arch='small_cnn')
    with pytest.raises(ValueError, match=re.escape(says)): checkpoint.load(file, normalization='none', image_size=8)

def test_an_explicit_architecture_wins_over_a_foreign_name(tmp_path):
    model = network()
    file = put(tmp_path/'n.pth', model.state_dict(), arch='their_name')
    opened = checkpoint.load(file, arch='small_cnn', normalization='none', image_size=8)
    assert torch.equal(opened(X), model(X))
    assert opened.metadata['arch'] == 'small_cnn'
    with pytest.raises(ValueError, match="other words .*unknown model 'their_name'.* pass arch="):
        checkpoint.load(file, normalization='none', image_size=8)

@pytest.mark.parametrize('name, classes', [('cifar100_resnet110', 100), ('imagenet32_resnet110', 1000)])
def test_names_of_the_field_that_are_not_ours(tmp_path, name, classes):
    model = build('cifar_resnet110', classes, mean=MEAN, std=STD).eval()
    file = put(tmp_path/'n.pth.tar', model.state_dict(), arch=name, epoch=150)
    opened = checkpoint.load(file, arch='cifar_resnet110', dataset='cifar10', normalization='standard')
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(opened(x), model(x))
    assert opened.metadata['num_classes'] == classes

def write_theirs(folder): return put(folder/'n.pth', network(MEAN, STD).state_dict(), arch='small_cnn')

def write_ours(folder): return checkpoint.save(folder, network(MEAN, STD), **COLOUR)

@pytest.mark.parametrize('write', [write_theirs, write_ours])
@pytest.mark.parametrize('arch, says', [('mlp', 'says that its architecture is small_cnn, the call says mlp'),
                                        ('smal_cnn', 'says that its architecture is small_cnn')])
def test_a_contradiction_is_loud(tmp_path, write, arch, says):
    file = write(tmp_path)
    with pytest.raises(ValueError, match=says): checkpoint.load(file, arch=arch, **CIFAR)

@pytest.mark.parametrize('asked, says', [
    (dict(image_size=32), 'image_size 8, the call says 32'),
    (dict(arch_args=dict(width=8)), 'the call says {'),
    (dict(normalization='none'), 'holds its own mean'),
    (dict(normalization='center', dataset='cifar10'), 'holds its own std'),
    (dict(normalization='standard', dataset='imagenet'), 'holds its own mean'),
])
def test_arguments_that_contradict_a_file_of_ours(tmp_path, asked, says):
    checkpoint.save(tmp_path, network(MEAN, STD), **COLOUR)
    with pytest.raises(ValueError, match=re.escape(says)): checkpoint.load(tmp_path, **asked)
    same = checkpoint.load(tmp_path, arch='small_cnn', arch_args={}, **CIFAR)
    assert torch.equal(same(X), network(MEAN, STD)(X))
    other_images = checkpoint.load(tmp_path, dataset='folder:elsewhere')        # and the same network
    assert torch.equal(other_images(X), same(X))

def test_ours_is_told_by_metadata(tmp_path):
    model = network(MEAN, STD)
    checkpoint.save(tmp_path, model, **COLOUR).rename(tmp_path/'renamed.pt')
    assert torch.equal(checkpoint.load(tmp_path/'renamed.pt')(X), model(X))
    put(tmp_path/'theirs.safetensors', model.state_dict(), arch='small_cnn')    # a pickle under our ending
    assert torch.equal(checkpoint.load(tmp_path/'theirs.safetensors', **CIFAR)(X), model(X))

@pytest.mark.parametrize('first', [b'\x80', b'PK'])
def test_the_length_of_a_header_may_look_like_a_pickle_or_a_zip(tmp_path, first):
    def written(note): return checkpoint.save(tmp_path, network(), note=note, **RAW).read_bytes()
    short = int.from_bytes(written('')[:8], 'little')           # a header's length comes first, and is a multiple of 8
    wanted = int.from_bytes(first, 'little')
    while wanted < short: wanted += 256**len(first)
    assert written('x'*(wanted - short)).startswith(first)
    assert torch.equal(checkpoint.load(tmp_path)(X), network()(X))

@pytest.mark.parametrize('metadata', [None, dict(format='pt'), dict(arch='their_name', note='not JSON')])
def test_safetensors_of_others(tmp_path, metadata):
    model = build('cifar_resnet20', 7, 1, 8).eval()             # in the file, names are sorted: the head is not last
    save_file(renamed(model.state_dict(), 'model.'), tmp_path/'n.safetensors', metadata)
    with pytest.raises(ValueError, match='pass arch='): checkpoint.load(tmp_path/'n.safetensors')
    with pytest.raises(ValueError, match='does not hold its normalisation'):
        checkpoint.load(tmp_path/'n.safetensors', arch='cifar_resnet20')
    opened = checkpoint.load(tmp_path/'n.safetensors', arch='cifar_resnet20', dataset='digits', normalization='none')
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(opened(x), model(x))
    assert (opened.metadata['num_classes'], opened.metadata['in_channels']) == (7, 1)

@pytest.mark.parametrize('names', [('means', 'sds'), ('mean', 'std'), ('mu', 'sigma')])
@pytest.mark.parametrize('layer', ['0.', 'normalize.', 'module.0.', ''])
@pytest.mark.parametrize('shape', [(-1,), (-1, 1, 1), (1, -1, 1, 1)])
def test_normalisation_among_the_tensors_is_read(tmp_path, names, layer, shape):
    model = network(MEAN, STD)
    constants = {layer + k: v for k, v in Buffered(names, shape).state_dict().items()}
    file = put(tmp_path/'n.pth', constants | renamed(model.state_dict(), 'module.1.'), arch='small_cnn')
    torch.testing.assert_close(checkpoint.load(file, image_size=8)(X), model(X))
    torch.testing.assert_close(checkpoint.load(file, **CIFAR)(X), model(X))
    for asked in dict(normalization='none'), dict(dataset='cifar100', normalization='standard'):
        with pytest.raises(ValueError, match='holds its own mean'): checkpoint.load(file, image_size=8, **asked)

def test_a_mean_alone_centers_and_other_units_are_refused(tmp_path):
    model = network(MEAN)
    put(tmp_path/'n.pth', model.state_dict() | {'0.means': torch.tensor(MEAN)}, arch='small_cnn')
    torch.testing.assert_close(checkpoint.load(tmp_path/'n.pth', image_size=8)(X), model(X))
    bytes_not_units = {'0.means': torch.tensor([123.7, 116.3, 103.5]), '0.sds': torch.tensor([58.4, 57.1, 57.4])}
    put(tmp_path/'n.pth', model.state_dict() | bytes_not_units, arch='small_cnn')
    with pytest.raises(ValueError, match='normalises by a mean of 103.5 to 123.7'):
        checkpoint.load(tmp_path/'n.pth', image_size=8)

def test_images_from_a_folder_name_the_cure(tmp_path):
    file = put(tmp_path/'n.pth', network().state_dict(), arch='small_cnn')
    with pytest.raises(ValueError, match='-p constants cifar10'):
        checkpoint.load(file, dataset='folder:photos', normalization='standard')

def as_numpy_1_wrote_it(file, old):
    "The same checkpoint, with another name of the module that makes NumPy's numbers."
    assert b'numpy._core' in file.read_bytes()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(old, 'w', zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            content = source.read(name).replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
            target.writestr(name, content)
    return old

@pytest.mark.parametrize('number', [np.float64(93.2), np.float32(.5), np.int64(3), np.bool_(True)])
def test_numpy_numbers_beside_the_tensors(tmp_path, number):
    model = network()
    allowed = set(torch.serialization.get_safe_globals())
    file = put(tmp_path/'new.pth', model.state_dict(), arch='small_cnn', best_acc=number)
    for written in file, as_numpy_1_wrote_it(file, tmp_path/'old.pth'):
        opened = checkpoint.load(written, normalization='none', image_size=8)
        assert torch.equal(opened(X), model(X)), written.name
    assert set(torch.serialization.get_safe_globals()) == allowed               # for this one file, not for good

RAN = []

class Evil:
    def __reduce__(self): return RAN.append, ('run',)

class Shell:
    def __reduce__(self):
        import os
        return os.system, ('true',)

@pytest.mark.parametrize('make, names', [
    (network, r'rs_toolkit\.models\.Normalized'),
    (Evil, r'builtins\.list|getattr'),
    (Shell, r'posix\.system|os\.system|nt\.system'),
    (lambda: Namespace(lr=.1), r'argparse\.Namespace'),
    (lambda: Path('x'), r'pathlib\.\S*PosixPath'),
])
@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_that_could_run_code_is_refused_by_the_name_of_its_class(tmp_path, make, names, zipped):
    content = dict(state_dict=network().state_dict(), args=make())
    torch.save(content, tmp_path/'n.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match='could run code') as e:
        checkpoint.load(tmp_path/'n.pth', arch='small_cnn', normalization='none', image_size=8)
    assert not RAN
    said = str(e.value)
    assert re.search(names, said)
    assert '\x1b' not in said
    assert len(said) < 400

def text(content): return lambda path: path.write_bytes(content)

def zipped(path):
    with zipfile.ZipFile(path, 'w') as f: f.writestr('weights/model.pth', 'x')

def tarred(path):
    (path.parent/'inside').write_text('x')
    with tarfile.open(path, 'w') as f: f.add(path.parent/'inside')

@pytest.mark.parametrize('write, says', [
    (text(b'\n<!DOCTYPE html>\n<html><head><title>Sign in'), 'is a web page'),
    (text(b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'),
     'is a git-lfs pointer, not the file itself: run `git lfs pull`'),
    (text(b''), 'is empty'),
    (text(b'404: Not Found'), "is text, not a checkpoint; it begins with '404: Not Found'"),
    (text(gzip.compress(b'x'*100)), 'is compressed by gzip: unpack it'),
    (zipped, 'is a zip archive without a checkpoint\'s records (it holds weights/model.pth)'),
    (tarred, 'is a tar archive'),
    (lambda path: np.save(path.open('wb'), np.zeros(3)), 'is a NumPy array'),
    (lambda path: torch.jit.save(torch.jit.trace(network(), X), path), 'is a TorchScript archive'),
    (lambda path: torch.save(torch.zeros(3), path), "holds no state dict"),
    (text(bytes(range(1, 200))), 'was its copy or download cut short?'),
])
@pytest.mark.parametrize('ending', ['pt', 'safetensors'])
def test_a_file_that_is_something_else_says_so(tmp_path, write, says, ending):
    write(tmp_path/f'n.{ending}')
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        checkpoint.load(tmp_path/f'n.{ending}', arch='small_cnn', normalization='none')
    assert 'could run code' not in str(e.value)

OWN = '''
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, width=4):
        super().__init__()
        self.head = nn.Linear(in_channels*width, num_classes)
        self.width = width
    def forward(self, x): return self.head(x.flatten(2)[..., :self.width].flatten(1))

def net(num_classes, **kwargs): return Net(num_classes, 3, **kwargs)

def trap(num_classes): raise SystemExit('called')
'''

@pytest.fixture
def own(tmp_path, monkeypatch):
    "A package of one's own, importable for the length of a test."
    (tmp_path/'package').mkdir()
    (tmp_path/'package/own_nets.py').write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path/'package')
    yield 'own_nets'
    sys.modules.pop('own_nets', None)

def test_a_network_of_ones_own(tmp_path, own):
    model = build('own_nets:Net', 10, 3, 8, MEAN, STD, width=6).eval()
    assert model[1].head.in_features == 18
    recipe = COLOUR | dict(arch='own_nets:Net', arch_args=dict(width=6))
    checkpoint.save(tmp_path, nn.DataParallel(model), **recipe)
    assert torch.equal(checkpoint.load(tmp_path)(X), model(X))
    with pytest.raises(ValueError, match="unknown argument of model own_nets:Net 'widht': did you mean 'width'?"):
        build('own_nets:Net', 10, widht=3)
    with pytest.raises(ValueError, match='is not a own_nets:Net'):
        checkpoint.save(tmp_path, model, **recipe | dict(arch_args={}))

def test_a_network_of_ones_own_in_a_file_of_others(tmp_path, own):
    model = build('own_nets:Net', 10, 3, 8, MEAN, STD, width=6).eval()
    file = put(tmp_path/'n.pth', model[1].state_dict())
    opened = checkpoint.load(file, arch='own_nets:Net', arch_args=dict(width=6), **CIFAR)
    assert torch.equal(opened(X), model(X))

def test_a_network_of_ones_own_that_is_not_here(tmp_path, own):
    model = build('own_nets:Net', 10, 3, 8, MEAN, STD, width=6).eval()
    checkpoint.save(tmp_path, model, **COLOUR | dict(arch='own_nets:Net', arch_args=dict(width=6)))
    sys.modules.pop('own_nets')
    (tmp_path/'package/own_nets.py').rename(tmp_path/'package/elsewhere.py')
    with pytest.raises(ValueError, match='own_nets cannot be imported here .* put its folder on PYTHONPATH'):
        checkpoint.load(tmp_path)

def test_who_opens_a_file_may_choose_a_function(tmp_path, own):
    model = build('own_nets:net', 10, 3, 8, width=6).eval()
    checkpoint.save(tmp_path, model, **RAW | dict(arch='own_nets:net', arch_args=dict(width=6)))
    with pytest.raises(ValueError, match="no class of networks, .* pass arch='own_nets:net' if you trust it"):
        checkpoint.load(tmp_path)
    assert torch.equal(checkpoint.load(tmp_path, arch='own_nets:net')(X), model(X))

@pytest.mark.parametrize('name', ['own_nets:trap', 'os:system', 'builtins:dict', 'own_nets:Nat'])
def test_a_file_makes_us_call_no_function(tmp_path, own, name):
    state = build('own_nets:net', 10, 3, 8, width=6).state_dict()
    refused = 'no class of networks|has no attribute'
    header = {k: json.dumps(v) for k, v in (RAW | dict(arch=name)).items()}
    save_file(state, tmp_path/'forged.safetensors', header)
    with pytest.raises(ValueError, match=refused): checkpoint.load(tmp_path/'forged.safetensors')
    put(tmp_path/'forged.pth', state, arch=name)
    with pytest.raises(ValueError, match=refused): checkpoint.load(tmp_path/'forged.pth', normalization='none')

def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    checkpoint.save('~/run', network(), **RAW)
    assert (tmp_path/'run/model.safetensors').exists()
    assert torch.equal(checkpoint.load('~/run')(X), network()(X))
