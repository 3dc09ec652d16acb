"""The pictures that explorers open with where no kernel runs: `python tools/pictures.py [NAME ...]` writes nbs/explore/images/NAME.png from `rs_toolkit.explore.NAME.NAME_figure()`."""
import sys
from importlib import import_module
from pathlib import Path

EXPLORE = Path(__file__).resolve().parents[1] / 'nbs/explore'

if __name__ == '__main__':
    for name in sys.argv[1:] or sorted(p.stem for p in EXPLORE.glob('[a-z]*.ipynb')):
        figure = getattr(import_module(f'rs_toolkit.explore.{name}'), f'{name}_figure')()
        figure.write_image(EXPLORE/f'images/{name}.png', width=1100, height=figure.layout.height, scale=1.5)
