"Adapting a data set: kill and resume, keys, processes, memory, conditions, saved adapters; tiny random networks."
import copy, json, os, shutil, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import diffclip_da.adaptation.adapter as A
from diffclip_da.adaptation.adapter import Adapter, Batches, Compute, fast, file_names, load_adapted, transform
from diffclip_da.adaptation.finetune import CAREFUL
from diffclip_da.core import UserError, new_generator, to_uint8
from diffclip_da.data import image_folder
from diffclip_da.diffusion.schedule import cosine_schedule, linear_schedule
from diffclip_da.diffusion.walk import Walk
from diffclip_da.models.load import load_guide
from diffclip_da.models.unet import save_unet, tiny_unet
from diffclip_da.store import read_record, sha256_file, write_record
from test_finetune import Face, Net, clip_folder
from test_store import Held

schedule = linear_schedule()
walk, cfg = Walk(t0=300, n_inv=3, n_gen=2, grid='linear', inversion='ddim'), Compute(batch_size=2, shard_size=3)


def adapt(images, unet, tuned, cfg, schedule, out, cache=None, walk=walk, size=16, **cond):
    "`transform` with this file's walk and size."
    return transform(images, unet, tuned, schedule, walk, cfg, size, out, cache, **cond)

def make_photos(folder, n=7):
    "Smooth pictures of odd sizes, in two folders, of three file types; labels.csv beside the folder."
    folder, g = Path(folder), new_generator(0)
    for i in range(n):
        w, h = [(20, 20), (31, 17), (16, 40)][i % 3]
        small = torch.randint(0, 256, (3, 3, 3), generator=g, dtype=torch.uint8).numpy()
        p = folder/('a' if i < 3 else 'b')/f'{i}{[".png", ".jpg", ".jpeg"][i % 3]}'
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((w, h)).save(p)
    ids = image_folder(folder).ids
    (folder.parent/'labels.csv').write_text('id,label\n' + ''.join(f'{i},{("no", "yes")[k % 2]}\n' for k, i in enumerate(ids)))
    return folder

def tuned_like(model):
    "A network a little away from `model`, as fine-tuning leaves it."
    model, g = copy.deepcopy(model), new_generator(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g), alpha=.02)
    return model

def tree(folder):
    "Every file below `folder` with its hash."
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(Path(folder).rglob('*')) if p.is_file()}

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return make_photos(tmp_path_factory.mktemp('data')/'photos')

@pytest.fixture(scope='module')
def images(photos): return image_folder(photos, photos.parent/'labels.csv')

@pytest.fixture(scope='module')
def unet(): return Net()

@pytest.fixture(scope='module')
def tuned(unet): return tuned_like(unet)

@pytest.fixture(scope='module')
def reference(tmp_path_factory, images, unet, tuned):
    "One uninterrupted run."
    out = tmp_path_factory.mktemp('reference')/'out'
    adapt(images, unet, tuned, cfg, schedule, out)
    return out


def test_same_ids_and_labels_and_an_honest_manifest(reference, images):
    got, table = load_adapted(reference, images), pd.read_csv(reference/'manifest.csv')
    assert got.ids == images.ids and got.labels == images.labels and got.classes == ['no', 'yes']
    assert list(table.columns) == ['id', 'label', 'file', 'source_sha256', 'adapted_sha256', 'shard']
    assert sorted(table.id) == sorted(images.ids) and table.shard.tolist() == [0, 0, 0, 1, 1, 1, 2]
    for r in table.itertuples():
        assert sha256_file(reference/r.file) == r.adapted_sha256 and images.image_hash(r.id) == r.source_sha256 and images.labels[r.id] == r.label
    assert got.pil('a/1.jpg').size == (16, 16) and (reference/'images/a/1.png').exists()
    x = got.tensor(images.ids, 16)
    assert x.std() > .05 and (x - images.tensor(images.ids, 16)).abs().mean() > .01   # pictures, and not the sources

def test_unlabelled_images_and_one_image(tmp_path, photos, unet, tuned):
    plain = image_folder(photos)
    got = adapt(plain.subset(plain.ids[:1]), unet, tuned, cfg, schedule, tmp_path/'out')
    assert len(got) == 1 and got.labels is None
    assert pd.read_csv(tmp_path/'out/manifest.csv').label.isna().all()

def test_what_the_arithmetic_is(tmp_path, images, unet, tuned):
    "One image, by the two sampler calls that `transform` promises."
    from diffclip_da.diffusion.ddim import invert, sample, step_pairs
    one = images.subset(['b/4.jpg'])
    for which, inverter in (('pretrained', unet), ('finetuned', tuned)):
        got = adapt(one, unet, tuned, cfg, schedule, tmp_path/which, walk=replace(walk, inverter=which))
        with torch.no_grad():
            x0 = one.tensor(one.ids, 16)
            z = invert(inverter, x0, step_pairs(300, 3), schedule)
            x = sample(tuned, z, step_pairs(300, 2), schedule)
        assert torch.equal(to_uint8(got.tensor(one.ids, 16)), to_uint8(x))
    assert tree(tmp_path/'pretrained/images') != tree(tmp_path/'finetuned/images')


KILLS = '''
    import os, signal, sys, shutil
    from pathlib import Path
    import torch; torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    from test_adapter import *
    photos, root = sys.argv[2], Path(sys.argv[3])
    unet = Net(); tuned = tuned_like(unet)

    def child(out, kill_at, before):
        "Run in a fork; SIGKILL at the kill_at-th rename, before or after it. Returns (signal or 0, renames made)."
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            n, replace_ = 0, os.replace
            def killer(a, b):
                nonlocal n
                n += 1
                if n == kill_at and before: os.kill(os.getpid(), signal.SIGKILL)
                replace_(a, b)
                if n == kill_at: os.kill(os.getpid(), signal.SIGKILL)
            os.replace = killer
            images = image_folder(photos, Path(photos).parent/'labels.csv')
            try: adapt(images.subset(images.ids[:4]), unet, tuned, cfg, schedule, out)
            except BaseException as e: print(repr(e), flush=True); os._exit(1)
            os.write(w, bytes([n])); os._exit(0)
        os.close(w)
        status = os.waitpid(pid, 0)[1]
        return os.WTERMSIG(status) or os.WEXITSTATUS(status) * 100, int.from_bytes(os.read(r, 1), 'big')

    A.describe_run(image_folder(photos), unet, tuned, schedule, walk, cfg, 16)   # code is read once: forks inherit it
    status, n = child(root/'straight', 0, True)
    assert status == 0, status
    want = tree(root/'straight')
    for k in range(1, n + 1):
        for before in ((True, False) if k in (2, 3, 6) else (bool(k % 2),)):
            out = root/f'{k}{before}'
            assert child(out, k, before)[0] == signal.SIGKILL
            assert tree(out) != want or k == n
            assert child(out, 0, True)[0] == 0
            assert tree(out) == want, (k, before, set(tree(out).items()) ^ set(want.items()))
            shutil.rmtree(out)
    print('kills', n)
'''

def test_killed_at_any_write_the_same_command_ends_in_the_same_bytes(tmp_path, photos):
    script = tmp_path/'kills.py'
    script.write_text(textwrap.dedent(KILLS))
    r = subprocess.run([sys.executable, script, Path(__file__).parent, photos, tmp_path/'runs'], capture_output=True, text=True,
                       env={**os.environ, 'DIFFCLIP_QUIET': '1', 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stdout + r.stderr
    assert r.stdout.strip() == 'kills 10'   # config, then latents + images + record per shard, then the manifest

TWO = '''
    import sys; sys.path.insert(0, sys.argv[1])
    import torch; torch.set_num_threads(1)
    from test_adapter import *
    from pathlib import Path
    unet = Net()
    got = adapt(image_folder(sys.argv[2], Path(sys.argv[2]).parent/'labels.csv'), unet, tuned_like(unet), cfg, schedule, sys.argv[3])
    assert len(got) == 7
    print(A.processes()[:2])
'''

def free_port():
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def test_two_processes_make_the_bytes_of_one(tmp_path, photos, reference):
    "The environment is what `accelerate launch --num_processes 2` sets."
    script, port = tmp_path/'two.py', free_port()
    script.write_text(textwrap.dedent(TWO))
    env = {**os.environ, 'DIFFCLIP_QUIET': '1', 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
           'MASTER_PORT': str(port), 'ACCELERATE_USE_CPU': 'true', 'CUDA_VISIBLE_DEVICES': ''}
    ps = [subprocess.Popen([sys.executable, script, Path(__file__).parent, photos, tmp_path/'out'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}) for r in (0, 1)]
    for r, p in enumerate(ps):
        out, err = p.communicate(timeout=300)
        assert p.returncode == 0, err
        assert f'({r}, 2)' in out
    assert tree(tmp_path/'out') == tree(reference)


class Stop(BaseException): pass

def test_stopped_in_the_middle_of_the_arithmetic(tmp_path, monkeypatch, images, unet, tuned, reference):
    real, calls = Walk.generate, []
    def stopping(*a, **k):
        calls.append(1)
        if len(calls) == 3: raise Stop
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(Walk, 'generate', stopping)
        with pytest.raises(Stop): adapt(images, unet, tuned, cfg, schedule, tmp_path/'out')
    assert not (tmp_path/'out/manifest.csv').exists() and (tmp_path/'out/shards/00000.json').exists()
    with pytest.raises(UserError, match='not finished'): load_adapted(tmp_path/'out', images)
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'out')
    assert tree(tmp_path/'out') == tree(reference)

def test_a_finished_run_computes_nothing(tmp_path, monkeypatch, images, unet, tuned, reference):
    shutil.copytree(reference, tmp_path/'out')
    for name in ('generate', 'invert'): monkeypatch.setattr(Walk, name, None)
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'out')
    assert tree(tmp_path/'out') == tree(reference)

def test_damaged_or_missing_pictures_and_latents_are_made_again(tmp_path, images, unet, tuned, reference):
    out = tmp_path/'out'
    shutil.copytree(reference, out)
    (out/'images/a/1.png').write_bytes(b'x'); (out/'images/b/3.png').unlink()
    latents = sorted(out.glob('latents/*/*.safetensors'))
    latents[0].write_bytes(latents[0].read_bytes()[:100])
    (out/'shards/00002.json').write_text('{')
    adapt(images, unet, tuned, cfg, schedule, out)
    assert tree(out) == tree(reference)

@pytest.mark.parametrize('what, words', [('size', 'size'), ('n_gen', 'n_gen'), ('model', 'finetuned'), ('images', 'images'), ('labels', 'labels')])
def test_another_run_in_the_same_folder_is_refused(what, words, tmp_path, photos, images, unet, tuned, reference):
    out, before = reference, tree(reference)
    args, kw = [images, unet, tuned, cfg, schedule], {}
    if what == 'model': args[2] = unet
    elif what == 'images': args[0] = images.subset(images.ids[1:])
    elif what == 'labels': args[0] = image_folder(photos)
    elif what == 'size': kw = dict(size=8)
    else: kw = dict(walk=replace(walk, n_gen=3))
    with pytest.raises(UserError) as e: adapt(*args, out, **kw)
    assert str(out) in str(e.value) and words in str(e.value).split('different: ')[1].split(')')[0] and 'choose another folder' in str(e.value)
    assert tree(reference) == before

def test_files_of_somebody_else_are_not_overwritten(tmp_path, images, unet, tuned):
    (tmp_path/'out/images/a').mkdir(parents=True)
    (tmp_path/'out/images/a/1.png').write_text('mine')
    with pytest.raises(UserError, match='no config.json'): adapt(images, unet, tuned, cfg, schedule, tmp_path/'out')
    assert (tmp_path/'out/images/a/1.png').read_text() == 'mine'

def test_latents_are_shared_by_all_prompts(tmp_path, monkeypatch, images, unet, tuned, reference):
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'one', cache=tmp_path/'cache')
    assert tree(tmp_path/'one/images') == tree(reference/'images') and not (tmp_path/'one/latents').exists()
    monkeypatch.setattr(Walk, 'invert', None)   # would fail if it were called
    adapt(images, unet, tuned_like(tuned), cfg, schedule, tmp_path/'two', cache=tmp_path/'cache')
    assert tree(tmp_path/'two/images') != tree(reference/'images')

def test_noise_does_not_depend_on_shards_already_done(tmp_path, images, unet, tuned):
    noisy = replace(walk, eta=1., noise_seed=3)
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'a', walk=noisy)
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'b', walk=noisy)
    assert tree(tmp_path/'a') == tree(tmp_path/'b')
    (tmp_path/'b/shards/00001.json').unlink()
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'b', walk=noisy)
    assert tree(tmp_path/'a') == tree(tmp_path/'b')
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'c', walk=replace(noisy, noise_seed=4))
    assert tree(tmp_path/'a/images') != tree(tmp_path/'c/images')

def test_half_precision_stays_close(tmp_path, images, unet, tuned, reference):
    got = adapt(images, unet, tuned, replace(cfg, dtype='bfloat16'), schedule, tmp_path/'out').tensor(images.ids, 16)
    gap = (got - load_adapted(reference, images).tensor(images.ids, 16)).abs().mean()
    assert 0 < gap < .05


@pytest.mark.skipif(not (shutil.which('c++') or shutil.which('g++')), reason='no C++ compiler')
def test_compiled_networks_draw_the_same(tmp_path, images, unet, tuned, reference):
    got = adapt(images, unet, tuned, replace(cfg, compile=True), schedule, tmp_path/'out').tensor(images.ids, 16)
    want = load_adapted(reference, images).tensor(images.ids, 16)
    assert (got - want).abs().max() < 2.5 / 127.5 and got.std() > 0

def test_compiling_without_a_compiler_says_what_to_install(monkeypatch, tuned):
    monkeypatch.setattr('shutil.which', lambda name: None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='install g'): fast(tuned, replace(cfg, compile=True))

def test_networks_see_channels_last_images():
    seen = []
    def eps_model(x, t): seen.append(x.is_contiguous(memory_format=torch.channels_last)); return x
    fast(eps_model, cfg)(torch.randn(2, 3, 8, 8), 10)
    assert seen == [True]


class Hungry(torch.nn.Module):
    "Runs out of memory above `limit` images."
    def __init__(self, model, limit, error): super().__init__(); self.model, self.limit, self.error = model, limit, error
    def forward(self, x, t):
        if len(x) > self.limit: raise self.error
        return self.model(x, t)

@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB'), RuntimeError('MPS backend out of memory'),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_halves_the_batch_and_says_so(error, tmp_path, capsys, images, unet, tuned, reference):
    hungry = Hungry(tuned, 1, error)
    got = adapt(images, Hungry(unet, 1, error), hungry, replace(cfg, batch_size=4), schedule, tmp_path/'out')
    assert 'memory ran out; going on with batches of 2' in capsys.readouterr().out
    want = load_adapted(reference, images).tensor(images.ids, 16)
    assert (got.tensor(images.ids, 16) - want).abs().max() < 2.5 / 127.5   # another batch size may round a pixel differently
    assert json.loads((tmp_path/'out/shards/00001.json').read_text())['batch_size'] == 1

def test_no_memory_for_one_image_is_a_user_error_and_other_errors_pass(images):
    def never(x, i): raise RuntimeError('CUDA out of memory')
    said = []
    with pytest.raises(UserError, match='single image.*smaller size'): Batches(4, said.append)(never, torch.zeros(4))
    assert len(said) == 2
    def wrong(x, i): raise RuntimeError('shapes do not match')
    with pytest.raises(RuntimeError, match='shapes do not match'): Batches(4)(wrong, torch.zeros(4))

@pytest.mark.parametrize('change, words', [(dict(t0=1000), 't0 = 1000'), (dict(n_inv=0), 'n_inv = 0'), (dict(n_gen=400), 'lower n_gen'), (dict(eta=2.), 'eta = 2'),
                                           (dict(inverter='x'), 'pretrained or finetuned')])
def test_a_bad_walk_is_refused(change, words, tmp_path, images, unet):
    with pytest.raises(UserError, match=words): adapt(images, unet, unet, cfg, schedule, tmp_path/'out', walk=replace(walk, **change))
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('change, words', [(dict(dtype='int8'), 'bfloat16'), (dict(batch_size=0), 'batch_size = 0'), (dict(shard_size=0), 'shard_size = 0')])
def test_bad_compute_is_refused(change, words, tmp_path, images, unet):
    with pytest.raises(UserError, match=words): adapt(images, unet, unet, replace(cfg, **change), schedule, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_file_names():
    assert file_names(['a/1.jpg', '2.PNG', '3', 'v1.2']) == {'a/1.jpg': 'a/1.png', '2.PNG': '2.png', '3': '3.png', 'v1.2': 'v1.2.png'}
    assert file_names(['a.jpg', 'a.png', 'a.jpg.png']) == {'a.jpg': 'a.jpg.png', 'a.png': 'a.png.png', 'a.jpg.png': 'a.jpg.png.png'}
    assert file_names(['a.jpg', 'A.png'])['A.png'] == 'A.png.png'
    for bad in ('../a.png', '/a.png', ''):
        with pytest.raises(UserError, match='cannot be a file name'): file_names([bad])

def test_half_written_files_go_and_those_of_a_living_process_stay(tmp_path, images, unet):
    args = images, unet, unet, cfg, schedule, tmp_path/'out', tmp_path/'latents'
    adapt(*args)
    latents = next(p for p in (tmp_path/'latents').rglob('*') if p.is_file()).parent
    folders = tmp_path/'out/images', latents, tmp_path/'out'
    others = [Held(folder/'x.png') for folder in folders]   # processes that write there at this moment
    try:
        foreign = [folder/'x.png.mine.tmp' for folder in folders]
        left = [folder/f'x.png.{n}.tmp' for folder in folders for n in (99999999, os.getpid(), f'{others[0].pid}-0123abcd')]
        for p in (*foreign, *left): p.write_bytes(b'half wri')
        adapt(*args)
        assert all(p.exists() for p in (*foreign, *(o.file for o in others))) and not any(p.exists() for p in left)
    finally:
        for o in others: o.end()


# --- what somebody else did to the files ---

def said(capsys): return capsys.readouterr().out

def retouch(path):
    im = Image.open(path).convert('RGB'); im.putpixel((3, 3), (255, 0, 0)); im.save(path)

def test_a_retouched_picture_stays_and_is_named_and_force_makes_it_anew(tmp_path, capsys, images, unet, tuned, reference):
    out = tmp_path/'out'
    shutil.copytree(reference, out)
    mine = out/'images/a/1.png'
    retouch(mine)
    bytes_ = mine.read_bytes()
    for again in range(2):
        got = adapt(images, unet, tuned, cfg, schedule, out)
        text = said(capsys)
        assert mine.read_bytes() == bytes_ and '1 pictures were changed' in text and 'images/a/1.png' in text and '--force' in text and 'anew' in text
        table = pd.read_csv(out/'manifest.csv').set_index('file')
        assert table.adapted_sha256['images/a/1.png'] == sha256_file(mine)   # the manifest names what is there
    assert got.pil('a/1.jpg').getpixel((3, 3)) == (255, 0, 0)
    (out/'images/a/0.png').unlink()   # its shard is made again, around the retouched one
    adapt(images, unet, tuned, cfg, schedule, out)
    assert mine.read_bytes() == bytes_ and sha256_file(out/'images/a/0.png') == sha256_file(reference/'images/a/0.png')
    (out/'shards/00000.json').unlink()
    adapt(images, unet, tuned, cfg, schedule, out)
    assert mine.read_bytes() == bytes_
    adapt(images, unet, tuned, cfg, schedule, out, force=True)
    assert tree(out) == tree(reference)

def test_one_flipped_bit_in_any_file_of_a_run_is_repaired_or_named(tmp_path, capsys, images, unet, tuned):
    "Finished, without its manifest, and in the middle: every kind of file, bits all over it."
    from test_store import flips
    some = images.subset(images.ids[:4])
    def run(out): return adapt(some, unet, tuned, cfg, schedule, out)
    run(tmp_path/'whole')
    want = tree(tmp_path/'whole')
    kinds = ['config.json', 'manifest.csv', 'shards/00000.json', 'images/a/1.png', next(f for f in want if f.endswith('00000.safetensors'))]
    states = dict(finished=[], killed=['manifest.csv', 'shards/00001.json', 'images/b/3.png'])
    named = {}
    for state, lacks in states.items():
        for kind in kinds:
            if kind in lacks: continue
            out = tmp_path/f'{state}-{kind}'.replace('/', '_')
            for bit, b in flips(tmp_path/'whole'/kind, 14):
                shutil.copytree(tmp_path/'whole', out)
                for f in lacks: (out/f).unlink()
                if kind.endswith('safetensors'): (out/'shards/00000.json').unlink()   # else nobody reads it
                (out/kind).write_bytes(b)
                said(capsys)
                run(out)
                text, now = said(capsys), tree(out)
                bad = [f for f in want if now.get(f) != want[f]]
                if bad:   # only a picture that still decodes may stay, and then it is named
                    assert set(bad) <= {kind, 'manifest.csv'} and kind.endswith('.png') and kind in text, (state, kind, bit, bad)
                named.setdefault(kind, []).append(Path(kind).name in text)
                assert set(now) == set(want), (state, kind, bit)
                shutil.rmtree(out)
    for kind in kinds[2:]: assert sum(named[kind]) > .5 * len(named[kind]), (kind, named)

def test_a_record_that_names_fewer_pictures_than_its_shard_is_no_record(tmp_path, images, unet, tuned, reference):
    "Under a checksum that fits, as if somebody had meant it."
    out = tmp_path/'out'
    shutil.copytree(reference, out)
    path = out/'shards/00000.json'
    said = read_record(path)
    write_record(path, said | dict(images=said['images'][:-1]))
    adapt(images, unet, tuned, cfg, schedule, out)
    assert tree(out) == tree(reference)

def test_a_damaged_or_missing_claim_does_not_lock_the_owner_out(tmp_path, images, unet, tuned, reference):
    out = tmp_path/'out'
    shutil.copytree(reference, out)
    for damage in ('', '{', '[]', None):
        if damage is None: (out/'config.json').unlink()
        else: (out/'config.json').write_text(damage)
        adapt(images, unet, tuned, cfg, schedule, out)
        assert tree(out) == tree(reference)
    for damage in ('{', None):   # but it lets nobody else in
        if damage is None: (out/'config.json').unlink()
        else: (out/'config.json').write_text(damage)
        with pytest.raises(UserError, match='not the result of this run'): adapt(images, unet, unet, cfg, schedule, out)

def test_a_photo_replaced_while_the_run_goes_on_is_named(tmp_path, monkeypatch, unet, tuned):
    photos = make_photos(tmp_path/'photos')
    images, real = image_folder(photos), Walk.generate
    def replace_one(*a, **k):
        Image.new('RGB', (20, 20), 'red').save(photos/'b/6.png')
        return real(*a, **k)
    monkeypatch.setattr(Walk, 'generate', replace_one)
    with pytest.raises(UserError, match=r'b/6\.png was replaced while the run goes on; put the old picture back'):
        adapt(images, unet, tuned, replace(cfg, shard_size=1), schedule, tmp_path/'out')
    assert not (tmp_path/'out/images/b/6.png').exists() and (tmp_path/'out/images/a/0.png').exists()

def test_nothing_is_claimed_before_something_was_made(tmp_path, monkeypatch, images, unet, tuned, reference):
    def broken(*a, **k): raise RuntimeError('shapes do not match')
    with monkeypatch.context() as m:
        m.setattr(Walk, 'invert', broken)
        with pytest.raises(RuntimeError, match='shapes'): adapt(images, unet, unet, cfg, schedule, tmp_path/'out')
    assert not (tmp_path/'out').exists()
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'out')   # another run than the one that failed
    assert tree(tmp_path/'out') == tree(reference)

def test_a_damaged_manifest_is_named_when_it_is_read(tmp_path, images, reference):
    out = tmp_path/'out'
    shutil.copytree(reference, out)
    for damage in ('id,file', 'x\n', '"', ''):
        (out/'manifest.csv').write_text(damage)
        with pytest.raises(UserError, match='manifest.csv is damaged.*start the same command again'): load_adapted(out, images)

def test_a_saved_adapter_with_a_flipped_bit_is_named(tmp_path, networks, images):
    from test_store import flips
    folder = fitted(networks, images).save(tmp_path/'mine')
    before = A.fingerprint(Adapter.load(folder, device='cpu').tuned)
    for p in sorted(q for q in folder.rglob('*') if q.is_file()):
        whole = p.read_bytes()
        for bit, b in flips(p, 6):
            p.write_bytes(b)
            try: assert A.fingerprint(Adapter.load(folder, device='cpu').tuned) == before, (p, bit)
            except UserError as e: assert p.name in str(e)
        p.write_bytes(whole)


class Shifted(torch.nn.Module):
    "A network with a condition: one number per image."
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x, t, shift): return self.net(x, t) + shift[:, None, None, None]

def test_a_condition_goes_with_its_image_through_shards_and_batches(tmp_path, images, unet, tuned):
    model, other = Shifted(unet), Shifted(tuned)
    shift = torch.linspace(-.5, .5, len(images))
    got = adapt(images, model, other, cfg, schedule, tmp_path/'all', shift=shift)
    for i in (0, 3, 6):   # alone, and first in the alphabet or not
        one = adapt(images.subset([images.ids[i]]), model, other, cfg, schedule, tmp_path/f'{i}', shift=shift[i:i + 1])
        assert (one.tensor(size=16) - got.tensor([images.ids[i]], 16)).abs().max() < 2.5 / 127.5
    order = images.subset(images.ids[::-1])
    turned = adapt(order, model, other, cfg, schedule, tmp_path/'turned', shift=shift.flip(0))
    assert torch.equal(turned.tensor(images.ids, 16), got.tensor(images.ids, 16))
    with pytest.raises(UserError, match='another run'): adapt(images, model, other, cfg, schedule, tmp_path/'all', shift=-shift)


# --- the adapter ---

@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp('networks')
    save_unet(tiny_unet(16), root/'unet')
    return str(root/'unet'), str(clip_folder(root/'clip'))

def fitted(networks, images, **kw):
    recipe = replace(CAREFUL, n_images=3, passes=1, n_crops=1)
    return Adapter.from_pretrained(networks[0], networks[1], None, walk, cfg, device='cpu').fit(images, 'sketch', recipe=recipe, **kw)

def test_fit_and_transform_are_finetune_and_transform(tmp_path, networks, images):
    adapter = fitted(networks, images)
    assert adapter.target == 'sketch' and len(adapter.history) == 1 and adapter.size == 16
    assert adapter.models['unet']['name'] == 'unet' and adapter.models['identity'] is None
    got = adapter.transform(images, tmp_path/'out')
    want = transform(images, adapter.unet, adapter.tuned, schedule, walk, cfg, 16, tmp_path/'want')
    assert tree(tmp_path/'out') == tree(tmp_path/'want') and got.labels == images.labels and want.ids == got.ids
    same = adapter.untuned().transform(images)   # a temporary folder
    control = transform(images, adapter.unet, adapter.unet, schedule, walk, cfg, 16, tmp_path/'control')
    assert torch.equal(same.tensor(size=16), control.tensor(size=16)) and not torch.equal(same.tensor(size=16), got.tensor(size=16))

def test_fitting_in_a_folder_is_found_again_and_labels_are_not_looked_at(tmp_path, monkeypatch, networks, images):
    a = fitted(networks, images, out=tmp_path)
    monkeypatch.setattr('diffclip_da.adaptation.finetune.accumulate_gradients', None)
    unlabelled = image_folder(images.store.path)
    b = fitted(networks, unlabelled, out=tmp_path)
    assert A.fingerprint(a.tuned) == A.fingerprint(b.tuned)
    assert [p.name for p in tmp_path.iterdir()] == [a.fit_key(images, 'sketch', recipe=a.recipe)]

def test_a_saved_adapter_makes_the_same_bytes_on_other_photos(tmp_path, networks, images):
    some, more = images.subset(images.ids[:4]), images.subset(images.ids[4:])
    adapter = fitted(networks, some)
    adapter.save(tmp_path/'mine')
    adapter.transform(more, tmp_path/'a')
    script = tmp_path/'again.py'   # another process, nothing in memory
    script.write_text(textwrap.dedent("""
        import sys; sys.path.insert(0, sys.argv[1])
        from test_adapter import *
        images = image_folder(sys.argv[2], Path(sys.argv[2]).parent/'labels.csv')
        Adapter.load(sys.argv[3] + '/mine', device='cpu').transform(images.subset(images.ids[4:]), sys.argv[3] + '/b')
    """))
    r = subprocess.run([sys.executable, script, Path(__file__).parent, images.store.path, tmp_path], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert tree(tmp_path/'a') == tree(tmp_path/'b')
    again = Adapter.load(tmp_path/'mine', device='cpu')
    assert (again.source, again.target, again.walk, again.compute, again.recipe, again.models) == (
        adapter.source, adapter.target, adapter.walk, adapter.compute, adapter.recipe, adapter.models)

def test_what_cannot_be_saved_or_loaded_is_named(tmp_path, networks, images, unet, tuned):
    fresh = Adapter.from_pretrained(networks[0], networks[1], None, walk, cfg, device='cpu')
    with pytest.raises(UserError, match='not fitted'): fresh.transform(images)
    with pytest.raises(UserError, match='not fitted'): fresh.save(tmp_path)
    with pytest.raises(UserError, match='give size='): Adapter(unet)
    own = Adapter(unet, size=16)
    own.tuned = tuned
    with pytest.raises(UserError, match='only an EpsUNet can be saved, and this network is a Net'): own.save(tmp_path)
    with pytest.raises(UserError, match='holds no adapter.json'): Adapter.load(tmp_path)
    folder = fitted(networks, images).save(tmp_path/'mine')
    (folder/'adapter.json').write_text('{"format": 1}')
    with pytest.raises(UserError, match='adapter.json is not as Adapter.save wrote it'): Adapter.load(folder)

def test_modules_are_taken_as_they_are_and_a_schedule_counts(tmp_path, images, unet, tuned):
    face = Face()
    a = Adapter.from_pretrained(unet, None, face, walk, cfg, size=16, device='cpu')
    assert a.unet is unet and a.guide is None and a.embedder is face
    a.tuned = tuned
    b = copy.copy(a)
    b.schedule = cosine_schedule()
    assert a.transform_key(images) != b.transform_key(images) != a.walking(replace(walk, t0=200)).transform_key(images)
    with pytest.raises(UserError, match='clip_weight = 3.0 needs a CLIP'): a.fit(images, 'sketch', recipe=CAREFUL)
