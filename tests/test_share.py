"""Several processes write one log: the same bytes as one process, whoever dies on the way."""
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch

from forked import SERVER
from rs_toolkit.certify import certify_dataset
from rs_toolkit.models import build
from rs_toolkit.share import parts_of, so_far

pytestmark = pytest.mark.filterwarnings('ignore:on noisy images')        # the network is not trained
GIVEN = dict(sigma=.25, n=2000, batch_size=100, progress=False)
PROCEDURES = {'fixed': {}, 'sequential': dict(radii=[0, .25, .5]), 'anytime': dict(tol=.05), 'pilot': {}}

def data(count):
    torch.manual_seed(0)
    images = torch.rand(count, 1, 8, 8)
    model = build('mlp', 4, 1, 8).eval()
    with torch.no_grad(): labels = model(images).argmax(1)
    return model, images, labels

def killer(batches):
    "A hook of a model: its process dies when it has seen so many batches."
    seen = []
    def count(*_):
        seen.append(1)
        if len(seen) == batches: os.kill(os.getpid(), signal.SIGKILL)
    return count

def certify_images(log, count=30, dies_at=None, **given):
    "In a process of its own, too; it may die at so many batches."
    torch.set_num_threads(1)
    model, images, labels = data(count)
    if dies_at: model.register_forward_hook(killer(dies_at))
    certify_dataset(model, images, labels, log=log, **GIVEN | given)

def begin(log, count=30, **given):
    process = SERVER.Process(target=certify_images, args=(str(log), count), kwargs=given)
    process.start()
    return process

def together(log, processes, **given):
    started = [begin(log, shared=True, **given) for _ in range(processes)]
    for process in started: process.join(timeout=120)
    assert [process.exitcode for process in started] == [0]*processes

def rows(log):
    "The text of a log, but for the time that an image took."
    return pd.read_csv(log, sep='\t', dtype=str, keep_default_na=False).drop(columns='time')


@pytest.mark.parametrize('procedure', PROCEDURES)
def test_processes_write_the_log_of_one(tmp_path, procedure):
    given = dict(procedure=procedure, procedure_args=PROCEDURES[procedure])
    certify_images(tmp_path/'one', **given)
    together(tmp_path/'three', 3, **given)
    pd.testing.assert_frame_equal(rows(tmp_path/'three'), rows(tmp_path/'one'))
    assert not parts_of(tmp_path/'three').exists()

def test_who_dies_loses_what_it_was_at_and_no_more(tmp_path):
    "The block of the dead is finished by another one, with the rows that stand in it."
    certify_images(tmp_path/'one')
    log = tmp_path/'two'
    victim = begin(log, shared=True, dies_at=300)                      # of about 630, for thirty images
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    kept = pd.concat(rows(part) for part in parts_of(log).glob('*.tsv'))
    assert 1 < len(kept) < 30
    together(log, 2)
    pd.testing.assert_frame_equal(rows(log), rows(tmp_path/'one'))

def test_one_process_goes_on_alone(tmp_path):
    "With what several had begun."
    certify_images(tmp_path/'one')
    log = tmp_path/'log'
    model, images, labels = data(30)
    with pytest.raises(KeyboardInterrupt, match='of 30 images: the same call goes on from there'):
        certify_dataset(model, images, labels, log=log, shared=True, watch=stop, **GIVEN)
    assert parts_of(log).exists()
    certify_images(log)
    pd.testing.assert_frame_equal(rows(log), rows(tmp_path/'one'))
    assert not parts_of(log).exists()

def stop(frame): raise KeyboardInterrupt

def test_a_part_that_is_gone_when_it_is_read_does_no_harm(tmp_path):
    "Another process may be collecting the parts."
    certify_images(tmp_path/'log', count=5)
    parts_of(tmp_path/'log').mkdir()
    (parts_of(tmp_path/'log')/'000000.tsv').symlink_to('gone')
    assert len(so_far(tmp_path/'log')) == 5

def test_a_log_of_one_is_finished_by_several(tmp_path):
    certify_images(tmp_path/'one')
    text = Path(tmp_path/'one').read_text().splitlines(keepends=True)
    (tmp_path/'half').write_text(''.join(text[:14]))
    together(tmp_path/'half', 2)
    pd.testing.assert_frame_equal(rows(tmp_path/'half'), rows(tmp_path/'one'))

def test_other_images_are_refused(tmp_path):
    certify_images(tmp_path/'log', count=12)
    model, images, labels = data(12)
    with pytest.raises(ValueError, match='holds image 0, which is not among those to certify now, or is another image'):
        certify_dataset(model, images.flip(0), labels, log=tmp_path/'log', shared=True, **GIVEN)
    with pytest.raises(ValueError, match='processes share a log: give log=PATH'):
        certify_dataset(model, images, labels, shared=True, **GIVEN)
