import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from diffclip_da import core, store
from diffclip_da.core import (COLOURS, UserError, default_device, friendly_exit, from_pil, from_uint8,
                              image_grid, new_generator, progress, set_seed, show_images, to_pil, to_uint8)
from diffclip_da.study.figures import make_record, save_figure, validate_record
from diffclip_da.store import (asset_file, atomic_write, canonical_hash, check_sha256, git_commit,
                               load_card, read_json, sha256_bytes, sha256_file, state_hash, versions,
                               write_json)


# ---- errors -----------------------------------------------------------------------------------------------------------------

def test_friendly_exit_prints_one_line_and_exits_with_2(capsys):
    @friendly_exit
    def main(x):
        if x: raise UserError('photos/: no such folder')
        return 7
    assert main(0) == 7
    with pytest.raises(SystemExit) as e: main(1)
    assert e.value.code == 2
    assert capsys.readouterr().err == 'error: photos/: no such folder\n'


def test_friendly_exit_keeps_bugs_visible_and_ctrl_c_apart(capsys):
    @friendly_exit
    def main(e): raise e
    with pytest.raises(ZeroDivisionError): main(ZeroDivisionError())
    with pytest.raises(SystemExit) as e: main(KeyboardInterrupt())
    assert e.value.code == 130 and 'resumes' in capsys.readouterr().err


def test_user_error_is_a_value_error(): assert issubclass(UserError, ValueError)


# ---- seeds, devices ---------------------------------------------------------------------------------------------------------

def test_generator_is_independent_of_the_global_one():
    a = torch.randn(4, generator=new_generator(3))
    torch.randn(10)
    assert torch.equal(a, torch.randn(4, generator=new_generator(3)))
    assert not torch.equal(a, torch.randn(4, generator=new_generator(4)))


def test_set_seed_seeds_all_three():
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    set_seed(5); a = draw()
    set_seed(5)
    assert draw() == a
    set_seed(2**40)   # beyond numpy's range
    assert draw() != a


def test_default_device_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert default_device() == torch.device('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert default_device() == torch.device('mps')
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert default_device() == torch.device('cpu')


# ---- files ------------------------------------------------------------------------------------------------------------------

def listing(p): return sorted(q.relative_to(p).as_posix() for q in p.rglob('*'))


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    with atomic_write(tmp_path/'a'/'b.bin') as f: f.write(b'one')
    with atomic_write(tmp_path/'a'/'b.bin') as f:
        f.write(b'two')
        assert f.name.endswith(f'b.bin.{os.getpid()}.tmp')
        assert (tmp_path/'a'/'b.bin').read_bytes() == b'one'   # the old one until the block has ended
    assert (tmp_path/'a'/'b.bin').read_bytes() == b'two'
    assert listing(tmp_path) == ['a', 'a/b.bin']


def test_atomic_write_text_is_utf8_with_plain_line_ends(tmp_path):
    with atomic_write(tmp_path/'t.txt', 'w') as f: f.write('é\n')
    assert (tmp_path/'t.txt').read_bytes() == b'\xc3\xa9\n'


@pytest.mark.parametrize('error', [RuntimeError('boom'), KeyboardInterrupt(), PermissionError(13, 'another file')])
def test_atomic_write_leaves_nothing_on_exception(tmp_path, error):
    (tmp_path/'x').write_text('old')
    with pytest.raises(type(error)):
        with atomic_write(tmp_path/'x', 'w') as f:
            f.write('half')
            raise error
    assert listing(tmp_path) == ['x'] and (tmp_path/'x').read_text() == 'old'


@pytest.mark.parametrize('no', [errno.ENOSPC, errno.EDQUOT])
def test_atomic_write_full_disk_at_fsync(tmp_path, monkeypatch, no):
    def full(fd): raise OSError(no, os.strerror(no))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=r'cannot write .*big\.bin: .*(no space left|quota).*free some or choose another folder'):
        with atomic_write(tmp_path/'big.bin') as f: f.write(b'x')
    assert listing(tmp_path) == []


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_atomic_write_full_disk_said_by_the_kernel(tmp_path):
    (tmp_path/f'big.bin.{os.getpid()}.tmp').symlink_to('/dev/full')   # every write to it fails with ENOSPC
    with pytest.raises(UserError, match=r'cannot write .*big\.bin: no space left'):
        with atomic_write(tmp_path/'big.bin') as f: f.write(b'x' * 10)
    assert listing(tmp_path) == []


def test_atomic_write_bad_places(tmp_path):
    (tmp_path/'file').write_text('')
    (tmp_path/'dir').mkdir()
    with pytest.raises(UserError, match='part of this path is a file'):
        with atomic_write(tmp_path/'file'/'x') as f: f.write(b'')
    with pytest.raises(UserError, match='there is a folder of that name'):
        with atomic_write(tmp_path/'dir') as f: f.write(b'')
    assert listing(tmp_path) == ['dir', 'file']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_atomic_write_survives_kill_9(tmp_path):
    "A process that is killed inside the block leaves the old file whole."
    (tmp_path/'x').write_text('old')
    if (pid := os.fork()) == 0:
        with atomic_write(tmp_path/'x', 'w') as f:
            f.write('new')
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (tmp_path/'x').read_text() == 'old'
    with atomic_write(tmp_path/'x', 'w') as f: f.write('newer')
    assert (tmp_path/'x').read_text() == 'newer'


@dataclasses.dataclass(frozen=True)
class Config:
    t0: int = 500
    where: Path = Path('runs')
    sizes: tuple = (1, 2)


def test_json_round_trip(tmp_path):
    obj = dict(c=Config(), a=np.arange(2), t=torch.tensor(1.5), f=np.float32(.5), nan=float('nan'), inf=np.inf, none=None, b=np.bool_(True), d={1: 'é'})
    write_json(tmp_path/'r.json', obj)
    assert read_json(tmp_path/'r.json') == dict(c=dict(t0=500, where='runs', sizes=[1, 2]), a=[0, 1], t=1.5, f=.5, nan=None, inf=None, none=None, b=True, d={'1': 'é'})


def test_json_errors(tmp_path):
    with pytest.raises(UserError, match=r'none\.json: no such file'): read_json(tmp_path/'none.json')
    for text in (b'{"a": ', b'\xff\xfe'):
        (tmp_path/'bad.json').write_bytes(text)
        with pytest.raises(UserError, match=r'bad\.json: not valid JSON .*delete it'): read_json(tmp_path/'bad.json')
    with pytest.raises(TypeError, match='no JSON form for set'): write_json(tmp_path/'s.json', {1, 2})
    assert not (tmp_path/'s.json').exists()


# ---- hashes -----------------------------------------------------------------------------------------------------------------

def test_sha256(tmp_path):
    (tmp_path/'w').write_bytes(b'abc' * 10**6)
    assert sha256_bytes(b'abc') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    assert sha256_file(tmp_path/'w') == sha256_bytes(b'abc' * 10**6)
    check_sha256(tmp_path/'w', sha256_file(tmp_path/'w').upper())
    with pytest.raises(UserError, match=r'w: SHA-256 is \w{12}\.\.\., expected 0{12}\.\.\.; .*fetch it again'): check_sha256(tmp_path/'w', '0' * 64)
    with pytest.raises(UserError, match='cannot read .*gone: No such file'): check_sha256(tmp_path/'gone', '0' * 64)


def test_canonical_hash():
    h = canonical_hash(Config())
    assert len(h) == 16 and h == canonical_hash(dict(sizes=[1, 2], where='runs', t0=500))
    assert len({h, canonical_hash(Config(t0=501)), canonical_hash(Config(sizes=(2, 1))), canonical_hash(None), canonical_hash('None'), canonical_hash(float('nan'))}) == 6
    assert canonical_hash(dict(a=1), n=64).startswith(canonical_hash(dict(a=1)))


def test_state_hash():
    set_seed(0)
    m = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))   # the norm has a scalar integer buffer
    h = state_hash(m)
    assert h == state_hash(m.state_dict()) == state_hash(dict(reversed(list(m.state_dict().items()))))
    assert h != state_hash(m.double())
    m.float()
    assert h == state_hash(m)
    with torch.no_grad(): m[0].bias[0] += 1e-6
    assert h != state_hash(m)
    assert state_hash(m.bfloat16()) != h
    assert state_hash(dict(a=torch.zeros(2, 3))) != state_hash(dict(a=torch.zeros(3, 2)))


def test_versions_and_commit():
    v = versions()
    assert v['torch'] == torch.__version__.split('+')[0] or v['torch'] == torch.__version__
    assert set(v) == {'python', 'torch', 'torchvision', 'diffusers', 'open_clip_torch', 'facenet-pytorch', 'numpy', 'seaborn', 'diffclip_da'}
    c = git_commit()
    assert c is None or len(c.removesuffix('+dirty')) == 10 and int(c.removesuffix('+dirty'), 16) >= 0


def git(root, *args): subprocess.run(['git', '-C', str(root), '-c', 'user.name=a', '-c', 'user.email=a@b', *args], check=True, capture_output=True)


def test_git_commit_of_the_package_only(tmp_path, monkeypatch):
    pkg = tmp_path/'pkg'
    pkg.mkdir()
    (pkg/'__init__.py').write_text('')
    (tmp_path/'figure.json').write_text('1')
    monkeypatch.setattr(core.diffclip_da, '__file__', str(pkg/'__init__.py'))
    assert git_commit() is None                       # no repository
    git(tmp_path, 'init')
    git(tmp_path, 'add', 'figure.json')
    git(tmp_path, 'commit', '-m', 'x')
    assert git_commit() is None                       # another's repository, which does not track the package
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-m', 'y')
    c = git_commit()
    assert len(c) == 10
    (tmp_path/'figure.json').write_text('2')
    assert git_commit() == c                          # a figure made anew does not make the code dirty
    (pkg/'__init__.py').write_text('a = 1')
    assert git_commit() == c + '+dirty'


# ---- assets -----------------------------------------------------------------------------------------------------------------

def test_assets(tmp_path, monkeypatch):
    monkeypatch.setenv('DIFFCLIP_ASSETS', str(tmp_path))
    with pytest.raises(UserError, match=r"no shipped asset 'unet' .*there are: none.*Reinstall"): load_card('unet')
    (tmp_path/'unet').mkdir()
    (tmp_path/'unet'/'w.bin').write_bytes(b'abc')
    write_json(tmp_path/'unet'/'card.json', dict(measured={}, files={'w.bin': sha256_bytes(b'abc'), 'gone.bin': '0' * 64}))
    assert asset_file('unet', 'w.bin').read_bytes() == b'abc'
    with pytest.raises(UserError, match=r"lists no file 'x.bin'; it lists: w.bin, gone.bin"): asset_file('unet', 'x.bin')
    with pytest.raises(UserError, match=r'gone.bin is missing although its card lists it'): asset_file('unet', 'gone.bin')
    (tmp_path/'unet'/'w.bin').write_bytes(b'abcd')    # changed after the first check
    with pytest.raises(UserError, match=r'w\.bin: SHA-256 is .*damaged or another version'): asset_file('unet', 'w.bin')
    with pytest.raises(UserError, match=r"no shipped asset 'clip' .*there are: unet"): load_card('clip')


@pytest.mark.parametrize('card', sorted(core.asset_dir().glob('*/card.json')), ids=lambda p: p.parent.name)
def test_shipped_files_match_their_cards(card):
    name, files = card.parent.name, load_card(card.parent.name)['files']
    assert files
    for f in files: assert asset_file(name, f).stat().st_size > 0


# ---- images -----------------------------------------------------------------------------------------------------------------

def test_bytes_survive_the_round_trip():
    u = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(to_uint8(from_uint8(u)), u)
    assert torch.equal(to_uint8(from_pil(to_pil(from_uint8(u)))), u)
    assert to_uint8(torch.tensor([-9., 9.])).tolist() == [0, 255]
    x = torch.rand(3, 5, 7, requires_grad=True)
    assert to_pil(x).size == (7, 5) and to_pil(x[:1]).mode == 'RGB'


def test_from_pil_resizes_and_converts():
    x = from_pil(Image.new('L', (10, 20), 255), 8)
    assert x.shape == (3, 8, 8) and torch.allclose(x, torch.ones(()))


def test_image_errors():
    with pytest.raises(UserError, match='NaN or infinite'): to_uint8(torch.tensor([float('nan')]))
    with pytest.raises(UserError, match=r'one image \[3, h, w\], got shape \(2, 3, 4, 4\)'): to_pil(torch.zeros(2, 3, 4, 4))
    with pytest.raises(UserError, match=r'images \[b, c, h, w\], got shape \(3, 4, 4\)'): image_grid(torch.zeros(3, 4, 4), 2)


def test_image_grid_places_each_image():
    x = torch.arange(5.).reshape(5, 1, 1, 1).expand(5, 1, 4, 3) / 10
    g = image_grid(x, n_cols=2, pad=1)
    assert g.shape == (3, 3 * 5 + 1, 2 * 4 + 1)
    for k in range(5):
        r, c = divmod(k, 2)
        assert torch.all(g[:, r * 5 + 1:r * 5 + 5, c * 4 + 1:c * 4 + 4] == k / 10)
    assert torch.all(g[:, 11:, 5:] == 1) and torch.all(g[:, 0] == 1)   # the empty place and the margin are white


def test_show_images():
    fig = show_images(torch.zeros(5, 3, 4, 4), titles=range(5), n_cols=3, row_labels=['a', 'b'])
    assert len(fig.axes) == 6 and fig.axes[4].get_title() == '4' and fig.axes[3].get_ylabel() == 'b'
    assert not plt.fignum_exists(fig.number)   # closed, so notebooks show it once


def test_colours_are_told_apart_without_red_or_green():
    assert set(COLOURS) == {'source', 'target', 'adapted', 'train', 'other'}
    rgb = np.array([[int(c[k:k + 2], 16) for k in (1, 3, 5)] for c in COLOURS.values()]) / 255
    for M in ([[.567, .433, 0], [.558, .442, 0], [0, .242, .758]], [[.625, .375, 0], [.7, .3, 0], [0, .3, .7]]):   # protanopia, deuteranopia
        seen = rgb @ np.array(M).T
        d = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(5, 1)]
        assert d.min() > .1


def test_progress(monkeypatch, capsys):
    monkeypatch.setenv('DIFFCLIP_QUIET', '1')
    bar = progress(range(3), desc='x')
    assert bar.disable and list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('DIFFCLIP_QUIET', '0')
    with progress(total=2) as bar: assert not bar.disable


# ---- records and figures ----------------------------------------------------------------------------------------------------

def a_record(**kw):
    args = dict(figure='figure3', profile='embedded', config=Config(), seeds=range(2), weights=dict(unet=dict(name='a', sha256='0', provenance='shipped')),
                data=dict(name='faces'), numbers=dict(loss=torch.tensor([1., 2.])), summary=dict(acc=dict(mean=.5, ci95=(.4, .6), n_seeds=2)), tolerance=dict(acc=.02))
    return make_record(**{**args, **kw})


def test_make_record():
    r = a_record()
    assert r['config'] == dict(t0=500, where='runs', sizes=[1, 2]) and r['seeds'] == [0, 1] and r['numbers'] == dict(loss=[1., 2.])
    assert r['versions'] == versions() and r['commit'] == git_commit()
    assert json.loads(json.dumps(r)) == r


@pytest.mark.parametrize('change, message', [
    (dict(weights=dict(unet=dict(name='a'))), r'record of figure3: weights.unet lacks sha256; weights.unet lacks provenance'),
    (dict(weights=dict(clip=dict(name='a', sha256='0', provenance='mine'))), r"weights.clip.provenance is 'mine', not one of shipped, published, random"),
    (dict(summary=dict(acc=dict(mean=.5))), r'summary.acc lacks ci95; summary.acc lacks n_seeds'),
    (dict(summary=dict(acc=dict(mean=.5, ci95=[.6, .4], n_seeds=2))), r'summary.acc.ci95 is \[0.6, 0.4\], not \[low, high\]'),
    (dict(tolerance=dict(accuracy=.1)), r'tolerance.accuracy has no metric of that name'),
    (dict(numbers=[1]), r'numbers is not a dict'),
])
def test_bad_records_are_refused(change, message):
    with pytest.raises(UserError, match=message): a_record(**change)


def test_record_lists_all_missing_keys():
    r = a_record()
    for k in ('seeds', 'commit'): del r[k]
    with pytest.raises(UserError, match='record of figure3: seeds is missing; commit is missing'): validate_record(r)


def draw(seed):
    core.set_style()
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot(np.random.default_rng(seed).random(5), label='a', color=COLOURS['source'])
    ax.legend()
    plt.close(fig)
    return fig


def test_save_figure_writes_four_files_and_the_same_bytes(tmp_path):
    table = pd.DataFrame(dict(epoch=[1, 2], accuracy=[.1, 1 / 3]))
    one, two = (save_figure(draw(0), a_record(), table, root=tmp_path/n) for n in 'ab')
    assert listing(tmp_path/'a') == ['embedded'] + [f'embedded/figure3.{e}' for e in ('csv', 'json', 'pdf', 'png')]
    for ext in ('png', 'pdf', 'json', 'csv'): assert one[ext].read_bytes() == two[ext].read_bytes(), ext
    other = save_figure(draw(1), a_record(), table, root=tmp_path/'c')
    assert other['png'].read_bytes() != one['png'].read_bytes()
    assert read_json(one['json']) == a_record()
    pd.testing.assert_frame_equal(pd.read_csv(one['csv']), table)
    assert Image.open(one['png']).width > 300 and one['pdf'].read_bytes()[:4] == b'%PDF'


def test_save_figure_same_bytes_from_another_process(tmp_path):
    "Neither the time nor Python's hash seed shows in the files."
    code = ('import sys; sys.path.insert(0, sys.argv[1]); import test_core as t\n'
            't.save_figure(t.draw(0), t.a_record(), root=sys.argv[2])')
    subprocess.run([sys.executable, '-c', code, str(Path(__file__).parent), str(tmp_path/'a')], check=True, env={**os.environ, 'PYTHONHASHSEED': '1', 'MPLBACKEND': 'Agg'})
    save_figure(draw(0), a_record(), root=tmp_path/'b')
    for ext in ('png', 'pdf', 'json', 'csv'):
        a, b = ((tmp_path/n/'embedded'/f'figure3.{ext}').read_bytes() for n in 'ab')
        assert a == b, ext


def test_save_figure_without_table_writes_the_summary(tmp_path):
    paths = save_figure(draw(0), a_record(), root=tmp_path)
    assert paths['csv'].read_text() == 'metric,mean,n_seeds\nacc,0.5,2\n'


def test_save_figure_checks_the_record_first(tmp_path):
    r = a_record()
    del r['weights']
    with pytest.raises(UserError, match='weights is missing'): save_figure(draw(0), r, root=tmp_path)
    assert listing(tmp_path) == []
