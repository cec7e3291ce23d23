"What every notebook promises its reader: short, clean, really run, nothing defined twice, and a formula table that points at things that exist."
import ast
import importlib
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from alt_text import is_bar, pictures, said
from check_house import ENTRY
from openings import OPENING, colab_line, git_url, opening_of
from test_your_turn import EXERCISES

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / 'nbs').glob('*.ipynb'))
NOTEBOOKS = {p.stem: json.loads(p.read_text(encoding='utf-8')) for p in PATHS}
EXPORTING = [n for n, nb in NOTEBOOKS.items() if any('#| default_exp' in ''.join(c['source']) for c in nb['cells'])]
every_notebook = pytest.mark.parametrize('name', NOTEBOOKS)


def cells(name, kind):
    "Sources of the cells of one kind."
    return [''.join(c['source']) for c in NOTEBOOKS[name]['cells'] if c['cell_type'] == kind]


def outputs(name): return [o for c in NOTEBOOKS[name]['cells'] for o in c.get('outputs', [])]


def output_text(o):
    "What an output says in words; pictures are left out."
    data = {k: v for k, v in o.get('data', {}).items() if not k.startswith('image/')}
    return '\n'.join(''.join(v) if isinstance(v, list) else str(v) for v in [o.get('text', ''), *data.values()])


def definitions(source):
    "Names of functions and classes at the top level of a cell; methods added with `@patch` count for their class."
    plain = '\n'.join('' if line.lstrip().startswith(('%', '!')) else line for line in source.split('\n'))
    for node in ast.parse(plain).body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue
        patched = any('patch' in ast.unparse(d) for d in node.decorator_list)
        yield f'{ast.unparse(node.args.args[0].annotation)}.{node.name}' if patched else node.name


def rows_of(name, heading):
    "Cells of the markdown table below a heading, one list per row."
    text = '\n'.join(cells(name, 'markdown'))
    section = text.split(f'## {heading}\n', 1)[1].split('\n## ', 1)[0]
    rows = [[c.strip() for c in line.strip().strip('|').split('|')] for line in section.split('\n') if line.startswith('|')]
    return rows[2:]  # without the header and the rule


def test_there_are_notebooks(): assert {'00_overview', '05_ddim', '15_experiment'} <= set(NOTEBOOKS)


def test_a_notebook_is_named_like_its_module():
    for name in EXPORTING:
        module, = (m for s in cells(name, 'code') for m in re.findall(r'^#\| default_exp (\S+)$', s, re.M))
        assert re.fullmatch(r'\d\d[a-z]?_(\w+)', name)[1] == module.split('.')[-1], name


@every_notebook
def test_short(name):
    size = (ROOT / f'nbs/{name}.ipynb').stat().st_size
    assert len(NOTEBOOKS[name]['cells']) <= 60 and size <= 400_000, f'{len(NOTEBOOKS[name]["cells"])} cells, {size} bytes'


@every_notebook
def test_really_run(name):
    errors = [(o['ename'], o['evalue']) for o in outputs(name) if o['output_type'] == 'error']
    assert not errors, errors
    assert outputs(name), 'no stored output: run the notebook'


@every_notebook
def test_pictures_are_described_in_words(name):
    for c in NOTEBOOKS[name]['cells']:
        for o, mime in pictures(c):
            assert said(c), f'cell {c["id"]}: add a line "#| fig-alt: what the picture shows", then run tests/alt_text.py'
            assert o['metadata'][mime]['alt'] == said(c), f'cell {c["id"]}: run tests/alt_text.py'


@every_notebook
def test_no_progress_bar_is_stored(name):
    assert not [o for o in outputs(name) if is_bar(o)], 'run tests/alt_text.py'
    assert is_bar(dict(name='stderr', text='\rtraining:  5%| 7/300')) and not is_bar(dict(name='stderr', text='error: give a folder'))


@every_notebook
def test_begins_with_title_and_summary(name):
    first = NOTEBOOKS[name]['cells'][0]
    assert first['cell_type'] == 'markdown' and re.match(r'# .+\n+> .+', ''.join(first['source']))


@every_notebook
def test_clean_metadata(name):
    nb = NOTEBOOKS[name]
    assert nb['metadata'] == {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    for c in nb['cells']:
        assert set(c['metadata']) <= {'tags'} and c.get('execution_count') is None
        for o in c.get('outputs', []): assert o.get('execution_count') is None


@every_notebook
def test_no_machine_paths(name):
    "Neither sources nor printed outputs name a folder of the machine they were made on."
    pattern = re.compile(r'(?<![\w.:/])(/(root|home|tmp|work|mnt|Users)/[^\s"\']*)')
    said = cells(name, 'code') + cells(name, 'markdown') + [output_text(o) for o in outputs(name)]
    assert [m[0] for text in said for m in pattern.findall(text)] == []


@pytest.mark.parametrize('name', [n for n in EXPORTING if n < '16'])  # from 16 on: how the assets were made
def test_questions_have_folded_answers_and_a_cell(name):
    sources = [(c['cell_type'], ''.join(c['source'])) for c in NOTEBOOKS[name]['cells']]
    start = [i for i, (kind, s) in enumerate(sources) if kind == 'markdown' and re.search(r'^## Questions', s, re.M)]
    assert len(start) == 1, 'one section "## Questions"'
    text = '\n'.join(s for kind, s in sources[start[0]:] if kind == 'markdown')
    folded = text.count('<details>')
    assert folded >= 2 and folded == text.count('</details>') == text.count('<summary>')
    assert any(kind == 'code' for kind, _ in sources[start[0]:]), 'no cell verifies an answer'


def test_nothing_is_defined_twice():
    where = defaultdict(list)
    for name in NOTEBOOKS:
        for source in cells(name, 'code'):
            if source.lstrip().startswith('%%'): continue
            for d in definitions(source): where[d].append(name)
    for name in ENTRY: where.pop(name, None)
    assert {d: names for d, names in where.items() if len(names) > 1} == {}


def package_imports(source):
    "(module, name) of every `from diffclip_da... import` in a cell or file."
    plain = '\n'.join('' if line.lstrip().startswith(('%', '!')) else line for line in source.split('\n'))
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or '').split('.')[0] == 'diffclip_da':
            for a in node.names: yield node.module, a.name


def missing(source):
    return [f'{m}.{n}' for m, n in package_imports(source) if not hasattr(importlib.import_module(m), n)]


@pytest.mark.parametrize('name', [*NOTEBOOKS, *(p.name for p in sorted((ROOT/'benchmarks').glob('*.py')))])
def test_what_is_imported_exists(name):
    "Also in the figures' notebooks and in the benchmarks, which no test runs from end to end."
    sources = cells(name, 'code') if name in NOTEBOOKS else [(ROOT/'benchmarks'/name).read_text(encoding='utf-8')]
    assert [m for s in sources if not s.lstrip().startswith('%%') for m in missing(s)] == []


def test_missing_sees_a_name_that_is_gone():
    assert missing('from diffclip_da.core import UserError, gone') == ['diffclip_da.core.gone']


def test_definitions_sees_patches_and_skips_magics():
    assert list(definitions('%matplotlib inline\n@patch\ndef f(self:A): pass\ndef g(): \n  def h(): pass\nclass C: pass')) == ['A.f', 'g', 'C']


FORMULAS = rows_of('00_overview', 'Each formula of the paper')


@pytest.mark.parametrize('row', FORMULAS, ids=lambda r: r[2])
def test_formula_table_points_at_things_that_exist(row):
    assert len(row) == 4, f'a | inside the formula? {row}'
    formula, notebook, function, test = row
    target = re.fullmatch(r'\[\d\d[a-z]?\]\((\w+)\.ipynb\)', notebook)[1]
    module, func = re.fullmatch(r'`([\w.]+)\.(\w+)`', function).groups()
    assert callable(getattr(importlib.import_module(f'diffclip_da.{module}'), func))
    assert f'#| default_exp {module}' in cells(target, 'code')
    assert func in {d for s in cells(target, 'code') for d in definitions(s)}
    file, test_name = re.fullmatch(r'`(\w+)\.(test_\w+)`', test).groups()
    tree = ast.parse((ROOT / f'tests/{file}.py').read_text(encoding='utf-8'))
    assert test_name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_formula_table_is_whole(): assert len(FORMULAS) >= 8


def test_errata_are_where_the_table_says():
    rows = rows_of('00_overview', 'Errata')
    assert [int(r[0]) for r in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 9
    for number, *_, where in rows:
        linked = re.findall(r'\((\w+)\.ipynb\)', where)
        assert linked or where in ('here', 'below')
        for name in linked: assert re.search(rf'[Ee]rratum {number}\b', '\n'.join(cells(name, 'markdown'))), f'erratum {number} is not in {name}'


@every_notebook
def test_links_between_notebooks(name):
    for target in re.findall(r'\]\((?:nbs/)?(\d\d[a-z]?_\w+)\.ipynb[)#]', '\n'.join(cells(name, 'markdown'))): assert target in NOTEBOOKS


# The scheme of a chapter: what it is for, what it asks, how long it takes; an exercise; three lines to keep.


def breaks_the_scheme(name):
    "What is missing in a notebook, in words; '' for one that keeps the scheme."
    nb = NOTEBOOKS[name]
    opening = opening_of(nb)
    if opening is None: return f'the second cell should begin with {OPENING}'
    text, last = ''.join(opening['source']), nb['cells'][-1]
    if '\n\n**Before it, you should know** ' not in text: return 'the opening should say what one should know'
    if not re.search(r'\n\n\*\*Time:\*\* \d+ minutes? to read, .*(to run|more after)', text): return 'the opening should say how long reading and running take'
    if not text.endswith('\n\n' + colab_line(name, git_url())): return 'run tests/openings.py for the line about Colab'
    if name not in EXERCISES: return 'there should be a section "## Your turn" with a cell to fill'
    recap = ''.join(last['source']).split('\n\n', 1)
    if last['cell_type'] != 'markdown' or recap[0] != '## Recap': return 'the last cell should be "## Recap"'
    if len(lines := recap[1].split('\n')) != 3 or not all(line.startswith('- ') for line in lines): return 'the recap should have three lines'
    return ''


@every_notebook
def test_scheme(name):
    missing = breaks_the_scheme(name)
    assert not missing, missing


