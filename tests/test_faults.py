"""kill -9, Ctrl-C, SIGTERM and a full disk at every call that makes a file last (fsync, rename), in adapting, fine-tuning and training.

After each fault the same command must end in the bytes of a run without one, and leave nothing else behind. `make test` tries a
sample of the calls; `DIFFCLIP_ALL_FAULTS=1 .venv/bin/pytest tests/test_faults.py` tries them all (some minutes)."""
import errno, os, shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import diffclip_da.adaptation.finetune as F
import diffclip_da.models.loop as L
import diffclip_da.models.train as T
from diffclip_da.adaptation.folder import main as adapt
from diffclip_da.models.unet import save_unet, tiny_unet
from diffclip_da.store import sha256_file
from test_adapter import make_photos
from test_finetune import clip_folder

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
ALL = os.environ.get('DIFFCLIP_ALL_FAULTS') == '1'


def tree(folder):
    "Every file with its hash, and every folder."
    return {p.relative_to(folder).as_posix(): sha256_file(p) if p.is_file() else None for p in sorted(folder.rglob('*'))}


class Fault:
    "What a child process does at its `at`-th call (from 1) of os.fsync or os.replace; `at=0`: only counts."
    def __init__(self, kind, at): self.kind, self.at, self.n = kind, at, 0

    def __call__(self, real):
        def call(*args):
            self.n += 1
            if self.at and (self.n == self.at or self.kind == 'full' and self.n > self.at): self.strike()
            return real(*args)
        return call

    def strike(self):
        if self.kind == 'full': raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), getattr(signal, self.kind))


def child(command, fault, log):
    "Run a command in a fork. -> (exit code, or minus the signal; calls made; what it said)"
    told, tell = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(told)
        for fd in (1, 2): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
        code = 1
        try:
            os.fsync, os.replace = fault(os.fsync), fault(os.replace)
            F.time = L.time = SimpleNamespace(perf_counter=lambda: 0., monotonic=lambda: 0.)   # times in files would differ
            code = command() or 0
        except SystemExit as e: code = e.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.write(tell, fault.n.to_bytes(2, 'big'))
            os._exit(code)
    os.close(tell)
    calls = int.from_bytes(os.read(told, 2), 'big')
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(told)
    return code, calls, Path(log).read_text()


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    "name -> (out -> a command): fine-tuning and adapting by the front door, and the training of a U-Net."
    root = tmp_path_factory.mktemp('faults')
    photos = make_photos(root/'photos', 3)
    save_unet(tiny_unet(16), root/'unet')
    guide = clip_folder(root/'clip')
    small = dict(t0=200, n_inv=2, n_gen=2, n_iter=1, passes=2, n_images=2, images_per_update=1, n_crops=1, batch_size=2, shard_size=2, device='cpu')
    def front(out):
        argv = [str(photos), '--target', 'a sketch', '--out', str(out), '--save', str(out/'kept'), '--unet', str(root/'unet'), '--clip', str(guide)]
        return lambda: adapt(argv + [w for k, v in small.items() for w in (f'--{k.replace("_", "-")}', str(v))])
    def train(out):
        argv = ['--images', str(photos), '--out', str(out), '--n-images', '8', '--batch-size', '2', '--image-size', '16', '--device', 'cpu']
        return lambda: T.main(argv)
    real = T.small_unet
    with pytest.MonkeyPatch.context() as m:
        m.setenv('DIFFCLIP_CHECKPOINT_SECONDS', '0')   # a checkpoint at every update
        m.setattr(T, 'small_unet', lambda size, _, **kw: real(size, channels=(16, 32), patch=2, **{**kw, 'attention': 1}))
        for command in (front, train): command(root/f'warm-{command.__name__}')()   # the forks inherit what is read once
        yield dict(front=front, train=train)


@pytest.fixture(scope='module')
def whole(commands, tmp_path_factory):
    "name -> (files of a run without faults, calls that it made)"
    root, found = tmp_path_factory.mktemp('whole'), {}
    for name, command in commands.items():
        code, n, said = child(command(root/name), Fault('', 0), root/'log')
        assert code == 0, said
        found[name] = tree(root/name), n
    return found


def points(n, salt):
    "Calls to fail at: all of them, or a few that differ from test to test."
    if ALL: return range(1, n + 1)
    return sorted(np.random.default_rng(salt).choice(np.arange(1, n + 1), 2, replace=False))


KINDS = dict(SIGKILL=-signal.SIGKILL, SIGINT=130, SIGTERM=143, full=2)


@pytest.mark.parametrize('name', ['front', 'train'])
@pytest.mark.parametrize('kind', KINDS)
def test_after_a_fault_at_any_write_the_same_command_ends_in_the_same_bytes(name, kind, commands, whole, tmp_path):
    want, n = whole[name]
    assert n > (40 if name == 'front' else 8)   # fsync and rename of every file
    for k in points(n, 10 * [*KINDS].index(kind) + (name == 'train')):
        out = tmp_path/f'{name}-{kind}-{k}'
        code, _, said = child(commands[name](out), Fault(kind, int(k)), tmp_path/'log')
        assert code == KINDS[kind] and 'Traceback' not in said, (k, code, said)
        if kind in ('SIGINT', 'SIGTERM'): assert 'the same command resumes' in said
        if kind == 'full':
            stages = ('the fine-tuning', 'adapting', 'the report', 'keeping the adapter') if name == 'front' else ('reading the pictures', 'the training', 'the trained network')
            assert 'no space left' in said and (any(f'error: {s} (it writes about' in said for s in stages) or 'job.json' in said), (k, said)
        if kind != 'SIGKILL': assert not out.exists() or not list(out.rglob('*.tmp')), k
        code, _, said = child(commands[name](out), Fault('', 0), tmp_path/'log')
        assert code == 0, (k, said)
        now = tree(out)
        assert now == want, (k, {f for f in {*now, *want} if now.get(f, 0) != want.get(f, 0)}, said)
        shutil.rmtree(out)
