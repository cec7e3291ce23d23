"Figure 35's parts: what may be seen is seen, what may not is not, and the keys are those that others read."
from dataclasses import replace

import numpy as np
import pytest

from diffclip_da.study.evaluate import Evaluation, manifest_of
from diffclip_da.study.experiment import Experiment
from diffclip_da.study.profile import get_profile
from diffclip_da.study.unlabelled import (SETS, UNLABELLED, answers_of, called, difference, domains_of, entries, features_of, fit_regression,
                                          reader, shift_of_shares, skewed, some, training_sets, unlabelled_curve)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp('unlabelled')
    ev = Evaluation(Experiment(get_profile('toy', seeds='0'), root/'runs', root/'figures', device='cpu'))
    clip = ev.part('clip')
    return ev, clip, domains_of(ev, clip)[ev.name]


def test_keys_for_every_set_and_every_number_of_pictures(toy):
    ev, clip, d = toy
    s, strengths = unlabelled_curve(ev, clip, {ev.name: d}, draws=2)
    for m in map(called, UNLABELLED):
        for n in (*SETS, 'zero_shot', 'oracle'):
            assert 0 <= s[f'guide/{n}/{m}/pencil/balanced_accuracy']['mean'] <= 1 and f'guide/{n}/{m}/pencil/auroc' in s
        assert s[f'guide/adapted_minus_photos/{m}/pencil/balanced_accuracy']['mean'] == pytest.approx(
            s[f'guide/adapted/{m}/pencil/balanced_accuracy']['mean'] - s[f'guide/photos/{m}/pencil/balanced_accuracy']['mean'])
    assert set(strengths) == set(SETS) and called(None) == 'm=all' and called(16) == 'm=16'


def test_nothing_is_chosen_by_labels_of_the_target_or_by_test_pictures(toy):
    "The target's labels turned round, its test pictures replaced by noise: every choice stays, and every answer but the oracle's."
    ev, clip, d = toy
    other = replace(d, train=(d.train[0], 1 - d.train[1]), test=(np.random.default_rng(0).normal(size=d.test[0].shape), d.test[1]))
    (_, a), (_, b) = (unlabelled_curve(ev, clip, {ev.name: x}, ms=(0,), draws=1) for x in (d, other))
    assert a == b
    turned = replace(d, train=(d.train[0], 1 - d.train[1]))
    (s, _), (t, _) = (unlabelled_curve(ev, clip, {ev.name: x}, ms=(4, None), draws=2) for x in (d, turned))
    same = {k for k in s if s[k] == t[k]}
    assert {k for k in s if 'oracle' not in k} <= same and any(k not in same for k in s if 'oracle' in k)
    roles = manifest_of(ev)   # refuses a test picture that has another role
    assert set(roles[roles.role == 'unlabelled'].split) == {'train'}


def test_draws_are_of_the_training_pictures_and_repeat_themselves(toy):
    _, _, d = toy
    z = d.train[0]
    a, b = some(z, 4, 0), some(z, 4, 1)
    assert len(a) == 4 and np.array_equal(a, some(z, 4, 0)) and not np.array_equal(a, b)
    assert all((row == z).all(1).any() for row in a) and some(z, None, 0) is z and some(z, len(z) + 1, 3) is z and len(some(z, 0, 0)) == 0


def test_a_skewed_pool_has_the_share_that_was_asked_for(toy):
    _, _, d = toy
    y = np.arange(40) % 2
    d = replace(d, train=(y[:, None] * 1., y))
    for share in (.1, .5, .9): assert skewed(d, share, 20, 0).mean() == pytest.approx(share)
    assert len(skewed(d, .9, 40, 0)) == 20 + 4   # there are no more of class 1


def test_differences_are_paired_whatever_the_number_of_draws(toy):
    _, _, d = toy
    y = d.test[1]
    sure, flat = np.eye(2)[y][None], np.full((3, len(y), 2), .5)
    flat[..., 0] += .01                                     # class 0, always
    s = difference(y, sure, flat)
    assert s['mean'] == pytest.approx(.5) and s['n_seeds'] == 3 and s['ci95'] == pytest.approx([.5, .5])
    assert entries(y, sure)['auroc']['mean'] == 1 and entries(y, flat)['balanced_accuracy']['mean'] == .5


def test_a_reader_of_other_recipes_gives_the_curves_entry(toy):
    ev, clip, d = toy
    s, _ = unlabelled_curve(ev, clip, {ev.name: d}, ms=(4,), draws=2, names=('photos', 'adapted'))
    found = reader(ev, clip, 4, draws=2)(ev, ('photos', 'adapted'))
    assert found == {n: s[f'guide/{n}/m=4/pencil/balanced_accuracy'] for n in ('photos', 'adapted')}


def test_features_are_cached_by_pictures_and_guide(toy, monkeypatch):
    from diffclip_da.study import unlabelled
    ev, clip, _ = toy
    x = ev.tests[ev.name][0]
    a = features_of(ev, clip, x)
    monkeypatch.setattr(unlabelled, 'cached_tensor', lambda file, key, make: pytest.fail('computed again') if not file.exists() else unlabelled_tensor(file))
    from safetensors.torch import load_file
    unlabelled_tensor = lambda file: load_file(file)['tensor']
    assert np.array_equal(features_of(ev, clip, x), a)


def test_all_pictures_are_one_answer_and_shares_have_two_ways(toy):
    ev, clip, d = toy
    probe = fit_regression(training_sets(ev, clip, ('photos',))['photos'])
    assert [answers_of(probe, d, m, 3).shape for m in (0, 4, None)] == [(1, len(d.test[1]), 2), (3, len(d.test[1]), 2), (1, len(d.test[1]), 2)]
    s = shift_of_shares(ev, clip, d, 1., m=8, draws=2)
    assert len(s) == 10 and {k.split('/')[2] for k in s} == {'plain', 'em'}
