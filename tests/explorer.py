"""A hand on the controls of an explorer, and an eye on its figure."""
import plotly.graph_objects as go

from rs_toolkit.explore.core import EVERY

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

def complains(explorer, words): return 'role="alert"' in explorer.words.value and words in explorer.words.value

def drop(explorer, grip, x, y):
    "Take hold of the point in a panel, and let it go elsewhere: what the browser sends."
    places = {f'shapes[{grip}].xanchor': x, f'shapes[{grip}].yanchor': y}
    explorer.fig._js2py_relayout = dict(relayout_data=places, source_view_id='a view')

def grips(explorer): return [(shape.xanchor, shape.yanchor) for shape in explorer.fig.layout.shapes]
