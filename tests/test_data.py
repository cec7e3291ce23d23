import csv
import io
import json
import pickle
import random
import re
import zipfile
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import celeba_rows, encoded, picture, write_celeba
from PIL import Image

from diffclip_da import data
from diffclip_da.core import UserError, from_pil
from diffclip_da.store import sha256_bytes, write_json
from diffclip_da.data import (ATTRIBUTE_WORDS, DATASETS, ImageSet, attribute_captions, celeba, check_splits, csv_text, dataset,
                              describe, find_celeba, find_fs2k, fs2k, image_folder, label_indices, labelled_split, load_dataset,
                              read_attribute, read_labels_csv,
                              shipped_faces, toy_faces)
from diffclip_da.pictures import CELEBA_CROP, Store, crop_image


# ---- folders ----------------------------------------------------------------------------------------------------------------

IDS = ['0.png', '1.png', '2.png', '3.png', 'more/4.png', 'more/5.png']


def write_csv(path, ids=IDS, labels=None, header='id,label'):
    labels = labels or ['cat' if k % 2 else 'dog' for k in range(len(ids))]
    path.write_text('\n'.join([header] + [f'{i},{y}' for i, y in zip(ids, labels)]) + '\n')
    return path


def test_folder_ids_are_relative_paths_and_hidden_files_are_skipped(photos):
    (photos/'.hidden.png').write_bytes(b'x')
    (photos/'.thumbs').mkdir()
    (photos/'.thumbs'/'t.jpg').write_bytes(b'x')
    (photos/'notes.txt').write_text('x')
    (photos/'UPPER.JPG').write_bytes(encoded(picture(9)))
    for ext, fmt in (('jpeg', 'JPEG'), ('webp', 'WEBP'), ('bmp', 'BMP')): (photos/f'z.{ext}').write_bytes(encoded(picture(8), fmt))
    s = image_folder(photos)
    assert s.ids == IDS[:4] + ['UPPER.JPG'] + IDS[4:] + ['z.bmp', 'z.jpeg', 'z.webp']
    assert s.labels is None and s.tensor(size=16).shape == (10, 3, 16, 16)


def test_tensor_is_the_cropped_resized_image(photos):
    s = image_folder(photos)
    x = s.tensor(['more/4.png', '0.png'], 16)
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    assert torch.equal(x[0], from_pil(picture(4), 16)) and torch.equal(x[1], from_pil(picture(0), 16))
    assert torch.equal(s.tensor(size=64)[2], from_pil(picture(2)))


def test_labels_meet_images_by_id_whatever_the_order(photos, tmp_path):
    a = image_folder(photos, write_csv(tmp_path/'a.csv'))
    order = list(range(6))
    random.Random(0).shuffle(order)
    assert order != sorted(order)
    b = image_folder(photos, write_csv(tmp_path/'b.csv', [IDS[k] for k in order], [('dog', 'cat')[k % 2] for k in order]))
    assert a.labels == b.labels == {i: 1 - k % 2 for k, i in enumerate(IDS)} and a.classes == ['cat', 'dog']
    assert a.labels_of(['1.png', '0.png']).tolist() == [0, 1] and a.labels_of().dtype == torch.long
    pd.testing.assert_frame_equal(a.manifest(), b.manifest())


def test_numeric_labels_sort_as_numbers(photos, tmp_path):
    s = image_folder(photos, write_csv(tmp_path/'a.csv', labels=['10', '9', '10', '9', '9', '9']))
    assert s.classes == ['9', '10'] and s.counts() == {'9': 4, '10': 2} and repr(s) == 'ImageSet(photos, 6 images: 4 9, 2 10)'


def test_csv_of_other_programs(photos, tmp_path):
    "A byte-order mark, Windows line ends, spaces after commas, further columns."
    (tmp_path/'a.csv').write_bytes(b'\xef\xbb\xbfid, label, note\r\n' + b''.join(f'{i}, {"NA" if k % 2 else "a"}, x\r\n'.encode() for k, i in enumerate(IDS)))
    assert image_folder(photos, tmp_path/'a.csv').classes == ['NA', 'a']   # "NA" is a label, not a missing one


@pytest.mark.parametrize('write', [
    lambda text: text.encode('utf-16'), lambda text: b'\xfe\xff' + text.encode('utf-16-be'), lambda text: text.replace('\n', '\r').encode(),
    lambda text: ('sep=,\n' + text).encode(), lambda text: text.replace('id,label', 'ID,Label').encode(), lambda text: text.replace('/', '\\').encode(),
    lambda text: text.replace('more', './more').encode()])
def test_csv_in_other_encodings_and_spellings(photos, tmp_path, write):
    text = 'id,label\n' + ''.join(f'{i},{"cat" if k % 2 else "Küche"}\n' for k, i in enumerate(IDS))
    (tmp_path/'a.csv').write_bytes(write(text))
    s = image_folder(photos, tmp_path/'a.csv')
    assert s.classes == ['Küche', 'cat'] and s.labels == {i: k % 2 for k, i in enumerate(IDS)}


@pytest.mark.parametrize('text', ['image_id,{0},x\n1.jpg,1,1\n', 'image_id,Male,x\n{0},1,1\n{0},1,1\n'])
def test_long_names_in_a_list_make_no_long_messages(tmp_path, text):
    (tmp_path/'l.csv').write_text(text.format('9' * 5000))
    with pytest.raises(UserError, match=r'l\.csv: .*9\.\.\.9') as e: read_attribute(tmp_path/'l.csv', 'Male')
    assert len(str(e.value)) < 500 + len(str(tmp_path))


def test_accents_may_be_composed_in_the_list_and_not_in_the_folder(tmp_path):
    (tmp_path/'p').mkdir()
    for k, name in enumerate(['e\u0301.png', '\u00fc.png']): picture(k).save(tmp_path/'p'/name)
    (tmp_path/'a.csv').write_text('id,label\n\u00e9.png,a\nu\u0308.png,b\n', encoding='utf-8')
    assert image_folder(tmp_path/'p', tmp_path/'a.csv').labels == {'e\u0301.png': 0, '\u00fc.png': 1}
    (tmp_path/'a.csv').write_text('id,label\n\u00e9.png,a\ne\u0301.png,b\nu\u0308.png,b\n', encoding='utf-8')
    with pytest.raises(UserError, match=r'a\.csv: ids given twice'): image_folder(tmp_path/'p', tmp_path/'a.csv')


@pytest.mark.parametrize('kw, message', [
    (dict(ids=IDS + ['9.png', '8.png', '7.png', '6.png']), r'a\.csv: 4 ids have no image in .*photos: 6\.png, 7\.png, 8\.png and 1 more'),
    (dict(ids=IDS[:4]), r'a\.csv: no line for 2 images of .*photos: more/4\.png, more/5\.png'),
    (dict(ids=IDS + ['0.png']), r'a\.csv: ids given twice: 0\.png'),
    (dict(labels=['cat'] * 6), r'a\.csv: every image has the label cat; a classifier needs images of two classes'),
    (dict(labels=['cat', 'dog', '', 'dog', 'cat', 'dog']), r'a\.csv: no label for 2\.png'),
    (dict(header='file,label'), r'a\.csv: no column id; the first line must be the header "id,label", found "file,label"'),
    (dict(header='0.png,cat'), r'a\.csv: no column id and no column label'),
    (dict(header='id,id,label'), r'a\.csv: the header names the column id twice'),
    (dict(header='id,label,label'), r'a\.csv: the header names the column label twice'),
    (dict(labels=['cat', 'dog', 'cat,x', 'dog', 'cat', 'dog']), r'a\.csv: row 4 has 3 fields, the header 2'),
    (dict(labels=['cat', 'dog', ' ', 'dog', 'cat', 'dog']), r'a\.csv: no label for 2\.png \(row 4\)'),
])
def test_bad_csv(photos, tmp_path, kw, message):
    with pytest.raises(UserError, match=message): image_folder(photos, write_csv(tmp_path/'a.csv', **kw))


def test_unreadable_csv(photos, tmp_path):
    with pytest.raises(UserError, match=r'cannot read .*none\.csv: No such file'): image_folder(photos, tmp_path/'none.csv')
    (tmp_path/'e.csv').write_text('')
    with pytest.raises(UserError, match=r'e\.csv: not a readable CSV .*needs a header line'): image_folder(photos, tmp_path/'e.csv')
    (tmp_path/'h.csv').write_text('<!doctype html><html>')
    with pytest.raises(UserError, match=r'h\.csv: this is a web page'): image_folder(photos, tmp_path/'h.csv')
    (tmp_path/'l.csv').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 99\n')
    with pytest.raises(UserError, match=r'l\.csv only names the file .*git lfs pull'): image_folder(photos, tmp_path/'l.csv')


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(UserError, match=r'nowhere: no such folder'): image_folder(tmp_path/'nowhere')
    (tmp_path/'readme.txt').write_text('x')
    with pytest.raises(UserError, match=r'no images \(\.jpg, .*\) in this folder or below it'): image_folder(tmp_path)


def test_broken_image_in_a_folder_names_it(photos):
    (photos/'more'/'4.png').write_bytes((photos/'more'/'4.png').read_bytes()[:80])
    with pytest.raises(UserError, match=r'photos/more/4\.png: the image is'): image_folder(photos).tensor(size=8)


def test_folder_as_zip_equals_folder(photos, tmp_path):
    with zipfile.ZipFile(tmp_path/'p.zip', 'w') as z:
        for i in IDS: z.write(photos/i, i)
        z.writestr('__MACOSX/._0.png', b'x')
    a, b = image_folder(photos), image_folder(tmp_path/'p.zip')
    assert a.ids == b.ids and torch.equal(a.tensor(size=8), b.tensor(size=8)) and a.manifest().equals(b.manifest())


def test_labels_of_one_value_keep_one_order():
    "1, 01 and 001 are equal as numbers: their order must not follow that of a set, which differs from run to run."
    names = ['1', '01', '001', '2', '02', '-1', '00']
    for k in range(len(names)):
        label = pd.Series({f'{i}.png': n for i, n in enumerate(names[k:] + names[:k])})
        assert label_indices(label, 'l.csv')[1] == ['-1', '00', '001', '01', '1', '02', '2']
    assert label_indices(pd.Series(dict(a='9' * 5000, b='1')), 'l.csv')[1] == ['1', '9' * 5000]


FORMULAS = ['=1+1', '@SUM(A1)', "+cmd|' /C calc'!A0", '-2+3', "'=already", "''-", '=HYPERLINK("http://x.y","a, b")']


def test_formulas_are_written_as_text_and_read_back(tmp_path):
    plain = ['cat', '-1', '+3.5', '-1e-3', '-.5', "it's", "'tis", '']
    table = pd.DataFrame(dict(id=[f'{v}.png' for v in FORMULAS] + [f'{k}.png' for k in range(len(plain) - 1)], label=FORMULAS + plain[:-1], n=3))
    text = csv_text(table)
    (tmp_path/'l.csv').write_text(text)
    again = read_labels_csv(tmp_path/'l.csv')
    assert again.index.tolist() == table.id.tolist() and again.label.tolist() == table.label.tolist()
    cells = list(csv.reader(io.StringIO(text)))[1:]
    assert not any(c[0] in '=@' or c[0] in '+-' and not re.fullmatch(r'[+-][\d.e-]+', c) for r in cells for c in r)
    assert [r[1] for r in cells[len(FORMULAS):]] == plain[:-1]                # what is harmless stays as it is


# ---- classes and captions ---------------------------------------------------------------------------------------------------

def class_folders(root, names, n=4, start=0):
    for c, name in enumerate(names):
        (root/name).mkdir(parents=True)
        for k in range(n): (root/name/f'{k}.png').write_bytes(encoded(picture(start + n * c + k), 'PNG'))
    return root


@pytest.mark.parametrize('rows', [
    ['id,label'] + [f'{i},{"cat" if k % 2 else "dog"} ' for k, i in enumerate(IDS)],                        # spaces
    ['id,label,,'] + [f'{i},{"cat" if k % 2 else "dog"},,' for k, i in enumerate(IDS)],                     # commas at line ends
    ['id,label'] + [f'{i},{"cat" if k % 2 else "dog"},' for k, i in enumerate(IDS)],                        # only below the header
    ['id,label'] + [f'{i},{"cat" if k % 2 else "dog"}' for k, i in enumerate(IDS)] + [',', '', ' , '],      # empty rows
    ['id;label'] + [f'{i};{"cat" if k % 2 else "dog"}' for k, i in enumerate(IDS)],                         # semicolons
    ['id\tlabel'] + [f'{i}\t{"cat" if k % 2 else "dog"}' for k, i in enumerate(IDS)],                       # tabs
])
def test_csv_as_spreadsheets_leave_it(photos, tmp_path, rows):
    (tmp_path/'a.csv').write_text('\n'.join(rows) + '\n')
    s = image_folder(photos, tmp_path/'a.csv')
    assert s.classes == ['cat', 'dog'] and s.counts() == dict(cat=3, dog=3)


def test_folder_per_class(tmp_path):
    s = image_folder(class_folders(tmp_path/'a', ['owl', 'cat', 'dog']), 'folders')
    assert s.classes == ['cat', 'dog', 'owl'] and s.labels['owl/0.png'] == 2 and s.counts() == dict(cat=4, dog=4, owl=4)
    assert s.captions == ['a cat', 'a dog', 'an owl']
    assert labelled_split(s, 7, 0, balanced=True).counts() == dict(cat=3, dog=2, owl=2)
    (tmp_path/'a'/'loose.png').write_bytes(encoded(picture(0), 'PNG'))
    with pytest.raises(UserError, match=r'loose\.png lie in no class folder; with labels="folders"'): image_folder(tmp_path/'a', 'folders')
    with pytest.raises(UserError, match='every image has the label cat'): image_folder(class_folders(tmp_path/'b', ['cat']), 'folders')


def test_a_target_set_takes_the_classes_of_the_source(tmp_path):
    source = image_folder(class_folders(tmp_path/'a', ['x', 'cat', 'dog']), 'folders', classes=['dog', 'x', 'cat'])
    target = image_folder(class_folders(tmp_path/'b', ['cat', 'dog'], start=50), 'folders', classes=source.classes)
    assert target.labels['dog/0.png'] == source.labels['dog/0.png'] == 0 and target.counts() == dict(dog=4, x=0, cat=4)
    image_folder(class_folders(tmp_path/'c', ['cat']), 'folders', classes=source.classes)   # one class of several is enough to be tested on
    with pytest.raises(UserError, match='labels owl are none of the classes dog, x, cat'):
        image_folder(class_folders(tmp_path/'d', ['owl', 'cat']), 'folders', classes=source.classes)


def test_data_loader(photos, tmp_path):
    from torch.utils.data import DataLoader
    s = image_folder(photos, write_csv(tmp_path/'a.csv'))
    x, y = next(iter(DataLoader(s, 6)))
    assert torch.equal(x, s.tensor(size=64)) and torch.equal(y, s.labels_of())
    x, y = s[0]
    assert x.shape == (3, 64, 64) and y == 1 and image_folder(photos)[-1][1] == -1
    s.size = 16
    assert next(iter(DataLoader(s, 2, num_workers=2, shuffle=True)))[0].shape == (2, 3, 16, 16)
    assert len(list(s)) == 6                                                # iteration ends


def test_captions(photos, tmp_path):
    s = image_folder(photos, write_csv(tmp_path/'a.csv'), captions=['a tom', 'a hound'])
    assert s.captions == s.subset(s.ids[:2]).captions == ['a tom', 'a hound'] and image_folder(photos).captions == []
    with pytest.raises(UserError, match='1 captions for 2 classes'): image_folder(photos, tmp_path/'a.csv', captions=['a tom'])
    assert describe('owl') == 'an owl' and describe('man', ['young', 'with a hat', 'who smiles']) == 'a young man with a hat and who smiles'


def test_no_attribute_is_asked_for_in_the_words_of_another():
    said = {a: attribute_captions(a) for a in [*ATTRIBUTE_WORDS, 'Attractive']}
    assert said['Male'] == ['a woman', 'a man'] and said['Smiling'] == ['a serious person', 'a smiling person'] and said['Eyeglasses'][1] == 'a person with glasses'
    assert all(len(set(c)) == 2 for c in said.values())
    assert not any(w in ' '.join(c).split() for a, c in said.items() if a != 'Male' for w in ('man', 'woman', 'male', 'female'))


# ---- ImageSet ---------------------------------------------------------------------------------------------------------------

def test_unknown_ids_and_missing_labels(photos):
    s = image_folder(photos)
    for f in (lambda: s.tensor(['0.png', 'x.png'], 8), lambda: s.pil('x.png'), lambda: s.image_hash('x.png'), lambda: s.subset(['x.png'])):
        with pytest.raises(UserError, match=r'photos .* has no image x\.png'): f()
    with pytest.raises(UserError, match='photos has no labels; build it with labels='): s.labels_of()
    with pytest.raises(UserError, match='must not hold an image twice: 0.png'): s.subset(['0.png', '1.png', '0.png'])


def test_subset_batches_manifest(photos, tmp_path):
    s = image_folder(photos, write_csv(tmp_path/'a.csv'))
    t = s.subset(['3.png', '1.png', 'more/4.png'], 'three')
    assert (t.name, t.ids, len(t), t.labels) == ('three', ['3.png', '1.png', 'more/4.png'], 3, {'3.png': 0, '1.png': 0, 'more/4.png': 1})
    got = list(t.batches(8, 2))
    assert [i for i, _ in got] == [['3.png', '1.png'], ['more/4.png']] and torch.equal(torch.cat([x for _, x in got]), t.tensor(size=8))
    m = t.manifest()
    assert m.index.name == 'id' and m.index.tolist() == t.ids and list(m.columns) == ['label', 'sha256'] and m.label.tolist() == [0, 0, 1]
    assert m.loc['1.png', 'sha256'] == sha256_bytes((photos/'1.png').read_bytes()) == s.image_hash('1.png')
    assert image_folder(photos).manifest().label.isna().all()


def test_empty_tensor(photos): assert image_folder(photos).tensor([], 8).shape == (0, 3, 8, 8)


def test_cache(photos, tmp_path, monkeypatch):
    s, cache = image_folder(photos), tmp_path/'cache'
    x = s.tensor(size=8, cache_dir=cache)
    file, = cache.iterdir()
    with monkeypatch.context() as m:
        m.setattr(ImageSet, 'pil', lambda *a: 1 / 0)                       # nothing is decoded any more
        assert torch.equal(x, image_folder(photos).tensor(size=8, cache_dir=cache))
    s.tensor(size=16, cache_dir=cache)
    s.tensor(s.ids[::-1], 8, cache_dir=cache)
    image_folder(photos, crop=(0, 0, 32, 32)).tensor(size=8, cache_dir=cache)
    assert len(list(cache.iterdir())) == 4                                  # size, order, crop
    (photos/'0.png').write_bytes(encoded(picture(77), 'PNG'))               # a changed image under the old name
    y = image_folder(photos).tensor(size=8, cache_dir=cache)
    assert torch.equal(y[0], from_pil(picture(77), 8)) and torch.equal(y[1:], x[1:])
    file.write_bytes(file.read_bytes()[:100])                               # a broken cache file is made anew
    (photos/'0.png').write_bytes(encoded(picture(0), 'PNG'))
    assert torch.equal(x, image_folder(photos).tensor(size=8, cache_dir=cache))


def test_a_cache_with_a_flipped_bit_is_made_anew_and_named(photos, tmp_path, capsys):
    x = image_folder(photos).tensor(size=8, cache_dir=tmp_path/'cache')
    file, = (tmp_path/'cache').iterdir()
    raw = bytearray(file.read_bytes()); raw[-5] ^= 4; file.write_bytes(raw)
    assert torch.equal(image_folder(photos).tensor(size=8, cache_dir=tmp_path/'cache'), x)
    assert f'{file} is damaged' in capsys.readouterr().out


def test_a_packed_set_is_the_set(photos, tmp_path, monkeypatch):
    s = image_folder(photos)
    packed = s.packed(8, tmp_path/'c')
    assert packed.shape == (6, 3, 8, 8) and torch.equal(packed[:], s.pixels(size=8)) and torch.equal(packed[[4, 1]], s.pixels(['more/4.png', '1.png'], 8))
    with monkeypatch.context() as m:
        m.setattr(ImageSet, 'pil', lambda *a: 1 / 0)                       # nothing is decoded any more
        assert torch.equal(image_folder(photos).packed(8, tmp_path/'c')[:], packed[:])
    (photos/'0.png').write_bytes(encoded(picture(77), 'PNG'))
    other = image_folder(photos).packed(8, tmp_path/'c')
    assert other.path != packed.path and not torch.equal(other[0], packed[0]) and torch.equal(other[1:], packed[1:])


def child(s): return s.tensor(s.ids[:2], 8)


def test_pickle_and_fork(mini_celeba):
    s = celeba(mini_celeba)
    x = child(s)                                                            # the zip is open now
    assert torch.equal(child(pickle.loads(pickle.dumps(s))), x)
    if 'fork' in __import__('multiprocessing').get_all_start_methods():
        read, write = get_context('fork').Pipe(False)
        p = get_context('fork').Process(target=lambda: write.send((s.store.read(s.files[s.ids[0]]), s.store._pid)))
        p.start()
        b, pid = read.recv()
        p.join()
        assert b == s.store.read(s.files[s.ids[0]]) and pid == p.pid        # its own handle


# ---- CelebA -----------------------------------------------------------------------------------------------------------------

def test_celeba(mini_celeba):
    rows = celeba_rows()
    for partition, k, n in (('train', 0, 12), (1, 1, 6), ('test', 2, 6)):
        s = celeba(mini_celeba, partition)
        assert s.ids == [i for i, r in rows.items() if r[0] == k] and len(s) == n
        assert s.labels == {i: rows[i][1] for i in s.ids} and s.classes == ['female', 'male']
        assert s.identity == {i: f'celeba {rows[i][3]}' for i in s.ids}
        assert s.name == f"celeba-{('train', 'valid', 'test')[k]}"
    s = celeba(mini_celeba, 'valid', 'Smiling')
    assert s.classes == ['not Smiling', 'Smiling'] and s.labels == {i: rows[i][2] for i in s.ids}
    assert s.captions == ['a serious person', 'a smiling person'] and celeba(mini_celeba).captions == ['a woman', 'a man']
    assert celeba(mini_celeba, attribute=None).labels is None
    assert s.pil(s.ids[0]).size == (148, 148)
    im = Image.open(io.BytesIO(encoded(picture(int(s.ids[0][:6]), (178, 218)))))
    assert torch.equal(s.tensor(s.ids[:1], 32)[0], from_pil(im.crop(CELEBA_CROP), 32))


def test_celeba_order_of_lines_is_of_no_account(mini_celeba, tmp_path):
    a, b = celeba(mini_celeba), celeba(write_celeba(tmp_path/'b', order=-1))
    assert a.ids == b.ids and a.labels == b.labels and a.identity == b.identity and a.manifest().equals(b.manifest())


def test_celeba_layouts(mini_celeba, tmp_path):
    want = celeba(mini_celeba).manifest()
    write_celeba(tmp_path/'tv'/'celeba', zipped=False)                      # torchvision's: the folder above
    assert celeba(tmp_path/'tv').manifest().equals(want)
    write_celeba(tmp_path/'official')
    for sub, names in dict(Img=['img_align_celeba.zip'], Anno=['list_attr_celeba.txt', 'identity_CelebA.txt'], Eval=['list_eval_partition.txt']).items():
        (tmp_path/'official'/sub).mkdir()
        for n in names: (tmp_path/'official'/n).rename(tmp_path/'official'/sub/n)
    assert celeba(tmp_path/'official').manifest().equals(want)
    (mini_celeba/'img_align_celeba').mkdir()                                # an empty folder beside the zip
    assert celeba(mini_celeba).manifest().equals(want)


@pytest.mark.parametrize('suffix', ['.csv', '.txt'])
def test_celeba_as_kaggle_serves_it(mini_celeba, tmp_path, suffix):
    "Lists as .csv (or such a file renamed), pictures one folder deeper; the same images and labels."
    root, rows = write_celeba(tmp_path/'kaggle', zipped=False), celeba_rows()
    (root/'img_align_celeba').rename(root/'inner')
    (root/'img_align_celeba').mkdir()
    (root/'inner').rename(root/'img_align_celeba'/'img_align_celeba')
    for name in ('list_attr_celeba', 'list_eval_partition', 'identity_CelebA'): (root/f'{name}.txt').unlink()
    sign = lambda v: 2 * v - 1
    (root/f'list_attr_celeba{suffix}').write_text('image_id,Male,Smiling\n' + ''.join(f'{n},{sign(r[1])},{sign(r[2])}\n' for n, r in rows.items()))
    (root/f'list_eval_partition{suffix}').write_text('image_id,partition\n' + ''.join(f'{n},{r[0]}\n' for n, r in rows.items()))
    for split in ('train', 'test'):
        ours, theirs = celeba(root, split, 'Smiling'), celeba(mini_celeba, split, 'Smiling')
        assert ours.ids == theirs.ids and ours.labels == theirs.labels and ours.identity is None


def test_celeba_without_identities(mini_celeba):
    (mini_celeba/'identity_CelebA.txt').unlink()
    assert celeba(mini_celeba).identity is None


def edit(path, f): path.write_text(f(path.read_text()))


@pytest.mark.parametrize('breakage, message', [
    (lambda r: (r/'list_eval_partition.txt').unlink(), r'list_eval_partition\.txt is missing; download it'),
    (lambda r: (r/'list_attr_celeba.txt').unlink(), r'list_attr_celeba\.txt is missing; download it'),
    (lambda r: (r/'img_align_celeba.zip').unlink(), r'no img_align_celeba\.zip and no folder img_align_celeba with images; download'),
    (lambda r: (r/'img_align_celeba.zip').write_text('  <!DOCTYPE html><title>Quota exceeded'), r'img_align_celeba\.zip: this is a web page \(HTML\), not data\. Google Drive.*quota.*delete it'),
    (lambda r: (r/'img_align_celeba.zip').write_bytes((r/'img_align_celeba.zip').read_bytes()[:5000]), r'img_align_celeba\.zip: not a complete zip \(5,000 bytes\).*fetch it again'),
    (lambda r: (r/'list_attr_celeba.txt').write_text('<html>quota'), r'list_attr_celeba\.txt: this is a web page'),
    (lambda r: edit(r/'list_attr_celeba.txt', lambda t: t[:200]), r'list_attr_celeba\.txt: (line \d+ does not hold|\d+ lines, but its first line says 24)'),
    (lambda r: edit(r/'list_attr_celeba.txt', lambda t: t[:t.rindex('000024')]), r'list_attr_celeba\.txt: 23 lines, but its first line says 24; the download was cut short'),
    (lambda r: edit(r/'list_attr_celeba.txt', lambda t: t + t.splitlines()[2] + '\n'), r'list_attr_celeba\.txt: 000001\.jpg is given twice'),
    (lambda r: edit(r/'list_attr_celeba.txt', lambda t: 'hello\n'), r'list_attr_celeba\.txt: not a CelebA attribute file'),
    (lambda r: edit(r/'list_attr_celeba.txt', lambda t: t.replace('000003.jpg', '999999.jpg')), r'list_attr_celeba\.txt: 1 of the 12 images of partition 0 are missing: 000003\.jpg'),
    (lambda r: edit(r/'list_eval_partition.txt', lambda t: t + '000001.jpg 2\n'), r'list_eval_partition\.txt: 000001\.jpg is given twice \(line 25\)'),
    (lambda r: edit(r/'list_eval_partition.txt', lambda t: t + 'oops\n'), r"list_eval_partition\.txt: line 25 is 'oops', expected"),
    (lambda r: edit(r/'list_eval_partition.txt', lambda t: t.replace(' 0\n', ' 1\n')), r'no image belongs to partition 0'),
    (lambda r: edit(r/'list_eval_partition.txt', lambda t: t + '000025.jpg 0\n000026.jpg 0\n'), r'img_align_celeba\.zip: 2 of the 14 images of partition 0 are missing: 000025\.jpg, 000026\.jpg'),
    (lambda r: edit(r/'identity_CelebA.txt', lambda t: t.replace('000002.jpg 0\n', '')), r'identity_CelebA\.txt: 1 of the 12 images of partition 0 are missing: 000002\.jpg'),
    (lambda r: edit(r/'list_attr_celeba.txt', lambda t: t.replace('jpg -1', 'jpg  1')), r'all images of partition 0 have the same value of Male'),
])
def test_broken_celeba(mini_celeba, breakage, message):
    breakage(mini_celeba)
    with pytest.raises(UserError, match=message): celeba(mini_celeba)


def test_celeba_bad_arguments(mini_celeba, tmp_path):
    with pytest.raises(UserError, match=r"no attribute 'Smile'; did you mean Smiling"): celeba(mini_celeba, attribute='Smile')
    with pytest.raises(UserError, match=r"partition 'dev' is none of 'train', 'valid', 'test'"): celeba(mini_celeba, 'dev')
    with pytest.raises(UserError, match=r'nowhere: no such folder'): celeba(tmp_path/'nowhere')


def test_celeba_drops_images_that_are_in_no_list(mini_celeba):
    with zipfile.ZipFile(mini_celeba/'img_align_celeba.zip', 'a') as z: z.writestr('img_align_celeba/900000.jpg', b'x')
    assert len(celeba(mini_celeba)) == 12


def test_truncated_image_and_bad_checksum_inside_a_zip(tmp_path):
    root = write_celeba(tmp_path/'c')
    with zipfile.ZipFile(root/'img_align_celeba.zip', 'w') as z:
        for nm in celeba_rows():
            b = encoded(picture(int(nm[:6]), (178, 218)))
            z.writestr(f'img_align_celeba/{nm}', b[:400] if nm == '000002.jpg' else b)
    s = celeba(root)
    s.tensor(['000001.jpg'], 8)
    with pytest.raises(UserError, match=r'img_align_celeba\.zip:img_align_celeba/000002\.jpg: the image is'): s.tensor(size=8)
    raw = bytearray((root/'img_align_celeba.zip').read_bytes())
    at = raw.index(b'000003.jpg') + 300
    raw[at] ^= 255
    (root/'img_align_celeba.zip').write_bytes(raw)
    with pytest.raises(UserError, match=r'000003\.jpg: cannot be read \(Bad CRC'): celeba(root).tensor(['000003.jpg'], 8)


# ---- FS2K -------------------------------------------------------------------------------------------------------------------

def write_fs2k(root, zipped):
    rows = []
    sizes = {1: (250, 250), 2: (180, 256), 3: (256, 183)}
    with zipfile.ZipFile(root/'fs2k_256.zip', 'w') as z:
        for k in range(12):
            st = k % 3 + 1
            r = dict(photo=f'photo/photo{st}/image{k:04d}.jpg', sketch=f'sketch/sketch{st}/sketch{k:04d}.jpg', gender=['female', 'male'][k // 3 % 2], style=st - 1, smile=k % 2, split='train' if k < 6 else 'test')
            for kind in ('photo', 'sketch'): z.writestr(r[kind], encoded(picture(k + (100 if kind == 'sketch' else 0), sizes[st])))
            rows.append(r)
    (root/'annotations.json').write_text(json.dumps(rows[::-1]))
    if not zipped:
        zipfile.ZipFile(root/'fs2k_256.zip').extractall(root)
        (root/'fs2k_256.zip').unlink()
    return root


@pytest.mark.parametrize('zipped', [True, False])
def test_fs2k(tmp_path, zipped):
    root = write_fs2k(tmp_path, zipped)
    sketch, photo = fs2k(root), fs2k(root, kind='photo', labelled=True)
    assert sketch.labels is None and photo.classes == ['female', 'male']
    assert sketch.ids == photo.ids == ['1/0000', '1/0003', '2/0001', '2/0004', '3/0002', '3/0005'] and sketch.files['2/0001'] == 'sketch/sketch2/sketch0001.jpg'
    assert photo.labels_of(['1/0000', '1/0003']).tolist() == [0, 1]
    assert photo.tensor(size=16).shape == (6, 3, 16, 16) and all(len(set(photo.pil(i).size)) == 1 for i in photo.ids)
    check_splits(sketch, fs2k(root, 'test'))
    with pytest.raises(UserError, match=r'fs2k-sketch-train and fs2k-photo-train share images of the same person \(6\)'): check_splits(sketch, photo)


def test_fs2k_errors(tmp_path):
    with pytest.raises(UserError, match=r'annotations\.json is missing'): fs2k(tmp_path)
    root = write_fs2k(tmp_path, True)
    with pytest.raises(UserError, match=r"split 'valid' is none of 'train', 'test'"): fs2k(root, 'valid')
    with pytest.raises(UserError, match=r"kind 'drawing' is none of"): fs2k(root, kind='drawing')
    with zipfile.ZipFile(root/'fs2k_256.zip', 'w') as z: z.writestr('sketch/sketch1/sketch0000.jpg', b'x')
    with pytest.raises(UserError, match=r'fs2k_256\.zip: 5 images are missing: sketch/'): fs2k(root)
    (root/'fs2k_256.zip').unlink()
    with pytest.raises(UserError, match=r'neither a folder sketch/ nor a zip of images'): fs2k(root)


def test_fs2k_answers_for_gender_and_smiles_only(tmp_path):
    root = write_fs2k(tmp_path, True)
    s = fs2k(root, labelled=True, attribute='Smiling')                      # FS2K writes 0 for a smile
    assert s.classes == celeba_classes('Smiling') and s.captions == ['a serious person', 'a smiling person']
    assert s.labels_of(['1/0000', '1/0003']).tolist() == [1, 0]
    assert fs2k(root, labelled=True).captions == ['a woman', 'a man']
    with pytest.raises(UserError, match=r'FS2K knows nothing of Eyeglasses; it is labelled with Male and Smiling only.*give labelled pictures of your own'):
        fs2k(root, labelled=True, attribute='Eyeglasses')
    fs2k(root, attribute='Eyeglasses')                                      # without labels nobody asks
    (root/'annotations.json').write_text((root/'annotations.json').read_text().replace('"smile": 0, ', ''))
    with pytest.raises(UserError, match=r'annotations\.json: smile of 1/0000.* is none of 1, 0'): fs2k(root, labelled=True, attribute='Smiling')


def celeba_classes(attribute): return [f'not {attribute}', attribute]


def publish_fs2k(root, gender=lambda k: k % 2, endings=('.jpg', '.png', '.JPG')):
    "FS2K as its authors serve it: two lists, names without endings, 0 for a man."
    for kind, style in ((k, s) for k in ('photo', 'sketch') for s in (1, 2, 3)): (root/kind/f'{kind}{style}').mkdir(parents=True)
    for split, ks in dict(train=range(6), test=range(6, 10)).items():
        rows = [dict(image_name=f'photo{k % 3 + 1}/image{k:04d}', skin_patch=[1, 1], hair=0, gender=gender(k), earring=1, smile=k // 2 % 2, frontal_face=0, style=0) for k in ks]
        (root/f'anno_{split}.json').write_text(json.dumps(rows))
        for k in ks:
            for kind, name, fmt in (('photo', 'image', 'JPEG'), ('sketch', 'sketch', 'PNG')):
                (root/kind/f'{kind}{k % 3 + 1}'/f'{name}{k:04d}{endings[k % len(endings)]}').write_bytes(encoded(picture(k + 50 * (kind == 'sketch'), (250, 250)), fmt))
    return root


@pytest.mark.parametrize('below', ['', 'FS2K'])
def test_fs2k_as_its_authors_serve_it(tmp_path, below):
    publish_fs2k(tmp_path/below)
    photo, sketch = fs2k(tmp_path, kind='photo', labelled=True), fs2k(tmp_path, 'test')
    assert photo.ids == ['1/0000', '1/0003', '2/0001', '2/0004', '3/0002', '3/0005'] and photo.files['2/0001'] == 'photo/photo2/image0001.png'
    assert photo.classes == ['female', 'male'] and photo.labels == {i: 1 - int(i[-1]) % 2 for i in photo.ids}     # 0 is a man
    assert fs2k(tmp_path, labelled=True, attribute='Smiling').labels == {i: 1 - int(i[-1]) // 2 % 2 for i in photo.ids}
    assert sketch.ids == ['1/0006', '1/0009', '2/0007', '3/0008'] and sketch.files['3/0008'] == 'sketch/sketch3/sketch0008.JPG' and sketch.labels is None
    assert torch.equal(sketch.tensor(['2/0007'], 16), torch.stack([from_pil(crop_image(picture(57, (250, 250)), 'fs2k'), 16)]))
    check_splits(photo, fs2k(tmp_path, 'test', 'photo'))


@pytest.mark.parametrize('change, message', [
    (lambda r: r[2].pop('image_name'), r'anno_train\.json: pair 3 is not as FS2K is published.*image_name'),
    (lambda r: r[0].update(image_name='photo1/../x'), r'anno_train\.json: pair 1 is not as'),
    (lambda r: r.insert(0, 'text'), r'anno_train\.json: pair 1 is not as'),
    (lambda r: r[1].update(gender=2), r'anno_train\.json: gender of 2/0001 is none of female, male, 1, 0'),
    (lambda r: r[1].update(image_name='photo2/image0099'), r'FS2K: 1 images are missing: photo/photo2/image0099'),
])
def test_published_fs2k_that_is_damaged(tmp_path, change, message):
    notes = publish_fs2k(tmp_path/'FS2K')/'anno_train.json'
    rows = json.loads(notes.read_text()); change(rows); notes.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message): fs2k(tmp_path, kind='photo', labelled=True)


# ---- data sets by name ------------------------------------------------------------------------------------------------------

def test_data_sets_by_name(tmp_path, mini_celeba, monkeypatch):
    assert {'faces', 'celeba', 'fs2k', 'folder', 'toy'} <= set(DATASETS) and DATASETS['celeba'].title == 'CelebA'
    assert load_dataset('celeba', 'valid', mini_celeba, 'Smiling').manifest().equals(celeba(mini_celeba, 'valid', 'Smiling').manifest())
    (tmp_path/'f').mkdir()
    assert load_dataset('fs2k', 'test', write_fs2k(tmp_path/'f', True), 'Smiling').name == 'fs2k-sketch-test'
    toys = {s: load_dataset('toy', s, tmp_path/'t') for s in ('train', 'valid', 'test')}
    check_splits(*toys.values())
    assert toys['train'].ids == toy_faces(tmp_path/'again', 40, 0, 'toy-train').ids and toys['test'].captions == ['a face with long hair', 'a face with a beard']
    with pytest.raises(UserError, match="dataset = 'imagenet'; there are: faces, celeba, fs2k, toy, folder"): load_dataset('imagenet')
    with pytest.raises(UserError, match="attribute = 'Smiling': the shipped faces are labelled female and male only"): load_dataset('faces', attribute='Smiling')
    monkeypatch.delenv('CELEBA', raising=False); monkeypatch.delenv('FS2K', raising=False)
    for name, find in (('celeba', find_celeba), ('fs2k', find_fs2k)):
        with pytest.raises(UserError, match=f'Fetch .*environment variable {name.upper()}'): load_dataset(name)
        with pytest.raises(UserError, match='is not at /nowhere'): find('/nowhere')
        monkeypatch.setenv(name.upper(), str(tmp_path))
        assert find() == tmp_path


def test_a_data_set_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr('diffclip_da.data.DATASETS', dict(DATASETS))
    @dataset('mine', 'my pictures')
    def mine(split, folder='', attribute='Male'): return toy_faces(tmp_path, 4, 0, f'mine-{split}')
    assert load_dataset('mine', 'test').name == 'mine-test'


def test_folder_as_a_data_set_is_split_the_same_way_each_time(tmp_path):
    whole = class_folders(tmp_path/'a', ['cat', 'dog', 'owl'], 40)
    sets = {s: load_dataset('folder', s, whole) for s in ('train', 'valid', 'test')}
    check_splits(*sets.values())
    assert sum(map(len, sets.values())) == 120 and len(sets['train']) > 2 * len(sets['test']) > 2 * len(sets['valid']) > 0
    assert all(s.classes == ['cat', 'dog', 'owl'] for s in sets.values())
    before = sets['test'].ids
    (whole/'cat'/'new.png').write_bytes(encoded(picture(999), 'PNG'))
    assert set(before) <= set(load_dataset('folder', 'test', whole).ids)
    for k, s in enumerate(('train', 'test')): class_folders(tmp_path/'b'/s, ['x', 'y'], start=200 + 50 * k)
    assert load_dataset('folder', 'test', tmp_path/'b').counts() == dict(x=4, y=4)
    with pytest.raises(UserError, match='holds train, test but no folder valid'): load_dataset('folder', 'valid', tmp_path/'b')
    with pytest.raises(UserError, match='no such folder'): load_dataset('folder', 'train', tmp_path/'c')


# ---- splits -----------------------------------------------------------------------------------------------------------------

def test_check_splits(mini_celeba, photos, tmp_path):
    train, valid, test = (celeba(mini_celeba, p) for p in ('train', 'valid', 'test'))
    check_splits(train, valid, test)
    check_splits(train)
    with pytest.raises(UserError, match=r'celeba-train and other share the same images \(1\): 000001\.jpg and 000001\.jpg'): check_splits(valid, train, train.subset(['000001.jpg'], 'other'))
    with pytest.raises(UserError, match=r'a and b share images of the same person \(1\): 000001\.jpg and 000002\.jpg'):
        check_splits(train.subset(['000001.jpg'], 'a'), train.subset(['000002.jpg'], 'b'))
    a = image_folder(photos)
    other = tmp_path/'other'
    other.mkdir()
    (other/'0.png').write_bytes(encoded(picture(50), 'PNG'))
    check_splits(a, image_folder(other))                                    # the same id of another folder is another image
    (other/'copy.png').write_bytes((photos/'3.png').read_bytes())
    with pytest.raises(UserError, match=r'photos and other share byte-identical images \(1\): 3\.png and copy\.png'): check_splits(a, image_folder(other))
    check_splits(a, image_folder(other), content=False)


def test_labelled_split(mini_celeba):
    s = celeba(mini_celeba)
    a, b = labelled_split(s, 5, seed=0), labelled_split(s, 9, seed=0)
    assert b.ids[:5] == a.ids and set(a.labels.values()) == {0, 1}
    shuffled = s.subset(s.ids[::-1])
    assert labelled_split(shuffled, 5, seed=0).ids == a.ids                 # the order of iteration is of no account
    assert any(labelled_split(s, 5, seed=k).ids != a.ids for k in range(1, 4))
    for n in (4, 6, 7):
        c = list(labelled_split(s, n, seed=1, balanced=True).counts().values())
        assert sum(c) == n and abs(c[0] - c[1]) <= 1
    assert a.name == 'celeba-train-5-seed0' and a.identity is not None


def test_labelled_split_errors(mini_celeba):
    s = celeba(mini_celeba)
    for n in (0, 1, 13):
        with pytest.raises(UserError, match=rf'cannot draw {n} of 12 images; n must lie in 2 ... 12'): labelled_split(s, n, 0)
    few = s.subset([i for i in s.ids if s.labels[i]] + [i for i in s.ids if not s.labels[i]][:1])
    with pytest.raises(UserError, match=r'too few images of female \(1\) for 6 in equal parts'): labelled_split(few, 6, 0, balanced=True)
    seed = next(k for k in range(50) if all(few.labels[i] for i in [sorted(few.ids)[j] for j in torch.randperm(7, generator=torch.Generator().manual_seed(k))[:2]]))
    with pytest.raises(UserError, match=r'the 2 images drawn are all of one class; raise n or set balanced=True'): labelled_split(few, 2, seed)
    with pytest.raises(UserError, match='has no labels'): labelled_split(celeba(mini_celeba, attribute=None), 4, 0)


# ---- shipped faces ----------------------------------------------------------------------------------------------------------

def write_faces(root, labels=('female', 'male'), **card):
    (root/'faces').mkdir()
    with zipfile.ZipFile(root/'faces'/'faces.zip', 'w') as z:
        for k in range(8): z.writestr(f'{k:05d}.png', encoded(picture(k), 'PNG'))
    (root/'faces'/'labels.csv').write_text('id,label,split\n' + ''.join(f'{k:05d},{labels[k % 2]},{("train", "train", "valid", "test")[k // 2]}\n' for k in range(8)))
    files = {n: sha256_bytes((root/'faces'/n).read_bytes()) for n in ('faces.zip', 'labels.csv')}
    write_json(root/'faces'/'card.json', dict(files=files, **card))


@pytest.mark.parametrize('labels', [('female', 'male'), ('0', '1')])
def test_shipped_faces(tmp_path, monkeypatch, labels):
    write_faces(tmp_path, labels)
    monkeypatch.setenv('DIFFCLIP_ASSETS', str(tmp_path))
    s = shipped_faces('train')
    assert s.ids == ['00000', '00001', '00002', '00003'] and s.classes == ['female', 'male'] and s.labels_of().tolist() == [0, 1, 0, 1]
    assert len(shipped_faces(None)) == 8 and shipped_faces('test').tensor(size=64).shape == (2, 3, 64, 64)
    check_splits(*(shipped_faces(p) for p in ('train', 'valid', 'test')))
    with pytest.raises(UserError, match=r"split 'dev' is none of train, valid, test"): shipped_faces('dev')


def test_shipped_faces_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv('DIFFCLIP_ASSETS', str(tmp_path))
    with pytest.raises(UserError, match="no shipped asset 'faces'"): shipped_faces()
    write_faces(tmp_path)
    (tmp_path/'faces'/'labels.csv').write_text('id,label,split\n')
    with pytest.raises(UserError, match=r'labels\.csv: SHA-256 is'): shipped_faces()


def test_store_names_what_it_cannot_read(photos):
    s = image_folder(photos)
    (photos/'0.png').unlink()
    with pytest.raises(UserError, match=r'photos/0\.png: cannot be read .*fetch it again'): s.tensor(['0.png'], 8)
    with pytest.raises(UserError, match='cannot be read'): Store(photos).read('nothing.png')


@pytest.mark.parametrize('suffix, fmt', [('.tif', 'TIFF'), ('.tiff', 'TIFF'), ('.gif', 'GIF'), ('.jfif', 'JPEG'), ('.JPG', 'JPEG'), ('.bmp', 'BMP'), ('.webp', 'WEBP')])
def test_whatever_pillow_decodes_is_an_image(tmp_path, suffix, fmt):
    (tmp_path/f'a{suffix}').write_bytes(encoded(picture(3), fmt))
    images = image_folder(tmp_path)
    assert images.ids == [f'a{suffix}'] and images.tensor(size=32).shape == (1, 3, 32, 32) and images.left_out == {}


def test_pictures_that_cannot_be_read_here_are_named_and_never_silently_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'UNREADABLE', ('.heic', '.dng')); monkeypatch.setattr(data, 'IMAGE_SUFFIXES', ('.jpg',))
    for n in ('IMG_1.HEIC', 'b/raw.dng'):
        (tmp_path/'photos'/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'photos'/n).write_bytes(b'....')
    with pytest.raises(UserError, match="2 left out: IMG_1.HEIC: pip install pillow-heif.*; b/raw.dng: a camera's raw file; export"): image_folder(tmp_path/'photos')
    for n in ('a.jpg', 'b.jpg'): (tmp_path/'photos'/n).write_bytes(encoded(picture(1)))
    (tmp_path/'photos/notes.txt').write_text('no picture')
    images = image_folder(tmp_path/'photos')
    assert images.ids == ['a.jpg', 'b.jpg'] and set(images.left_out) == {'IMG_1.HEIC', 'b/raw.dng'}
    (tmp_path/'l.csv').write_text('id,label\na.jpg,x\nb.jpg,y\nIMG_1.HEIC,x\n')
    assert image_folder(tmp_path/'photos', tmp_path/'l.csv').labels == {'a.jpg': 0, 'b.jpg': 1}
