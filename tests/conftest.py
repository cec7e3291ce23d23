"Settings and fixtures that several test files share. Nothing here needs a network, a GPU or a downloaded data set."
import os
import signal

os.environ.setdefault('DIFFCLIP_QUIET', '1')
os.environ.setdefault('MPLBACKEND', 'Agg')

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

# tests run side by side, one thread each: threads that wait for each other's cores cost more than they bring
torch.set_num_threads(1)
# a shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


def picture(k, size=(64, 64), mode='RGB'):
    "A smooth coloured picture that differs for each `k`."
    w, h = size
    y, x = np.mgrid[:h, :w]
    a = np.stack([x * 255 / w, y * 255 / h, np.full((h, w), 37 * k % 256)], -1)
    return Image.fromarray(a.astype(np.uint8)).convert(mode)


def encoded(im, fmt='JPEG', **kw):
    "The bytes of `im` as a file of that format."
    buffer = io.BytesIO()
    im.save(buffer, fmt, **kw)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    "A folder of six images, two of them in a sub-folder."
    root = tmp_path/'photos'
    (root/'more').mkdir(parents=True)
    for k in range(6): (root/('more' if k > 3 else '.')/f'{k}.png').write_bytes(encoded(picture(k), 'PNG'))
    return root


CELEBA_N = 24


def celeba_rows():
    "name -> (partition, Male, Smiling, person) of the miniature CelebA."
    return {f'{k + 1:06d}.jpg': (0 if k < 12 else 1 if k < 18 else 2, k % 2, int(k % 3 == 0), k // 2) for k in range(CELEBA_N)}


def write_celeba(root, rows=None, zipped=True, order=1):
    "CelebA's published files with small random pictures; `order` = -1 turns the lines around."
    rows = rows or celeba_rows()
    root.mkdir(parents=True, exist_ok=True)
    if zipped:
        with zipfile.ZipFile(root/'img_align_celeba.zip', 'w') as z:
            for nm in rows: z.writestr(f'img_align_celeba/{nm}', encoded(picture(int(nm[:6]), (178, 218))))
    else:
        (root/'img_align_celeba').mkdir()
        for nm in rows: (root/'img_align_celeba'/nm).write_bytes(encoded(picture(int(nm[:6]), (178, 218))))
    names = list(rows)[::order]
    (root/'list_attr_celeba.txt').write_text(f'{len(rows)}\nMale Smiling \n' + ''.join(f'{n} {2 * rows[n][1] - 1:2d} {2 * rows[n][2] - 1:2d}\n' for n in names))
    (root/'list_eval_partition.txt').write_text(''.join(f'{n} {rows[n][0]}\n' for n in names))
    (root/'identity_CelebA.txt').write_text(''.join(f'{n} {rows[n][3]}\n' for n in names))
    return root


@pytest.fixture
def mini_celeba(tmp_path):
    "A miniature CelebA: 24 images, 12 persons, partitions of 12, 6 and 6."
    return write_celeba(tmp_path/'celeba')
