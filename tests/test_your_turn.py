"Every exercise can be solved: its check refuses the empty cell, says what is missing, and accepts the folded solution."
import ast
import json
import re
from pathlib import Path

import matplotlib
import pytest

matplotlib.use('Agg')
NBS = Path(__file__).parents[1]/'nbs'


def exercise(path: Path) -> tuple|None: # (code to fill, folded solution)
    "The code cell after the heading 'Your turn', and the solution that is folded below the task."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    texts = [(c['cell_type'], ''.join(c['source'])) for c in cells]
    at = [i for i, (kind, s) in enumerate(texts) if kind == 'markdown' and re.search(r'^## Your turn$', s, re.M)]
    if not at: return None
    assert len(at) == 1, f'{path.stem}: one section "## Your turn"'
    task, (kind, code) = texts[at[0]][1].split('## Your turn')[1], texts[at[0] + 1]
    assert kind == 'code', f'{path.stem}: the cell to fill follows the task'
    folded = re.search(r'<details><summary>Solution</summary>\n\n```python\n(.*?)\n```\n\n</details>', task, re.S)
    assert folded, f'{path.stem}: fold the solution below the task'
    return code, folded[1]


EXERCISES = {p.stem: e for p in sorted(NBS.glob('*.ipynb')) if (e := exercise(p))}


@pytest.mark.parametrize('name', EXERCISES)
def test_the_check_refuses_the_empty_cell_and_accepts_the_solution(name):
    code, solution = EXERCISES[name]
    defined = [n.name for n in ast.parse(code).body if isinstance(n, ast.FunctionDef)]
    yours, = (n for n in defined if n.startswith('your_'))
    check, = (n for n in defined if n.startswith('check_'))
    assert check == yours.replace('your_', 'check_', 1) and [n.name for n in ast.parse(solution).body] == [yours]
    assert ast.unparse(ast.parse(code).body[-1]) == f'{check}({yours})', 'the cell ends with the check'
    scope = {}
    exec(code, scope)
    said = scope[check](scope[yours])
    assert said.startswith('not yet: '), said
    exec(solution, scope)
    assert scope[check](scope[yours]) == 'right'


def test_there_are_exercises(): assert {'02_schedule', '04_reverse', '05c_toy', '12_finetune'} <= set(EXERCISES)
