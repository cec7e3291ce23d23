"The house rules: sync, rooms, public names, packaging, and no trace of the machine it was made on"
import ast
import configparser
import contextlib
import doctest
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
import torch
from conftest import encoded, picture, write_celeba
from packaging.requirements import Requirement

import diffclip_da
from check_house import broken_rules
from check_sync import ROOT, problems


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The tracked parts that nbdev and packaging read, with room to break them"
    work = tmp_path_factory.mktemp('copy')
    for name in ('settings.ini', 'setup.py', 'README.md', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'constraints.txt'): shutil.copy(ROOT / name, work)
    for name in ('nbs', 'diffclip_da'): shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    return work


def test_tree_is_clean_and_in_sync(): assert problems() == []


def test_check_sees_a_stale_module_an_edit_and_a_dirty_notebook(copy):
    (copy / 'diffclip_da/renamed_away.py').write_text('x = 1\n')
    (copy / 'diffclip_da/diffusion/schedule.py').write_text((copy / 'diffclip_da/diffusion/schedule.py').read_text() + '\nx = 1\n')
    nb = copy / 'nbs/02_schedule.ipynb'
    nb.write_text(nb.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    found = problems(copy)
    assert 'diffclip_da/renamed_away.py is stale: no notebook exports it, delete it' in found
    assert 'diffclip_da/diffusion/schedule.py is out of sync with its notebook: run nbdev_export' in found
    assert 'nbs/02_schedule.ipynb is not clean: run nbdev_clean' in found
    assert len(found) == 3


def test_the_house_is_in_order(): assert broken_rules() == []


BREAKS = dict(  # what is broken: (file, line that is added to it, what is reported)
    upward=('diffusion/ddim.py', 'from ..models.unet import EpsUNet', 'diffusion.ddim imports models.unet, which is above it'),
    upward_by_its_full_name=('core.py', 'import diffclip_da.data', 'core imports data, which is above it'),
    upward_by_a_string=('core.py', "import importlib; importlib.import_module('diffclip_da.data')", 'core imports data, which is above it'),
    upward_from_a_function=('store.py', 'def late():\n    from .data import ImageSet', 'store imports data, which is above it'),
    beside=('align.py', 'from .styles import render', 'align imports styles, which is beside it'),
    through_the_front_door=('study/stats.py', 'from .. import ImageSet', 'imports ImageSet from the package itself'),
    through_an_old_name=('study/stats.py', 'from ..unet import EpsUNet', 'imports unet, an old name'),
    a_room_without_a_place=('attic/box.py', 'x = 1', 'attic is no room of ORDER'),
    circle=('diffusion/schedule.py', 'from .forward import q_sample', 'circle: diffusion.forward -> diffusion.schedule -> diffusion.forward'),
    circle_in_a_function=('diffusion/schedule.py', 'def f():\n    from . import forward', 'circle: diffusion.forward -> diffusion.schedule'),
    private_import=('data.py', 'from .core import _hidden', 'imports _hidden of core'),
    private_of_a_module=('data.py', 'from . import store\nx = store._hidden', 'reaches store._hidden, private to store'),
    private_by_its_full_name=('data.py', 'import diffclip_da.store\nx = diffclip_da.store._hidden', 'reaches diffclip_da.store._hidden'),
    private_of_a_class=('data.py', 'from .store import Lock\nx = Lock._hidden', 'reaches Lock._hidden, private to store'),
    twice=('study/stats.py', 'def q_sample(): pass', 'q_sample is defined 2 times'),
    twice_as_a_class=('study/stats.py', 'class ImageSet: pass', 'ImageSet is defined 2 times'),
    patch=('data.py', 'from fastcore.basics import patch\nfrom .core import UserError\n@patch\ndef f(self:UserError): pass', 'patches f into UserError'),
    patch_by_hand=('data.py', 'from .core import UserError\nUserError.f = len', 'sets UserError.f, whose module is another'),
    hashing_elsewhere=('data.py', 'import hashlib', 'imports hashlib, which is for core and store'),
    table_of_options=('data.py', 'from argparse import ArgumentParser', 'imports argparse, which is for nobody'),
    long_line=('core.py', f'x = "{"y" * 120}"', '126 characters, more than 120'))


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    "The package's sources, to break, and what is reported before that"
    root = tmp_path_factory.mktemp('package')
    shutil.copytree(ROOT / 'diffclip_da', root / 'diffclip_da', ignore=shutil.ignore_patterns('__pycache__', 'assets'))
    return root, set(broken_rules(root))


def reported_with(package, added: dict) -> list:
    "What the checker says anew when each file has that text at its end"
    root, known = package
    before = {root / 'diffclip_da' / f: None for f in added}
    for path, text in zip(before, added.values()):
        if path.exists(): before[path] = path.read_text()
        path.parent.mkdir(exist_ok=True)
        with path.open('a') as f: f.write(f'\n{text}\n')
    try: return [line for line in broken_rules(root) if line not in known]
    finally:
        for path, text in before.items(): path.unlink() if text is None else path.write_text(text)


@pytest.mark.parametrize('name', BREAKS)
def test_a_broken_rule_is_seen(package, name):
    file, added, said = BREAKS[name]
    new = reported_with(package, {file: added})
    assert any(said in line for line in new), new


def test_a_private_attribute_of_another_modules_object_is_seen(package):
    new = reported_with(package, {'store.py': 'class Box:\n    def __init__(self): self._lid = 1',
                                  'data.py': 'def lid(box): return box._lid'})
    assert any('reaches box._lid, private to store' in line for line in new), new


def test_a_body_under_another_name_is_seen(package):
    body = ('    total = 0\n    for k, x in enumerate(xs):\n        if k % 2: total += x * k\n'
            '        else: total -= x / (k + 1)\n    return total')
    new = reported_with(package, {f: f'def {n}(xs):\n    "Words differ: {n}"\n{body}' for f, n in (('core.py', 'a'), ('data.py', 'b'))})
    assert any('one function body stands 2 times: diffclip_da/core.py' in line for line in new), new


def test_make_check_runs_both(): assert re.search(r'check_sync\.py.*\n.*check_house\.py', (ROOT / 'Makefile').read_text())


# the public face

def python(code: str) -> str:
    "What a fresh interpreter prints"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    loaded = python("import sys, diffclip_da; print([m for m in ('torch', 'numpy', 'diffusers', 'open_clip') if m in sys.modules])")
    assert loaded == '[]'


def test_names_are_loaded_when_asked_for_and_misspellings_refused():
    assert python('from diffclip_da import *; import diffclip_da; print(sorted(set(diffclip_da.__all__) - set(globals())))') == '[]'
    assert set(diffclip_da.__all__) <= set(dir(diffclip_da))
    with pytest.raises(AttributeError, match="no attribute 'Adaptor'"): diffclip_da.Adaptor


def test_type_checkers_see_what_is_loaded():
    tree = ast.parse((ROOT / 'diffclip_da/__init__.py').read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == 'TYPE_CHECKING')
    said = {a.asname: n.module for n in block.body for a in n.names}
    assert all(a.name == a.asname for n in block.body for a in n.names)  # `as` marks a name as public in a typed package
    assert said == {n: m for m, names in diffclip_da.HOMES.items() for n in names}
    assert (ROOT / 'diffclip_da/py.typed').exists()


def snippets(doc: str) -> list[str]:
    "Examples that a docstring has between backquotes"
    return [text for text in re.findall(r'`([^`]+)`', doc) if '(' in text]


def bind_calls(snippet: str):
    "Each call of a public name in a snippet must fit that name's signature"
    for node in ast.walk(ast.parse(snippet)):
        if not isinstance(node, ast.Call): continue
        path = ast.unparse(node.func).split('.')
        if path[0] not in diffclip_da.__all__ or any(isinstance(a, ast.Starred) for a in node.args): continue
        target = getattr(diffclip_da, path[0])
        for part in path[1:]: target = getattr(target, part, None)
        if callable(target): inspect.signature(target).bind(*node.args, **{k.arg: k.value for k in node.keywords if k.arg})


@pytest.mark.parametrize('name', diffclip_da.__all__)
def test_public_names_are_explained_with_an_example_that_is_right(name, tmp_path, monkeypatch):
    """Lines with >>> are run, where photos/ and sketches/ hold cat/1.jpg and dog/1.jpg and labels.csv names both;
    what stands between backquotes is read, and its calls are checked against the signatures"""
    monkeypatch.chdir(tmp_path)
    for k, (folder, animal) in enumerate((f, a) for f in ('photos', 'sketches') for a in ('cat', 'dog')):
        (tmp_path/folder/animal).mkdir(parents=True)
        (tmp_path/folder/animal/'1.jpg').write_bytes(encoded(picture(k)))
    write_celeba(tmp_path/'celeba')
    (tmp_path/'labels.csv').write_text('id,label\ncat/1.jpg,cat\ndog/1.jpg,dog\n')
    doc = inspect.getdoc(getattr(diffclip_da, name)) or ''
    examples, short = doctest.DocTestParser().get_examples(doc), [s for s in snippets(doc) if re.search(rf'\b{name}\b', s)]
    assert examples or short, f'{name} has no example in its docstring: lines with >>>, or `{name}(...)`'
    for s in short: bind_calls(s)
    for e in examples: e.source = re.sub(r': \.\.\.\n$', ': pass\n', e.source)
    names = {n: getattr(diffclip_da, n) for n in diffclip_da.__all__} | dict(torch=torch)
    test = doctest.DocTest(examples, names, name, None, None, doc)
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=said.append).failed == 0, ''.join(said)


def test_examples_are_read_closely():
    bind_calls('Walk(t0=400, n=6)')
    with pytest.raises(TypeError, match='n_steps'): bind_calls('Walk(n_steps=6)')
    with pytest.raises(TypeError, match='tagret'): bind_calls('Adapter.from_pretrained("shipped", tagret=1)')


# names of the first edition

@pytest.mark.parametrize('old, names', dict(
    adapt='adapt_folder main', train='train_diffusion TrainConfig main', unet='load_unet save_unet EpsUNet small_unet',
    published='pick_state LAYOUTS GuidedUNet GuidedAttention').items())
def test_old_modules_still_work(old, names):
    module = importlib.import_module(f'diffclip_da.{old}')
    for n in names.split(): assert getattr(module, n).__module__ != module.__name__ if callable(getattr(module, n)) else getattr(module, n)
    homes = [importlib.import_module(h) for h in re.findall(r'^from (diffclip_da\.\S+) import \*', inspect.getsource(module), re.M)]
    assert homes
    for home in homes:
        for n in home.__all__: assert getattr(module, n) is getattr(home, n), n


@pytest.mark.parametrize('old, said', dict(adapt='--target', train='--celeba').items())
def test_old_commands_still_work(old, said):
    done = subprocess.run([sys.executable, '-m', f'diffclip_da.{old}', '--help'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and said in done.stdout, done.stderr[-2000:]


def test_wheel_holds_the_code_and_every_asset(copy, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, copy], check=True, capture_output=True)
    wheel = next(tmp_path.glob('*.whl'))
    listed = subprocess.run([sys.executable, '-m', 'zipfile', '-l', wheel], check=True, capture_output=True, text=True).stdout
    assets = [p.relative_to(ROOT).as_posix() for p in (ROOT / 'diffclip_da/assets').rglob('*') if p.is_file()]
    assert assets
    for name in assets + ['diffclip_da/diffusion/ddim.py', 'diffclip_da/py.typed', 'entry_points.txt']: assert name in listed, name


def test_requirements_are_ranges_and_constraints_pin_each_of_them():
    cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(ROOT / 'settings.ini')
    wanted = ' '.join(cfg['DEFAULT'][k] for k in ('requirements', 'dev_requirements', 'book_requirements')).split()
    name = lambda s: re.split(r'[<>=!~\[ ]', s)[0].lower().replace('_', '-')
    pinned = {name(l): l for l in (ROOT / 'constraints.txt').read_text().split('\n') if '==' in l}
    for req in wanted: assert name(req) in pinned, req
    # and what they need in turn, but for build tools and the libraries of a GPU, which differ from machine to machine
    todo, seen = {name(r) for r in wanted}, set()
    while todo:
        seen.add(one := todo.pop())
        with contextlib.suppress(PackageNotFoundError):
            needs = [Requirement(r) for r in requires(one) or ()]
            todo |= {name(r.name) for r in needs if r.marker is None or r.marker.evaluate(dict(extra=''))} - seen
    apart = re.compile('nvidia|cuda|triton|setuptools|wheel|pip$')
    installed = {name(d.metadata['Name']) for d in distributions()}
    assert sorted(n for n in seen & installed if not apart.match(n) and n not in pinned) == []


def test_no_tracked_file_names_the_machine_it_was_made_on():
    "Paths of one machine, in the sources and in the stored outputs"
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode: pytest.skip('not a git checkout')
    pattern = re.compile(rb'(?<![\w.])/(work|root|home|farm|tmp/[a-z_]+\.)[/\w]')
    me = Path(__file__).name
    bad = [f for f in tracked.stdout.split('\0') if f and Path(f).name not in (me, 'test_notebooks.py') and Path(f).suffix not in ('.zip', '.safetensors', '.png', '.pdf')
           and (ROOT / f).is_file() and pattern.search((ROOT / f).read_bytes())]
    assert bad == []
