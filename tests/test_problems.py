"What is written for complete verifiers, read back by others: onnxruntime, and a reader of VNN-LIB of our own."
import csv
import importlib
import re
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from rs_toolkit.data import load
from rs_toolkit.deterministic import boxes, export
from rs_toolkit.deterministic.boxes import BATCH_NORMS
from rs_toolkit.deterministic.export import export_problems, write_network
from rs_toolkit.models import CifarResNet, Normalized, build

X, Y = (t[::40] for t in load('digits', 'test'))
EPS = .06

def unsettled(model):
    "Batch-norms with statistics, factors and shifts of all signs."
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS):
            nn.init.normal_(layer.running_mean, std=.3)
            nn.init.uniform_(layer.running_var, .2, 2)
            for weight in layer.parameters(): nn.init.normal_(weight)
    return model

def network():
    torch.manual_seed(0)
    return unsettled(build('cnn_digits', 10, 1, 8, [.3], [.25]))

def answers(file, x): return onnxruntime.InferenceSession(file).run(None, {'X': x.numpy()})[0]

@pytest.fixture(scope='module')
def problems(tmp_path_factory):
    "A network in training mode, what it answers in eval mode, the folder, and the table."
    folder = tmp_path_factory.mktemp('problems')
    model = network().train()
    table = export_problems(model, X, Y, EPS, folder, idx=list(range(0, 360, 40)), timeout=20)
    assert model.training
    return model.eval(), folder, table

def read_property(file):
    "Box [2, inputs], and pairs (j, i) of which Y_j >= Y_i may hold for one; refuses what verifiers do not read."
    text = file.read_text()
    declared = re.findall(r'^\(declare-const ([XY])_(\d+) Real\)$', text, re.M)
    counts = [sum(kind == name for name, _ in declared) for kind in 'XY']
    assert declared == [(kind, str(i)) for kind, count in zip('XY', counts) for i in range(count)]
    ends = np.full((2, counts[0]), np.nan)
    for order, pixel, value in re.findall(r'^\(assert \((>=|<=) X_(\d+) (\d+\.\d+)\)\)$', text, re.M):
        ends[int(order == '<='), int(pixel)] = float(value)
    [choices] = re.findall(r'^\(assert \(or (.*)\)\)$', text, re.M)
    assert re.fullmatch(r'(\(and \(>= Y_\d+ Y_\d+\)\) ?)+', choices)
    pairs = [(int(j), int(i)) for j, i in re.findall(r'>= Y_(\d+) Y_(\d+)', choices)]
    assert len(text.splitlines()) == sum(counts) + 2*counts[0] + 1
    return ends, pairs

def test_onnxruntime_answers_as_the_network_in_eval_mode(problems):
    model, folder, _ = problems
    for x in X[:1], X[:5], torch.rand(3, 1, 8, 8):
        with torch.no_grad(): expected = model(x)
        np.testing.assert_allclose(answers(folder/'network.onnx', x), expected, rtol=1e-4, atol=1e-4)

def test_a_residual_network_of_colour_images(tmp_path):
    torch.manual_seed(0)
    model = unsettled(Normalized(CifarResNet(8, 5, 3), [.5, .4, .3], [.2, .2, .1])).eval()
    x = torch.rand(3, 3, 32, 32)
    write_network(model, x[:1], tmp_path/'network.onnx')
    with torch.no_grad(): expected = model(x)
    tolerance = 1e-4 * float(expected.abs().max())
    np.testing.assert_allclose(answers(tmp_path/'network.onnx', x), expected, rtol=1e-3, atol=tolerance)

def test_a_property_is_the_box_of_its_image(problems):
    _, folder, table = problems
    for row, image, label in zip(table.itertuples(), X.flatten(1).double().numpy(), Y.tolist()):
        (low, high), pairs = read_property(folder/row.property)
        assert (low <= np.maximum(image - EPS, 0)).all() and (high >= np.minimum(image + EPS, 1)).all()
        np.testing.assert_allclose([low, high], [np.maximum(image - EPS, 0), np.minimum(image + EPS, 1)], atol=2e-7)
        assert low.min() >= 0 and high.max() <= 1 and row.label == label
        np.testing.assert_array_equal(low.astype('f4'), boxes.ball(X, EPS).lower[row.Index].flatten())
        assert pairs == [(j, label) for j in range(10) if j != label]

def test_a_property_asks_whether_a_margin_is_lost(problems):
    "On points of each box, by the logits of onnxruntime; where a bound is positive, no point says yes."
    model, folder, table = problems
    bounds = boxes.margin_bounds(model, X, Y, EPS).scatter(1, Y[:, None], torch.inf).amin(1)
    told = []
    torch.manual_seed(1)
    for row, bound in zip(table.itertuples(), bounds):
        (low, high), pairs = read_property(folder/row.property)
        points = torch.tensor(low) + torch.rand(200, 64).round()*torch.tensor(high - low)
        points = points.float().reshape(-1, 1, 8, 8)
        logits = answers(folder/'network.onnx', points)
        violated = np.any([logits[:, j] >= logits[:, i] for j, i in pairs], 0)
        with torch.no_grad(): right = (model(points).argmax(1) == row.label).numpy()
        np.testing.assert_array_equal(violated, ~right)
        assert bound <= 0 or not violated.any()
        told.extend(violated)
    assert 0 < np.mean(told) < 1

def test_the_index_is_as_competitions_have_it(problems):
    _, folder, table = problems
    rows = list(csv.reader((folder/'instances.csv').open()))
    assert [row[2] for row in rows] == ['20']*9 and {row[0] for row in rows} == {'network.onnx'}
    assert [row[1] for row in rows] == [f'properties/{i}.vnnlib' for i in range(0, 360, 40)] == list(table.property)
    for row in rows: assert (folder/row[0]).is_file() and (folder/row[1]).is_file()
    assert not list(folder.glob('*.part*'))

def test_without_onnx_it_says_what_to_install(monkeypatch, tmp_path):
    for name in 'onnx', 'onnx.reference', 'onnxscript': monkeypatch.setitem(sys.modules, name, None)
    fresh = importlib.reload(export)                                        # the module itself needs neither
    with pytest.raises(ImportError, match='pip install onnx onnxscript'):
        fresh.export_problems(network(), X, Y, EPS, tmp_path/'problems')
    assert not (tmp_path/'problems').exists()

@pytest.mark.parametrize('change, says', [
    (dict(eps=8), '8/255, not 8'), (dict(eps=0), 'positive'), (dict(labels=Y + 9), 'labels'),
    (dict(images=255*X), r'\[0, 1\]'), (dict(timeout=0), 'timeout'),
    (dict(model=lambda x: x.flatten(1)[:, :10]), 'made from a torch.nn.Module, got function')])
def test_what_makes_no_sense_is_refused_before_a_file_is_written(tmp_path, change, says):
    given = dict(model=network(), images=X, labels=Y, eps=EPS, folder=tmp_path/'problems') | change
    with pytest.raises(ValueError, match=says): export_problems(**given)
    assert not (tmp_path/'problems').exists()

def test_a_file_that_answers_otherwise_is_not_kept(monkeypatch, tmp_path):
    "An exporter that leaves something out."
    export_it = torch.onnx.export
    def forgets(model, *args, **given): return export_it(model[1], *args, **given)
    monkeypatch.setattr(torch.onnx, 'export', forgets)
    with pytest.raises(RuntimeError, match='does not answer as the network does'):
        write_network(network(), X[:1], tmp_path/'network.onnx')
    assert not (tmp_path/'network.onnx').exists()
