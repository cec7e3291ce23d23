"The baselines: each formula against an independent one, and no method looks at more than it says."
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from diffclip_da.study import baselines
from diffclip_da.study.baselines import (LONGER, METHODS, ROWS, NormCNN, ReverseGradient, Task, adain, adapt_norms,
                                         clip_features, coral_loss, entropy, half, move_features,
                                         moved_and_recoloured, same_budget, sobel_edges, strongly, tent_steps,
                                         to_grey, train_aligned)
from diffclip_da.study.classify import Training
from diffclip_da.store import code_hash
from diffclip_da.models.clip import tiny_clip, zero_shot
from diffclip_da.core import new_generator


def pictures(seed, n=20): return torch.rand(n, 3, 16, 16, generator=new_generator(seed)) * 2 - 1


@pytest.fixture
def task():
    y = torch.arange(20) % 2
    return Task((pictures(0), y), (pictures(1), y), (pictures(2), y), (pictures(3), y),
                (torch.stack([pictures(7), pictures(8)]), y), (pictures(4), y), pictures(5), (pictures(6), y),
                tiny_clip(), training=Training(epochs=1, batch_size=8))


@pytest.fixture
def three(task):
    "The same pictures with labels of three classes."
    y = torch.arange(20) % 3
    fields = ('source', 'source_valid', 'adapted', 'control', 'varied', 'drawn', 'oracle')
    return replace(task, captions=('a cat', 'a dog', 'a bird'), **{f: (getattr(task, f)[0], y) for f in fields})


PARTS = ('adapted', 'control', 'varied', 'drawn', 'target', 'oracle', 'clip')


@pytest.mark.parametrize('name', METHODS)
def test_a_method_needs_no_more_than_it_says_and_is_the_same_for_a_seed(task, name):
    m, x = METHODS[name], pictures(9)
    before = m.fit(task, 1)[0](x)
    assert before.shape == (20, 2) and torch.allclose(before.sum(1), torch.ones(20)) and before.min() >= 0
    seen = {k: getattr(task, k) for k in PARTS if k in m.sees}
    blind = Task(task.source, task.source_valid, **seen, training=task.training)
    torch.rand(3)   # the global state plays no part
    assert torch.equal(m.fit(blind, 1)[0](x), before)


@pytest.mark.parametrize('name', METHODS)
def test_every_method_answers_for_three_classes(three, name):
    p = METHODS[name].fit(three, 0)[0](pictures(9))
    assert p.shape == (20, 3) and torch.allclose(p.sum(1), torch.ones(20)) and p.min() >= 0


def test_three_classes_are_told_apart_by_a_row_of_the_table(three):
    g = new_generator(0)
    y = torch.arange(60) % 3
    x = .3 * torch.randn(60, 3, 16, 16, generator=g) + .8 * torch.nn.functional.one_hot(y, 3)[:, :, None, None]
    task = replace(three, source=(x, y), source_valid=(x, y), training=Training(epochs=4, batch_size=8))
    for name in ('source_only', 'source_only_selected', 'batch_norm'):
        assert balanced_accuracy_score(y, METHODS[name].fit(task, 0)[0](x).argmax(1)) > .9, name


@pytest.mark.parametrize('name', METHODS)
def test_labels_of_the_target_reach_the_oracle_alone(task, name):
    x, m = pictures(9), METHODS[name]
    before = m.fit(task, 0)[0](x)
    task.oracle = (task.oracle[0], 1 - task.oracle[1])
    assert torch.equal(m.fit(task, 0)[0](x), before) == (name not in ('oracle', 'oracle_long'))


@pytest.mark.parametrize('name', [n for n, m in METHODS.items() if m.seeded and n != 'majority'])
def test_another_seed_gives_another_network(task, name):
    x = pictures(9)
    assert not torch.equal(METHODS[name].fit(task, 0)[0](x), METHODS[name].fit(task, 1)[0](x))


def test_grey_and_edges_against_their_definitions():
    x = pictures(0, 2)
    grey = (x * torch.tensor([.2989, .587, .114])[:, None, None]).sum(1)
    assert torch.allclose(to_grey(x)[:, 1], grey, atol=1e-4)
    step = torch.full((1, 3, 8, 8), -.2); step[..., 4:] = .2
    e = sobel_edges(step)
    assert torch.allclose(e[0, 0, :, 0], torch.ones(8)) and torch.allclose(e[0, 0, :, 3], torch.full((8,), 1 - 4 * .2), atol=1e-3)


def test_augmentations_draw_for_each_picture():
    x = pictures(0, 64)
    changed = (half(lambda v: -v, x, new_generator(0)) == -x).flatten(1).all(1)
    assert 16 < changed.sum() < 48
    torch.manual_seed(0)
    same = strongly(x[:1].repeat(8, 1, 1, 1))
    assert len({tuple(v.flatten().tolist()) for v in same}) > 4 and same.abs().max() <= 1


def test_adain_has_the_styles_statistics():
    x, s = pictures(0) * .1, pictures(1) * .3 + .1
    y = adain(x, s)
    assert torch.allclose(y.mean((2, 3)), s.mean((2, 3)), atol=1e-3) and torch.allclose(y.std((2, 3)), s.std((2, 3)), atol=1e-3)


@pytest.mark.parametrize('k', (2, 3, 7))
def test_entropy_against_torch(k):
    z = torch.randn(5, k, generator=new_generator(k)) * 3
    assert torch.allclose(entropy(z), torch.distributions.Categorical(logits=z).entropy(), atol=1e-5)


def test_adabn_moves_statistics_only_and_tent_scales_and_shifts_only():
    net, x = NormCNN(16), pictures(0) * 2 + 1
    a, b, c = (dict(m.state_dict()) for m in (net, adapt_norms(net, x), tent_steps(net, x, 0)))
    moved = lambda other: {k for k in a if not torch.equal(a[k], other[k])}
    norm = {f'features.{i}' for i, m in enumerate(net.features) if isinstance(m, torch.nn.BatchNorm2d)}
    assert {k.rsplit('.', 1)[0] for k in moved(b)} == norm and all('running' in k or 'num_batches' in k for k in moved(b))
    assert {k for k in moved(c) if 'running' not in k and 'num_batches' not in k} == {f'{n}.{p}' for n in norm for p in ('weight', 'bias')}


def test_coral_against_numpy():
    a, b = np.random.default_rng(0).standard_normal((2, 30, 5))
    want = ((np.cov(a.T) - np.cov(b.T))**2).sum() / (4 * 25)
    assert coral_loss(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(want)


def test_gradient_is_turned_around():
    x = torch.tensor([1., 2.], requires_grad=True)
    (ReverseGradient.apply(x, .3) * torch.tensor([2., 5.])).sum().backward()
    assert x.grad.tolist() == pytest.approx([-.6, -1.5])


def test_the_penalty_sees_features_of_both_domains_and_the_course_of_the_training(task):
    seen = []
    def penalty(f, g, p): seen.append((f.shape, g.shape, p)); return f.sum() * 0
    train_aligned(task, 0, penalty)
    assert {f for f, _, _ in seen} == {torch.Size([8, 512]), torch.Size([4, 512])} and all(f == g for f, g, _ in seen)
    course = [p for *_, p in seen]
    assert course == sorted(course) and course[0] == 0 and course[-1] < 1


def test_zero_shot_is_the_guides(task):
    x = pictures(9)
    assert torch.allclose(METHODS['clip_zero_shot'].fit(task, 0)[0](x), zero_shot(task.clip, x, [['a woman'], ['a man']]))


@pytest.mark.parametrize('name', ('clip_zero_shot', 'latent_augmentation'))
def test_captions_come_with_the_task(task, name):
    "Asked for smiles, the guide is not asked for women and men."
    x = pictures(9)
    other = replace(task, captions=('a person with a serious face', 'a smiling person'))
    assert not torch.equal(METHODS[name].fit(task, 0)[0](x), METHODS[name].fit(other, 0)[0](x))


def test_moved_features_have_unit_length_and_go_along():
    z = torch.nn.functional.normalize(torch.randn(100, 6, generator=new_generator(0)), dim=1)
    d, classes = torch.eye(6)[0], torch.eye(6)[1:3]
    y = (z @ classes.T).argmax(1)
    m = move_features(z, y, d, classes, 20., 0)
    assert torch.allclose(m.norm(dim=1), torch.ones(100), atol=1e-5)
    assert torch.cosine_similarity(m - z, d[None]).mean() > .5 and balanced_accuracy_score(y, (m @ classes.T).argmax(1)) > .8
    assert clip_features(tiny_clip(), pictures(0)).norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)


LONG = [n for n in METHODS if n.endswith('_long')]


@pytest.mark.parametrize('name', LONG)
def test_every_long_row_sees_as_many_pictures(task, monkeypatch, name):
    seen = []
    def spy(task, train, seed, tests, epochs, augment, before, domains): seen.append((len(train[1]) * epochs, augment)); return None, None
    monkeypatch.setattr(baselines, 'cnn', spy)
    METHODS[name].fit(replace(task, training=Training(epochs=6)), 0)
    assert seen == [(LONGER * 6 * 20, moved_and_recoloured)]


def test_rows_of_one_budget_make_as_many_updates(task, monkeypatch):
    seen = []
    def spy(task, train, seed, tests=None, epochs=None, **how): seen.append(len(train[1]) * epochs); return None, None
    monkeypatch.setattr(baselines, 'cnn', spy)
    for name, row in ROWS.items():
        if row.budget == 1 and not row.selected: METHODS[name].fit(replace(task, training=Training(epochs=6)), 0)
    assert set(seen) == {6 * 20}


def test_every_long_row_has_its_photos_and_its_oracle():
    assert len(LONG) == 5
    for n in LONG: assert {same_budget(n, 'source_only'), same_budget(n, 'oracle')} <= set(LONG)
    assert same_budget('adapted', 'oracle') == 'oracle'


def test_moved_and_recoloured_does_both():
    x = torch.zeros(64, 3, 16, 16) - .5
    x[:, 0] = .9   # red everywhere: a move alone leaves it
    torch.manual_seed(0)
    y = moved_and_recoloured(x)
    assert y.shape == x.shape and (y - x).abs().amax((1, 2, 3)).gt(.05).float().mean() > .9
    ramp = torch.linspace(-1, 1, 16).expand(64, 3, 16, 16)
    z = moved_and_recoloured(ramp)
    assert (z.std(2).amax((1, 2)) > .01).float().mean() > .8   # columns are no longer even: turned or sheared


def test_code_of_a_row_is_what_it_runs_through():
    key = {n: code_hash(*m.code) for n, m in METHODS.items()}
    assert key['source_only'] == key['adapted'] == key['oracle'] != key['strong_augmentation']
    assert key['source_only_long'] == key['pencil_long'] != key['strong_augmentation']
    assert len({key[n] for n in ('source_only', 'grayscale', 'dann', 'coral', 'tent', 'adabn', 'clip_zero_shot')}) == 7
