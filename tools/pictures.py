"""The pictures that explorers open with where no kernel runs.

    python tools/pictures.py [NAME ...]

writes nbs/explore/images/NAME.png from `rs_toolkit.explore.NAME.NAME_figure()`; without names, of all explorers.
"""
import sys
from importlib import import_module
from pathlib import Path

EXPLORE = Path(__file__).resolve().parents[1]/'nbs/explore'

def write_picture(name):
    module = import_module(f'rs_toolkit.explore.{name}')
    figure = getattr(module, f'{name}_figure')()
    figure.write_image(EXPLORE/f'images/{name}.png', width=1100, height=figure.layout.height, scale=1.5)

if __name__ == '__main__':
    names = sys.argv[1:] or sorted(path.stem for path in (EXPLORE/'how').glob('*.ipynb'))
    for name in names: write_picture(name)
