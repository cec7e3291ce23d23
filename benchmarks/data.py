"""Time and memory of a whole data set: 1,000, 16,000 and all 162,770 training photos of CelebA, in synthetic pictures.

    python benchmarks/data.py                   # some 20 minutes on one core, 4 GB of disk
    python benchmarks/data.py --counts 1000     # seconds

The pictures have CelebA's format (JPEG, 178 x 218, in one zip) and are packed at 64 px by `ImageSet.packed`, as
`python -m diffclip_da.models.train --celeba` does. Each number of pictures is measured in processes of its own: packing, finding
the pack again (which reads and checks everything), and drawing batches of 32. `other` is the way of the first edition, all
pictures as float32 in memory, where that fits. Results go to `results.json`, its table to `README.md`.
"""
import io, json, os, subprocess, sys, tempfile, time, zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from speed import cpu_name, save

from diffclip_da.core import UserError, command, friendly_exit
from diffclip_da.store import sha256_file

HERE = Path(__file__).parent
MEASURE = '''
import json, re, sys, time, torch
from pathlib import Path
from diffclip_da.data import CELEBA_CROP, image_folder
torch.set_num_threads(1)
path, cache, how = sys.argv[1:]
peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024   # ru_maxrss begins with the parent's
start = peak(); tic = time.perf_counter()
images = image_folder(path, crop=CELEBA_CROP)
listed = time.perf_counter() - tic; tic = time.perf_counter()
if how == 'float': x = torch.cat([x for _, x in images.batches(64, 256)])
else: x = images.packed(64, cache)
made = time.perf_counter() - tic; memory = peak() - start
g = torch.Generator().manual_seed(0); tic = time.perf_counter()
for _ in range(200): x[torch.randint(len(x), (32,), generator=g)]
print(json.dumps(dict(listed=listed, made=made, batch=(time.perf_counter() - tic) / 200, memory=memory, after=peak() - start, n=len(x))))
'''


def synthetic(path, n, kinds=500):
    "A zip of `n` JPEGs of CelebA's size, none with the bytes of another: `kinds` pictures, each copy with a number in its comment."
    rng, made = np.random.default_rng(0), []
    for _ in range(min(n, kinds)):
        small = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).resize((178, 218), Image.Resampling.BICUBIC)
        noisy = np.asarray(small).astype(int) + rng.integers(-12, 13, (218, 178, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(b := io.BytesIO(), 'JPEG', quality=80)
        made.append(b.getvalue())
    with zipfile.ZipFile(path, 'w') as z:
        for k in range(n):
            b, comment = made[k % len(made)], f'{k:09}'.encode()
            z.writestr(f'img_align_celeba/{k + 1:06}.jpg', b[:2] + b'\xff\xfe\x00\x0b' + comment + b[2:])


def measured(path, cache, how):
    env = dict(os.environ, DIFFCLIP_QUIET='1', OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', MEASURE, str(path), str(cache), how], capture_output=True, text=True, env=env)
    if done.returncode: raise UserError(f'measuring {path} failed: {done.stderr.strip().splitlines()[-1]}')
    return json.loads(done.stdout.splitlines()[-1])


def result(name, ours, other, unit, note):
    ratio = other / ours if other else None
    return dict(name=name, device=cpu_name(), ours=round(ours, 4), other=other and round(other, 4), ratio=ratio and round(ratio, 3),
                unit=unit, runs=1, target=None, met=None, note=note)


def rows_for(n, folder, floats_up_to):
    "Four rows for `n` pictures."
    path = Path(folder)/f'{n}.zip'
    tic = time.perf_counter()
    synthetic(path, n)
    size = path.stat().st_size / 1e6
    print(f'{n:,} pictures in a zip of {size:,.0f} MB, made in {time.perf_counter() - tic:.0f} s', flush=True)
    pack, again = (measured(path, Path(folder)/'packed', 'packed') for _ in range(2))
    packed, = (Path(folder)/'packed').glob('*/bytes.u8')
    if n <= 1000:   # the same bytes each time
        measured(path, Path(folder)/'twice', 'packed')
        other, = (Path(folder)/'twice').glob('*/bytes.u8')
        if sha256_file(packed) != sha256_file(other): raise UserError('packing twice gave different bytes')
    whole = measured(path, '-', 'float') if n <= floats_up_to else {}
    about = f'64 px from a zip of {size:,.0f} MB, {packed.stat().st_size / 1e6:,.0f} MB packed'
    rows = [result(f'data_{n}_pack_seconds', pack['made'], whole.get('made'), 'seconds', f'once for a data set: hashing, decoding, writing, {pack["made"] / n * 1e3:.1f} ms a picture; {about}'),
            result(f'data_{n}_found_seconds', again['made'], whole.get('made'), 'seconds', 'each later start: every file hashed, every block checked'),
            result(f'data_{n}_peak_mb', max(pack['after'], again['after']), whole.get('after'), 'MB', f'growth of the whole process until the end, with the batches; {about}'),
            result(f'data_{n}_batch_ms', again['batch'] * 1e3, whole['batch'] * 1e3 if whole else None, 'ms', '32 random pictures, uint8 from the disk; the other float32 from memory')]
    path.unlink()
    for p in (packed, packed.with_name('blocks.json')): p.unlink()
    packed.parent.rmdir()
    return rows


@dataclass
class Options:
    "Time and memory of a whole data set."
    counts: tuple[int, ...] = (1000, 16_000, 162_770) # pictures
    floats_up_to: int = 16_000      # measure float32 in memory up to so many
    work: str | None = None         # where the data are made; default: a temporary folder
    out: str = str(HERE/'results.json')


@friendly_exit
def main(argv=None):
    o = command(Options, argv, prog='python benchmarks/data.py')
    torch.set_num_threads(1)
    for n in o.counts:
        with tempfile.TemporaryDirectory(dir=o.work) as folder: rows = rows_for(n, folder, o.floats_up_to)
        for r in rows: print(r['name'], r['ours'], r['other'], r['unit'], flush=True)
        save(rows, Path(o.out))


if __name__ == '__main__': main()
