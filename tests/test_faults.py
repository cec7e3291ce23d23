"""kill -9, Ctrl-C, SIGTERM and a full disk at every call that makes a file last (fsync, rename), in adapting, fine-tuning and training.

After each fault the same command must end in the bytes of a run without one, and leave nothing else behind. `make test` tries a
sample of the calls; `DIFFCLIP_ALL_FAULTS=1 .venv/bin/pytest tests/test_faults.py` tries them all (some minutes). The same for
one flipped bit in each kind of file that a run consists of."""
import errno, os, re, shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import diffclip_da.adaptation.finetune as F
import diffclip_da.models.loop as L
import diffclip_da.models.train as T
from diffclip_da import align
from diffclip_da.adaptation.folder import main as adapt
from diffclip_da.models.unet import save_unet, tiny_unet
from diffclip_da.store import content_hash, load_state, sha256_file
from test_adapter import make_photos
from test_finetune import clip_folder
from test_store import flips

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
    "name -> (out -> a command): aligning, fine-tuning and adapting by the front door, and the training of a U-Net."
    root = tmp_path_factory.mktemp('faults')
    photos = make_photos(root/'photos', 3)
    save_unet(tiny_unet(16), root/'unet')
    guide = clip_folder(root/'clip')
    small = dict(t0=200, n_inv=2, n_gen=2, n_iter=1, passes=2, n_images=2, images_per_update=1, n_crops=1, batch_size=2, shard_size=2, device='cpu')
    def front(out):
        argv = [str(photos), '--target', 'a sketch', '--out', str(out), '--save', str(out/'kept'),
                '--unet', str(root/'unet'), '--clip', str(guide), '--labels', str(root/'labels.csv'), '--align']
        return lambda: adapt(argv + [w for k, v in small.items() for w in (f'--{k.replace("_", "-")}', str(v))])
    def train(out):
        argv = ['--images', str(photos), '--out', str(out), '--n-images', '8', '--batch-size', '2', '--image-size', '16', '--device', 'cpu']
        return lambda: T.main(argv)
    real = T.small_unet
    with pytest.MonkeyPatch.context() as m:
        m.setenv('DIFFCLIP_CHECKPOINT_SECONDS', '0')   # a checkpoint at every update
        m.setattr(align, 'SMALLEST', 1)                # these photos hold no face: one is found in each
        m.setattr(align, 'find_face', lambda *a: dict(landmarks=align.TEMPLATE * 16, probability=.99, n_faces=1))
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
            stages = ('finding the faces', 'the fine-tuning', 'adapting', 'the report', 'keeping the adapter') if name == 'front' else ('reading the pictures', 'the training', 'the trained network')
            assert 'no space left' in said and (any(f'error: {s} (it writes about' in said for s in stages) or 'job.json' in said), (k, said)
        if kind != 'SIGKILL': assert not out.exists() or not list(out.rglob('*.tmp')), k
        code, _, said = child(commands[name](out), Fault('', 0), tmp_path/'log')
        assert code == 0, (k, said)
        now = tree(out)
        assert now == want, (k, {f for f in {*now, *want} if now.get(f, 0) != want.get(f, 0)}, said)
        shutil.rmtree(out)


def kind_of(file): return re.sub(r'[0-9a-f]{8,}|\d+', '#', file)   # files of one kind differ in numbers and keys

FILES = dict(   # `kind_of` each file that a finished run must have, at least
    front="""config.json manifest.csv labels.csv contact_sheet.png report.json report.html images/a/#.png shards/#.json
             .diffclip/job.json .diffclip/aligned/#.png .diffclip/aligned/alignment.json .diffclip/aligned/alignment.csv
             .diffclip/finetune/#-#/latents.safetensors .diffclip/finetune/#-#/checkpoint.pt
             .diffclip/finetune/#-#/history.csv .diffclip/latents/#/#.safetensors
             kept/adapter.json kept/unet/config.json kept/tuned/diffclip.json""".split(),
    train="""checkpoint.pt pictures/pictures-#-#/blocks.json pictures/pictures-#-#/bytes.u#
             model/config.json model/diffclip.json""".split())
SHOWS_PICTURES = {'manifest.csv', 'contact_sheet.png', 'report.html'}


@pytest.mark.parametrize('name', ['front', 'train'])
def test_one_flipped_bit_in_any_kind_of_file_in_any_state_is_repaired_or_named(name, commands, whole, tmp_path):
    "Finished, and killed on the way; a file of each kind. What is named as damaged is deleted, as the message says."
    (want, n), r, met = whole[name], np.random.default_rng(name == 'train'), set()
    run = lambda out: child(commands[name](out), Fault('', 0), tmp_path/'log')
    for at in (0, *map(int, np.linspace(0, n, 5 if ALL else 3)[1:-1].round())):
        state = tmp_path/f'state-{at}'
        child(commands[name](state), Fault('SIGKILL', at), tmp_path/'log')
        kinds = {kind_of(f): f for f, h in tree(state).items() if h and not f.endswith('.tmp')}
        met |= {*kinds}
        for kind, f in kinds.items():
            damaged = list(flips(state/f, 400))
            for k in r.choice(len(damaged), 3 if ALL else 1):
                (bit, b), out = damaged[k], tmp_path/'out'
                shutil.copytree(state, out)
                (out/f).write_bytes(b)
                if '/latents/' in f:   # else nobody reads them
                    (out/'shards'/Path(f).with_suffix('.json').name).unlink(missing_ok=True)
                code, _, said = run(out)
                where = (at, f, bit, said)
                assert code in (0, 2) and 'Traceback' not in said, where
                if code == 2:
                    assert Path(f).name in said, where
                    (out/f).unlink()
                    assert run(out)[0] == 0, where
                now = tree(out)
                bad = {g for g in {*now, *want} if now.get(g) != want.get(g)}
                if bad == {f} and f.endswith('checkpoint.pt'):   # between the parts of a zip nobody reads
                    assert content_hash(load_state(out/f)) == content_hash(load_state(state/f)), where
                    bad = ()
                # a picture that still decodes may have been retouched: it stays, and whatever shows it
                if bad: assert kind == 'images/a/#.png' and f in said and bad <= {f, *SHOWS_PICTURES}, (*where, bad)
                shutil.rmtree(out)
    assert met >= {*FILES[name]}, {*FILES[name]} - met
