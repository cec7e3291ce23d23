"""Are the notebooks clean and is the package what they export? Exit 1 with a list where not.

Works on a copy, so it never changes the tree: cleans and exports there, then compares. A module that no notebook
exports any more (nbdev leaves it behind after a rename) is reported as stale.
"""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT_BY_HAND = '__init__.py', 'adapt.py', 'train.py', 'unet.py', 'published.py'  # the public face; names of the first edition


def cleaned_and_exported(root: Path, work: Path) -> None:
    "Copy what nbdev reads into `work`, then clean the notebooks and export them there, into an empty package"
    for name in ('settings.ini', 'setup.py', 'README.md', 'pyproject.toml'): shutil.copy(root / name, work)
    shutil.copytree(root / 'nbs', work / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (work / 'diffclip_da').mkdir()
    for name in KEPT_BY_HAND: shutil.copy(root / 'diffclip_da' / name, work / 'diffclip_da')
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}', 'PYTHONPATH': str(root)}
    for command in ('nbdev_clean', 'nbdev_export'):
        done = subprocess.run([command], cwd=work, env=env, capture_output=True, text=True)
        if done.returncode: raise SystemExit(f'{command} failed:\n{done.stdout}{done.stderr}')


def problems(root: Path = ROOT) -> list[str]:
    "One line for each notebook or module that is not as nbdev would leave it"
    with tempfile.TemporaryDirectory() as d:
        work = Path(d); cleaned_and_exported(root, work)
        found = [f'nbs/{p.name} is not clean: run nbdev_clean' for p in sorted((work / 'nbs').glob('*.ipynb'))
                 if not filecmp.cmp(p, root / 'nbs' / p.name, shallow=False)]
        fresh = {p.relative_to(work / 'diffclip_da') for p in (work / 'diffclip_da').rglob('*.py')}
        there = {p.relative_to(root / 'diffclip_da') for p in (root / 'diffclip_da').rglob('*.py')}
        found += [f'diffclip_da/{p} is stale: no notebook exports it, delete it' for p in sorted(there - fresh)]
        found += [f'diffclip_da/{p} is missing: run nbdev_export' for p in sorted(fresh - there)]
        found += [f'diffclip_da/{p} is out of sync with its notebook: run nbdev_export' for p in sorted(fresh & there)
                  if not filecmp.cmp(work / 'diffclip_da' / p, root / 'diffclip_da' / p, shallow=False)]
    return found


if __name__ == '__main__':
    found = problems()
    print('\n'.join(found) if found else 'notebooks are clean, the package is in sync')
    sys.exit(bool(found))
