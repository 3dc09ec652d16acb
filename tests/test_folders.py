"Folders of images as people have them: every kind of file at its own white, or refused by name."
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageCms
from torchvision.transforms import functional as TF

from rs_toolkit.data import load

RNG = np.random.RandomState(0)
BYTES = RNG.randint(0, 256, (8, 8), np.uint8)
COLOURS = RNG.randint(0, 256, (8, 8, 3), np.uint8)
WORDS = RNG.randint(0, 65_536, (8, 8)).astype(np.uint16)

def folder(root, images, other=()):
    "A data set of one class: `images` (name -> Pillow image) are its test split, and train, unless there are others."
    for split, content in ('test', images), ('train', other or images):
        (root/split/'thing').mkdir(parents=True, exist_ok=True)
        for name, image in content.items(): image.save(root/split/'thing'/name)
    return f'folder:{root}'

def read(root, image, name='0.png'):
    "The test split of a folder of one image."
    return load(folder(root, {name: image}), 'test')[0][0]

def grey(values, white): return torch.from_numpy(values.astype(np.int64))[None].float() / white
def colour(values): return torch.from_numpy(values).permute(2, 0, 1).float() / 255

def palette(**more):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, 'P')
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    for key, value in more.items(): image.info[key] = value
    return image

PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)[np.arange(64).reshape(8, 8) % 4]

def with_alpha(image, alpha):
    image = image.copy()
    image.putalpha(alpha)
    return image

def in_lab(image):
    srgb = ImageCms.createProfile('sRGB')
    return ImageCms.profileToProfile(image, srgb, ImageCms.createProfile('LAB'), outputMode='LAB')

@pytest.mark.parametrize('image, name, expected', [
    (Image.fromarray(BYTES > 127), '0.png', grey(BYTES > 127, 1)),
    (Image.fromarray(BYTES > 127), '0.tif', grey(BYTES > 127, 1)),
    (Image.fromarray(BYTES), '0.png', grey(BYTES, 255)),
    (Image.fromarray(BYTES), '0.bmp', grey(BYTES, 255)),
    (Image.fromarray(BYTES), '0.pgm', grey(BYTES, 255)),
    (with_alpha(Image.fromarray(BYTES), 255), '0.png', grey(BYTES, 255)),
    (Image.fromarray(WORDS), '0.png', grey(WORDS, 65_535)),
    (Image.fromarray(WORDS), '0.tif', grey(WORDS, 65_535)),
    (Image.fromarray(WORDS), '0.pgm', grey(WORDS, 65_535)),
    (Image.fromarray(COLOURS), '0.png', colour(COLOURS)),
    (with_alpha(Image.fromarray(COLOURS), 255), '0.png', colour(COLOURS)),
    (with_alpha(Image.fromarray(COLOURS), 255), '0.tiff', colour(COLOURS)),
    (palette(), '0.png', colour(PALETTE)),
    (Image.fromarray(255 - COLOURS).convert('CMYK'), '0.tif', colour(255 - COLOURS)),
])
def test_every_kind_of_image_at_its_own_white(tmp_path, image, name, expected):
    assert torch.equal(read(tmp_path, image, name), expected)

@pytest.mark.parametrize('value, expected', [(30_000, .4578), (65_535, 1.), (256, .0039)])
def test_a_constant_of_16_bits(tmp_path, value, expected):
    pixels = read(tmp_path, Image.fromarray(np.full((8, 8), value, np.uint16)))
    assert torch.equal(pixels, (torch.tensor(value)/65_535).expand(1, 8, 8))
    assert abs(pixels.mean() - expected) < 1e-4

@pytest.mark.parametrize('image, name, says', [
    (Image.fromarray(WORDS.astype(np.int32)), '0.tif', "Pillow's mode I cannot be brought to [0, 1]"),
    (Image.fromarray(BYTES.astype(np.float32)), '0.tif', "Pillow's mode F cannot be brought to [0, 1]"),
    (in_lab(Image.fromarray(COLOURS)), '0.tif', "Pillow's mode LAB cannot be brought to [0, 1]"),
    (with_alpha(Image.fromarray(COLOURS), 254), '0.png', 'it is transparent'),
    (with_alpha(Image.fromarray(BYTES), 0), '0.png', 'it is transparent'),
    (palette(transparency=0), '0.png', 'it is transparent'),
])
def test_what_would_need_a_guess_is_refused_by_name(tmp_path, image, name, says):
    with pytest.raises(OSError) as e: read(tmp_path, image, name)
    assert f'could not read the image {tmp_path}/test/thing/{name}: {says}' in str(e.value)
    assert 'save it' in str(e.value)

def test_a_transparent_colour_of_a_file_without_alpha(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path/'key.png', transparency=tuple(int(c) for c in COLOURS[0, 0]))
    with pytest.raises(OSError, match='it is transparent'): read(tmp_path, Image.open(tmp_path/'key.png'))

def test_a_broken_image_is_named(tmp_path):
    where = folder(tmp_path, {'0.png': Image.fromarray(BYTES)})
    (tmp_path/'test/thing/0.png').write_bytes((tmp_path/'test/thing/0.png').read_bytes()[:60])
    with pytest.raises(OSError, match=f'could not read the image {tmp_path}/test/thing/0.png: '): load(where, 'test')

def test_grey_folders_are_grey_and_mixed_ones_are_coloured(tmp_path):
    grey_one = Image.fromarray(BYTES)
    deep_one = Image.fromarray(WORDS)
    coloured = Image.fromarray(COLOURS)
    where = folder(tmp_path/'grey', {'0.png': grey_one, '1.png': deep_one})
    assert torch.equal(load(where, 'test')[0], torch.stack([grey(BYTES, 255), grey(WORDS, 65_535)]))
    expected = torch.stack([grey(BYTES, 255).repeat(3, 1, 1), colour(COLOURS), grey(WORDS, 65_535).repeat(3, 1, 1)])
    where = folder(tmp_path/'mixed', {'0.png': grey_one, '1.png': coloured, '2.png': deep_one})
    assert torch.equal(load(where, 'test')[0], expected)
    where = folder(tmp_path/'halves', {'0.png': grey_one}, {'0.png': grey_one, '1.png': coloured})
    assert torch.equal(load(where, 'test')[0][0], expected[0])                     # the other split decides, too
    assert torch.equal(load(where, 'train')[0], expected[:2])

def test_jpegs_in_colour_are_what_they_were(tmp_path):
    "The networks that come with the project were trained on these pixels: they must not change by a bit."
    pixels = RNG.randint(0, 256, (6, 32, 32, 3), np.uint8)
    where = folder(tmp_path, {f'{i}.jpg': Image.fromarray(image) for i, image in enumerate(pixels)})
    as_torchvision = [TF.pil_to_tensor(image) for image, _ in torchvision.datasets.ImageFolder(tmp_path/'test')]
    images, labels = load(where, 'test')
    assert torch.equal(images, torch.stack(as_torchvision).float().div_(255))
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert labels.tolist() == [0]*6

def test_one_size(tmp_path):
    where = folder(tmp_path, {'0.png': Image.fromarray(BYTES), '1.png': Image.fromarray(BYTES[:6])})
    says = r'must have one size: .*1\.png is \[1, 6, 8\], the first is \[1, 8, 8\]'
    with pytest.raises(ValueError, match=says): load(where, 'test')

VISIBLE = ['cat/0.png', 'cat/sub/1.png', 'dog/0.png']
HIDDEN = ['.ipynb_checkpoints/0.png', 'cat/.ipynb_checkpoints/0.png', 'dog/._0.png', '.Trash/x/0.png']

@pytest.mark.parametrize('dataset', ['folder', 'imagenet'])
def test_hidden_files_and_folders_are_no_part_of_it(tmp_path, dataset):
    root = tmp_path/'.hidden'/'imagenet'                                           # what lies above does not count
    image = Image.fromarray(COLOURS)
    for split in 'train', 'test':
        for name in VISIBLE + HIDDEN:
            (root/split/name).parent.mkdir(parents=True, exist_ok=True)
            image.save(root/split/name)
        (root/split/'.DS_Store').write_text('x')
        (root/split/'cat/notes.txt').write_text('x')
    for split in 'train', 'test':
        images, labels = load(f'folder:{root}', split) if dataset == 'folder' else load('imagenet', split, root.parent)
        assert len(images) == len(VISIBLE)
        assert labels.tolist() == [0, 0, 1]

@pytest.mark.parametrize('dataset', ['folder', 'imagenet'])
def test_a_class_without_images_and_a_split_without_classes(tmp_path, dataset):
    root = tmp_path/'imagenet'
    where = (f'folder:{root}', 'test') if dataset == 'folder' else ('imagenet', 'test', tmp_path)
    for split in 'train', 'test': (root/split).mkdir(parents=True)
    with pytest.raises(ValueError, match='must hold CLASS/.*with images in each class'): load(*where)
    folder(root, {'0.png': Image.fromarray(COLOURS)})
    (root/'train/empty').mkdir()
    with pytest.raises(ValueError, match=r"differ from those of train: \['empty'\]"): load(*where)
    (root/'test/empty').mkdir()
    with pytest.raises(ValueError, match='must hold CLASS/.* classes empty'): load(*where)

def test_photos_of_a_stream_keep_their_white(tmp_path):
    size = (300, 260)
    photos = {
        '0.png': Image.fromarray(np.full(size, 30_000, np.uint16)),
        '1.png': Image.new('L', size, 117),
        '2.tif': Image.new('CMYK', size, (0, 0, 0, 138)),
        '3.png': Image.new('RGBA', size, (117, 117, 117, 0)),
    }
    folder(tmp_path/'imagenet', photos)
    images, _ = load('imagenet', 'test', tmp_path)
    assert images[:].shape == (4, 3, 224, 224)
    for name, image in zip(photos, images[:]): assert (image == torch.tensor(117.)/255).all(), name
