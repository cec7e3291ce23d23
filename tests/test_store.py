"Files, names and folders: what every cache rests on."
import ast
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from diffclip_da import store
from diffclip_da.core import UserError, set_seed
from diffclip_da.diffusion.schedule import cosine_schedule, linear_schedule
from diffclip_da.models.unet import tiny_unet
from diffclip_da.store import (asset_file, atomic_write, cached_tensor, canonical_hash, check_sha256, claim_folder,
                               code_hash, fingerprint, git_commit, is_web_page, load_card, read_json, read_tensors,
                               remove_leftovers, sha256_bytes, sha256_file, stage, state_hash, tensor_hash, versions,
                               write_json)
from diffclip_da.store import NoSpace, packed_tensor


# ---- files ------------------------------------------------------------------------------------------------------------------

def listing(p): return sorted(q.relative_to(p).as_posix() for q in p.rglob('*'))


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    with atomic_write(tmp_path/'a'/'b.bin') as f: f.write(b'one')
    with atomic_write(tmp_path/'a'/'b.bin') as f:
        f.write(b'two')
        assert re.fullmatch(rf'b\.bin\.{os.getpid()}-[0-9a-f]{{8}}\.tmp', Path(f.name).name)   # no other process has this name
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
def test_atomic_write_full_disk_said_by_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(store.secrets, 'token_hex', lambda n: '0' * 2 * n)
    (tmp_path/f'big.bin.{os.getpid()}-00000000.tmp').symlink_to('/dev/full')   # every write to it fails with ENOSPC
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
    monkeypatch.setattr(store.diffclip_da, '__file__', str(pkg/'__init__.py'))
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


@pytest.mark.parametrize('card', sorted(store.asset_dir().glob('*/card.json')), ids=lambda p: p.parent.name)
def test_shipped_files_match_their_cards(card):
    name, files = card.parent.name, load_card(card.parent.name)['files']
    assert files
    for f in files: assert asset_file(name, f).stat().st_size > 0


# ---- leftovers, web pages, weights files ------------------------------------------------------------------------------------

class Held:
    "Another process that writes `path`, as `atomic_write` does, until `end()`."
    def __init__(self, path):
        (told, tell), (self.wait, self.go) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.go)
            with atomic_write(path) as f:
                os.write(tell, Path(f.name).name.encode())
                os.read(self.wait, 1)
            os._exit(0)
        os.close(tell)
        self.file = Path(path).with_name(os.read(told, 500).decode())
    def end(self):
        os.write(self.go, b'.')
        os.close(self.go)
        os.waitpid(self.pid, 0)


def test_remove_leftovers_spares_the_living_and_what_others_wrote(tmp_path):
    (tmp_path/'deep').mkdir()
    other = Held(tmp_path/'deep'/'a.png')
    try:
        # of the last edition, of this one, by a process that ended, of this process's own number in another container
        left = [f'a.png.{n}.tmp' for n in (99999999, os.getpid(), '1-0123abcd', f'{os.getpid()}-0123abcd', f'{other.pid}-0123abcd')]
        for n in (*left, 'a.png.x.tmp', 'keep.png'): (tmp_path/'deep'/n).write_text('')
        (tmp_path/'b.json.99999999.tmp').write_text('')
        remove_leftovers(tmp_path, recursive=False)
        stays = [f'deep/{other.file.name}', 'deep/a.png.x.tmp', 'deep/keep.png']
        assert listing(tmp_path) == sorted(['deep', *stays, *(f'deep/{n}' for n in left)])
        remove_leftovers([tmp_path/'nowhere', tmp_path])
        assert listing(tmp_path) == sorted(['deep', *stays])
    finally: other.end()
    assert listing(tmp_path) == ['deep', 'deep/a.png', 'deep/a.png.x.tmp', 'deep/keep.png']   # and it could end its work


def test_two_containers_with_equal_process_numbers_never_share_a_temporary_file(tmp_path, monkeypatch):
    other = Held(tmp_path/'x')
    monkeypatch.setattr(os, 'getpid', lambda: other.pid)
    with atomic_write(tmp_path/'x') as f:
        assert Path(f.name) != other.file
        f.write(b'ours')
    remove_leftovers(tmp_path)
    assert other.file.exists() and (tmp_path/'x').read_bytes() == b'ours'
    other.end()


def test_where_a_file_system_has_no_locks_the_process_number_decides(tmp_path, monkeypatch):
    def none(*a): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(store.fcntl, 'flock', none)
    for n in (f'a.{os.getppid()}-00000000.tmp', 'a.99999999-00000000.tmp'): (tmp_path/n).write_text('')
    with atomic_write(tmp_path/'x') as f: f.write(b'x')
    remove_leftovers(tmp_path)
    assert listing(tmp_path) == [f'a.{os.getppid()}-00000000.tmp', 'x']
    monkeypatch.setattr(store, 'fcntl', None)   # Windows: what is open cannot be deleted, the rest is litter
    with atomic_write(tmp_path/'x') as f: f.write(b'y')
    remove_leftovers(tmp_path)
    assert listing(tmp_path) == ['x']


@pytest.mark.parametrize('error', [MemoryError(), SafetensorError('unable to mmap 9 bytes from file: Cannot allocate memory (12)'),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_weights_for_which_memory_is_short_are_not_called_damaged_at_once(tmp_path, monkeypatch, error):
    def fails(*a, **k): raise error
    monkeypatch.setattr(store, 'load_file', fails)
    (tmp_path/'m.safetensors').write_bytes(b'x')
    with pytest.raises(UserError, match='m.safetensors cannot be read for want of memory'): read_tensors(tmp_path/'m.safetensors')


def test_reading_a_small_file_takes_little_memory(tmp_path):
    "Whatever the most is that would be read: four threads that ask for half a gigabyte each fail where memory is scarce."
    import tracemalloc
    (tmp_path/'a').write_bytes(b'x' * 99)
    tracemalloc.start()
    try:
        assert store.read_regular(tmp_path/'a', 1 << 29) == b'x' * 99
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally: tracemalloc.stop()


def test_a_name_of_255_bytes_is_written(tmp_path):
    name = 'ä' * 125 + '.json'
    write_json(tmp_path/name, 1)
    assert read_json(tmp_path/name) == 1 and listing(tmp_path) == [name]
    with pytest.raises(UserError, match='name is too long'): write_json(tmp_path/('x' * 300), 1)


# ---- checksums --------------------------------------------------------------------------------------------------------------

def flips(path, n=150):
    "Copies of a file with one bit flipped each, spread over all of it."
    whole = path.read_bytes()
    for bit in np.unique(np.linspace(0, 8 * len(whole) - 1, n).astype(int)):
        b = bytearray(whole)
        b[bit // 8] ^= 1 << bit % 8
        yield int(bit), bytes(b)


def test_a_flipped_bit_in_a_record_is_seen(tmp_path):
    said = dict(key='k', images=[dict(id='a/ä.png', label=1, x=.1), dict(id='b', label=None, x=float('nan'))])
    store.write_record(tmp_path/'r.json', said)
    same = store.read_record(tmp_path/'r.json')
    assert same == jsonable_like(said)
    seen = 0
    for bit, b in flips(tmp_path/'r.json', 1000):
        (tmp_path/'f.json').write_bytes(b)
        try: got = store.read_record(tmp_path/'f.json')
        except store.Damaged as e: assert 'f.json' in str(e); seen += 1; continue
        assert {k: v for k, v in got.items() if k in said} == same, bit   # white space, or the name of the checksum itself
    assert seen > 300
    (tmp_path/'f.json').write_text('[1]')
    with pytest.raises(store.Damaged): store.read_record(tmp_path/'f.json')
    write_json(tmp_path/'f.json', said)
    assert store.read_record(tmp_path/'f.json', unmarked=True) == same


def jsonable_like(o): return json.loads(json.dumps(store.jsonable(o, nan=False)))


def test_a_flipped_bit_in_a_checkpoint_is_seen(tmp_path):
    net = nn.Linear(8, 8)
    opt = torch.optim.Adam(net.parameters()); net(torch.ones(1, 8)).sum().backward(); opt.step()
    state = dict(net=net.state_dict(), opt=opt.state_dict(), generator=torch.Generator().get_state(), history=[dict(loss=.5, k=1)], step=3)
    store.save_state(tmp_path/'c.pt', state)
    want, seen = store.content_hash(state), 0
    assert store.content_hash(store.load_state(tmp_path/'c.pt')) == want
    for bit, b in flips(tmp_path/'c.pt', 1000):
        (tmp_path/'f.pt').write_bytes(b)
        try: got = store.load_state(tmp_path/'f.pt')
        except store.Damaged as e: assert 'f.pt is not a readable checkpoint' in str(e); seen += 1; continue
        # in a part that nobody reads, or in the name of the checksum
        assert store.content_hash({k: got[k] for k in state}) == want, bit
    assert seen > 200


def test_a_flipped_bit_in_a_cached_tensor_makes_it_anew(tmp_path):
    path, x, said = tmp_path/'x.safetensors', torch.arange(40.), []
    cached_tensor(path, 'k', lambda: x)
    whole, calls = path.read_bytes(), []
    def make(): calls.append(1); return x
    for bit, b in flips(path, 200):
        path.write_bytes(b)
        assert torch.equal(cached_tensor(path, 'k', make, said.append), x), bit
        assert calls or b[-160:] == whole[-160:]
    assert len(calls) > 120 and path.read_bytes() == whole and 'x.safetensors is damaged' in said[0] and 'made anew' in said[0]


def test_content_hash_sees_types_names_and_order():
    a = dict(w=torch.ones(2), n=[1, 2.], s='x')
    others = [dict(a, n=[1., 2.]), dict(a, s='y'), dict(a, w=torch.ones(2, 1)), dict(a, w=torch.ones(2).double()), {**a, 'more': None}, dict(a, n=[[1], 2.])]
    assert len({store.content_hash(o) for o in (a, *others)}) == 1 + len(others) and store.content_hash(a) == store.content_hash(dict(a, w=torch.ones(2), n=(1, 2.)))


def test_torch_save_on_a_full_disk_is_said_in_words(tmp_path, monkeypatch):
    if not Path('/dev/full').exists(): pytest.skip('needs /dev/full')
    monkeypatch.setattr(store.secrets, 'token_hex', lambda n: '0' * 2 * n)
    (tmp_path/f'c.pt.{os.getpid()}-00000000.tmp').symlink_to('/dev/full')
    with pytest.raises(store.NoSpace, match=r'the training \(it writes about 3 MB in all\): cannot write .*c\.pt: no space left.*the same command goes on'):
        with store.doing('the training', 3_000_000): store.save_state(tmp_path/'c.pt', dict(w=torch.zeros(100_000)))
    assert listing(tmp_path) == []
    with pytest.raises(UserError, match='^another$'):
        with store.doing('x'): raise UserError('another')


def test_memory_that_runs_out_is_no_damage(tmp_path, monkeypatch):
    store.save_state(tmp_path/'c.pt', dict(w=torch.ones(2)))
    def hungry(*a, **k): raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, 'load', hungry)
    with pytest.raises(RuntimeError, match='DefaultCPUAllocator'): store.load_state(tmp_path/'c.pt')


def test_pace_comes_early_and_then_once_a_minute(monkeypatch):
    now = [0.]
    monkeypatch.setattr(store.time, 'monotonic', lambda: now[0])
    pace, due = store.Pace(), []
    for second in range(0, 200):
        now[0] = second
        if pace.due(): due.append(second); pace.done()
    assert due == [10, 70, 130, 190]
    monkeypatch.setenv('DIFFCLIP_CHECKPOINT_SECONDS', '0')
    assert store.Pace().due()


@pytest.mark.parametrize('text, page', [(b'<!DOCTYPE html>', True), (b'\xef\xbb\xbf \n<HTML>', True), (b'<?xml version="1.0"?>', True), (b'PK\x03\x04', False), (b'', False)])
def test_is_web_page(tmp_path, text, page):
    (tmp_path/'f').write_bytes(text)
    assert is_web_page(tmp_path/'f') is page


def test_read_tensors(tmp_path):
    state = dict(w=torch.arange(3.), b=torch.ones(2, dtype=torch.float16))
    from safetensors.torch import save_file
    save_file(state, tmp_path/'w.safetensors')
    torch.save(state, tmp_path/'w.pt')
    torch.save(dict(model=state, step=3), tmp_path/'nested.ckpt')
    for name in ('w.safetensors', 'w.pt'):
        got = read_tensors(tmp_path/name, flat=True)
        assert got.keys() == state.keys() and all(torch.equal(got[k], v) for k, v in state.items())
    assert read_tensors(tmp_path/'nested.ckpt')['step'] == 3
    with pytest.raises(UserError, match=r'nested\.ckpt is not a state dict'): read_tensors(tmp_path/'nested.ckpt', flat=True)


def test_read_tensors_refuses_what_is_no_weights_file(tmp_path):
    with pytest.raises(UserError, match=r'none\.pt: no such file; give the path of a weights file'): read_tensors(tmp_path/'none.pt')
    (tmp_path/'q.pt').write_text('<html>quota')
    with pytest.raises(UserError, match='q.pt is a web page, not a weights file'): read_tensors(tmp_path/'q.pt')
    for name in ('l.pt', 'l.safetensors'):
        (tmp_path/name).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 99\n')
        with pytest.raises(UserError, match='l[.].* only names the file .*git lfs pull'): read_tensors(tmp_path/name)
    torch.save(dict(run=subprocess.run), tmp_path/'code.pt')
    with pytest.raises(UserError, match='holds something else than plain tensors.*can run code'): read_tensors(tmp_path/'code.pt')
    for name in ('cut.safetensors', 'cut.pt'):
        (tmp_path/name).write_bytes(b'\x10\x00\x00')
        with pytest.raises(UserError, match=f'{name} (cannot be read|holds something else)'): read_tensors(tmp_path/name)


# ---- fingerprints -----------------------------------------------------------------------------------------------------------

def test_fingerprint_of_a_unet_knows_its_settings():
    a, b = tiny_unet(16), tiny_unet(16)
    assert fingerprint(a) == fingerprint(b) and len(fingerprint(a)) == 64 and fingerprint(None) is None
    first = fingerprint(a)
    a.v_schedule = linear_schedule()
    linear = fingerprint(a)
    a.v_schedule = cosine_schedule()
    assert len({first, linear, fingerprint(a)}) == 3
    a.v_schedule = None
    assert fingerprint(a) == first
    a.patch = 1
    assert fingerprint(a) != first
    a.patch = 2
    a.unet.conv_in.stride = (2, 2)                               # of a module inside
    assert fingerprint(a) != first


def test_fingerprint_does_not_depend_on_memory_mode_or_names():
    a = tiny_unet(16)
    first = fingerprint(a)
    a.info = dict(name='another', sha256='0', provenance='published')
    assert fingerprint(a.train()) == first == fingerprint(tiny_unet(16).requires_grad_(False))
    assert fingerprint(a.to(torch.float64)) != first


def test_fingerprint_is_the_same_in_another_process():
    code = 'from diffclip_da.models.unet import tiny_unet; from diffclip_da.store import fingerprint; print(fingerprint(tiny_unet(16)))'
    other = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, env={**os.environ, 'PYTHONHASHSEED': '7'}).stdout.strip()
    assert other == fingerprint(tiny_unet(16))


def test_fingerprint_is_carried_until_a_weight_changes(monkeypatch):
    m, calls = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), []
    monkeypatch.setattr(store, 'state_hash', lambda x: calls.append(1) or state_hash(x))
    seen = [fingerprint(m), fingerprint(m), fingerprint(m)]
    assert len(set(seen)) == 1 and len(calls) == 1
    m[0].stride = 3                                              # a setting needs no new hash of the weights
    assert fingerprint(m) != seen[0] and len(calls) == 1
    del m[0].stride
    def change(f):
        f()
        seen.append(fingerprint(m))
        assert len(set(seen[2:])) == len(seen) - 2, 'not noticed'
    with torch.no_grad():
        change(lambda: m[0].weight.add_(1))
        change(lambda: m[0].bias.data.mul_(2))                   # around the counter of changes
        change(lambda: m[1].running_mean.fill_(.5))              # a buffer
        change(lambda: setattr(m[0], 'weight', nn.Parameter(torch.zeros(4, 3))))
    m.train()
    change(lambda: m(torch.rand(8, 3)))                          # batch norm learns
    step = torch.optim.Adam(m.parameters(), lr=.1)
    m(torch.rand(8, 3)).square().sum().backward()
    change(step.step)
    change(lambda: m.load_state_dict({k: torch.zeros_like(v) for k, v in m.state_dict().items()}))
    with torch.no_grad(): m[0].weight[0, 0] = float('nan')
    n = (fingerprint(m), len(calls))[1]
    assert (fingerprint(m), len(calls))[1] == n                  # nan does not look like a change each time


def test_fingerprint_counts_buffers_that_are_not_saved():
    class Scaled(nn.Module):
        def __init__(self, s):
            super().__init__()
            self.register_buffer('scale', torch.tensor(s), persistent=False)
    assert fingerprint(Scaled(1.)) != fingerprint(Scaled(2.)) and state_hash(Scaled(1.)) == state_hash(Scaled(2.))


def test_fingerprint_of_something_that_is_no_module():
    class Named: fingerprint = 'mine'
    assert fingerprint(Named()) == 'mine'
    m = nn.Linear(1, 1)
    for bare in (lambda x, t: m(x), functools.partial(m, 1), object(), fingerprint):
        with pytest.raises(UserError, match='bare function or object.*nn.Module, or give it a text attribute `fingerprint`'): fingerprint(bare)


def test_fingerprint_of_attributes_of_all_kinds():
    def with_(**kw):
        m = nn.Linear(1, 1)
        with torch.no_grad(): m.weight.fill_(1); m.bias.fill_(0)
        for k, v in kw.items(): setattr(m, k, v)
        return fingerprint(m)
    class Cache:
        def __init__(self): self.size, self.cache = 3, {}
    used = Cache()
    used.cache['a word'] = 1
    assert with_(tok=Cache()) == with_(tok=used)                 # what it remembers is no setting
    used.size = 4
    assert with_(tok=Cache()) != with_(tok=used)
    def scaled(s): return lambda x: x * s
    assert with_(act=scaled(1)) == with_(act=scaled(1)) != with_(act=scaled(2))
    assert with_(act=torch.relu) != with_(act=torch.tanh)
    assert with_(act=functools.partial(torch.clamp, min=0)) != with_(act=functools.partial(torch.clamp, min=1))
    assert with_(size=(1, 2)) != with_(size=(2, 1)) and with_(where=torch.device('cpu')) == with_(where=torch.device('meta'))
    m = nn.Linear(1, 1)
    before = fingerprint(m)
    m.register_forward_hook(lambda m, x, y: y + 1)
    assert fingerprint(m) != before


# ---- code -------------------------------------------------------------------------------------------------------------------

PKG = Path(store.__file__).parent
# prints the hash of every definition of adaptation and diffusion, and which of them reach `ddim_step`
HASHES = '''
import json, sys
from diffclip_da import store
from diffclip_da.adaptation import finetune
from diffclip_da.diffusion import ddim
found, reach, package = {}, [], store._package()
for m, n in package.nodes:
    if m.split('.')[1:2] not in (['adaptation'], ['diffusion']): continue
    used = package.closure([(m, n)])
    found[f'{m[12:]}.{n}'] = store.canonical_hash(sorted((k[1], t) for k, ts in used.items() for t in ts))
    if ('diffclip_da.diffusion.ddim', 'ddim_step') in used: reach.append(f'{m[12:]}.{n}')
for o in (ddim.ddim_step, ddim.invert, ddim.sample, ddim.step_pairs, finetune.finetune, finetune.check_sane):
    found[f'object {o.__name__}'] = store.code_hash(o)
    if o.__name__ not in ('step_pairs', 'check_sane'): reach.append(f'object {o.__name__}')
print(json.dumps([found, reach]))
'''


def hashes_of(package, *edits):
    "What `HASHES` prints for a copy of a package with some edits: (module, function of its text)."
    root = package.with_name(f'edited{len(list(package.parent.iterdir()))}')
    shutil.copytree(package, root/'diffclip_da')
    for module, f in edits:
        path = root/'diffclip_da'/f'{module}.py'
        text = path.read_text()
        assert f(text) != text, f'{module}: the edit changes nothing'
        path.write_text(f(text))
    env = {**os.environ, 'PYTHONPATH': str(root)}
    run = subprocess.run([sys.executable, '-c', HASHES], capture_output=True, text=True, env=env, cwd=root)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def definition(text, name): return next(n for n in ast.walk(ast.parse(text)) if getattr(n, 'name', None) == name)


def other_docstring(name):
    def edit(text):
        node = definition(text, name).body[0]
        lines = text.split('\n')
        lines[node.lineno - 1:node.end_lineno] = [' ' * node.col_offset + '"Told in other words."']
        return '\n'.join(lines)
    return edit


def other_comments(name):
    "Another help text behind each field of a dataclass."
    def edit(text):
        lines = text.split('\n')
        for n in definition(text, name).body:
            if isinstance(n, ast.AnnAssign): lines[n.end_lineno - 1] = lines[n.end_lineno - 1][:n.end_col_offset] + '   # told in other words'
        return '\n'.join(lines)
    return edit


def one_statement_more(name, statement):
    def edit(text):
        node = definition(text, name).body[1]
        lines = text.split('\n')
        lines.insert(node.lineno - 1, ' ' * node.col_offset + statement)
        return '\n'.join(lines)
    return edit


def test_code_hash_changes_with_what_decides_pixels_and_with_nothing_else(tmp_path):
    package = shutil.copytree(PKG, tmp_path/'package', ignore=shutil.ignore_patterns('assets', '__pycache__'))
    before, reach = hashes_of(package)
    assert {'diffusion.ddim.sample', 'diffusion.ddim.invert', 'diffusion.ddim.ddim_step', 'adaptation.finetune.finetune'} <= set(reach) < set(before)
    after, _ = hashes_of(package, ('diffusion/ddim', other_docstring('ddim_step')),
                         ('diffusion/walk', other_comments('Walk')), ('adaptation/finetune', other_comments('Recipe')),
                         ('diffusion/ddim', lambda t: t.replace("UserError(f'", "UserError(f'Alas: ").replace('UserError(f"', 'UserError(f"Alas: ')),
                         ('data', one_statement_more('fs2k', 'split = str(split)')), ('core', one_statement_more('show_images', 'scale = scale * 2')),
                         ('study/figures', lambda t: t + '\n\ndef another_plot(): return 1\n'))
    assert {k for k in before if before[k] != after[k]} == set()
    after, _ = hashes_of(package, ('diffusion/ddim', one_statement_more('ddim_step', 'eps = eps * 1')))
    assert {k for k in before if before[k] != after[k]} == set(reach)


TOY = {
    'p': '__version__ = "1"',
    'p.base': '''
import functools
LIMIT = 3
def low(x): return x + LIMIT
def helper(x): return low(x)
def other(x): return x
TABLE = dict(low=helper, high=lambda x: x)
short = functools.partial(helper, 1)
def registered(f): TABLE[f.__name__] = f; return f
class Thing:
    size: int = 1
    def __init__(self): self.x = other(1)
    def used(self): return helper(self.x)
    def unused(self): return 1
class Part(Thing):
    def more(self): return 2
''',
    'p.room': '', 'p.room.up': '''
from ..base import (TABLE, Thing, Part, low as deep, registered, short)
from .. import base
import p.base as whole
import torch
def by_name(x): return deep(x)
def by_table(k): return TABLE[k](1)
def by_partial(): return short()
@registered
def by_decorator(): return 1
def by_module(x): return base.helper(x)
def by_alias(x): return whole.helper(x)
def by_local_import(x):
    from ..base import helper as h
    return h(x)
def by_method(thing): return thing.used()
def by_class(): return Thing()
def by_inner(x):
    def inner(y): return deep(y)
    return [inner(v) for v in x]
def shadowed(x, deep=None): return deep(x)
class Net(torch.nn.Module):
    def forward(self, x): return self.again(x)
    def again(self, x): return deep(x)
def by_net(): return Net()
def default(x, f=deep): return f(x)
class Kid(Part): pass
def by_kid(): return Kid()
'''}


def keys_of(*key, sources=TOY): return set(store._Package(sources).closure([key]))


@pytest.mark.parametrize('name, sees', [
    ('by_name', {'low', 'LIMIT'}), ('by_table', {'TABLE', 'helper', 'low', 'LIMIT'}), ('by_partial', {'short', 'helper', 'low', 'LIMIT'}),
    ('by_decorator', {'registered', 'TABLE', 'helper', 'low', 'LIMIT'}), ('by_module', {'helper', 'low', 'LIMIT'}), ('by_alias', {'helper', 'low', 'LIMIT'}),
    ('by_local_import', {'helper', 'low', 'LIMIT'}), ('by_method', {'Thing', 'Thing.used', 'other', 'helper', 'low', 'LIMIT'}), ('by_class', {'Thing', 'other'}),
    ('by_inner', {'low', 'LIMIT'}), ('shadowed', set()), ('default', {'low', 'LIMIT'}), ('by_net', {'low', 'LIMIT'}), ('by_kid', {'Part', 'Thing', 'other'})])
def test_what_a_definition_uses(name, sees):
    got = keys_of('p.room.up', name)
    assert {n for m, n in got if m == 'p.base'} == sees and ('p.room.up', name) in got


def test_what_computes_nothing_is_left_out():
    def bare(text): return [ts for _, ts in sorted(store._Package({'p': '', 'p.a': text}).closure([('p.a', 'f')]).items())]
    plain = bare('def f(x, y=1):\n  if x: raise ValueError("bad")\n  return x')
    for same in ('def f(x: int, y: "float" = 1) -> int:\n  "Doc."\n  # comment\n  if x: raise ValueError(f"very bad {len(x)}") from None\n  return x',
                 'def f(x,\n      y=1 # help\n     ):\n    if x:\n        raise ValueError\n    return x'):
        assert bare(same) == plain
    for other in ('def f(x, y=2):\n  if x: raise ValueError("bad")\n  return x', 'def f(x, y=1):\n  if x: raise KeyError("bad")\n  return x',
                  'def f(x, y=1):\n  return x'):
        assert bare(other) != plain
    assert bare('def f(x):\n  print("a", x)\n  need(x, f"{x} is bad")\n  assert x, "no"') == bare('def f(x):\n  print("b", x)\n  need(x, "bad")\n  assert x')
    assert bare('class f:\n  a: int = 1 # help\n  b: str') == bare('class f:\n  "Doc."\n  a: float = 1\n  b: int') != bare('class f:\n  a: int = 1')


def test_code_hash_takes_objects_of_many_kinds():
    from diffclip_da.diffusion import ddim
    from diffclip_da.diffusion.schedule import Schedule
    a = code_hash(ddim.ddim_step)
    assert len(a) == 16 and a == code_hash(ddim.ddim_step) != code_hash(ddim.invert)
    assert code_hash(ddim.ddim_step, ddim.invert) == code_hash([ddim.invert, ddim.ddim_step]) == code_hash(dict(a=ddim.invert, b=ddim.ddim_step))
    assert code_hash(functools.partial(ddim.ddim_step, 1)) != code_hash(functools.partial(ddim.ddim_step, 2))
    assert code_hash(linear_schedule().ab) == code_hash(Schedule.ab) and code_hash(Schedule.T) != code_hash(Schedule.ab)
    unet = tiny_unet(16)
    assert code_hash(unet) == code_hash(type(unet)) != a
    assert code_hash(torch.relu) != code_hash(torch.tanh)


def test_code_hash_of_a_function_from_outside_follows_it_into_the_package():
    from diffclip_da.diffusion.ddim import ddim_step, invert
    space = dict(ddim_step=ddim_step)
    def outside(x): return ddim_step(x)
    a = code_hash(outside)
    def outside(x):
        "Another docstring."
        return ddim_step(x)   # another comment
    assert code_hash(outside) == a
    def outside(x): return ddim_step(x, 1)
    assert code_hash(outside) != a
    f = eval('lambda x: x', space)
    with pytest.raises(UserError, match='its source cannot be read.*define it with `def`'): code_hash(f)


# ---- results that are found again -------------------------------------------------------------------------------------------

def test_cached_tensor(tmp_path):
    path, calls = tmp_path/'deep'/'x.safetensors', []
    def make(): calls.append(1); return torch.rand(2, 3).T       # not contiguous
    a = cached_tensor(path, 'k', make)
    assert torch.equal(cached_tensor(path, 'k', make), a) and len(calls) == 1
    b = cached_tensor(path, 'other', make)
    assert len(calls) == 2 and not torch.equal(a, b)
    path.write_bytes(path.read_bytes()[:20])                     # cut short
    cached_tensor(path, 'other', make)
    assert len(calls) == 3 and listing(tmp_path) == ['deep', 'deep/x.safetensors']


def test_tensor_hash():
    x = torch.arange(6.)
    assert tensor_hash(x) == tensor_hash(x.clone()) and len({tensor_hash(v) for v in (x, x.view(2, 3), x.double(), x + 1)}) == 4


def test_claim_folder(tmp_path):
    path = tmp_path/'job.json'
    claim_folder(path, 'a', dict(t0=1, config=dict(lr=.1)), 'out')
    claim_folder(path, 'a', dict(t0=1, config=dict(lr=.1)), 'out')
    with pytest.raises(UserError, match=r'out holds the result of another run \(different: t0, n, lr\); choose another folder, or delete this one'):
        claim_folder(path, 'b', dict(t0=2, n=1, config=dict(lr=.2)), 'out')
    assert read_json(path) == dict(key='a', inputs=dict(t0=1, config=dict(lr=.1)))


def test_a_claim_that_is_damaged_is_written_anew_and_another_run_is_still_refused(tmp_path):
    path, inputs = tmp_path/'job.json', dict(t0=1, config=dict(lr=.1), words=['a', 'b'])
    key = canonical_hash(inputs)
    claim_folder(path, key, inputs, 'out')
    whole = path.read_bytes()
    for bit, b in flips(path, 250):
        path.write_bytes(b)
        claim_folder(path, key, inputs, 'out')
        assert read_json(path) == dict(key=key, inputs=inputs), bit
        path.write_bytes(b)
        other = dict(inputs, t0=2)
        try: claim_folder(path, canonical_hash(other), other, 'out')
        except UserError as e: assert 'another run' in str(e)
        else: assert not is_json(b), bit   # nothing is left that could say whose it is
    path.write_bytes(whole)
    for odd in ('[1]', '{"inputs": 3}', '{"key": "x", "inputs": {"config": 1}}'):
        path.write_text(odd)
        if odd == '[1]': assert claim_folder(path, key, inputs, 'out') is None
        else:
            with pytest.raises(UserError, match='another run'): claim_folder(path, key, inputs, 'out')


def is_json(b):
    try: return isinstance(json.loads(b), dict)
    except ValueError: return False


def test_a_stage_whose_file_is_damaged_is_done_again(tmp_path):
    def run(said):
        with stage(tmp_path, 'classify', 'k', said.append) as s:
            if not (s.folder/'h.json').exists(): write_json(s.folder/'h.json', dict(accuracy=.5))
        return s.found
    assert not run([]) and run([])
    path = tmp_path/'classify-k'/'h.json'
    path.write_text(path.read_text().replace('0.5', '0.7'))
    said = []
    assert not run(said) and 'h.json is damaged or gone' in said[0] and read_json(path) == dict(accuracy=.5) and run([])
    mark = tmp_path/'classify-k'/'stage.json'
    for bit, b in flips(mark, 25):
        mark.write_bytes(b)
        run([])
        assert store.read_record(mark)['stage'] == 'classify' and run([]), bit


@pytest.mark.parametrize('name', ['', '..', 'a\0', 'x' * 300, 'sub'])
def test_a_mark_of_a_stage_may_hold_any_name(tmp_path, name):
    def run():
        with stage(tmp_path, 'step', 'k', lambda text: None) as s: (s.folder/'sub').mkdir(parents=True, exist_ok=True)
        return s.found
    run()
    mark = tmp_path/'step-k'/'stage.json'
    said = store.read_record(mark)
    said['files'] = {name: 'x'}
    mark.write_text(json.dumps(said | dict(sha256=store.canonical_hash(said, 64))))
    assert not run() and run() and (tmp_path/'step-k'/'sub').is_dir()


def test_stage_is_done_once_and_a_killed_one_is_not_done(tmp_path):
    said = []
    with pytest.raises(KeyboardInterrupt):
        with stage(tmp_path/'runs', 'adapt test', 'k', said.append) as s:
            write_json(s.folder/'half.json', {})
            raise KeyboardInterrupt
    assert not (s.folder/'stage.json').exists()
    with stage(tmp_path/'runs', 'adapt test', 'k', said.append, device='cpu') as s:
        assert not s.found and s.folder == tmp_path/'runs'/'adapt-test-k' and s.seconds is None
        assert (s.folder/'half.json').exists()                   # what was made is still there
    with stage(tmp_path/'runs', 'adapt test', 'k', said.append) as again: assert again.found
    assert again.seconds == s.seconds >= 0
    mark = read_json(s.folder/'stage.json')
    assert mark['stage'] == 'adapt test' and mark['device'] == 'cpu' and mark['versions'] == versions()
    assert [m.split(' ')[2] for m in said] == ['working,', 'working,', 'done', 'found']


# ---- packed tensors ----------------------------------------------------------------------------------------------------------

def packing(folder, n=10, key='k', **kw):
    "A packed tensor of squares, and the blocks that had to be made for it."
    made, said = [], []
    def make(a, b): made.append((a, b)); return (torch.arange(a * 3, b * 3).view(-1, 3) ** 2 % 251).to(torch.uint8)
    return packed_tensor(folder, key, (n, 3), make, block=4, say=said.append, **kw), made, said


def test_packed_tensor_is_the_tensor(tmp_path):
    x, made, _ = packing(tmp_path/'p')
    whole = (torch.arange(30).view(10, 3) ** 2 % 251).to(torch.uint8)
    assert made == [(0, 4), (4, 8), (8, 10)] and torch.equal(x[:], whole) and x.shape == whole.shape and x.dtype == torch.uint8 and len(x) == 10 and x.dim() == 2
    for i in (3, -1, slice(2, 7), [0, 9, 0], torch.tensor([5, 1]), torch.tensor(4)): assert torch.equal(x[i], whole[i])
    assert torch.equal(torch.cat(list(x.blocks(3))), whole) and tensor_hash(x) == tensor_hash(whole)
    x[0].zero_()                                                            # a copy: the file stays
    assert torch.equal(x[:], whole) and packing(tmp_path/'p')[1] == []
    assert packing(tmp_path/'p', key='other')[1] == [(0, 4), (4, 8), (8, 10)] and packing(tmp_path/'p', n=11)[1][-1] == (8, 11)
    assert packing(tmp_path/'empty', n=0)[0][:].shape == (0, 3)


def test_a_killed_packing_goes_on_where_it_was(tmp_path):
    def make(a, b):
        if a == 8: raise KeyboardInterrupt
        return (torch.arange(a * 3, b * 3).view(-1, 3) ** 2 % 251).to(torch.uint8)
    with pytest.raises(KeyboardInterrupt): packed_tensor(tmp_path/'p', 'k', (10, 3), make, block=4)
    x, made, said = packing(tmp_path/'p')
    assert made == [(8, 10)] and said == [] and torch.equal(x[:], packing(tmp_path/'fresh')[0][:])
    assert {f.name: f.read_bytes() for f in (tmp_path/'p').iterdir()} == {f.name: f.read_bytes() for f in (tmp_path/'fresh').iterdir()}


@pytest.mark.parametrize('at', [0, 13, 29])
def test_a_flipped_bit_in_a_packed_tensor_is_made_anew_and_named(tmp_path, at):
    x, _, _ = packing(tmp_path/'p')
    before, raw = x[:], bytearray(x.path.read_bytes())
    raw[at] ^= 8; x.path.write_bytes(raw)
    again, made, said = packing(tmp_path/'p')
    block = at // 12 * 4
    assert made == [(block, min(10, block + 4))] and f'rows {block} to {min(10, block + 4)} are damaged' in said[0] and torch.equal(again[:], before)


@pytest.mark.parametrize('text', ['', '[]', '{"key": "k"}', '{"key": "k", "shape": [10, 3], "block": 4, "blocks": 7}'])
def test_a_damaged_list_of_blocks_costs_work_and_nothing_else(tmp_path, text):
    x, _, _ = packing(tmp_path/'p')
    (tmp_path/'p/blocks.json').write_text(text)
    again, made, _ = packing(tmp_path/'p')
    assert len(made) == 3 and torch.equal(again[:], x[:])


def test_packing_says_at_once_that_the_disk_is_too_small(tmp_path):
    with pytest.raises(NoSpace, match=r'bytes\.u8 needs [\d,.]+ GB, and .* GB are free'): packed_tensor(tmp_path/'p', 'k', (10**12, 10**3), lambda a, b: 1 / 0)
