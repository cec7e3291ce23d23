"Classifiers on frozen features: a shift of domain undone, shares found, a setting chosen without labels of the target."
import copy

import numpy as np
import pytest
import torch

from diffclip_da.core import UserError
from diffclip_da.models.clip import tiny_clip
from diffclip_da.study.classify import Training, new_classifier, train_classifier
from diffclip_da.study.features import (STRENGTHS, FeatureClassifier, Probe, Scale, TimmFeatures, TowerCNN, choose_strength, feature_network, mean_features, views_of,
                                        fit_regression, one_hot, reverse_score, scale_by_words, scale_of, target_scale)


def gaussians(n, share, seed, shift=0., stretch=1., k=2, gap=4.):
    "k classes on the corners of a simplex, d = 6."
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.r_[np.zeros(round(n * (1 - share)), int), 1 + np.arange(n - round(n * (1 - share))) % (k - 1)])
    return (rng.normal(size=(n, 6)) + gap * np.eye(6)[y]) * stretch + shift, y


def right(logits, y): return (logits.argmax(1) == y).mean()


def test_the_scale_does_not_depend_on_the_shares():
    z, y = gaussians(400, .5, 0)
    few = np.r_[np.flatnonzero(y == 0), np.flatnonzero(y == 1)[:20]]
    a, b = (scale_of(z[i], one_hot(y[i], 2)) for i in (slice(None), few))
    assert np.abs(a.mean - b.mean).max() < .35 < np.abs(z.mean(0) - z[few].mean(0)).max()
    plain = scale_of(z, np.full((400, 2), .5))
    assert np.allclose(plain.mean, z.mean(0)) and np.allclose(plain.std, z.std(0), atol=1e-5)


@pytest.mark.parametrize('k', [2, 3])
def test_a_shift_and_a_stretch_are_undone_by_unlabelled_pictures(k):
    shift, stretch = np.linspace(-3, 8, 6), np.linspace(.5, 3, 6)
    probe = fit_regression([gaussians(600, 1 - 1 / k, 0, k=k)], k)
    z, y = gaussians(600, 1 - 1 / k, 1, shift, stretch, k)
    pool = gaussians(300, 1 - 1 / k, 2, shift, stretch, k)[0]
    assert right(probe.logits(z), y) < .8 < .95 < right(probe.logits(z, target_scale(probe, pool)), y)


def test_em_finds_the_scale_of_unequal_shares():
    probe, (z, y) = fit_regression([gaussians(600, .5, 0, gap=2.)]), gaussians(600, .5, 1, 5., 2., gap=2.)
    pool = gaussians(600, .1, 2, 5., 2., gap=2.)[0]
    plain, em = (right(probe.logits(z, target_scale(probe, pool, shares)), y) for shares in (False, True))
    assert em > plain + .04


def test_no_picture_means_the_trainings_own_scale():
    probe = fit_regression([gaussians(100, .5, 0)])
    assert target_scale(probe, np.zeros((0, 6))) is probe.scale
    one = target_scale(probe, np.full((1, 6), 7.))
    assert np.allclose(one.mean, 7) and (one.std > .9 * probe.scale.std).all()   # one picture has no spread to tell


def test_words_move_the_mean_alone():
    probe = fit_regression([gaussians(100, .5, 0)])
    s = scale_by_words(Scale(np.ones(6), np.ones(6)), probe, torch.arange(6))
    assert np.array_equal(s.mean, 1 + np.arange(6)) and s.std is probe.scale.std


def test_each_domain_is_standardised_by_itself():
    a, b = gaussians(300, .5, 0), gaussians(300, .5, 1, 20., 3.)
    apart, mixed = fit_regression([a, b]), fit_regression([tuple(map(np.concatenate, zip(a, b)))])
    test = gaussians(300, .5, 2, 20., 3.)
    assert right(apart.logits(test[0]), test[1]) > .97 and np.allclose(apart.scale.mean, scale_of(b[0], one_hot(b[1], 2)).mean)
    assert not np.allclose(mixed.scale.mean, apart.scale.mean)


def test_the_strength_is_chosen_without_a_label_of_the_target():
    z, y = gaussians(120, .5, 0, gap=2.)
    pool = gaussians(200, .5, 1, 3., 2., gap=2.)[0]
    chosen, scores = choose_strength([(z, y)], pool)
    folds = {s: reverse_score([(z, y)], pool, s).mean(1) for s in STRENGTHS}
    best = folds[max(scores, key=scores.get)]
    near = [s for s in STRENGTHS if scores[s] >= best.mean() - best.std(ddof=1) / 5**.5]
    assert scores == pytest.approx({s: f.mean() for s, f in folds.items()}) and chosen == min(near) and scores[chosen] > .8
    nothing = np.random.default_rng(0).normal(size=pool.shape) * 0
    assert reverse_score([(z, y)], nothing, 1.).mean() == .5   # a target that tells nothing brings nothing home
    assert (chosen, scores) == choose_strength([(z, y)], pool)
    assert reverse_score([(z, y), (z + 5, y)], pool, 1., folds=3).shape == (3, 2)
    with pytest.raises(UserError, match='same pictures'): reverse_score([(z, y), (z, 1 - y)], pool, 1.)
    with pytest.raises(UserError, match='two of each class'): reverse_score([(z[:9], np.r_[np.zeros(8, int), 1])], pool, 1.)


def test_a_feature_classifier_goes_to_another_domain_and_stays_as_it_was():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = (.3 * torch.randn(60, 3, 32, 32, generator=g) + .8 * (y - .5)[:, None, None, None]).clamp(-1, 1)
    net = FeatureClassifier(clip=tiny_clip()).solve((x, y))
    before = net(x)
    moved = net.to_domain(.5 * x[:30])
    assert torch.equal(net(x), before) and not torch.equal(moved(x), before)
    assert (moved(.5 * x).argmax(1) == y).float().mean() > .9
    with pytest.raises(UserError, match='seen no pictures'): FeatureClassifier(clip=tiny_clip())(x)
    with pytest.raises(UserError, match='before it goes'): FeatureClassifier(clip=tiny_clip()).to_domain(x)


def test_six_views_and_their_mean():
    x = torch.linspace(-1, 1, 64).expand(2, 3, 64, 64).clone()
    views = views_of(x)
    assert len(views) == 6 and all(v.shape == x.shape for v in views) and torch.equal(views[0], x)
    assert all(torch.equal(a.flip(-1), b) for a, b in zip(views[:3], views[3:]))
    # the crop that moved to the left shows what is further left: columns 2 to 57 instead of 6 to 61
    assert views[1][0, 0, 0].mean().item() == pytest.approx(x[0, 0, 0, 2:58].mean().item(), abs=1e-4)
    assert views[2][0, 0, 0].mean().item() == pytest.approx(x[0, 0, 0, 6:62].mean().item(), abs=1e-4)
    z = mean_features(lambda b: b.flatten(1), x, size=1)
    assert torch.allclose(z, torch.stack(views).mean(0).flatten(1), atol=1e-6)
    assert torch.allclose(z.view(x.shape), z.view(x.shape).flip(-1), atol=1e-6)   # a picture and its mirror image are one


def test_domains_reach_the_classifier():
    y = torch.arange(40) % 2
    x = (.1 * torch.randn(40, 3, 32, 32) + .8 * (y - .5)[:, None, None, None]).clamp(-1, 1)
    both = torch.cat([x, .3 * x]), torch.cat([y, y])
    how = dict(model='guide', clip=tiny_clip(), measured=())
    apart, mixed = (train_classifier(both, {}, domains=d, **how)[0] for d in ((40, 40), None))
    assert not np.allclose(apart.probe.scale.mean, mixed.probe.scale.mean)


def test_features_by_name():
    net = TimmFeatures('resnet18', pretrained=False)   # random weights: the published ones are not at hand here
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 512)
    assert feature_network('clip:toy')(torch.zeros(2, 3, 16, 16)).shape == (2, 16)
    with pytest.raises(UserError, match="timm knows no network 'resnet_of_nobody'"): feature_network('timm:resnet_of_nobody')
    with pytest.raises(UserError, match='strength'): Training(model='guide', strength=0)


def test_weights_that_cannot_be_fetched_are_named(monkeypatch):
    import timm
    def fail(*a, pretrained, **k): raise OSError('no route to host')
    monkeypatch.setattr(timm, 'create_model', fail)
    with pytest.raises(UserError, match='timm:resnet18 are not at hand .OSError.*network connection'): feature_network('timm:resnet18')


def test_the_tower_keeps_its_statistics_and_leaves_the_guide_alone():
    clip = tiny_clip()
    weights = copy.deepcopy(clip.state_dict())
    y = torch.arange(16) % 2
    net, _ = train_classifier((torch.randn(16, 3, 32, 32), y), {}, model='tower', clip=clip, epochs=3, measured=())
    assert all(torch.equal(v, weights[k]) for k, v in clip.state_dict().items())
    for k, v in net.tower.state_dict().items():
        if 'running' in k: assert torch.equal(v, weights[f'model.visual.{k}'])
    assert not all(torch.equal(v, weights[f'model.visual.{k}']) for k, v in net.tower.state_dict().items())
    assert [g['lr'] for g in net.groups(1e-3)] == [1e-4, 1e-3] and isinstance(new_classifier('tower', 32, clip=clip), TowerCNN)


def test_consistency_is_the_penalty_that_the_equation_says():
    from scipy.optimize import minimize
    (z, y), C, mu = gaussians(80, .5, 0, gap=1.), .7, .4
    sets = [(z, y), (z + np.random.default_rng(1).normal(size=z.shape), y)]
    own = [scale_of(v, one_hot(y, 2))(v) for v, _ in sets]
    both, twice, gaps = np.concatenate(own), np.r_[y, y] * 2 - 1, own[1] - own[0]
    def objective(p):
        w, b = p[:-1], p[-1]
        return w @ w / 2 + C * np.logaddexp(0, -twice * (both @ w + b)).sum() + C * mu / 2 * ((gaps @ w)**2).sum()
    best = minimize(objective, np.zeros(7), tol=1e-10).x
    probe = fit_regression(sets, strength=C, consistency=mu)
    assert np.allclose(np.r_[probe.weight[1], probe.bias[1]], best, atol=2e-3)
    plain = fit_regression(sets, strength=C)
    def gap(p): return np.abs(p.logits(*[sets[0][0]], Scale(*vars(scale_of(z, one_hot(y, 2))).values())) - p.logits(sets[1][0])).mean()
    assert gap(probe) < gap(plain) and gap(fit_regression(sets, strength=C, consistency=1e6)) < 1e-2


@pytest.mark.parametrize('k', [2, 3])
def test_without_consistency_nothing_changes_and_pairs_must_match(k):
    z, y = gaussians(90, 1 - 1 / k, 0, k=k)
    same = fit_regression([(z, y), (z, y)], k, consistency=5.)   # no gaps: no penalty
    assert np.allclose(same.weight, fit_regression([(z, y), (z, y)], k).weight, atol=1e-3)
    with pytest.raises(UserError, match='same pictures'): fit_regression([(z, y), (z, y[::-1])], k, consistency=1.)
