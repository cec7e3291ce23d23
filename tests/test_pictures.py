"What a folder or a zip of a stranger may hold: each file is a picture, or a `UserError` that names it."
import io
import os
import socket
import struct
import zipfile
import zlib

import numpy as np
import pytest
from conftest import encoded, picture
from PIL import Image

from diffclip_da import pictures
from diffclip_da.core import UserError
from diffclip_da.data import image_folder
from diffclip_da.pictures import (CELEBA_CROP, Store, check_names, crop_image, decode, odd_name, to_rgb, walk_files,
                                  why_unreadable)


# ---- decoding ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode, colour, want', [
    ('RGB', (10, 20, 30), (10, 20, 30)),
    ('L', 77, (77, 77, 77)),
    ('1', 1, (255, 255, 255)),
    ('RGBA', (255, 0, 0, 0), (255, 255, 255)),
    ('RGBA', (255, 0, 0, 128), (255, 127, 127)),
    ('LA', (0, 51), (204, 204, 204)),
    ('CMYK', (0, 255, 255, 0), (255, 0, 0)),
    ('CMYK', (0, 0, 0, 255), (0, 0, 0)),
])
def test_modes(mode, colour, want):
    im = to_rgb(Image.new(mode, (2, 2), colour))
    assert im.mode == 'RGB' and im.getpixel((0, 0)) == want


@pytest.mark.parametrize('value, want', [(0, 0), (257, 1), (32896, 128), (65535, 255)])
def test_16_bit_grey_png(value, want):
    im = decode(encoded(Image.fromarray(np.full((3, 3), value, np.uint16)), 'PNG'), 'deep.png')
    assert im.mode == 'RGB' and im.getpixel((1, 1)) == (want,) * 3


def test_palette_with_and_without_transparency():
    im = Image.new('P', (2, 1))
    im.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    im.putpixel((1, 0), 1)
    rgb = decode(encoded(im, 'PNG'), 'p.png')
    assert [rgb.getpixel((k, 0)) for k in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    clear = decode(encoded(im, 'PNG', transparency=1), 'p.png')
    assert [clear.getpixel((k, 0)) for k in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_odd_metadata_never_stops_a_picture():
    "A resolution written as text, as one camera does: turning the picture rewrites its tags and fails."
    entries = struct.pack('<HHIHxx', 274, 3, 1, 6) + struct.pack('<HHII', 282, 2, 12, 38)
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + entries + struct.pack('<I', 0) + b'seventy-two\0'
    assert decode(encoded(picture(1), exif=exif), 'phone.jpg').size == (64, 64)


def test_whatever_a_decoder_raises_is_a_user_error(monkeypatch):
    def broken(*a): raise ZeroDivisionError('in a codec')
    monkeypatch.setattr(Image, 'open', broken)
    with pytest.raises(UserError, match='odd.tif: the image is damaged'): decode(b'II*', 'odd.tif')


def test_exif_orientation_is_applied():
    im = Image.new('RGB', (40, 20), 'black')
    im.paste('white', (0, 0, 20, 20))
    exif = Image.Exif()
    exif[274] = 6   # to be turned by 90 degrees clockwise: what is at the left comes to the top
    up = decode(encoded(im, exif=exif), 'phone.jpg')
    assert up.size == (20, 40) and up.getpixel((10, 5))[0] > 200 and up.getpixel((10, 35))[0] < 50


@pytest.mark.parametrize('fmt', ['JPEG', 'PNG', 'WEBP', 'BMP'])
def test_truncated_image_names_the_file(fmt):
    b = encoded(Image.effect_noise((64, 64), 60).convert('RGB'), fmt)
    with pytest.raises(UserError, match=r'photos/face\.x: the image is (truncated|damaged).*fetch it again or delete it'): decode(b[:len(b) // 2], 'photos/face.x')


def test_other_bytes_are_no_image():
    with pytest.raises(UserError, match=r'a\.jpg: the image is damaged, or not an image'): decode(b'<html>not found</html>', 'a.jpg')
    with pytest.raises(UserError, match=r'a\.jpg: the file is empty'): decode(b'', 'a.jpg')


def test_crops():
    im = picture(0, (178, 218))
    assert np.array_equal(np.asarray(crop_image(im, CELEBA_CROP)), np.asarray(im)[40:188, 15:163])
    assert np.array_equal(np.asarray(crop_image(im, 'center')), np.asarray(im)[20:198])
    assert crop_image(im, None).size == (178, 218)
    for size in [(250, 250), (180, 256), (256, 183), (1000, 1000), (90, 128)]:
        w, h = crop_image(Image.new('RGB', size), 'fs2k').size
        assert w == h > .75 * min(size)
    with pytest.raises(UserError, match=r"small\.jpg: crop \(15, 40, 163, 188\) does not fit a picture of 64 x 64 pixels; give another crop"): crop_image(picture(0), CELEBA_CROP, 'small.jpg')


pytestmark = pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')   # pytest resets what the module set


# ---- what a picture may declare ---------------------------------------------------------------------------------------------

def png(w, h, data, interlaced=0, depth=8, colour=0):
    "A PNG of these unpacked bytes, rows with their filter byte."
    def chunk(kind, b): return struct.pack('>I', len(b)) + kind + b + struct.pack('>I', zlib.crc32(kind + b))
    head = struct.pack('>IIBBBBB', w, h, depth, colour, 0, 0, interlaced)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')


def test_a_png_that_declares_more_than_it_holds_costs_nothing(monkeypatch):
    monkeypatch.setattr(Image.core, 'new', lambda *a: pytest.fail('memory was set aside'))
    row = b'\0' + bytes(10_000)
    with pytest.raises(UserError, match=r'bomb\.png: the image is truncated \(rows are missing'): decode(png(10_000, 10_000, row), 'bomb.png')
    with pytest.raises(UserError, match=r'bomb\.png: 13,000 x 13,000 pixels are 169 megapixels; at most 120 are read here'): decode(png(13_000, 13_000, row), 'bomb.png')
    with pytest.raises(UserError, match=r'bomb\.png: it declares more than 120 megapixels.*save it smaller'): decode(png(60_000, 60_000, row), 'bomb.png')


@pytest.mark.parametrize('interlaced, n', [(0, 8 * 9), (1, 2 + 2 + 3 + 2 * 3 + 2 * 5 + 4 * 5 + 4 * 9)])
def test_rows_of_a_png_are_counted(interlaced, n):
    assert decode(png(8, 8, bytes(n), interlaced), 'a.png').getextrema() == ((0, 0),) * 3
    with pytest.raises(UserError, match='rows are missing'): decode(png(8, 8, bytes(n - 1), interlaced), 'a.png')
    assert decode(png(3, 5, bytes(5 * 2), depth=1), 'a.png').size == (3, 5)      # three pixels to a byte


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'])
def test_whole_pngs_of_every_mode_are_read(mode):
    im = picture(0, (37, 21)).convert('L' if mode == 'I;16' else mode)
    if mode == 'I;16': im = Image.fromarray(np.asarray(im).astype(np.uint16) * 257)
    assert decode(encoded(im, 'PNG'), 'a.png').size == (37, 21)


def test_a_huge_jpeg_is_read_smaller_and_not_called_damaged(monkeypatch):
    monkeypatch.setattr(pictures, 'MOST_PIXELS', 5_000)
    big = encoded(picture(3, (128, 96)))
    assert decode(big, 'phone.jpg').size == (64, 48)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 5_000)                        # what Pillow refuses by itself
    small = decode(big, 'phone.jpg')
    assert small.size == (64, 48) and np.abs(np.asarray(small, float) - np.asarray(picture(3, (128, 96)).resize((64, 48)), float)).mean() < 3
    for b, whole in ((big, True), (encoded(picture(3, (128, 96)), progressive=True), False), (encoded(picture(0, (512, 512))), False), (encoded(picture(3, (100, 60)), 'BMP'), False)):
        with pytest.raises(UserError, match=r'phone\.jpg: [\d,]+ x [\d,]+ pixels are .* megapixels; at most 0 are read here: save it smaller'): decode(b, 'phone.jpg', whole)


def test_a_box_is_never_cut_from_a_picture_that_was_made_smaller(tmp_path, monkeypatch):
    (tmp_path/'a.jpg').write_bytes(encoded(picture(3, (128, 96))))
    monkeypatch.setattr(pictures, 'MOST_PIXELS', 5_000)
    assert image_folder(tmp_path).pil('a.jpg').size == (48, 48)
    with pytest.raises(UserError, match='megapixels'): image_folder(tmp_path, crop=(0, 0, 40, 40)).pil('a.jpg')


def test_numbers_whose_range_is_unknown_are_refused():
    with pytest.raises(UserError, match=r'depth\.tif: its pixels are floating-point numbers.*8 or 16 bits'):
        decode(encoded(Image.new('F', (4, 4), .5), 'TIFF'), 'depth.tif')


def test_only_formats_of_photos_are_tried():
    "PostScript would be run by Ghostscript, whatever the file is called."
    with pytest.raises(UserError, match=r'a\.jpg: the image is damaged, or not an image'): decode(encoded(picture(0), 'EPS'), 'a.jpg')
    with pytest.raises(UserError, match=r'a\.jpg: the image is damaged, or not an image'): decode(encoded(picture(0), 'TGA'), 'a.jpg')


def test_memory_that_runs_out_is_not_called_damage(monkeypatch):
    def full(*a, **kw): raise MemoryError
    monkeypatch.setattr(pictures, 'to_rgb', full)
    with pytest.raises(UserError, match=r'a\.png: not enough memory to decode'): decode(encoded(picture(0), 'PNG'), 'a.png')


def test_each_kind_that_is_not_read_has_its_own_advice():
    assert 'pillow-heif' in why_unreadable('IMG_1.HEIC') and 'heif' not in why_unreadable('a.dng') and 'raw file' in why_unreadable('b/A.DNG')
    assert why_unreadable('a.psd').endswith('save it as JPEG or PNG')


# ---- folders ----------------------------------------------------------------------------------------------------------------

def test_linked_folders_are_read_once_and_never_in_a_circle(photos, tmp_path):
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'elsewhere/x.png').write_bytes(encoded(picture(8), 'PNG'))
    (photos/'linked').symlink_to(tmp_path/'elsewhere')
    (photos/'a_circle').symlink_to(photos)
    (photos/'more/twin').symlink_to(photos/'more')
    s = image_folder(photos)
    assert 'linked/x.png' in s.ids and len(s) == 7 and s.tensor(['linked/x.png'], 8).shape == (1, 3, 8, 8)
    assert set(s.left_out) == {'a_circle/', 'more/twin/'} and 'under another name' in s.left_out['a_circle/']


def test_what_cannot_be_read_in_a_folder_is_named(photos, monkeypatch):
    os.mkfifo(photos/'pipe.jpg')
    (photos/'gone.png').symlink_to(photos/'nothing.png')
    (photos/'note').symlink_to(photos/'nothing.txt')                             # no picture: nobody misses it
    scandir = os.scandir
    def denied(path):
        if str(path).endswith('more'): raise PermissionError(13, 'Permission denied')
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', denied)
    s = image_folder(photos)
    assert s.left_out == {'gone.png': 'a link that leads nowhere', 'more/': 'a folder that cannot be read (Permission denied); give yourself the right',
                          'pipe.jpg': 'a pipe, a socket or a device, not a file'}
    assert s.ids == ['0.png', '1.png', '2.png', '3.png']
    (photos/'l.csv').write_text('id,label\n' + ''.join(f'{k}.png,{k % 2}\n' for k in range(4)) + 'more/4.png,1\n')
    with pytest.raises(UserError, match=r'1 ids have no image.*more/4\.png.*not read there: gone\.png, more/, pipe\.jpg'): image_folder(photos, photos/'l.csv')


def test_a_folder_with_nothing_but_odd_things_says_so(tmp_path):
    os.mkfifo(tmp_path/'pipe.jpg')
    with pytest.raises(UserError, match=r'no images .*1 left out: pipe\.jpg: a pipe'): image_folder(tmp_path)


def sparse(path, size):
    with open(path, 'wb') as f: f.truncate(size)
    return path


def test_pipes_sockets_devices_and_holes_are_looked_at_before_they_are_opened(photos, tmp_path):
    os.mkfifo(tmp_path/'pipe')
    server = socket.socket(socket.AF_UNIX); server.bind(str(tmp_path/'s'))
    for path, kind in ((tmp_path/'pipe', 'a pipe'), (tmp_path/'s', 'a socket'), ('/dev/zero', 'a device'), (photos, 'a folder')):
        with pytest.raises(UserError, match=f'cannot read {path}: it is {kind}, not a file'): image_folder(photos, path)
        if path != photos:
            with pytest.raises(UserError, match=f'cannot read {path}: it is {kind}'): image_folder(path)
    server.close()
    with pytest.raises(UserError, match=r'l\.csv: it has 20,000,000,000 bytes, more than the 67,108,864'): image_folder(photos, sparse(tmp_path/'l.csv', 20 * 10**9))
    sparse(photos/'0.png', 20 * 10**9)
    with pytest.raises(UserError, match=r'photos/0\.png: cannot be read .*20,000,000,000 bytes, more than'): image_folder(photos).tensor(['0.png'], 8)


# ---- zips -------------------------------------------------------------------------------------------------------------------

def zipped(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', method) as z:
        for n, b in files.items(): z.writestr(n, b)
    return path


def patched(path, at, value, n=2):
    "Change a field of every entry in a zip's list of contents: its offset there."
    raw = bytearray(path.read_bytes())
    k = raw.find(b'PK\1\2')
    while k >= 0:
        raw[k + at:k + at + n] = value.to_bytes(n, 'little')
        k = raw.find(b'PK\1\2', k + 4)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize('at, value, n, said', [
    (8, 1, 2, 'it is encrypted'), (10, 9, 2, r'its compression \(method 9\) is not known here'), (24, 8_000_000, 4, 'would become 8,000,000'), (24, 2**32 - 2, 4, 'would become 4,294,967,294')])
def test_zip_entries_that_cannot_be_unpacked_are_named_before_any_work(tmp_path, at, value, n, said):
    path = patched(zipped(tmp_path/'p.zip', {'b/0.png': encoded(picture(0), 'PNG')}), at, value, n)
    with pytest.raises(UserError, match=rf'p\.zip:b/0\.png: {said}|p\.zip:b/0\.png: its [\d,]+ bytes {said}'): image_folder(path)


def test_zip_bombs_are_refused_and_plain_files_beside_the_pictures_are_not(tmp_path):
    with pytest.raises(UserError, match=r'p\.zip:a\.bmp: its [\d,]+ bytes would become 30,000,000; unpack the archive yourself'): image_folder(zipped(tmp_path/'p.zip', {'a.bmp': bytes(30_000_000)}))
    assert image_folder(zipped(tmp_path/'q.zip', {'0.png': encoded(picture(0), 'PNG'), 'notes.txt': bytes(30_000_000)})).ids == ['0.png']
    patched(zipped(tmp_path/'o.zip', {f'{k}.png': encoded(picture(k), 'PNG') for k in range(4)}, zipfile.ZIP_STORED), 20, 4_000, 4)
    with pytest.raises(UserError, match=r'o\.zip: its files overlap'): image_folder(tmp_path/'o.zip')


def test_a_zip_that_holds_more_than_it_says(tmp_path):
    b = encoded(picture(0), 'PNG')
    s = image_folder(patched(zipped(tmp_path/'p.zip', {'0.png': b}), 24, len(b) - 9, 4))
    with pytest.raises(UserError, match=r'p\.zip:0\.png: cannot be read'): s.tensor(size=8)


@pytest.mark.parametrize('name', ['../../0.png', '/0.png', 'C:/0.png', 'a//0.png'])
def test_zips_cannot_place_files_elsewhere(tmp_path, name):
    with pytest.raises(UserError, match='is no path below the folder; rename the file'): image_folder(zipped(tmp_path/'p.zip', {name: b'x'}))


# ---- names ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, why', [
    (b'a\rb.png', 'a line break'), (b'a\nb.png', 'a line break'), (b'\x7f.png', 'control character'), (b'\xff\xfe.png', 'is not UTF-8'), (b'a\\b.png', 'a backslash'),
    (b'x' * 240 + b'.png', 'is 244 bytes long, more than 220'), (b' a.png', 'begins or ends with a space')])
def test_odd_file_names_are_refused_before_any_work(photos, name, why):
    with open(os.path.join(os.fsencode(photos), name), 'wb') as f: f.write(encoded(picture(0), 'PNG'))
    with pytest.raises(UserError, match=f'photos: the name .* {why}.*; rename the file') as e: image_folder(photos)
    str(e.value).encode('ascii')                                                 # fit for any console


@pytest.mark.parametrize('a, b', [('cat.jpg', 'Cat.jpg'), ('Dog/1.png', 'dog/1.png'), ('caf\u00e9.png', 'cafe\u0301.png'), ('STRASSE.png', 'stra\u00dfe.png')])
def test_names_that_are_one_file_elsewhere_are_refused(tmp_path, a, b):
    with pytest.raises(UserError, match='are one file on Windows and macOS; rename one of them'): image_folder(zipped(tmp_path/'p.zip', {a: b'x', b: b'x'}))
    check_names([a, 'x' + b], 'here')


def test_usual_names_are_fine():
    for n in ('a.jpg', 'b/\u0444\u043e\u0442\u043e 1.png', '-1.png', '@home.jpg', "it's.png", '#50%.webp', 'a.b.c.png', '\u732b.png'): assert odd_name(n) is None


def test_a_heic_picture_under_another_name_is_called_so():
    head = b'\0\0\0\x24ftypheic' + b'\0' * 60
    with pytest.raises(UserError, match=r'IMG_1.jpg: a HEIC picture, whatever its name says: pip install pillow-heif'):
        decode(head, 'IMG_1.jpg')
