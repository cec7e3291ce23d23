"The front door: a folder and a few words, as a function and as a command; tiny random networks."
import json, os, shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import diffclip_da.adaptation.folder as D
from diffclip_da.adaptation.finetune import CAREFUL, Recipe
from diffclip_da.adaptation.folder import adapt_folder, check_images, main
from diffclip_da.core import UserError
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
    assert {'labels.csv', 'contact_sheet.png', 'report.json', 'manifest.csv', 'config.json'} < names and not any(n.endswith('.tmp') for n in names)
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
    for bad, words in ((['--adapter', str(tmp_path/'mine'), '--target', 'x'], 'has its words already'), ([], 'say what the pictures should become'),
                       (['--adapter', str(tmp_path)], 'holds no adapter.json')):
        with pytest.raises(SystemExit) as e: main([str(photos), '--out', str(tmp_path/'three'), *bad])
        assert e.value.code == 2 and words in capsys.readouterr().err and not (tmp_path/'three').exists()
