"""The exercises: blank, with the solutions that are folded away, and with answers that are wrong."""
import re
from pathlib import Path

import nbformat
import pytest

from forked import execute, forked

ROOT = Path(__file__).resolve().parents[1]
CELLS = nbformat.read(ROOT/'nbs/exercises.ipynb', 4).cells
EXERCISES = [number for number, cell in enumerate(CELLS) if cell.source.startswith('# exercise')]

def solution_of(number):
    "What is folded away under the exercise in this cell."
    folded = next(cell.source for cell in CELLS[number:] if cell.source.startswith('<details><summary>Solution'))
    return re.search(r'```python\n(.*?)```', folded, re.S)[1]

METHOD = solution_of(EXERCISES[5])
WRONG = {  # exercise -> answers, each with a word of the hint that it gets
    1: [('radius = .5 * ndtri(.99)', 'takes the share'),
        ('radius = .5 * ndtri(betaincinv(990, 11, .0005))', 'two sides'),
        ('radius = ndtri(betaincinv(990, 11, .001))', 'units of sigma'), ('radius = 3', 'promises more'),
        ('radius = .5', 'less than the votes prove'), ('radius = "one"', 'TypeError')],
    2: [('samples = 300', 'less than 1'), ('samples = 1000', 'more than enough'), ('samples = 300.2', 'whole')],
    3: [('looks = [1000]', 'another chance'), ('looks = [0, 10]', '1 to 1,000')],
    4: [('mended = lambda k, n: lower_bound(k, n, .05)', 'above the truth'),
        ('mended = lambda k, n: lower_bound(k, n, 1e-9)', 'gives away')],
    5: [('first, second = [1, 0, 0, 0], [1, 1, 1, 1]', 'averages differ'),
        ('first, second = [1, 1, 1, 1], [1, 1, 1, 1]', 'not 3'),
        ('first, second = [9, 0, 0, 0], [3, 2, 2, 2]', 'lie between')],
    6: [(METHOD.replace("'spread'", "'var'"), 'named ce and spread'), (METHOD.replace('False', 'True'), 'spread is'),
        (METHOD.replace('y.repeat(len(logits))', 'y.repeat_interleave(len(logits))'), 'ce is')],
}

def run(answers):
    "The notebook from top to bottom, with these answers: exercise -> code. The check of each is run right below it."
    sources = [cell.source for cell in CELLS]
    for exercise, answer in answers.items(): sources[EXERCISES[exercise - 1]] = answer
    known = {}
    for cell, source in zip(CELLS, sources):
        if cell.cell_type == 'code': exec(source, known)

def told(answers):
    "What the notebook says of each exercise, and at the end."
    code, said = forked(run, answers)
    assert code == 0, said[-2000:]
    return [line for line in said.splitlines() if line.startswith('Exercise') or line.endswith('solved')]

def test_blank_they_wait():
    waiting = [f'Exercise {number}: not answered yet.' for number in WRONG]
    assert told({}) == [*waiting, '0 of 6 solved']

def test_the_folded_solutions_are_right():
    right = [f'Exercise {number}: right.' for number in WRONG]
    solutions = {number: solution_of(cell) for number, cell in zip(WRONG, EXERCISES)}
    assert told(solutions) == [*right, '6 of 6 solved']

@pytest.mark.parametrize('turn', range(max(map(len, WRONG.values()))))
def test_a_wrong_answer_gets_its_hint(turn):
    "One wrong answer to each exercise at a time, as long as there are any."
    answers = {number: wrong[turn] for number, wrong in WRONG.items() if turn < len(wrong)}
    said = told({number: answer for number, (answer, _) in answers.items()})
    for number, (_, hint) in answers.items():
        assert f'Exercise {number}: not yet.' in said[number - 1] and hint in said[number - 1]
    assert said[-1] == '0 of 6 solved'

def test_the_numbers_of_the_course():
    code, said = forked(execute, ROOT/'nbs/course.ipynb')
    assert code == 0, said[-2000:]
