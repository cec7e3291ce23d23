"""Whatever README tells a reader to type is typed here, in its order and in one folder, as a reader would.

Long commands get toy-sized arguments from the tables below, and published networks are stood in for by small random ones in
files of the same layout. A command that README has and the tables have not fails, as does an entry that README no longer has.
"""
import ast
import configparser
import importlib
import json
import os
import re
import shlex
import subprocess

import matplotlib.cbook
import open_clip
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner
from conftest import encoded, picture
from diffusers import UNet2DModel
from papermill.cli import papermill
from torch.distributed.run import get_args_parser

import diffclip_da
from check_sync import ROOT
from diffclip_da.core import UserError

README = (ROOT/'README.md').read_text(encoding='utf-8')
OVERVIEW = json.loads((ROOT/'nbs/00_overview.ipynb').read_text(encoding='utf-8'))

TOY = '--n-images 2 --views 2 --n-crops 1 --n-inv 2 --n-gen 2'  # what makes a fine-tuning and its walk short
TINY_UNET = '--n-images 4 --batch-size 2 --image-size 16'
ADDED = {  # command as README has it: what is added to it here
    '.venv/bin/diffclip-adapt photos/ --target "sketch" --out sketches/': TOY,
    '.venv/bin/diffclip-adapt photos/ --labels labels.csv --target "sketch" --out labelled-sketches/': TOY,
    '.venv/bin/diffclip-adapt animals/ --labels folders --target "sketch" --out animal-sketches/': TOY,
    '.venv/bin/diffclip-adapt photos/ --target "sketch" --out kept-sketches/ --save my-adapter/': TOY,
    '.venv/bin/diffclip-adapt more/ --adapter my-adapter/ --out more-sketches/': '',
    '.venv/bin/diffclip-adapt holiday/ --align --target "sketch" --out holiday-sketches/': TOY,
    '.venv/bin/diffclip-adapt photos/ --target "a watercolour" --out watercolours/': TOY,
    '.venv/bin/diffclip-adapt --list-looks --preview': '',
    '.venv/bin/diffclip-adapt photos/ --target "sketch" --clip ViT-B-16/openai --out by-openai/': TOY,
    '.venv/bin/python -m diffclip_da.models.train --images photos/ --out runs/unet': TINY_UNET,
    '.venv/bin/diffclip-adapt photos/ --unet runs/unet/model --target "sketch" --out by-my-unet/': TOY,
    '.venv/bin/diffclip-adapt photos/ --unet google/ddpm-celebahq-256 --target "sketch" --out large/': TOY,
    '.venv/bin/papermill nbs/21_figure3.ipynb runs/21_figure3.ipynb -p profile embedded -p n_inv 40': '--prepare-only',
    '.venv/bin/papermill nbs/21_figure3.ipynb runs/21_figure3.ipynb -p profile paper -p celeba path/to/celeba': '--prepare-only',
    '.venv/bin/accelerate launch -m diffclip_da.adaptation.folder photos/ --target "sketch" --out many-sketches/': TOY,
    '.venv/bin/accelerate launch -m diffclip_da.models.train --images photos/ --out runs/unet': TINY_UNET,
    '.venv/bin/torchrun --nproc_per_node 2 -m diffclip_da.adaptation.folder photos/ --target "sketch" --out two-processes/': TOY}
REPLACED = {  # in README's Python: what stands there, what runs here
    'target="sketch")': 'target="sketch", recipe=Recipe(n_images=2, views=2, n_crops=1))',
    'walk=Walk(t0=400)': 'walk=Walk(t0=400, n=2)',
    'from_pretrained("shipped")': 'from_pretrained("shipped", walk=Walk(t0=400, n=2))'}


FENCED = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.M | re.S)  # (language, text)


def blocks(language: str) -> list[str]: return [text for l, text in FENCED if l == language]


def stripped(line: str) -> str:
    "A line of shell without its comment, quotes as they stand"
    return re.sub(r'\s+#\s.*$', '', line).strip()


def parts(language: str, text: str) -> list[str]: # the whole block, or its commands one by one
    return [text] if language == 'python' else [c for c in map(stripped, text.split('\n')) if c]


PARTS = [(language, part) for language, text in FENCED if language for part in parts(language, text)]
COMMANDS = [part for language, part in PARTS if language == 'bash']
MAKE = sorted({c for c in COMMANDS if c.startswith('make ')} | set(re.findall(r'`(make [a-z][^`]*)`', README)))


def test_the_table_knows_every_command():
    typed = [c for c in COMMANDS if not c.startswith('make ')]
    assert len(set(typed)) == len(typed)
    assert set(typed) - set(ADDED) == set(), 'README has commands that no test runs: add them to ADDED'
    assert set(ADDED) - set(typed) == set(), 'README no longer has these: take them out of ADDED'
    python = ''.join(blocks('python'))
    assert [old for old in REPLACED if old not in python] == []


def test_other_languages_are_not_overlooked():
    assert {l for l, _ in FENCED} == {'bash', 'python', ''}
    program = re.compile(r'(\.venv|make|python|pip|diffclip)\b')
    assert [line for text in blocks('') for line in text.split('\n') if program.match(line)] == []


# ---------------------------------------------------------------- the folder of a reader

def save(path, im):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(im, 'PNG'))


def fill(root):
    "Everything that README takes for granted: photos with a table of labels, animals in folders, and so on"
    from diffclip_da.data import shipped_faces
    faces = shipped_faces('test')
    rows = ['id,label']
    for k, i in enumerate(faces.ids[:6]):
        name = f'{k}.png'
        save(root/('photos' if k < 4 else 'more')/name, faces.pil(i))
        if k < 4: rows.append(f'{name},{faces.classes[faces.labels[i]]}')
    (root/'labels.csv').write_text('\n'.join(rows) + '\n')
    for k, animal in enumerate(('cat', 'dog', 'fox')):
        for j in range(3): save(root/'animals'/animal/f'{j}.png', picture(3 * k + j))
        if animal != 'cat': save(root/'drawn'/animal/'0.png', picture(20 + k))   # one class is missing there
    holiday = root/'holiday'; holiday.mkdir()
    with matplotlib.cbook.get_sample_data('grace_hopper.jpg') as f: (holiday/'grace.jpg').write_bytes(f.read())
    save(holiday/'beach.png', picture(1))
    (root/'nbs').symlink_to(ROOT/'nbs')


SMALL_CLIP = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))


def stand_ins(root, patch):
    "Small random networks under published names: the loaders do all they do, but for the download"
    from diffclip_da.models import published
    patch.setitem(open_clip.factory._MODEL_CONFIGS, 'ViT-B-16', SMALL_CLIP)
    weights = root/'open_clip_model.bin'
    torch.save(open_clip.create_model('ViT-B-16', None, force_quick_gelu=True).state_dict(), weights)
    patch.setattr(open_clip.factory, 'download_pretrained', lambda *a, **kw: str(weights))
    net = UNet2DModel(sample_size=32, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=16, attention_head_dim=None,
                      down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'))
    net.save_pretrained(root/'hub')
    patch.setattr(published, 'snapshot_download', lambda name, **kw: str(root/'hub'))


class Reader:
    "Types README's commands one after the other, and remembers how each ended"
    def __init__(self, root): self.root, self.ended = root, []

    def up_to(self, k):
        while len(self.ended) <= k:
            language, part = PARTS[len(self.ended)]
            try: self.ended.append((run_python if language == 'python' else run_command)(part))
            except Exception as e: self.ended.append(e)
        return self.ended[k]


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    root, n = tmp_path_factory.mktemp('reader'), torch.get_num_threads()
    torch.set_num_threads(1)
    fill(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv('CELEBA', '')
        stand_ins(tmp_path_factory.mktemp('published'), patch)
        yield Reader(root)
    torch.set_num_threads(n)


def console_script(name: str) -> str:
    "The module behind an installed command, as settings.ini has it"
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    home, _, function = dict(e.split('=') for e in cfg['DEFAULT']['console_scripts'].split())[name].partition(':')
    assert function == 'main'
    return home


def run_module(name: str, argv: list):
    "`python -m name argv`, in this process; anything but success is an error"
    try: code = importlib.import_module(name).main(argv)
    except SystemExit as e: code = e.code
    if code: raise RuntimeError(f'{name} ended with {code}')


def run_command(command: str):
    if command.startswith('make '): return   # see test_make_knows_its_targets
    words = shlex.split(command) + shlex.split(ADDED[command])
    program, words = words[0].removeprefix('.venv/bin/'), words[1:]
    assert words != shlex.split(command)[1:] or {'--adapter', '--list-looks'} & set(words)
    if program == 'accelerate':
        assert words[0] == 'launch'
        args = launch_command_parser().parse_args(words[1:])
        assert args.module
        run_module(args.training_script, args.training_script_args)
    elif program == 'torchrun':
        args = get_args_parser().parse_args(words)
        assert args.module and args.nproc_per_node == '2'   # `test_two_processes_make_the_bytes_of_one` starts two
        run_module(args.training_script, args.training_script_args)
    elif program == 'papermill':
        os.makedirs('runs', exist_ok=True)
        done = CliRunner().invoke(papermill, words)
        assert done.exit_code == 0, done.output
        check_parameters(words)
    elif program == 'python':
        assert words[0] == '-m'
        run_module(words[1], words[2:])
    else: run_module(console_script(program), words)


def check_parameters(words: list):
    "papermill only warns of parameters that a notebook does not have; and what they say must make a profile"
    from diffclip_da.study.profile import get_profile
    given = {words[k + 1]: words[k + 2] for k, w in enumerate(words) if w == '-p'}
    cells = json.loads((ROOT/words[0]).read_text(encoding='utf-8'))['cells']
    source, = (''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', ()))
    assert set(given) <= {node.target.id for node in ast.parse(source).body}
    get_profile(given.pop('profile'), **{k: v for k, v in given.items() if k != 'celeba'})


def run_python(text: str):
    for old, new in REPLACED.items(): text = text.replace(old, new)
    space = {}
    exec('from diffclip_da import Recipe, Walk\n' + text, space)
    return space


@pytest.mark.parametrize('k', range(len(PARTS)), ids=[p.strip().split('\n')[-1][:60] for _, p in PARTS])
def test_what_readme_says_works(reader, k):
    end = reader.up_to(k)
    if isinstance(end, Exception): raise end


def test_a_command_that_is_refused_is_seen(reader, capsys):
    for words in ('photos/ --targt x --out y', 'photos/ --out y', 'photos/ --target x --clip ViT-B-61/openai --out y', 'nowhere/ --target x --out y'):
        with pytest.raises(RuntimeError, match='folder ended with 2'): run_module(console_script('diffclip-adapt'), words.split())
    with pytest.raises(KeyError): run_command('.venv/bin/diffclip-adapt something new')
    with pytest.raises(AssertionError): check_parameters('nbs/21_figure3.ipynb out.ipynb -p profile toy -p n_innv 3'.split())


def test_what_the_commands_leave_behind(reader):
    reader.up_to(len(PARTS) - 1)
    for out, names in dict(sketches='0 1 2 3', watercolours='0 1 2 3').items():
        assert sorted(p.stem for p in (reader.root/out/'images').glob('*.png')) == names.split(), out
        for name in ('contact_sheet.png', 'report.json', 'report.html'): assert (reader.root/out/name).exists()
    assert 'fox' in (reader.root/'animal-sketches/labels.csv').read_text()
    report = json.loads((reader.root/'holiday-sketches/report.json').read_text())
    assert list(report['skipped']) == ['beach.png']
    assert json.loads((reader.root/'by-openai/report.json').read_text())['models']['clip']['name'] == 'ViT-B-16/openai'


def test_labels_of_three_classes_keep_their_order_on_a_target_that_lacks_one(reader):
    reader.up_to(len(PARTS) - 1)
    space = next(s for s in reader.ended if isinstance(s, dict) and 'drawn' in s)
    drawn, sketches = space['drawn'], space['sketches']
    assert list(drawn.classes) == list(sketches.classes) == ['cat', 'dog', 'fox']
    for images in (drawn, sketches):
        assert {i: images.classes[images.labels[i]] for i in images.ids} == {i: i.split('/')[0] for i in images.ids}
    x, _ = space['test']
    assert space['predict'](space['classifier'], x).shape == (2, 3)


# ---------------------------------------------------------------- when something goes wrong

def troubles(tmp, patch):
    "Message -> what makes the package say it."
    from diffclip_da import align, store
    from diffclip_da.adaptation import finetune
    from diffclip_da.adaptation.adapter import Adapter
    from diffclip_da.adaptation.folder import check_folders, check_images
    from diffclip_da.core import local_device
    from diffclip_da.data import image_folder
    from diffclip_da.models.unet import tiny_unet
    photos = tmp/'photos'
    for k in range(2): save(photos/f'{k}.png', picture(k))
    (tmp/'one.csv').write_text('id,label\n0.png,a\n')
    (tmp/'same.csv').write_text('id,label\n0.png,a\n1.png,a\n')
    (tmp/'mine').mkdir(); (tmp/'mine'/'thesis.txt').write_text('mine')
    save(tmp/'bad/0.png', picture(0)); (tmp/'bad/1.png').write_bytes(b'no picture')

    def full(fd): raise OSError(28, 'No space left on device')

    def no_face():
        patch.setattr(align, 'find_face', lambda *a: None)
        align.align_faces(image_folder(photos), tmp/'aligned')

    def another_run():
        for t0 in (1, 2): store.claim_folder(tmp/'c.json', str(t0), dict(t0=t0), 'out')

    def full_disk():
        with patch.context() as m:
            m.setattr(os, 'fsync', full)
            store.write_json(tmp/'x.json', 1)

    def replaced():
        images = image_folder(photos)
        images.image_hash('0.png')
        save(photos/'0.png', picture(9))
        images.tensor(size=8)

    return {
        'is not empty and not the result of an earlier run': lambda: check_folders(photos, tmp/'mine'),
        'holds the result of another run (different:': another_run,
        'or leave such images out with --skip-bad': lambda: check_images(image_folder(tmp/'bad')),
        'no line for': lambda: image_folder(photos, tmp/'one.csv'),
        'every image has the label': lambda: image_folder(photos, tmp/'same.csv'),
        'no face was found in any of the': no_face,
        'this U-Net takes multiples of': lambda: Adapter(tiny_unet(16), size=17).check(),
        'cannot be used': lambda: local_device('cuda:77'),
        'not enough memory to fine-tune on a single image': lambda: finetune.Economy(1, 'checkpoint').lower('could not create a primitive'),
        'fine-tuning diverged': lambda: finetune.check_sane({'pass': 0, 'step': 3, 'total': 10.4, 'lr': .1}, beyond=.4),
        'no space left on the disk': full_disk,
        'was replaced while the run goes on': replaced,
    }


def test_the_messages_in_the_table_are_those_of_the_package(tmp_path, monkeypatch):
    rows = re.findall(r'^\| `([^`]+)` \|[^|]+\|[^|]+\|$', README.partition('### When something goes wrong')[2].partition('###')[0], re.M)
    ways = troubles(tmp_path, monkeypatch)
    assert len(rows) >= 10 and set(rows) == set(ways)
    for message, way in ways.items():
        with pytest.raises(UserError) as e: way()
        assert message in str(e.value), message


# ---------------------------------------------------------------- make

def dry(command: str) -> list[str]:
    "The lines that make would run; those with $(MAKE) it does run, so there may be none"
    assert '$(MAKE)' not in (ROOT/'Makefile').read_text()
    words = shlex.split(command.replace('...', 'path'))
    done = subprocess.run([*words, '-n'], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout.replace('\\\n', ' ').split('\n')


@pytest.mark.parametrize('command', MAKE)
def test_make_knows_its_targets(command):
    made = re.findall(r'^([A-Z]+)\s*\?=', (ROOT/'Makefile').read_text(), re.M)
    assert dry(command)
    assert set(re.findall(r'\b([A-Z0-9]+)=', command)) <= {*made, 'FS2K'}
    if profile := re.search(r'PROFILE=(\w+)', command):
        from diffclip_da.study.profile import PROFILES
        assert profile[1] in PROFILES


class Understood(Exception): "The arguments were read; nothing else is run"


@pytest.mark.parametrize('command', ['make assets CELEBA=c FS2K=f TEACHER=t', 'make guide CELEBA=c FS2K=f', 'make results', 'make verify', 'make figures'])
def test_programs_that_make_calls_understand_their_arguments(command, monkeypatch):
    lines = [re.search(r'-m (diffclip_da\.\S+)([^|;&]*)', line) for line in dry(command) if '-m diffclip_da.' in line]
    assert lines or command == 'make figures'
    for name, words in (m.groups() for m in lines):
        module = importlib.import_module(name)
        read = module.command

        def stop(*a, **kw):
            read(*a, **kw)
            raise Understood

        with monkeypatch.context() as m, pytest.raises(Understood):
            m.setattr(module, 'command', stop)
            getattr(module.main, '__wrapped__', module.main)(shlex.split(words))


# ---------------------------------------------------------------- names

def names_used(text: str) -> set:
    "(module, name) of every import from the package in a piece of Python"
    found = set()
    for module, names in re.findall(r'^from (diffclip_da\S*) import (\([^)]*\)|[^\n]*)', text, re.M):
        found |= {(module, n.split(' as ')[0].strip()) for n in re.sub(r'[()\n]|#.*', ' ', names).split(',') if n.strip()}
    return found | {(m, None) for m in re.findall(r'^import (diffclip_da\S*)', text, re.M)}


def exported_modules() -> set:
    return {m for p in (ROOT/'nbs').glob('*.ipynb') for m in re.findall(r'"#\| default_exp ([\w.]+)', p.read_text(encoding='utf-8'))}


def modules_in_table() -> list:
    rows = re.findall(r'^\|[^|]*\|[^|]*\|[^|]*\| ((?:`[a-z_.0-9]+`(?:, )?)+) \|$', README, re.M)
    return [m for row in rows for m in re.findall(r'`([^`]+)`', row)]


def test_the_table_of_modules_is_the_package():
    there = modules_in_table()
    assert len(there) == len(set(there)) and set(there) == exported_modules()


def test_readme_and_overview_use_public_names_or_documented_modules():
    cells = [''.join(c['source']) for c in OVERVIEW['cells'] if c['cell_type'] == 'code']
    used = set().union(*(names_used(text) for text in [*blocks('python'), *cells]))
    assert used
    for module, name in used:
        if module == 'diffclip_da': assert name is None or name in diffclip_da.__all__, name
        else:
            assert module.removeprefix('diffclip_da.') in modules_in_table(), module
            if name: assert name in importlib.import_module(module).__all__, f'{module}.{name}'
