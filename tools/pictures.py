"""The pictures that explorers open with where no kernel runs: `python tools/pictures.py [NAME ...]` writes nbs/images/NAME.png."""
import sys
from pathlib import Path

from rs_toolkit.explore.radius import radius_figure

IMAGES = Path(__file__).resolve().parents[1] / 'nbs/images'
PICTURES = {'radius': radius_figure}

if __name__ == '__main__':
    for name in sys.argv[1:] or PICTURES: PICTURES[name]().write_image(IMAGES / f'{name}.png', width=1100, height=660, scale=1.5)
