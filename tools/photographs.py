"""Twenty photographs of 32 x 32 pixels, cut from pictures with a free licence that two packages ship.

    pip install scikit-image          (for this alone: the project does not need it)
    python tools/photographs.py       (writes data/photographs.png and data/photographs.csv)

The sheet has five columns; the table says of each picture what is on it, its class in CIFAR-10 (-1: none), where
it was cut, who made the picture, and its licence as the package states it.
"""
from importlib.resources import files
from pathlib import Path

import pandas as pd
from PIL import Image

DATA = Path(__file__).resolve().parents[1]/'data'
SIDE, COLUMNS, CAT = 32, 5, 3
SOURCES = {  # file -> package, who made it, licence
    'china.jpg': ('sklearn.datasets.images', 'danielbuechele (Flickr)', 'CC BY 2.0'),
    'flower.jpg': ('sklearn.datasets.images', 'vultilion (Flickr)', 'CC BY 2.0'),
    'chelsea.png': ('skimage.data', 'Stefan van der Walt', 'CC0'),
    'astronaut.png': ('skimage.data', 'NASA', 'public domain'),
    'coffee.png': ('skimage.data', 'Rachel Michetti', 'CC0'),
    'rocket.jpg': ('skimage.data', 'SpaceX', 'public domain'),
    'camera.png': ('skimage.data', 'Lav Varshney', 'CC0')}
CUTS = [  # what is on it, class, file, left, top, side
    ('cat', CAT, 'chelsea.png', 50, 0, 300), ('cat', CAT, 'chelsea.png', 120, 0, 300),
    ('cat', CAT, 'chelsea.png', 0, 0, 300),
    ('face of a cat', CAT, 'chelsea.png', 110, 50, 240), ('eye of a cat', -1, 'chelsea.png', 115, 55, 120),
    ('pavilion', -1, 'china.jpg', 30, 15, 400), ('roofs', -1, 'china.jpg', 90, 30, 240),
    ('lake and trees', -1, 'china.jpg', 330, 150, 270), ('dahlia', -1, 'flower.jpg', 160, 75, 295),
    ('petals', -1, 'flower.jpg', 235, 150, 150), ('leaves', -1, 'flower.jpg', 0, 0, 170),
    ('astronaut', -1, 'astronaut.png', 60, 0, 400), ('face', -1, 'astronaut.png', 140, 5, 180),
    ('model of a shuttle', -1, 'astronaut.png', 345, 0, 165), ('helmet', -1, 'astronaut.png', 280, 335, 177),
    ('cup', -1, 'coffee.png', 70, 10, 390), ('espresso', -1, 'coffee.png', 170, 30, 230),
    ('rocket', -1, 'rocket.jpg', 100, 0, 427), ('rocket', -1, 'rocket.jpg', 230, 110, 170),
    ('photographer', -1, 'camera.png', 0, 40, 400)]

def cut(file, left, top, side):
    package = SOURCES[file][0]
    with Image.open(files(package).joinpath(file)) as image:
        box = left, top, left + side, top + side
        return image.convert('RGB').crop(box).resize((SIDE, SIDE), Image.Resampling.BOX)

if __name__ == '__main__':
    sheet = Image.new('RGB', (COLUMNS*SIDE, -(-len(CUTS) // COLUMNS)*SIDE))
    rows = []
    for i, (name, label, file, *box) in enumerate(CUTS):
        sheet.paste(cut(file, *box), (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
        package, author, licence = SOURCES[file]
        place = dict(zip(['left', 'top', 'side'], box))
        rows.append(dict(name=name, label=label, file=f'{package}/{file}', **place, author=author, licence=licence))
    sheet.save(DATA/'photographs.png', optimize=True)
    pd.DataFrame(rows).to_csv(DATA/'photographs.csv', index=False)
