"""A hand on the controls of an explorer, and an eye on its figure; images and runs from outside."""
import json

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from rs_toolkit.explore.core import EVERY

HOSTILE = '<img src=x onerror=alert(1)>'

def move(explorer, **values):
    "Set controls, one after the other. An exception in a callback comes out here."
    for name, value in values.items(): explorer.controls[name].value = value

def move_to(explorer, view):
    "Look at other panels."
    explorer.toggle.value = view

def clamps(explorer, name, wild):
    "The value that a control makes of a wild one."
    move(explorer, **{name: wild})
    return explorer.controls[name].value

class Shown(dict):
    "Traces by name; one that was never needed is empty."
    def __missing__(self, name): return go.Scatter(x=[], y=[], text='')

def shown(explorer):
    "What the panels show, all of them in sight."
    move_to(explorer, EVERY)
    return Shown({trace.name: trace for trace in explorer.fig.data})

def written(explorer):
    "All that a page may show as markup: its words, its legend, and the texts of its figure."
    return explorer.words.value + explorer.key.value + str(explorer.fig.to_dict())

def complains(explorer, words): return 'role="alert"' in explorer.words.value and words in explorer.words.value

def drop(explorer, grip, x, y):
    "Take hold of the point in a panel, and let it go elsewhere: what the browser sends."
    places = {f'shapes[{grip}].xanchor': x, f'shapes[{grip}].yanchor': y}
    explorer.fig._js2py_relayout = dict(relayout_data=places, source_view_id='a view')

def grips(explorer): return [(shape.xanchor, shape.yanchor) for shape in explorer.fig.layout.shapes]

def drag_about(e, panel):
    "Drag the point of a page within a panel, out of it, and after an echo; both panels follow. It ends at (.9, .52)."
    drop(e, panel, .4149, .5231)
    assert (e.controls['x'].value, e.controls['y'].value) == (.41, .52)
    assert grips(e) == [(.41, .52)] * 2
    drop(e, panel, -.2, .5231)                                 # outside of the picture: it comes back to its edge
    assert grips(e) == [(0, .52)] * 2
    move(e, x=.3)
    assert grips(e) == [(.3, .52)] * 2
    e.controls['x'].value = .1 + .2                            # as a browser echoes it: no picture is made
    drop(e, panel, .9, .52)
    assert grips(e) == [(.9, .52)] * 2

def click(trace, x, y):
    "On a cell of a heatmap: what the browser sends."
    keys = dict.fromkeys(['alt', 'ctrl', 'meta', 'shift'], False)
    points = dict(trace_indexes=[trace], point_indexes=[[20, 20]], xs=[x], ys=[y])
    return dict(event_type='plotly_click', selector=None, device_state=dict(keys, button=0, buttons=1), points=points)

def coloured_images(folder, size=9, classes='01'):
    "Four of size x size pixels, in two classes; training and test alike."
    pixels = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
    for split in 'train', 'test':
        for name in classes: (folder/split/name).mkdir(parents=True)
        for i, image in enumerate(pixels): Image.fromarray(image).save(folder/split/classes[i % 2]/f'{i}.png')
    return pixels

def coloured_run(place, classes='01'):
    "A run on such images, with a network that nobody has trained."
    from rs_toolkit.checkpoint import save
    from rs_toolkit.models import build
    pixels = coloured_images(place/'images', classes=classes)
    folder = place/'run'
    shape = dict(num_classes=2, in_channels=3, image_size=9)
    save(folder, build('small_cnn', **shape), arch='small_cnn', **shape, mean=None, std=None)
    (folder/'config.json').write_text(json.dumps(dict(parameters=dict(dataset=f'folder:{place}/images'))))
    return folder, pixels
