"""The door: what comes in by each way, what is asked, what is refused, and names that are no markup."""
import zipfile
from datetime import datetime
from pathlib import Path

import pytest

from explorer import HOSTILE
from rs_toolkit.common import data_folder
from rs_toolkit.explore.door import Door, guests, unpack

CRT = data_folder()/'digits-crt'

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path/'settings.ini').touch()           # a project of its own
    monkeypatch.chdir(tmp_path)
    return tmp_path

def foreign(path, **columns):
    "A log in the field's columns."
    rows = [['idx', 'label', 'predict', 'radius', 'correct', 'time', *columns]]
    rows += [[i, i % 3, i % 3, .1 + .01*i, 1, '0:00:01.5', *columns.values()] for i in range(9)]
    path.write_text(''.join('\t'.join(map(str, row)) + '\n' for row in rows))
    return path

def run(folder):
    "A run below `runs/`."
    folder.mkdir(parents=True)
    for name in 'certify.tsv', 'config.json': (folder/name).write_bytes((CRT/name).read_bytes())
    return folder

def upload(door, *files):
    "What the browser sends."
    told = dict(type='', last_modified=datetime(2026, 1, 1))
    door.upload.value = [told | dict(name=name, size=len(content), content=memoryview(content))
                         for name, content in files]

def names(door): return [guest.name for guest in door.value]

def answer(door, **words):
    for fact, said in words.items(): door.fields[fact].value = said
    door.answer.click()

def archive(path, **files):
    with zipfile.ZipFile(path, 'w') as packed:
        for name, content in files.items(): packed.writestr(name.replace('__', '/'), content)
    return path

def test_by_name(here):
    run(here/'runs/a')
    run(here/'runs/deep/b')
    door = Door()
    door.typed.value = 'runs/a'
    assert names(door) == ['my a'] and door.typed.value == ''
    door.typed.value = 'runs'                             # a folder that holds some; one of them is here
    assert names(door) == ['my a', 'my b'] and door.message.value == ''
    assert len(door.value[1].log) == 180

def test_from_the_list(here):
    run(here/'runs/a')
    run(here/'runs'/HOSTILE)
    door = Door()
    door.opener.value = True
    assert door.panel.layout.display == 'flex'
    assert [name for name, _ in door.below.options] == ['2 below runs/: choose', HOSTILE, 'a']
    door.below.value = str(here/'runs/a')
    assert names(door) == ['my a'] and door.below.value == ''
    door.opener.value = False
    assert door.panel.layout.display == 'none'

def test_by_upload(here):
    door = Door()
    log = (CRT/'certify.tsv').read_bytes()
    packed = archive(here/'x.zip', runs__one__certify_tsv='').read_bytes()       # no such file name: nothing in it
    upload(door, ('mine.tsv', log), ('../../evil.tsv', log), ('x.zip', packed))
    assert names(door) == ['my mine', 'my evil'] and 'no run in' in door.message.value
    assert all(Path(door.uploads.name) in guest.path.parents for guest in door.value)
    with zipfile.ZipFile(here/'y.zip', 'w') as packed: packed.write(CRT/'certify.tsv', '../../two/certify.tsv')
    upload(door, ('y.zip', (here/'y.zip').read_bytes()))
    assert names(door)[2:] == ['my two'] and Path(door.uploads.name) in door.value[2].path.parents

def test_what_a_foreign_log_leaves_out_is_asked(here):
    foreign(here/'a.tsv')
    foreign(here/'b.tsv', sigma=.5)
    door = Door()
    door.typed.value = '*.tsv'
    assert names(door) == [] and len(door.waiting) == 2 and door.questions.layout.display == 'flex'
    answer(door, sigma='.25', n0='100', n='', alpha='.001', split='test')
    assert 'samples N: to be filled in' in door.message.value and not door.value
    answer(door, n='ten')
    assert 'numbers are wanted' in door.message.value
    answer(door, n='10')                                  # which cannot certify .18
    assert 'can certify' in door.message.value and not door.value
    answer(door, n='100,000')
    assert names(door) == ['my a']
    assert door.value[0].log.sigma.eq(.25).all() and door.value[0].log.n.eq(100_000).all()
    assert [box.description for box in door.questions.children[1:-2]] == ['n0', 'samples N', 'failure α', 'split']
    door.skip.click()
    assert not door.waiting and names(door) == ['my a'] and door.questions.layout.display == 'none'

@pytest.mark.parametrize('place, message', [
    ('nowhere', 'there is no nowhere'), ('empty', 'no run in'), ('README.md', 'is not a certification log'),
    ('a/*', 'no run in'), ('bad.zip', 'cannot be unpacked'), (HOSTILE, '&lt;img src=x onerror=alert(1)&gt;')])
def test_wrong_places_are_said_and_survived(here, place, message):
    (here/'empty').mkdir()
    (here/'README.md').write_text('words')
    (here/'bad.zip').write_text('words')
    door = Door(CRT)
    door.typed.value = place
    assert 'role="alert"' in door.message.value and message in door.message.value and HOSTILE not in door.message.value
    assert names(door) == ['my digits-crt']
    door.typed.value = str(data_folder()/'digits-gaussian')
    assert names(door) == ['my digits-crt', 'my digits-gaussian'] and door.message.value == ''

def test_a_guest_goes():
    door = Door({'one': CRT, HOSTILE: CRT})
    assert [button.description for button in door.leaving.children] == ['one', HOSTILE]
    assert door.opener.description == 'add runs (2)'
    door.leaving.children[0].click()
    assert names(door) == [HOSTILE]

def test_a_large_archive_is_refused(here, monkeypatch):
    monkeypatch.setattr('rs_toolkit.explore.door.LARGEST', 1000)
    packed = archive(here/'x.zip', a='0' * 2000)
    with pytest.raises(ValueError, match='unpack it yourself'): unpack(packed)

def test_a_log_that_grows_is_read_again(here):
    path = foreign(here/'a.tsv')
    [guest] = guests({'a': (path, dict(sigma=.25))})
    assert len(guest.log) == 9
    path.write_text(path.read_text() + '9\t0\t0\t.3\t1\t0:00:01.5\n')
    assert len(guest.log) == 10
