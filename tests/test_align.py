"Aligning faces: the similarity, the warp, photos without a face, the command line."
import json
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import picture
from PIL import Image

from diffclip_da.adaptation.folder import main
import diffclip_da.align as align
from diffclip_da.align import TEMPLATE, align_faces, find_face, fit_similarity, warp
from diffclip_da.core import UserError
from diffclip_da.data import image_folder
from diffclip_da.models.unet import save_unet, tiny_unet
from test_finetune import clip_folder


@pytest.fixture(scope='module')
def portrait(): return Image.open(matplotlib.cbook.get_sample_data('grace_hopper.jpg', asfileobj=False)).convert('RGB')

@pytest.fixture
def photos(tmp_path, portrait):
    (tmp_path/'photos').mkdir()
    for k in range(2): portrait.rotate(10 * k, Image.BICUBIC).save(tmp_path/f'photos/face{k}.png')
    Image.new('RGB', (120, 90), (80, 120, 200)).save(tmp_path/'photos/sky.png')
    return tmp_path/'photos'


@pytest.mark.parametrize('turn, scale, shift', [(0, 1, (0, 0)), (.5, 3, (10, -4)), (-2, .1, (5, 5))])
def test_similarity_is_exact_where_one_exists(turn, scale, shift):
    c, s = scale * math.cos(turn), scale * math.sin(turn)
    want = np.array([[c, -s, shift[0]], [s, c, shift[1]]])
    got = fit_similarity(TEMPLATE, TEMPLATE @ want[:, :2].T + want[:, 2])
    assert np.allclose(got, want)

def test_similarity_never_mirrors():
    mirrored = TEMPLATE * [-1, 1]
    assert np.linalg.det(fit_similarity(TEMPLATE, mirrored)[:, :2]) >= 0

def test_warp_puts_a_marked_point_in_its_place():
    dots, at = np.zeros((300, 400, 3), np.uint8), TEMPLATE * 120 + [100, 60]
    for x, y in at.round().astype(int): dots[y - 2:y + 3, x - 2:x + 3] = 255
    out = np.asarray(warp(Image.fromarray(dots), at, 120).convert('L'))
    for x, y in (TEMPLATE * 120).round().astype(int): assert out[y, x] > 200
    assert (out > 128).mean() < .02

@pytest.mark.parametrize('size', [(40, 40), (2000, 300)])
def test_warp_gives_the_size_asked_for_and_no_black_border(size):
    out = np.asarray(warp(Image.new('RGB', size, (200, 10, 10)), TEMPLATE * min(size), 48))
    assert out.shape == (48, 48, 3) and (out == [200, 10, 10]).all()

def test_the_largest_face_counts(portrait):
    two = Image.new('RGB', (1000, 700), (60, 60, 60))
    two.paste(portrait.resize((128, 150)), (0, 0)); two.paste(portrait, (450, 50))
    face = find_face(two)
    assert face['n_faces'] == 2 and face['landmarks'][:, 0].min() > 450

def test_a_photo_without_a_face_is_left_out_and_named(photos, tmp_path):
    aligned, table = align_faces(image_folder(photos, crop=None), tmp_path/'aligned', 32)
    assert aligned.ids == ['face0.png', 'face1.png'] and aligned.tensor(size=32).shape == (2, 3, 32, 32)
    stored = pd.read_csv(tmp_path/'aligned/alignment.csv').set_index('id')
    assert stored.found.to_dict() == {'face0.png': True, 'face1.png': True, 'sky.png': False} and stored.n_faces['sky.png'] == 0

def test_labels_and_bytes_stay(photos, tmp_path):
    pd.DataFrame(dict(id=['face0.png', 'face1.png', 'sky.png'], label=['a', 'b', 'a'])).to_csv(tmp_path/'labels.csv', index=False)
    images = image_folder(photos, tmp_path/'labels.csv', crop=None)
    one, two = (align_faces(images, tmp_path/d, 32)[0] for d in 'xy')
    assert one.labels == {'face0.png': 0, 'face1.png': 1}
    assert [one.image_hash(i) for i in one.ids] == [two.image_hash(i) for i in two.ids]

def test_a_picture_too_small_for_the_finder_is_left_out_like_one_without_a_face(photos, tmp_path):
    Image.new('RGB', (300, 12), 'white').save(photos/'banner.png')
    try: aligned, table = align_faces(image_folder(photos, crop=None), tmp_path/'aligned', 32)
    finally: (photos/'banner.png').unlink()
    assert aligned.ids == ['face0.png', 'face1.png'] and set(table.id[~table.found]) == {'banner.png', 'sky.png'}

def test_a_finished_alignment_is_found_again_and_a_damaged_or_other_one_is_not(photos, tmp_path, monkeypatch):
    images, out, calls, real = image_folder(photos, crop=None), tmp_path/'aligned', [], align.find_face
    monkeypatch.setattr(align, 'find_face', lambda *a: calls.append(1) or real(*a))
    first, table = align_faces(images, out, 32)
    again, same = align_faces(images, out, 32)
    assert len(calls) == len(images) and again.files == first.files and same.equals(table)
    (out/'000000.png').write_bytes(b'damaged')
    align_faces(images, out, 32)
    assert len(calls) == 2 * len(images)
    align_faces(images.subset(images.ids[:1]), out, 32)
    assert len(calls) == 2 * len(images) + 1

def test_a_renamed_photo_is_aligned_under_its_new_name(photos, tmp_path):
    align_faces(image_folder(photos, crop=None), tmp_path/'aligned', 32)
    (photos/'face0.png').rename(photos/'anna.png')
    try: aligned, _ = align_faces(image_folder(photos, crop=None), tmp_path/'aligned', 32)
    finally: (photos/'anna.png').rename(photos/'face0.png')
    assert sorted(aligned.ids) == ['anna.png', 'face1.png'] and aligned.tensor(size=32).shape == (2, 3, 32, 32)

def test_no_face_at_all_is_a_user_error(tmp_path):
    (tmp_path/'photos').mkdir(); Image.new('RGB', (100, 100)).save(tmp_path/'photos/a.png')
    with pytest.raises(UserError, match='no face was found in any of the 1 photos'): align_faces(image_folder(tmp_path/'photos', crop=None), tmp_path/'out', 32)

def test_probability_out_of_range(photos, tmp_path):
    with pytest.raises(UserError, match='min_probability = 1'): align_faces(image_folder(photos), tmp_path/'out', 32, min_probability=1)

def test_command_line_reports_who_was_left_out(photos, tmp_path, capsys):
    save_unet(tiny_unet(16), tmp_path/'unet')
    clip_folder(tmp_path/'clip')
    code = main([str(photos), '--target', 'a sketch', '--out', str(tmp_path/'out'), '--align', '--unet', str(tmp_path/'unet'), '--clip', str(tmp_path/'clip'),
                 '--t0', '200', '--n-inv', '2', '--n-gen', '2', '--passes', '1', '--device', 'cpu'])
    assert code in (0, None) and 'left out: 1 (sky.png)' in capsys.readouterr().out
    report = json.loads((tmp_path/'out/report.json').read_text())
    assert report['skipped'] == {'sky.png': 'no face was found'} and report['n_images'] == 2
    assert not (tmp_path/'out/images/sky.png').exists() and (tmp_path/'out/images/face0.png').exists()


@pytest.mark.parametrize('damage', [lambda t: t[:-40], lambda t: '[]', lambda t: '{}', lambda t: t.replace('"key"', '"kex"'), lambda t: t.replace('"table"', '"tabel"'), lambda t: t.replace('000000.png', '000001.png'),
                                    lambda t: t.replace('"found"', '"fond"'), lambda t: t.replace('"pictures": {', '"pictures": 7, "x": {'), lambda t: t.replace('1.0', '0.5')])
def test_a_damaged_record_of_an_alignment_costs_work_and_nothing_else(tmp_path, monkeypatch, damage):
    "A found face is stood in for: only the record is on trial."
    (tmp_path/'photos').mkdir()
    for k in range(2): picture(k, (60, 60)).save(tmp_path/'photos'/f'{k}.png')
    calls, points = [], align.TEMPLATE * 40 + 10
    monkeypatch.setattr(align, 'find_face', lambda *a: calls.append(1) or dict(landmarks=points, probability=1., n_faces=1))
    run = lambda: align.align_faces(image_folder(tmp_path/'photos', crop=None), tmp_path/'out', 32)
    first, table = run()
    assert len(calls) == 2 and run()[1].equals(table) and len(calls) == 2
    path = tmp_path/'out/alignment.json'
    path.write_text(damage(path.read_text()))
    again, same = run()
    assert len(calls) == 4 and same.equals(table) and again.manifest().equals(first.manifest())
