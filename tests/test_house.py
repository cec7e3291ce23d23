"The house rules: sync, packaging, licence, and no trace of the machine it was made on"
import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_wheel_holds_the_code_and_every_asset(copy, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, copy], check=True, capture_output=True)
    wheel = next(tmp_path.glob('*.whl'))
    listed = subprocess.run([sys.executable, '-m', 'zipfile', '-l', wheel], check=True, capture_output=True, text=True).stdout
    assets = [p.relative_to(ROOT).as_posix() for p in (ROOT / 'diffclip_da/assets').rglob('*') if p.is_file()]
    assert assets
    for name in assets + ['diffclip_da/diffusion/ddim.py', 'entry_points.txt']: assert name in listed, name


def test_requirements_are_ranges_and_constraints_pin_each_of_them():
    cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(ROOT / 'settings.ini')
    wanted = ' '.join(cfg['DEFAULT'][k] for k in ('requirements', 'dev_requirements')).split()
    name = lambda s: re.split(r'[<>=!~\[ ]', s)[0].lower().replace('_', '-')
    pinned = {name(l): l for l in (ROOT / 'constraints.txt').read_text().split('\n') if '==' in l}
    for req in wanted: assert name(req) in pinned, req


def test_no_tracked_file_names_the_machine_it_was_made_on():
    "Paths of one machine, in the sources and in the stored outputs"
    tracked = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode: pytest.skip('not a git checkout')
    pattern = re.compile(rb'(?<![\w.])/(work|root|home|farm|tmp/[a-z_]+\.)[/\w]')
    me = Path(__file__).name
    bad = [f for f in tracked.stdout.split('\0') if f and Path(f).name not in (me, 'test_notebooks.py') and Path(f).suffix not in ('.zip', '.safetensors', '.png', '.pdf')
           and (ROOT / f).is_file() and pattern.search((ROOT / f).read_bytes())]
    assert bad == []
