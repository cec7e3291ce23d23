"""Whatever bytes a file holds: a value, or a `UserError` that names the file; in bounded time and memory.

One test for each family of files that come in from outside. Each takes valid files, changes them at random, and reads the result.
The seed is fixed, so every run tries the same inputs. `DIFFCLIP_FUZZ_SECONDS=3600 pytest tests/test_fuzz.py` goes on for that long
with other seeds, the families sharing the time, and says how many inputs there were. A failing input is kept in `runs/fuzz`.
"""
import faulthandler
import io
import json
import os
import random
import resource
import struct
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import celeba_rows, encoded, picture, write_celeba
from diffusers import DDPMScheduler
from PIL import Image, features
from safetensors.torch import save_file
from torch import nn

from diffclip_da.core import UserError
from diffclip_da.data import celeba, fs2k, image_folder, label_indices, read_attribute, read_labels_csv
from diffclip_da.models.load import load_unet
from diffclip_da.models.published import GuidedUNet, checked_sha256, load_weights, trained_for
from diffclip_da.models.unet import EpsUNet, save_unet, tiny_unet
from diffclip_da.pictures import decode
from diffclip_da.adaptation.adapter import Adapter, Compute, Run, describe_run
from diffclip_da.store import canonical_hash, claim_folder, packed_tensor, read_json, read_record, read_tensors, stage
from diffclip_da.diffusion.walk import Walk

FAMILIES = 7
SECONDS = float(os.environ.get('DIFFCLIP_FUZZ_SECONDS', 0)) / FAMILIES   # for each; 0: a fixed number of inputs
LONGEST, LARGEST = 20, 1.5 * 2**30   # seconds of computing, and bytes, that one input may take


# ---- changing files at random -----------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
WORDS = [b'', b'\0', b'\n', b'\r', b'\r\n', b',', b';', b'\t', b'"', b"'", b'=1+1', b'\xef\xbb\xbf', b'\xff', b'\xed\xa0\x80', b'1e999', b'-1', b'NaN', b'null', b'{', b'}', b'[' * 50,
         b']', b'9' * 40, b'9' * 5000, '\u00b2'.encode(), '\u0663'.encode(), b'../', b'\\', b'<html>', b'jpg', b'PK\1\2', b'PK\3\4', b'PK\5\6']


def mutated(r: random.Random, b: bytes, others: list) -> bytes:
    "One to eight changes of `b`: bits, bytes, numbers, words, cuts, copies, and pieces of other files."
    b = bytearray(b)
    for _ in range(r.choice([1, 1, 1, 2, 3, 8])):
        k = r.randrange(len(b) + 1) if r.random() < .7 else min(len(b), r.randrange(64))   # heads matter most
        n = int(2 ** r.uniform(0, 8))
        match r.randrange(9):
            case 0 if k < len(b): b[k] ^= 1 << r.randrange(8)
            case 1 if k < len(b): b[k] = r.choice([0, 1, 127, 128, 255, r.randrange(256)])
            case 2:
                size = r.choice([1, 2, 4, 8])
                b[k:k + size] = (r.choice(NUMBERS) % 256**size).to_bytes(size, r.choice(['little', 'big']))
            case 3: b[k:k + r.choice([0, 0, 1, 4])] = r.choice(WORDS)
            case 4: del b[k:k + n]
            case 5: b[k:k] = b[k:k + n] * r.choice([1, 1, 2, 20])
            case 6: del b[k:]
            case 7: b[k:k + n] = r.randbytes(n)
            case 8:
                o = r.choice(others)
                i = r.randrange(len(o) + 1)
                b[k:k + n] = o[i:i + n]
    return bytes(b)


STRANGE = [None, True, -1, 0, 1, 3, 2**31, 10**30, -1e308, float('nan'), float('inf'), '', 'x', 'linear', '\ud800', 'a' * 1000, [], {}, [[]], [None], {'': None}, ['x'] * 40, '../../x']


def strange(r: random.Random, o):
    "A value with some of its parts replaced, removed or renamed."
    if r.random() < .12 or not isinstance(o, (dict, list)) and r.random() < .1: return r.choice(STRANGE)
    if isinstance(o, dict):
        new = {k: strange(r, v) if r.random() < .25 else v for k, v in o.items() if r.random() > .03}
        if r.random() < .1: new[r.choice(['x', 'patch', 'layers_per_block', '_class_name', ''])] = r.choice(STRANGE)
        return new
    if isinstance(o, list): return [strange(r, v) if r.random() < .25 else v for v in o if r.random() > .05]
    return o


def strange_json(r: random.Random, b: bytes, others: list) -> bytes:
    if r.random() < .4: return mutated(r, b, others)
    return json.dumps(strange(r, json.loads(b))).encode()


def fuzz(family: str, seeds: list, read, n: int, mutate=mutated, named: str = ''):
    "`read(bytes, number of the seed)` gives a value or a `UserError` whose text holds `named`, for `n` inputs or for `SECONDS`."
    kept, process = Path('runs/fuzz'), psutil.Process()
    before, start, tried, refused, seed = process.memory_info().rss, time.monotonic(), 0, 0, 0
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (process.memory_info().vms + 6 * 2**30, limits[1]))   # refused rather than killed
    faulthandler.dump_traceback_later(600 + SECONDS, exit=True)                                  # where it hangs, if it does
    try:
        while tried < n or time.monotonic() - start < SECONDS:
            if tried >= n: seed += 1
            for k, b in enumerate(seeds):
                r = random.Random(f'{family} {seed} {tried}')
                bad = mutate(r, b, seeds)
                tic, why = time.process_time(), ''   # other programs' share of the processor is not ours
                try: read(bad, k)
                except UserError as e:
                    refused += 1
                    if named not in str(e): why = f'the file is not named: {e}'
                    if len(str(e)) > 1500: why = f'a message of {len(str(e))} characters'
                except Exception as e: why = f'{type(e).__name__}: {e}'
                if time.process_time() - tic > LONGEST: why = f'took {time.process_time() - tic:.0f} s'
                if process.memory_info().rss - before > LARGEST: why = f'memory grew by {(process.memory_info().rss - before) >> 20} MB'
                if why:
                    kept.mkdir(parents=True, exist_ok=True)
                    (kept/f'{family}-{k}-{seed}-{tried}').write_bytes(bad)
                    pytest.fail(f'{family}: input {tried} (seed {seed}, file {k}; kept in {kept}): {why}')
                tried += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)
    print(f'{family}: {tried:,} inputs, {refused:,} refused, {tried - refused:,} read, {time.monotonic() - start:.0f} s')
    assert 0 < refused < tried                                                                    # both ends were reached


def fuzz_files(family: str, root: Path, readers: dict, n: int, mutate): # a file's name below `root` -> what reads it
    "`fuzz` for files that are read where they lie; after each input the good one is put back."
    files = [(root/name, f, (root/name).read_bytes()) for name, f in readers.items()]
    def read(b, k):
        path, f, good = files[k]
        path.write_bytes(b)
        try: f()
        finally: path.write_bytes(good)
    fuzz(family, [good for _, _, good in files], read, n, mutate, named=str(root))


# ---- pictures ---------------------------------------------------------------------------------------------------------------

def pictures() -> list:
    small, noise = picture(3, (40, 28)), Image.effect_noise((48, 40), 90)
    exif = Image.Exif(); exif[274], exif[306] = 6, 'a date'
    palette = small.convert('P', palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.asarray(noise).astype(np.uint16) * 257)
    out = [encoded(small.convert(m), 'PNG') for m in ('RGB', 'RGBA', 'L', 'LA', '1')]
    out += [encoded(palette, 'PNG', transparency=1), encoded(deep, 'PNG')]
    out += [encoded(noise.convert('RGB'), exif=exif), encoded(small, progressive=True), encoded(small.convert('CMYK')), encoded(noise)]
    out += [encoded(palette, 'GIF'), encoded(palette, 'GIF', save_all=True, append_images=[palette.rotate(90)])]
    out += [encoded(small, 'TIFF', compression=c) for c in (None, 'tiff_lzw', 'tiff_adobe_deflate', 'jpeg', 'packbits')] + [encoded(deep, 'TIFF')]
    out += [encoded(small, 'WEBP'), encoded(small.convert('RGBA'), 'WEBP', lossless=True), encoded(small, 'WEBP', save_all=True, append_images=[small.rotate(90)])]
    out += [encoded(small, 'BMP'), encoded(palette, 'BMP')]
    if features.check('avif'): out.append(encoded(small, 'AVIF'))
    return out


@pytest.mark.filterwarnings('ignore')
def test_pictures():
    def read(b, k):
        im = decode(b, 'photos/a.xyz')
        assert im.mode == 'RGB' and min(im.size) > 0 and np.asarray(im).shape == (*im.size[::-1], 3)
    fuzz('pictures', pictures(), read, 3000, named='photos/a.xyz')


# ---- labels -----------------------------------------------------------------------------------------------------------------

def test_labels(tmp_path):
    path = tmp_path/'labels.csv'
    rows = [(f'{"ab"[k % 2]}/{k}.png', 'cat' if k % 3 else 'a "big", dog') for k in range(8)]
    plain = pd.DataFrame(rows, columns=['id', 'label'])
    seeds = [plain.to_csv(index=False).encode(), plain.to_csv(index=False, sep=';').encode(), plain.assign(label=[str(k % 3) for k in range(8)]).to_csv(index=False, sep='\t').encode(),
             plain.assign(note='x').to_csv(index=False, lineterminator='\r\n').encode('utf-8-sig'), b'id,label\n' + b''.join(b"%d.png,'=%d\n" % (k, k % 2) for k in range(5))]
    def read(b, k):
        path.write_bytes(b)
        table = read_labels_csv(path)
        assert table.index.is_unique and (table.label != '').all() and '' not in table.index and all(v == v.strip() for v in table.label)
        index, classes = label_indices(table.label, path)
        assert set(index.values()) <= set(range(len(classes))) and len(set(classes)) == len(classes) > 1
    fuzz('labels', seeds, read, 3000, named=str(path))


# ---- JSON of a run, and of a model -------------------------------------------------------------------------------------------

def test_json(tmp_path):
    model = tiny_unet(8)
    save_unet(model, tmp_path/'unet')
    (tmp_path/'pipeline').mkdir()
    DDPMScheduler().save_config(tmp_path/'pipeline')
    inputs = dict(source='photo', config=dict(t0=400, n=[1, 2]), models=None)
    claim_folder(tmp_path/'run.json', 'k', inputs, 'out')
    packing = lambda: packed_tensor(tmp_path/'pack', 'k', (5, 2), lambda a, b: np.full((b - a, 2), a, np.uint8), block=2, say=lambda m: None)
    want = packing()[:]
    pairs = tmp_path/'fs2k'
    for kind, name in (('photo', 'image'), ('sketch', 'sketch')):
        (pairs/kind/f'{kind}1').mkdir(parents=True)
        for k in range(3): (pairs/kind/f'{kind}1'/f'{name}{k:04}.jpg').write_bytes(b'x')
    (pairs/'anno_train.json').write_text(json.dumps([dict(image_name=f'photo1/image{k:04}', gender=k % 2, smile=0) for k in range(3)]))
    def unet(): assert load_unet(tmp_path/'unet')(torch.zeros(1, 3, 8, 8), 5).shape == (1, 3, 8, 8)
    def packed(): assert torch.equal(packing()[:], want)
    def scheduler(): assert trained_for(tmp_path/'pipeline') is None or True
    readers = {'unet/config.json': unet, 'unet/diffclip.json': unet, 'pipeline/scheduler_config.json': scheduler, 'run.json': lambda: claim_folder(tmp_path/'run.json', 'k', inputs, tmp_path),
               'pack/blocks.json': packed, 'fs2k/anno_train.json': lambda: fs2k(pairs, labelled=True, attribute='Male')}
    fuzz_files('json', tmp_path, readers, 300, strange_json)


# ---- records with a checksum: an adapter's, a shard's, a stage's -------------------------------------------------------------

def strange_record(r: random.Random, b: bytes, others: list) -> bytes:
    "Strange JSON; now and then under a checksum that fits, as if somebody had meant it."
    b = strange_json(r, b, others)
    try: said = json.loads(b)
    except (ValueError, RecursionError): return b
    if isinstance(said, dict) and r.random() < .5:
        said.pop('sha256', None)
        try: b = json.dumps(said | dict(sha256=canonical_hash(said, 64))).encode()
        except (ValueError, UnicodeError): pass
    return b


def test_records(tmp_path):
    adapter = Adapter(tiny_unet(8), walk=Walk(40, n=2), size=8)
    adapter.tuned, adapter.source, adapter.target = adapter.unet, 'photo', 'sketch'
    adapter.save(tmp_path/'adapter')
    for k in range(3): (tmp_path/f'{k}.png').write_bytes(encoded(picture(k, (12, 12)), 'PNG'))
    images = image_folder(tmp_path)
    what = describe_run(images, adapter.unet, adapter.unet, adapter.schedule, adapter.walk, Compute(), 8)
    run = Run(images, what, 3, tmp_path/'out', say=lambda text: None)
    run.save_shard(0, torch.zeros(3, 3, 8, 8), 2)
    kept = run.record(0)
    def staged():
        with stage(tmp_path, 'step', 'k', say=lambda text: None) as s:
            if not s.found: (s.folder/'a.txt').write_text('a')
        assert (s.folder/'a.txt').read_text() == 'a'
    (tmp_path/'step-k').mkdir(); staged()
    def adapted():
        a = Adapter.load(tmp_path/'adapter', device='cpu')
        out = a.walk.generate(a.tuned, torch.zeros(1, 3, 8, 8), a.schedule)
        assert out.shape == (1, 3, 8, 8) and torch.isfinite(out).all()
    def shard():
        said = run.record(0)
        if said is not None: assert [(r['id'], r['file']) for r in said['images']] == [(r['id'], r['file']) for r in kept['images']]
        run.done(0)
    readers = {'adapter/adapter.json': adapted, 'adapter/unet/diffclip.json': adapted, 'out/shards/00000.json': shard, 'step-k/stage.json': staged}
    fuzz_files('records', tmp_path, readers, 300, strange_record)


# ---- weights ----------------------------------------------------------------------------------------------------------------

def test_weights(tmp_path):
    state = GuidedUNet(8, channels=(32,), attention=(0,), width=8, head_channels=16).state_dict()
    small = dict(w=torch.arange(6.).view(2, 3), b=torch.ones(2, dtype=torch.float16), n=torch.tensor(3))
    def saved(o, **kw): f = io.BytesIO(); torch.save(o, f, **kw); return f.getvalue()
    save_file(small, tmp_path/'s.safetensors')
    seeds = [(tmp_path/'s.safetensors').read_bytes(), saved(small), saved(dict(model=small, ema=[small, {}], step=3)), saved(small, _use_new_zipfile_serialization=False), saved(state)]
    def read(b, k):
        path = tmp_path/('m.safetensors' if k == 0 else 'm.pt')
        path.write_bytes(b)
        if k < 4: return read_tensors(path, flat=k != 2)
        model = load_weights(path, head_channels=16, image_size=8)
        assert all(torch.isfinite(p).all() for p in model.parameters())
    try: fuzz('weights', seeds, read, 1500, named=str(tmp_path))
    finally: (tmp_path/'m.pt').unlink()


# ---- archives ---------------------------------------------------------------------------------------------------------------

def test_zips(tmp_path):
    def archive(method):
        f = io.BytesIO()
        with zipfile.ZipFile(f, 'w', method) as z:
            for k in range(3): z.writestr(f'{"ab"[k % 2]}/{k}.png', encoded(picture(k, (12, 12)), 'PNG'))
            z.writestr('notes.txt', 'x' * 99)
        return f.getvalue()
    path = tmp_path/'photos.zip'
    def read(b, k):
        path.write_bytes(b)
        s = image_folder(path)
        assert s.tensor(size=8).shape == (len(s), 3, 8, 8) and len(s) > 0
    fuzz('zips', [archive(m) for m in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)], read, 2500, named=str(path))


# ---- CelebA's lists ---------------------------------------------------------------------------------------------------------

def test_celeba_lists(tmp_path):
    root = write_celeba(tmp_path/'celeba')
    kaggle = 'image_id,Male,Smiling\n' + ''.join(f'{n},{2 * r[1] - 1},{2 * r[2] - 1}\n' for n, r in celeba_rows().items())
    names = ['list_attr_celeba.txt', 'list_eval_partition.txt', 'identity_CelebA.txt']
    good = [(root/n).read_bytes() for n in names]
    def read(b, k):
        if k == 3:
            (tmp_path/'list.csv').write_bytes(b)
            return read_attribute(tmp_path/'list.csv', 'Male')
        (root/names[k]).write_bytes(b)
        try:
            s = celeba(root)
            assert set(s.labels.values()) == {0, 1} and set(s.ids) <= set(celeba_rows())
        finally: (root/names[k]).write_bytes(good[k])
    fuzz('celeba', [*good, kaggle.encode()], read, 2000, named=str(tmp_path))
