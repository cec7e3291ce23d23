"An evaluation that a reviewer would accept: roles of pictures, intervals, stored answers, and the committed records."
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from conftest import encoded, picture, write_celeba
from diffclip_da.study.baselines import METHODS, QUESTIONS, Method
from diffclip_da.core import UserError
from diffclip_da.data import celeba, fs2k, image_folder, toy_faces
from diffclip_da.study import baselines
from diffclip_da.study.evaluate import (PARTS, Evaluation, check_roles, closed, compare_methods, draw_set, fewer, group_of,
                                        in_classes, manifest_of, variant)
from diffclip_da.study.experiment import Experiment
from diffclip_da.study.profile import get_profile

ROOT = Path(__file__).parents[1]


def write_fs2k(root, n=6):
    "FS2K's layout in small: `n` pairs of each split."
    rows = []
    for split in ('train', 'test'):
        for k in range(n):
            i = f'{split}/photo{1 if split == "train" else 2}/image{k:04}'
            rows.append(dict(photo=f'photo/photo{1 if split == "train" else 2}/image{k:04}.jpg', sketch=f'sketch/sketch{1 if split == "train" else 2}/sketch{k:04}.jpg',
                             gender='female' if k % 2 else 'male', style=0, split=split))
            for kind in ('photo', 'sketch'):
                f = root/rows[-1][kind]
                f.parent.mkdir(parents=True, exist_ok=True)
                f.write_bytes(encoded(picture(k + 50 * (split == 'test') + 100 * (kind == 'sketch'), (64, 64))))
    (root/'annotations.json').write_text(json.dumps(rows))
    return root


@pytest.fixture
def toy(tmp_path): return Evaluation(Experiment(get_profile('toy', seeds='0,1', epochs=1), tmp_path/'runs', tmp_path/'figures', device='cpu'))


@pytest.fixture
def real(tmp_path):
    "The celeba profile on miniatures of both data sets, with toy networks."
    p = get_profile('toy', dataset='celeba', n_train=8, n_valid=4, n_test=4, seeds='0')
    return Evaluation(Experiment(p, tmp_path/'runs', tmp_path/'figures', str(write_celeba(tmp_path/'celeba')), device='cpu'), str(write_fs2k(tmp_path/'fs2k')))


def test_manifest_of_real_data(real):
    m = manifest_of(real)
    assert set(m.role) == {'train', 'select', 'unlabelled', 'oracle', 'test'} and real.name == 'fs2k'
    celeba_test, fs2k_test = set(celeba(real.exp.folder, 'test').ids), set(fs2k(real.fs2k, 'test', 'sketch').ids)
    for r, g in m.groupby('role'): assert (set(g.id) <= celeba_test | fs2k_test) == (r == 'test'), r
    assert len(m[m.role == 'test']) == 4 + 6


def test_what_methods_get_holds_no_test_picture(real):
    "The pictures themselves, not what the table says of them."
    t = real.task()
    given = [v for f in ('source', 'source_valid', 'adapted', 'control', 'drawn', 'oracle') for v in getattr(t, f)[0]] + list(t.target)
    for x, _ in (real.tests['fs2k'], real.tests['original'], real.tests['adapted']):
        for v in x: assert all((v - g).abs().max() > 1e-3 for g in given)


def rows(**changes):
    return pd.DataFrame(dict(role=['train', 'select', 'test'], set='s', split=['train', 'valid', 'test'], id=['a', 'b', 'c'], sha256=['1', '2', '3']) | changes)


@pytest.mark.parametrize('changes, message', [
    (dict(id=['a', 'c', 'c']), '1 test pictures are also used as select, for instance c'), (dict(sha256=['3', '2', '3']), 'also used as train'),
    (dict(split=['test', 'valid', 'test']), '1 pictures of a test split are used as train, for instance a'), (dict(split=['train', 'valid', 'valid']), 'not of a test split'),
    (dict(role=['train', 'tune', 'test']), "role 'tune' is none of"), (dict(role=['train', 'select', 'train']), 'no test pictures')])
def test_roles_are_checked(changes, message):
    check_roles(rows())
    with pytest.raises(UserError, match=re.escape(message)): check_roles(rows(**changes))


def test_a_leak_stops_everything(tmp_path, toy):
    test = toy.exp.splits['test']
    leak = Evaluation(toy.exp, target=dict(train=test, test=draw_set(test, 'pencil', tmp_path/'p', 16)))
    with pytest.raises(UserError, match='16 test pictures are also used as oracle, unlabelled'): manifest_of(leak)


def test_answers_are_found_again_and_made_anew_when_something_changes(toy, monkeypatch, capsys):
    first = toy.answer('adapted', 0, history=True)
    assert set(first['p']) == {'original', 'adapted', 'pencil'} and len(first['history']['epoch']) == 3   # the three tests
    monkeypatch.setattr(METHODS['adapted'], 'fit', lambda *a: pytest.fail('trained again'))
    assert toy.answer('adapted', 0, history=True) == first
    with pytest.raises(pytest.fail.Exception, match='trained again'): toy.answer('adapted', 1)
    toy.exp.profile = get_profile('toy', seeds='0,1', epochs=2)
    with pytest.raises(pytest.fail.Exception, match='trained again'): toy.answer('adapted', 0)


def test_stopped_in_the_middle_goes_on(toy, monkeypatch):
    class Stop(Exception): pass
    def stop(*a): raise Stop
    names = ('source_only', 'grayscale', 'oracle')
    keep = METHODS['oracle'].fit
    monkeypatch.setattr(METHODS['oracle'], 'fit', stop)
    with pytest.raises(Stop): compare_methods(toy, names)
    made = sorted(p.parent.name for p in toy.exp.root.glob('toy/*/answer.json'))
    assert len(made) == 4
    monkeypatch.setattr(METHODS['oracle'], 'fit', keep)
    monkeypatch.setattr(METHODS['source_only'], 'fit', lambda *a: pytest.fail('trained again'))
    assert len(compare_methods(toy, names)) == 3 * 3 * 3 + 2 * 3


def test_deterministic_methods_are_asked_once(toy):
    s = compare_methods(toy, ('source_only', 'clip_zero_shot'))
    assert s['clip_zero_shot/pencil/accuracy']['n_seeds'] == 1 and s['source_only/pencil/accuracy']['n_seeds'] == 2
    with pytest.raises(UserError, match='source_only is what the others are compared with'): compare_methods(toy, ('adapted',))


def test_named_comparisons_get_all_seeds_and_the_others_a_few(toy):
    s = compare_methods(toy, ('source_only', 'oracle', 'grayscale'), few=1)
    n = {m: s[f'{m}/pencil/balanced_accuracy']['n_seeds'] for m in ('source_only', 'oracle', 'grayscale')}
    assert n == dict(source_only=2, oracle=2, grayscale=1)
    assert compare_methods(toy, ('source_only', 'grayscale'))['grayscale/pencil/balanced_accuracy']['n_seeds'] == 2


def test_summary_is_scikit_learns(toy):
    s, (_, y) = compare_methods(toy, ('source_only', 'adapted')), toy.tests['pencil']
    want = [balanced_accuracy_score(y, np.array(toy.answer('adapted', k)['p']['pencil']).argmax(1)) for k in (0, 1)]
    assert s['adapted/pencil/balanced_accuracy']['values'] == pytest.approx(want)
    base = [balanced_accuracy_score(y, np.array(toy.answer('source_only', k)['p']['pencil']).argmax(1)) for k in (0, 1)]
    assert s['adapted_minus_source_only/pencil/balanced_accuracy']['mean'] == pytest.approx(np.mean(want) - np.mean(base))
    assert closed({f'{m}/t/balanced_accuracy': dict(mean=v) for m, v in dict(source_only=.6, a=.7, oracle=.8).items()}, 'a', 't') == pytest.approx(.5)


def test_a_larger_budget_is_compared_with_its_own_photos(toy):
    s = compare_methods(toy, ('source_only', 'source_only_long', 'adapted_long', 'oracle', 'oracle_long'))
    assert {k.split('/')[0] for k in s if '_minus_' in k} == {f'{m}_minus_source_only' for m in ('source_only_long', 'adapted_long', 'oracle', 'oracle_long')} | {f'{m}_minus_source_only_long' for m in ('adapted_long', 'oracle_long')}
    mean = lambda m: s[f'{m}/pencil/balanced_accuracy']['mean']
    assert s['adapted_long_minus_source_only_long/pencil/balanced_accuracy']['mean'] == pytest.approx(mean('adapted_long') - mean('source_only_long'))


def test_drawings_are_the_same_each_time(toy, tmp_path):
    images = toy.exp.splits['test']
    a, b = (draw_set(images, 'pencil', tmp_path/n, 16) for n in 'ab')
    assert torch.equal(a.tensor(a.ids, 16), b.tensor(b.ids, 16)) and a.labels_of(a.ids).tolist() == images.labels_of(images.ids).tolist()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'a').iterdir()}
    draw_set(images, 'pencil', tmp_path/'a', 16)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path/'a').iterdir()} == before


def test_an_answer_hangs_on_what_it_sees_and_on_the_code_that_makes_it(toy, monkeypatch):
    key = lambda ev, m, **kw: ev.answer_key(METHODS[m], 0, ev.tests, False)
    before = {m: key(toy, m) for m in ('source_only', 'adapted', 'pencil_filter', 'clip_zero_shot')}
    assert len(set(before.values())) == 4
    monkeypatch.setitem(METHODS, 'mine', Method(lambda task, seed, tests=None: None))   # a reader's own method
    assert {m: key(toy, m) for m in before} == before and key(toy, 'mine') not in before.values()
    monkeypatch.setitem(baselines.ROWS, 'another', baselines.ROWS['adapted'])
    assert {m: key(toy, m) for m in before} == before
    toy.target['train'].labels = {i: 0 for i in toy.target['train'].ids}   # labels that none of these sees
    assert {m: key(toy, m) for m in before} == before
    other = variant(toy, recipe__seed=5)   # another fine-tuning: only what sees adapted pictures differs, and the adapted test
    same = dict(tests={'original': toy.tests['original']}, history=False, seed=0)
    assert other.answer_key(METHODS['source_only'], **same) == toy.answer_key(METHODS['source_only'], **same)
    assert other.answer_key(METHODS['adapted'], **same) != toy.answer_key(METHODS['adapted'], **same)


# any number of classes

@pytest.fixture
def three(tmp_path):
    "Three classes in folders; the target's folders are numbered the other way round by its CSV."
    def write(name, colours, k0):
        rows = []
        for k in range(12):
            c = list(colours)[k % 3]
            f = tmp_path/name/(c if name != 'target' else '')/f'{name}{k}.png'
            f.parent.mkdir(parents=True, exist_ok=True)
            im = picture(k + k0, (24, 24))
            f.write_bytes(encoded(Image.blend(im, Image.new('RGB', im.size, colours[c]), .7), 'PNG'))
            rows.append((f.name, c))
        return rows
    colours = dict(ant='red', bee='green', cat='blue')
    for k, s in enumerate(('train', 'valid', 'test')): write(s, colours, 100 * k)
    rows = write('target', dict(reversed(colours.items())), 500)
    (tmp_path/'target'/'labels.csv').write_text('id,label\n' + ''.join(f'{i},{c}\n' for i, c in rows))
    sets = {s: image_folder(tmp_path/s, labels='folders') for s in ('train', 'valid', 'test')}
    target = image_folder(tmp_path/'target', labels=tmp_path/'target'/'labels.csv', classes=['cat', 'bee', 'ant'])
    exp = Experiment(get_profile('toy', seeds='0', epochs=6, training__batch_size=4), tmp_path/'runs', sets=sets, device='cpu')
    halves = dict(train=target.subset(target.ids[:6]), test=target.subset(target.ids[6:]))
    return Evaluation(exp, target=halves)


def test_three_classes_and_a_target_in_another_order(three):
    assert three.exp.splits['train'].classes == ['ant', 'bee', 'cat'] == three.target['test'].classes
    assert three._target['test'].classes == ['cat', 'bee', 'ant'] and three.name == 'target'
    s = compare_methods(three, ('source_only', 'oracle', 'clip_zero_shot'))
    p = np.array(three.answer('source_only', 0)['p']['target'])
    assert p.shape == (6, 3) and p.sum(1) == pytest.approx(1)
    y = three.tests['target'][1]
    assert s['source_only/target/accuracy']['mean'] == pytest.approx((p.argmax(1) == y.numpy()).mean())
    assert s['source_only/target/balanced_accuracy']['mean'] > .6   # colours tell, in either order of the folders
    assert three.task(()).captions == ('an ant', 'a bee', 'a cat')


def test_other_classes_are_refused(three, tmp_path):
    with pytest.raises(UserError, match='has the classes long hair, beard, the source has ant, bee, cat'):
        in_classes(toy_faces(tmp_path/'f', 4, 0), ['ant', 'bee', 'cat'])


def test_an_attribute_other_than_gender_is_not_scored_by_gender(tmp_path):
    p = get_profile('toy', dataset='celeba', attribute='Young', n_train=8, n_valid=4, n_test=4, seeds='0')
    root = write_celeba(tmp_path/'celeba')
    text = (root/'list_attr_celeba.txt').read_text().replace('Smiling', 'Young')
    (root/'list_attr_celeba.txt').write_text(text)
    ev = Evaluation(Experiment(p, tmp_path/'runs', folder=str(root), device='cpu'), str(write_fs2k(tmp_path/'fs2k')))
    with pytest.raises(UserError, match='Young'): ev.target
    assert not any('woman' in c or c == 'a man' for c in ev.exp.splits['train'].captions)


def test_fewer_keeps_the_share_of_the_classes(toy):
    whole = toy.task(('adapted', 'varied'))
    t = fewer(whole, 8)
    assert len(t.source[1]) == 8 and t.source[1].float().mean() == .5 and len(whole.source[1]) == 24
    assert torch.equal(t.varied[0][1], whole.varied[0][1][[i for i in range(24) if any(torch.equal(whole.source[0][i], v) for v in t.source[0])]])
    assert fewer(whole, 24) is whole


def test_every_part_is_made(toy):
    t = toy.task()
    assert all(getattr(t, f) is not None for f in PARTS) and t.varied[0].shape == (2, 24, 3, 16, 16)
    assert not torch.equal(t.control[0], t.source[0]) and torch.equal(t.control[1], t.source[1])


def test_groups_say_what_is_seen():
    assert {group_of(m) for m in ('source_only', 'grayscale', 'pencil_filter', 'control_reconstruction')} == {'source only'}
    assert (group_of('adapted'), group_of('dann'), group_of('clip_zero_shot'), group_of('oracle')) == ('words', 'target pictures', 'the guide', 'target labels')


MANIFESTS = sorted((ROOT/'figures').glob('*/manifest.csv'))


MADE = pytest.mark.skipif(not (ROOT/'figures/celeba64/figure24.json').exists(), reason='figures/celeba64/figure24.json is still to be made: make results PROFILE=celeba64 ...')


@MADE
def test_there_are_manifests(): assert {p.parent.name for p in MANIFESTS} >= {'celeba64'}


@pytest.mark.parametrize('path', MANIFESTS, ids=lambda p: p.parent.name)
def test_committed_runs_never_touched_a_test_picture(path):
    m = pd.read_csv(path, dtype=str)
    check_roles(m)
    assert len(m[m.role == 'oracle']) and len(m[m.role == 'test']) >= 300


@MADE
def test_committed_baselines():
    r = json.loads((ROOT/'figures/celeba64/figure24.json').read_text())
    s, seeds = r['summary'], r['seeds']
    assert len(seeds) >= 5
    named = next(iter(QUESTIONS.values()))
    for m in (m for m in METHODS if not m.endswith('_long')):
        for t in ('original', 'adapted', 'fs2k'):
            e = s[f'{m}/{t}/balanced_accuracy']
            assert e['n_seeds'] == (1 if not METHODS[m].seeded else len(seeds) if m in named else 3) and 'over' in e['interval']
            assert (e['ci95'] is None) == (e['n_seeds'] == 1)
        if m != 'source_only': assert 'bootstrap' in s[f'{m}_minus_source_only/fs2k/balanced_accuracy']['interval']
