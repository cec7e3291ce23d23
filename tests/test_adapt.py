"Adapting a data set: kill and resume, keys, processes, memory, the command line; tiny random networks."
import copy, json, os, shutil, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import diffclip_da.adaptation.adapt as A
from diffclip_da.adaptation.adapt import SHIPPED_RECIPE, AdaptConfig, Batches, adapt, adapt_folder, check_images, fast, file_names, load_adapted, main, recipe
from diffclip_da.core import UserError, new_generator
from diffclip_da.store import sha256_file
from diffclip_da.data import image_folder
from diffclip_da.study.experiment import PROFILES
from diffclip_da.adaptation.finetune import FinetuneConfig
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.models.unet import save_unet, tiny_unet
from test_finetune import Net, clip_folder

schedule = linear_schedule()
cfg = AdaptConfig(t0=300, n_inv=3, n_gen=2, size=16, batch_size=2, shard_size=3)


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
    "One image, by the two sampler calls that `adapt` promises."
    from diffclip_da.core import to_uint8
    from diffclip_da.diffusion.ddim import invert, sample, step_pairs
    one = images.subset(['b/4.jpg'])
    for which, inverter in (('pretrained', unet), ('finetuned', tuned)):
        got = adapt(one, unet, tuned, replace(cfg, inversion_model=which), schedule, tmp_path/which)
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
    from test_adapt import *
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

    A.code_hash()   # read once: forks inherit it
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
    from test_adapt import *
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
    real, calls = A.sample, []
    def stopping(*a, **k):
        calls.append(1)
        if len(calls) == 3: raise Stop
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(A, 'sample', stopping)
        with pytest.raises(Stop): adapt(images, unet, tuned, cfg, schedule, tmp_path/'out')
    assert not (tmp_path/'out/manifest.csv').exists() and (tmp_path/'out/shards/00000.json').exists()
    with pytest.raises(UserError, match='not finished'): load_adapted(tmp_path/'out', images)
    adapt(images, unet, tuned, cfg, schedule, tmp_path/'out')
    assert tree(tmp_path/'out') == tree(reference)

def test_a_finished_run_computes_nothing(tmp_path, monkeypatch, images, unet, tuned, reference):
    shutil.copytree(reference, tmp_path/'out')
    for name in ('sample', 'invert'): monkeypatch.setattr(A, name, None)
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
    args = [images, unet, tuned, cfg, schedule]
    if what == 'model': args[2] = unet
    elif what == 'images': args[0] = images.subset(images.ids[1:])
    elif what == 'labels': args[0] = image_folder(photos)
    else: args[3] = replace(cfg, **{what: 8 if what == 'size' else 3})
    with pytest.raises(UserError) as e: adapt(*args, out)
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
    monkeypatch.setattr(A, 'invert', None)   # would fail if it were called
    adapt(images, unet, tuned_like(tuned), cfg, schedule, tmp_path/'two', cache=tmp_path/'cache')
    assert tree(tmp_path/'two/images') != tree(reference/'images')

def test_noise_does_not_depend_on_shards_already_done(tmp_path, images, unet, tuned):
    noisy = replace(cfg, eta=1., seed=3)
    adapt(images, unet, tuned, noisy, schedule, tmp_path/'a')
    adapt(images, unet, tuned, noisy, schedule, tmp_path/'b')
    assert tree(tmp_path/'a') == tree(tmp_path/'b')
    (tmp_path/'b/shards/00001.json').unlink()
    adapt(images, unet, tuned, noisy, schedule, tmp_path/'b')
    assert tree(tmp_path/'a') == tree(tmp_path/'b')
    adapt(images, unet, tuned, replace(noisy, seed=4), schedule, tmp_path/'c')
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
                                           (dict(size=0), 'size = 0'), (dict(dtype='int8'), 'bfloat16'), (dict(inversion_model='x'), 'pretrained or finetuned')])
def test_bad_config_is_refused(change, words, tmp_path, images, unet):
    with pytest.raises(UserError, match=words): adapt(images, unet, unet, replace(cfg, **change), schedule, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_file_names():
    assert file_names(['a/1.jpg', '2.PNG', '3', 'v1.2']) == {'a/1.jpg': 'a/1.png', '2.PNG': '2.png', '3': '3.png', 'v1.2': 'v1.2.png'}
    assert file_names(['a.jpg', 'a.png', 'a.jpg.png']) == {'a.jpg': 'a.jpg.png', 'a.png': 'a.png.png', 'a.jpg.png': 'a.jpg.png.png'}
    assert file_names(['a.jpg', 'A.png'])['A.png'] == 'A.png.png'
    for bad in ('../a.png', '/a.png', ''):
        with pytest.raises(UserError, match='cannot be a file name'): file_names([bad])


# --- the folder and the command line ---

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp('weights')
    save_unet(tiny_unet(16), root/'unet')
    return dict(unet=str(root/'unet'), clip=str(clip_folder(root/'clip')))

small = dict(t0=300, n_inv=3, n_gen=2, passes=1, n_images=4, batch_size=4, device='cpu')

def argv(photos, out, weights, *more):
    opts = {k.replace('_', '-'): v for k, v in {**small, **weights}.items()}
    return [str(photos), '--target', 'a pencil sketch', '--out', str(out), *(w for k, v in opts.items() for w in (f'--{k}', str(v))), *map(str, more)]

@pytest.fixture(scope='module')
def sketches(tmp_path_factory, photos, weights):
    out = tmp_path_factory.mktemp('cli')/'sketches'
    assert main(argv(photos, out, weights, '--labels', photos.parent/'labels.csv')) == 0
    return out

def test_folder_result(sketches, images, weights):
    names = {p.relative_to(sketches).as_posix() for p in sketches.rglob('*') if p.is_file() and '.diffclip' not in p.parts}
    assert {f'images/{i.rsplit(".", 1)[0]}.png' for i in images.ids} < names
    assert {'labels.csv', 'contact_sheet.png', 'report.json', 'manifest.csv', 'config.json'} < names and not any(n.endswith('.tmp') for n in names)
    again = image_folder(sketches/'images', sketches/'labels.csv')   # the result is a labelled data set
    assert {i.rsplit('.', 1)[0]: again.classes[k] for i, k in again.labels.items()} == {i.rsplit('.', 1)[0]: images.classes[k] for i, k in images.labels.items()}
    assert Image.open(sketches/'contact_sheet.png').size == (6 * 18 + 2, 2 * (2 * 18 + 2))   # seven pairs: six columns, two double rows
    report = json.loads((sketches/'report.json').read_text())
    assert report['target'] == 'a pencil sketch' and report['n_images'] == report['n_labelled'] == 7 and report['skipped'] == {}
    assert report['models']['unet']['provenance'] == 'published' and report['finetune']['n_images'] == 4 and report['adapt']['size'] == 16
    assert set(report['last_pass']) == {'total', 'clip', 'l1', 'grid', 'grad_norm'}

def test_the_same_command_again_changes_nothing_and_another_prompt_is_refused(sketches, photos, weights, capsys, monkeypatch):
    before = tree(sketches)
    monkeypatch.setattr(A, 'invert', None)
    assert main(argv(photos, sketches, weights, '--labels', photos.parent/'labels.csv')) == 0
    said = capsys.readouterr().out
    assert '7 images' in said and "'photo' -> 'a pencil sketch'" in said and 'published or your own weights' in said and 'Ctrl-C is safe' in said
    assert tree(sketches) == before
    with pytest.raises(SystemExit) as e: main(argv(photos, sketches, weights, '--labels', photos.parent/'labels.csv', '--seed', 1))
    err = capsys.readouterr().err
    assert tree(sketches) == before   # refused before the fine-tuning, not after it
    assert e.value.code == 2 and 'another run' in err and str(sketches) in err and 'Traceback' not in err

def test_a_corrupt_image_is_named_before_the_work_or_skipped_and_counted(tmp_path, photos, weights, capsys):
    mixed = shutil.copytree(photos, tmp_path/'photos')
    whole = (mixed/'b/4.jpg').read_bytes()
    (mixed/'b/4.jpg').write_bytes(whole[:len(whole)//2])
    with pytest.raises(SystemExit) as e: main(argv(mixed, tmp_path/'out', weights))
    err = capsys.readouterr().err
    assert e.value.code == 2 and '4.jpg' in err and 'truncated' in err and '--skip-bad' in err and not (tmp_path/'out').exists()
    got = adapt_folder(mixed, 'a pencil sketch', tmp_path/'out', skip_bad=True, **small, **weights)
    assert len(got) == 6 and 'b/4.jpg' not in got.ids and 'left out: 1' in capsys.readouterr().out
    assert list(json.loads((tmp_path/'out/report.json').read_text())['skipped']) == ['b/4.jpg']

def test_all_bad_images(tmp_path):
    (tmp_path/'p').mkdir(); (tmp_path/'p/1.png').write_text('no image')
    with pytest.raises(UserError, match='none of the 1 images'): check_images(image_folder(tmp_path/'p'), skip_bad=True)

def bad_commands(photos, tmp, weights):
    other = tmp/'full'; other.mkdir(); (other/'thesis.txt').write_text('mine')
    labels = tmp/'l.csv'; labels.write_text('id,label\na/0.png,x\n')
    ok = tmp/'new'
    return {
        'inside': (argv(photos, photos/'out', weights), 'outside it'),
        'equal': (argv(photos, photos, weights), 'would lie inside the photos'),
        'missing folder': (argv(tmp/'nowhere', ok, weights), 'nowhere is not a folder'),
        'not empty': (argv(photos, other, weights), 'is not empty'),
        'a file': (argv(photos, labels, weights), 'is a file'),
        'prompt': (argv(photos, ok, weights, '--target', ' '), 'target is empty'),
        'same prompt': (argv(photos, ok, weights, '--target', 'photo'), 'no direction'),
        't0': (argv(photos, ok, weights, '--t0', 1000), 't0 = 1000'),
        'passes': (argv(photos, ok, weights, '--passes', 0), 'passes = 0'),
        'batch': (argv(photos, ok, weights, '--batch-size', 0), 'batch_size = 0'),
        'labels': (argv(photos, ok, weights, '--labels', labels), 'l.csv: no line for 6 images'),
        'device': (argv(photos, ok, weights, '--device', 'cuda:77'), "device 'cuda:77' cannot be used"),
        'unet': (argv(photos, ok, weights, '--unet', 'nothing'), "no U-Net at 'nothing'"),
        'clip': (argv(photos, ok, weights, '--clip', 'nothing'), "'nothing' is neither"),
    }

def test_bad_input_is_one_line_and_exit_code_2(tmp_path, photos, weights, capsys):
    before = tree(photos)
    for name, (args, words) in bad_commands(photos, tmp_path, weights).items():
        with pytest.raises(SystemExit) as e: main(args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and 'Traceback' not in err, (name, err)
        assert not (tmp_path/'new').exists(), name
    assert tree(photos) == before
    with pytest.raises(SystemExit) as e: main([str(photos)])
    assert e.value.code == 2 and '--target' in capsys.readouterr().err

def test_ctrl_c_is_130_and_tells_how_to_go_on(tmp_path, photos, weights, monkeypatch, capsys, sketches):
    real, calls = A.sample, []
    def stop(*a, **k):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*a, **k)
    more = ('--labels', photos.parent/'labels.csv')
    with monkeypatch.context() as m:
        m.setattr(A, 'sample', stop)
        with pytest.raises(SystemExit) as e: main(argv(photos, tmp_path/'out', weights, *more))
    err = capsys.readouterr().err
    assert e.value.code == 130 and 'the same command resumes' in err and '0 finished shards' in err and str(tmp_path/'out') in err
    assert main(argv(photos, tmp_path/'out', weights, *more)) == 0
    def visible(d): return {k: v for k, v in tree(d).items() if not k.endswith(('history.csv', 'checkpoint.pt'))}   # these hold times
    assert visible(tmp_path/'out') == visible(sketches)

def test_half_written_files_go_and_those_of_a_living_process_stay(tmp_path, images, unet):
    other = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    try:
        args = images, unet, unet, cfg, schedule, tmp_path/'out', tmp_path/'latents'
        adapt(*args)
        latents = next(p for p in (tmp_path/'latents').rglob('*') if p.is_file()).parent
        living = [folder/f'x.png.{other.pid}.tmp' for folder in (tmp_path/'out/images', latents, tmp_path/'out')]
        left = [folder/f'x.png.{pid}.tmp' for folder in (tmp_path/'out/images', latents, tmp_path/'out') for pid in (99999999, os.getpid(), 'mine')]
        for p in (*living, *left): p.write_bytes(b'half wri')
        adapt(*args)
        assert all(p.exists() for p in living) and not any(p.exists() for p in left)
    finally: other.communicate(b'\n')


def test_a_full_disk_is_exit_code_2(tmp_path, photos, weights, monkeypatch, capsys, sketches):
    import errno
    out, real = tmp_path/'out', os.fsync
    shutil.copytree(sketches/'.diffclip', out/'.diffclip')   # fine-tuned already
    calls = []
    def full(fd):
        calls.append(1)
        if len(calls) > 4: raise OSError(errno.ENOSPC, 'No space left on device')
        return real(fd)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(SystemExit) as e: main(argv(photos, out, weights))
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'no space left' in err and str(out) in err
    assert not list(out.rglob('*.tmp'))


def test_the_shipped_network_gets_its_recipe_and_others_keep_careful_defaults():
    assert recipe('shipped', 200) == dict(SHIPPED_RECIPE, passes=4) and recipe('shipped', 12)['passes'] == 67 and recipe('shipped', 5000)['passes'] == 1
    assert recipe('google/ddpm-celebahq-256', 200) == {}
    for k, v in SHIPPED_RECIPE.items(): assert getattr(PROFILES['embedded'], k) == getattr(PROFILES['celeba64'], k) == v


def test_options_left_out_follow_the_recipe(monkeypatch, photos, tmp_path):
    class Seen(Exception): pass
    def see(self, *a): raise Seen(self)
    monkeypatch.setattr(FinetuneConfig, 'validate', see)
    def asked(**options):
        with pytest.raises(Seen) as e: adapt_folder(photos, 'a sketch', tmp_path/'out', device='cpu', **options)
        return e.value.args[0]
    cfg = asked(lr=None, l1_weight=None, id_weight=None)
    n = cfg.n_images
    assert (cfg.lr, cfg.l1_weight, cfg.id_weight, cfg.colour_weight, cfg.passes) == (2e-4, .03, 2., 5., -(-800 // n))
    assert asked(lr=1e-5, passes=3) == replace(cfg, lr=1e-5, passes=3)
