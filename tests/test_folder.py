"The front door: a folder and a few words, as a function and as a command; tiny random networks."
import json, os, shutil, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import diffclip_da.adaptation.folder as D
from diffclip_da.adaptation.finetune import CAREFUL, Recipe
from diffclip_da.adaptation.folder import adapt_folder, check_images, main
from diffclip_da.core import UserError, friendly_exit
from diffclip_da.data import image_folder
from diffclip_da.diffusion.walk import Walk
from diffclip_da.models.unet import save_unet, tiny_unet
from test_adapter import images, make_photos, photos, tree  # fixtures too
from test_finetune import clip_folder


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp('weights')
    save_unet(tiny_unet(16), root/'unet')
    return dict(unet=str(root/'unet'), clip=str(clip_folder(root/'clip')))

small = dict(t0=300, n_inv=3, n_gen=2, inversion='ddim', passes=1, n_images=4, n_crops=1, batch_size=4, device='cpu')

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
    assert {'labels.csv', 'contact_sheet.png', 'report.json', 'report.html', 'manifest.csv', 'config.json'} < names and not any(n.endswith('.tmp') for n in names)
    again = image_folder(sketches/'images', sketches/'labels.csv')   # the result is a labelled data set
    assert {i.rsplit('.', 1)[0]: again.classes[k] for i, k in again.labels.items()} == {i.rsplit('.', 1)[0]: images.classes[k] for i, k in images.labels.items()}
    assert Image.open(sketches/'contact_sheet.png').size == (6 * 18 + 2, 2 * (2 * 18 + 2))   # seven pairs: six columns, two double rows
    report = json.loads((sketches/'report.json').read_text())
    assert report['target'] == 'a pencil sketch' and report['n_images'] == report['n_labelled'] == 7 and report['skipped'] == {}
    assert report['models']['unet']['provenance'] == 'published' and report['recipe']['n_images'] == 4 and report['size'] == 16 and report['walk']['n_gen'] == 2
    assert set(report['last_pass']) == {'total', 'clip', 'l1', 'grid', 'grad_norm'}

def test_the_same_command_again_changes_nothing_and_another_prompt_is_refused(sketches, photos, weights, capsys, monkeypatch):
    before = tree(sketches)
    monkeypatch.setattr(Walk, 'invert', None)
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

def test_pictures_without_a_decoder_are_said_and_reported(tmp_path, photos, weights, capsys, monkeypatch):
    from diffclip_da import data
    monkeypatch.setattr(data, 'UNREADABLE', ('.heic',))
    mixed = shutil.copytree(photos, tmp_path/'photos')
    (mixed/'IMG_1.HEIC').write_bytes(b'....')
    got = adapt_folder(mixed, 'a pencil sketch', tmp_path/'out', **small, **weights)
    assert len(got) == 7 and 'left out: 1 (IMG_1.HEIC)' in capsys.readouterr().out
    assert 'pillow-heif' in json.loads((tmp_path/'out/report.json').read_text())['skipped']['IMG_1.HEIC']

def test_another_size_than_the_networks_own_gets_a_word_of_caution(tmp_path, photos, weights, capsys):
    adapt_folder(photos, 'a pencil sketch', tmp_path/'out', size=24, **small, **weights)
    assert 'careful: this U-Net was trained at 16 px, and 24 px are asked for' in capsys.readouterr().out
    assert Image.open(tmp_path/'out/images/a/0.png').size == (24, 24)

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
        'size': (argv(photos, ok, weights, '--size', 17), 'size = 17: this U-Net takes multiples of 4 pixels; give 16'),
        'no size': (argv(photos, ok, weights, '--size', -4), 'multiples of 4'),
        'passes': (argv(photos, ok, weights, '--passes', 0), 'passes = 0'),
        'size 7': (argv(photos, ok, weights, '--size', 7), 'size = 7: this U-Net takes multiples of 4 pixels; give 8'),
        'size 0': (argv(photos, ok, weights, '--size', 0), 'size = 0'),
        'lr': (argv(photos, ok, weights, '--lr', '1e38'), 'lr = 1e+38'),
        'lr nan': (argv(photos, ok, weights, '--lr', 'nan'), 'lr = nan'),
        'seed': (argv(photos, ok, weights, '--seed', 2**70), f'seed = {2**70}'),
        'out in a file': (argv(photos, labels/'x', weights), 'is a file, not a folder'),
        'save in a file': (argv(photos, ok, weights, '--save', labels/'x'), 'is a file, not a folder'),
        'save among the photos': (argv(photos, ok, weights, '--save', photos/'mine'), 'the adapter'),
        'save as the photos': (argv(photos, ok, weights, '--save', photos), 'would lie inside the photos'),
        'save as the result': (argv(photos, ok, weights, '--save', ok), 'is the folder of the pictures'),
        'save over other files': (argv(photos, ok, weights, '--save', other), 'is not empty and holds no adapter'),
        'a long name': (argv(photos, tmp/('x' * 300), weights), 'File name too long; give another path'),
        'half a character': (argv(photos, ok, weights, '--target', 'a \udcff'), 'is not UTF-8'),
        'unused embedder': (argv(photos, ok, weights, '--embedder', 'nothing'), 'id_weight is 0'),
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
    assert e.value.code == 2 and '--out' in capsys.readouterr().err

def test_ctrl_c_is_130_and_tells_how_to_go_on(tmp_path, photos, weights, monkeypatch, capsys, sketches):
    real, calls = Walk.generate, []
    def stop(*a, **k):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*a, **k)
    more = ('--labels', photos.parent/'labels.csv')
    with monkeypatch.context() as m:
        m.setattr(Walk, 'generate', stop)
        with pytest.raises(SystemExit) as e: main(argv(photos, tmp_path/'out', weights, *more))
    err = capsys.readouterr().err
    assert e.value.code == 130 and 'the same command resumes' in err and '0 finished shards' in err and str(tmp_path/'out') in err
    assert main(argv(photos, tmp_path/'out', weights, *more)) == 0
    def visible(d): return {k: v for k, v in tree(d).items() if not k.endswith(('history.csv', 'checkpoint.pt'))}   # these hold times
    assert visible(tmp_path/'out') == visible(sketches)

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


def test_settings_left_out_follow_the_recipe_of_the_network(monkeypatch, photos, tmp_path):
    class Seen(Exception): pass
    def see(o): raise Seen(o)
    monkeypatch.setattr(D, 'adapt_with', see)
    def asked(**options):
        with pytest.raises(Seen) as e: adapt_folder(photos, 'a sketch', tmp_path/'out', device='cpu', **options)
        return e.value.args[0].recipe
    assert asked(lr=None, l1_weight=None) == Recipe()
    assert asked(lr=1e-5, passes=3) == replace(Recipe(), lr=1e-5, passes=3)
    assert asked(unet='google/ddpm-celebahq-256') == CAREFUL
    def typed(*more):
        with pytest.raises(Seen) as e: main([str(photos), '--target', 'x', '--out', str(tmp_path/'out'), *more])
        return e.value.args[0]
    assert typed().recipe == Recipe() and typed().walk == Walk()
    assert typed('--unet', 'mine').recipe == typed('--unet=mine').recipe == CAREFUL
    assert typed('--n-inv', '40', '--lr', '1e-5', '--skip-bad') == replace(typed(), walk=Walk(n_inv=40), recipe=replace(Recipe(), lr=1e-5), skip_bad=True)
    with pytest.raises(UserError, match="there is no setting 'n_innv'"): adapt_folder(photos, 'a sketch', tmp_path/'out', n_innv=3)

def test_help_states_every_default_once(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    said = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 0 and '--colour-weight' in said and 'return step' in said and said.count('--t0 ') == 1
    with pytest.raises(SystemExit): main(['--unet', 'mine', '--help'])
    assert 'default: 6e-05' in ' '.join(capsys.readouterr().out.split()) and 'default: 0.0002' in said

def test_a_saved_adapter_on_the_command_line(tmp_path, photos, weights, sketches, capsys):
    more = ('--labels', photos.parent/'labels.csv')
    assert main(argv(photos, tmp_path/'one', weights, '--save', tmp_path/'mine', *more)) == 0
    assert main([str(photos), '--adapter', str(tmp_path/'mine'), '--out', str(tmp_path/'two'), '--device', 'cpu', *map(str, more)]) == 0
    assert tree(tmp_path/'one/images') == tree(tmp_path/'two/images') == tree(sketches/'images')
    assert (tmp_path/'two/labels.csv').read_text() == (sketches/'labels.csv').read_text()
    assert json.loads((tmp_path/'two/report.json').read_text())['target'] == 'a pencil sketch'
    kept = tree(tmp_path/'mine')
    with pytest.raises(SystemExit): main(argv(photos, tmp_path/'other', weights, '--save', tmp_path/'mine', '--target', 'an oil painting'))
    said = capsys.readouterr().err
    assert 'holds another adapter (different: target)' in said and tree(tmp_path/'mine') == kept and not (tmp_path/'other').exists()
    assert main(argv(photos, tmp_path/'one', weights, '--save', tmp_path/'mine', *more)) == 0   # the same one may be written again
    for bad, words in ((['--adapter', str(tmp_path/'mine'), '--target', 'x'], 'has its words already'), ([], 'say what the pictures should become'),
                       (['--adapter', str(tmp_path)], 'holds no adapter.json')):
        with pytest.raises(SystemExit) as e: main([str(photos), '--out', str(tmp_path/'three'), *bad])
        assert e.value.code == 2 and words in capsys.readouterr().err and not (tmp_path/'three').exists()


# --- what a run needs ---

def refused(args, capsys, words, out):
    with pytest.raises(SystemExit) as e: main(args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and 'Traceback' not in err, err
    assert not out.exists()

def test_too_small_a_disk_is_refused_before_the_work(tmp_path, photos, weights, capsys, monkeypatch):
    from diffclip_da import store
    monkeypatch.setattr(store.shutil, 'disk_usage', lambda p: type('U', (), dict(free=10_000)))
    refused(argv(photos, tmp_path/'out', weights), capsys, 'are needed there, and 1 MB are free', tmp_path/'out')

def test_what_is_written_was_estimated(sketches, photos, weights):
    from diffclip_da.adaptation.adapter import Adapter
    adapter = Adapter.from_pretrained(weights['unet'], weights['clip'], None, device='cpu')
    need = D.bytes_written(adapter, 7, replace(CAREFUL, n_images=4))
    def size(*parts): return sum(p.stat().st_size for part in parts for p in sketches.rglob(part) if p.is_file())
    assert size('finetune/*/*') <= need['the fine-tuning'] < 4e6 + 2 * 3 * 4 * sum(p.numel() for p in adapter.unet.parameters())
    assert size('images/*/*', 'latents/*/*', 'shards/*') <= need['adapting'] + 30_000 and size('report.html') < need['the report']

def test_too_little_memory_is_refused_before_the_work(tmp_path, photos, weights, capsys, monkeypatch):
    monkeypatch.setattr(D, 'available_memory', lambda: 100_000)
    refused(argv(photos, tmp_path/'out', weights), capsys, 'of memory, and 1 MB are free; take a smaller size', tmp_path/'out')

def test_memory_is_counted_without_computing():
    small, large = (D.memory_needed(tiny_unet(16), s, tuned=True) for s in (16, 64))
    weights = 4 * 4 * sum(p.numel() for p in tiny_unet(16).parameters())
    assert weights < small < large and (large - weights) == pytest.approx(16 * (small - weights), rel=.1)
    assert D.memory_needed(tiny_unet(16), 64, tuned=False) < large and D.memory_needed(torch_free(), 16, False) == 0

class Odd(tiny_unet(16).__class__.__mro__[1]):
    def forward(self, x, t): return x * float(x.sum())   # needs a value: nobody can follow
def torch_free(): return Odd()

def test_the_estimate_takes_smaller_batches_where_memory_is_short(photos, weights, monkeypatch):
    from diffclip_da.adaptation.adapter import Adapter
    adapter = Adapter.from_pretrained(weights['unet'], weights['clip'], None, device='cpu')
    real, seen = adapter.unet, []
    class Hungry(Odd):
        def forward(self, x, t):
            seen.append(len(x))
            if len(x) > 2: raise RuntimeError('could not create a primitive')
            return real(x, t)
    adapter.unet = Hungry()
    assert D.estimate_seconds(adapter, None, 8) > 0 and seen[:3] == [8, 4, 2]


# --- claims, retouched pictures, paths ---

def test_a_job_that_made_nothing_claims_nothing(tmp_path, photos, weights, monkeypatch, capsys, sketches):
    out = tmp_path/'out'
    def broken(*a, **k): raise RuntimeError('shapes do not match')
    with monkeypatch.context() as m:
        m.setattr(Walk, 'invert', broken)
        with pytest.raises(RuntimeError, match='shapes'): main(argv(photos, out, weights, '--seed', 3))
    assert not out.exists()
    (out/'.diffclip').mkdir(parents=True)   # killed between its claim and its first file
    (out/'.diffclip'/'job.json').write_text('{"key": "other", "inputs": {"target": "statue"}}')
    assert main(argv(photos, out, weights, '--labels', photos.parent/'labels.csv')) == 0
    assert tree(out/'images') == tree(sketches/'images')

def test_a_damaged_job_or_config_does_not_lock_the_owner_out(tmp_path, photos, weights, sketches, capsys):
    out, more = tmp_path/'out', ('--labels', photos.parent/'labels.csv')
    shutil.copytree(sketches, out)
    outputs = 'report.json', 'report.html', 'labels.csv', 'manifest.csv', 'contact_sheet.png'
    for text, names in (('{"ke', ('config.json', *outputs)), ('', ('.diffclip/job.json', *outputs)), ('[]', ('config.json', '.diffclip/job.json'))):
        for name in names: (out/name).write_text(text)
        assert main(argv(photos, out, weights, *more)) == 0
        assert tree(out) == tree(sketches), text
    shutil.rmtree(out/'.diffclip')
    assert main(argv(photos, out, weights, *more)) == 0 and tree(out/'images') == tree(sketches/'images')

def test_a_retouched_picture_stays_until_force(tmp_path, photos, weights, sketches, capsys):
    from test_adapter import retouch
    out, more = tmp_path/'out', ('--labels', photos.parent/'labels.csv')
    shutil.copytree(sketches, out)
    retouch(out/'images/a/1.png')
    mine = (out/'images/a/1.png').read_bytes()
    assert main(argv(photos, out, weights, *more)) == 0
    assert (out/'images/a/1.png').read_bytes() == mine and 'images/a/1.png' in capsys.readouterr().out
    assert main(argv(photos, out, weights, *more, '--force')) == 0 and tree(out) == tree(sketches)

def test_reports_name_no_path_of_this_machine(tmp_path, photos, weights):
    mixed = shutil.copytree(photos, tmp_path/'photos')
    (mixed/'b/4.jpg').write_bytes(b'no picture')
    adapt_folder(mixed, 'a pencil sketch', tmp_path/'out', skip_bad=True, **small, **weights)
    for name in ('report.json', 'report.html', 'labels.csv', 'manifest.csv', 'config.json'):
        if (tmp_path/'out'/name).exists(): assert str(tmp_path) not in (tmp_path/'out'/name).read_text(), name
    assert json.loads((tmp_path/'out/report.json').read_text())['skipped']['b/4.jpg'].startswith('b/4.jpg: ')


# --- signals and output ---

def test_sigterm_is_like_ctrl_c_with_code_143(tmp_path, photos, weights, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    def stop(*a, **k): os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Walk, 'generate', stop)
    with pytest.raises(SystemExit) as e: main(argv(photos, tmp_path/'out', weights))
    assert e.value.code == 143 and 'the same command resumes' in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) == before

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stop_during_the_imports_is_one_line(number):
    code = f'import sys, os; sys.argv = ["-m"]; import diffclip_da; os.kill(os.getpid(), {int(number)}); import time; time.sleep(5)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 128 + number and done.stderr == 'interrupted; the same command resumes\n'
    code = code.replace('["-m"]', '["a notebook"]')   # a library leaves signals alone
    assert 'same command' not in subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stderr

def test_output_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    class Full:
        def write(self, s): return len(s)
        def flush(self): raise OSError(28, 'No space left on device')
    @friendly_exit
    def command(): print('hello'); return 0
    with monkeypatch.context() as m:
        m.setattr(sys, 'stdout', Full())
        with pytest.raises(SystemExit) as e: command()
    assert e.value.code == 2 and 'cannot be written (No space left on device)' in capsys.readouterr().err

@pytest.mark.parametrize('error', [RuntimeError("can't start new thread"), MemoryError(), OSError(12, 'Cannot allocate memory')])
def test_memory_that_runs_out_anywhere_is_one_line(error, capsys):
    @friendly_exit
    def command(): raise error
    with pytest.raises(SystemExit) as e: command()
    assert e.value.code == 2 and 'memory ran out' in capsys.readouterr().err
    @friendly_exit
    def other(): raise RuntimeError('a bug')
    with pytest.raises(RuntimeError, match='a bug'): other()
