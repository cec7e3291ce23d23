"The classifier: its size, its training, what it refuses, and that no test set has a say in anything."
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from diffclip_da.study.classify import (CLASSIFIERS, PaperCNN, SmallCNN, Training, as_logits, at_epoch, check_labelled,
                                        evaluate, logits_of, new_classifier, predict, score, selected_epoch,
                                        train_classifier)
from diffclip_da.core import UserError, new_generator
from diffclip_da.models.clip import tiny_clip


def blobs(n, seed=0, size=16, gap=.8):
    "Noise, brighter for class 1."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return .3 * torch.randn(n, 3, size, size, generator=g) + gap * (y - .5)[:, None, None, None], y


def test_paper_cnn_has_the_papers_size():
    count = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device('meta'): m = PaperCNN(256)
    assert count(m) == 67_203_137 and count(m.fc1) / count(m) > .998
    assert count(PaperCNN(64)) == 4_288_577
    assert count(SmallCNN()) < 100_000


@pytest.mark.parametrize('size', [0, 4, 60])
def test_sizes_that_three_poolings_do_not_divide_are_refused(size):
    with pytest.raises(UserError, match='multiple of 8'): PaperCNN(size)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r'size=16.*\[3, 24, 24\]'): PaperCNN(16)(torch.zeros(1, 3, 24, 24))


@pytest.mark.parametrize('model', CLASSIFIERS)
def test_it_learns_and_repeats_itself_bit_for_bit(model):
    data, test = blobs(64), blobs(40, 1)
    state = torch.get_rng_state()
    net, h = train_classifier(data, dict(t=test), blobs(20, 2), epochs=3, batch_size=8, model=model)
    assert torch.equal(torch.get_rng_state(), state), 'the global random state was touched'
    torch.rand(5)
    _, again = train_classifier(data, dict(t=test), blobs(20, 2), epochs=3, batch_size=8, model=model)
    pd.testing.assert_frame_equal(h, again, check_exact=True)
    _, other = train_classifier(data, dict(t=test), blobs(20, 2), epochs=3, batch_size=8, model=model, seed=1)
    assert not h.loss.equals(other.loss)
    assert at_epoch(h).accuracy['t'] > .9
    assert h.groupby('split').epoch.apply(list).to_dict() == {s: [1, 2, 3] for s in ('train', 'valid', 't')}
    assert not net.training and (predict(net, test[0]).argmax(1) == test[1]).float().mean().item() == pytest.approx(at_epoch(h).accuracy['t'])


def test_evaluate_is_the_mean_cross_entropy():
    net, (x, y) = new_classifier('paper', 16), blobs(10)
    with torch.no_grad(): p = net(x)[:, 1].sigmoid().double()
    want = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert evaluate(net, x, y)['loss'] == pytest.approx(want.item(), rel=1e-5)


def test_loss_of_a_sure_and_wrong_logit_is_finite():
    class Sure(torch.nn.Module):
        def forward(self, x): return as_logits(torch.full((len(x), 1), -500.))
    assert evaluate(Sure(), torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))['loss'] == 250


def test_score_by_hand():
    got = score([0, 0, 0, 1], pair([.1, .2, .9, .8]))
    assert got['accuracy'] == .75 and got['balanced_accuracy'] == pytest.approx(5 / 6) and got['auroc'] == pytest.approx(2 / 3)
    one = score([1, 1], pair([.9, .1]))
    assert one['accuracy'] == .5 and np.isnan(one['auroc'])


def pair(p): return np.stack([1 - np.array(p), p], 1)   # probabilities of class 1 -> of both


x8, y8 = blobs(8, size=8)


@pytest.mark.parametrize('x, y, message', [
    (x8, y8[:5], '8 images but labels of shape'),
    (x8[:0], y8[:0], 'no images'),
    (x8, torch.zeros(8), 'all 8 labels are 0'),
    (x8, torch.arange(8) - 1, 'classes are expected as whole numbers'),
    (x8, torch.arange(8) / 2, 'classes are expected as whole numbers'),
    (x8[0], y8, 'images have shape'),
    (torch.where(torch.arange(8).view(8, 1, 1, 1) == 3, torch.nan, x8), y8, '1 images hold NaN.*number 3'),
])
def test_bad_sets_are_refused_by_name(x, y, message):
    with pytest.raises(UserError, match=f'portraits: .*{message}'): check_labelled(x, y, 'portraits')
    with pytest.raises(UserError, match='test_target: '): train_classifier((x8, y8), dict(test_target=(x, y)), epochs=1)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match='a batch of 1 has no variance'): train_classifier((x8, y8), {}, epochs=1, batch_size=1, model='small')
    with pytest.raises(UserError, match='at least 1'): train_classifier((x8, y8), {}, epochs=0)
    with pytest.raises(UserError, match="dtype = 'float16': choose float32 or bfloat16"): train_classifier((x8, y8), {}, epochs=1, dtype='float16')
    with pytest.raises(UserError, match="no classifier 'big'.*paper, small"): new_classifier('big')
    with pytest.raises(UserError, match='lower lr=1e'): train_classifier((x8, y8), {}, epochs=3, batch_size=4, lr=1e30)


def test_a_last_batch_of_one_joins_the_one_before():
    x, y = blobs(9, size=16)
    _, h = train_classifier((x, y), {}, epochs=1, batch_size=4, model='small')
    assert np.isfinite(h.loss).all()
    seen = []
    def spy(x, generator): seen.append(len(x)); return x
    train_classifier((x, y), {}, epochs=1, batch_size=4, augment=spy)
    assert seen == [4, 5]
    train_classifier((x, y), {}, epochs=1, batch_size=1)   # without BatchNorm a batch of one is fine


def test_augmentation_draws_from_the_runs_own_generator():
    def noisy(x, generator): return x + torch.randn(x.shape, generator=generator)
    runs = [train_classifier((x8, y8), {}, epochs=2, batch_size=4, augment=noisy)[1] for _ in range(2)]
    assert runs[0].equals(runs[1])
    assert not runs[0].loss.equals(train_classifier((x8, y8), {}, epochs=2, batch_size=4)[1].loss)


def test_the_epoch_is_chosen_on_validation_alone():
    h = pd.DataFrame([dict(epoch=e, split=s, accuracy=a) for s, accs in dict(valid=[.5, .8, .7, .8], test_target=[.9, .1, .9, .9]).items()
                      for e, a in enumerate(accs, 1)])
    assert selected_epoch(h) == 2
    assert selected_epoch(h.assign(accuracy=h.accuracy.where(h.split == 'valid', 1 - h.accuracy))) == 2
    with pytest.raises(UserError, match="no 'valid' rows"): selected_epoch(h[h.split != 'valid'])
    with pytest.raises(UserError, match='epoch 9 is not in the history, which has 1 to 4'): at_epoch(h, 9)


def test_only_what_is_asked_for_is_measured_and_measuring_changes_nothing():
    sets = (x8, y8), dict(test=(x8, y8)), (x8, y8)
    every, some, none = (train_classifier(*sets, epochs=2, batch_size=4, measured=m) for m in (None, ('valid',), ()))
    assert set(every[1].split) == {'train', 'valid', 'test'} and set(some[1].split) == {'valid'} and none[1].empty
    assert some[1].equals(every[1][every[1].split == 'valid'].reset_index(drop=True))
    for a, b, c in zip(*(m.state_dict().values() for m, _ in (every, some, none))): assert torch.equal(a, b) and torch.equal(a, c)


def test_bfloat16_trains_nearly_the_same_network():
    x, y = blobs(64, size=16)
    a, b = (train_classifier((x, y), {}, epochs=3, batch_size=8, dtype=d) for d in ('float32', 'bfloat16'))
    weights = [torch.cat([p.flatten() for p in m.state_dict().values()]) for m, _ in (a, b)]
    assert not torch.equal(*weights) and torch.nn.functional.cosine_similarity(*weights, dim=0) > .99
    assert abs(a[1].accuracy.iloc[-1] - b[1].accuracy.iloc[-1]) < .1 and all(p.dtype == torch.float32 for p in b[0].parameters())


# three classes

def three(n, seed=0, size=16):
    "Noise in which the class's channel is brighter."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return .3 * torch.randn(n, 3, size, size, generator=g) + .8 * F.one_hot(y, 3)[:, :, None, None], y


@pytest.mark.parametrize('model', CLASSIFIERS)
def test_three_classes_are_learned(model):
    net, h = train_classifier(three(60), dict(t=three(30, 1)), three(15, 2), epochs=4, batch_size=8, model=model)
    assert at_epoch(h).balanced_accuracy['t'] > .9 and at_epoch(h).auroc['t'] > .95
    x, y = three(30, 1)
    p = predict(net, x)
    assert p.shape == (30, 3) and torch.allclose(p.sum(1), torch.ones(30))
    assert at_epoch(h).loss['t'] == pytest.approx(-p.double()[range(30), y].log().mean().item(), rel=1e-4)


@pytest.mark.parametrize('model', CLASSIFIERS)
def test_two_classes_have_one_output_and_more_have_one_each(model):
    two, three_ = (new_classifier(model, 16, 0, n_classes=k) for k in (2, 3))
    last = lambda m: [p for p in m.parameters()][-1].shape
    assert last(two) == (1,) and last(three_) == (3,)
    z = logits_of(two, blobs(6)[0])
    assert z.shape == (6, 2) and (z[:, 0] == 0).all() and torch.allclose(z.softmax(1)[:, 1], z[:, 1].sigmoid())
    with pytest.raises(UserError, match='n_classes=1'): new_classifier(model, 16, 0, n_classes=1)


def test_scores_of_three_classes_are_scikit_learns():
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50)
    got = score(y, p)
    assert got['accuracy'] == (p.argmax(1) == y).mean()
    assert got['balanced_accuracy'] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert got['auroc'] == pytest.approx(roc_auc_score(y, p, multi_class='ovr', average='macro'))
    some = score([0, 0, 1], [[.8, .1, .1], [.1, .1, .8], [.1, .9, 0]])   # class 2 is guessed and never true
    assert some['accuracy'] == pytest.approx(2 / 3) and some['balanced_accuracy'] == .75 and some['auroc'] == .875
    with pytest.raises(UserError, match=r'give \[2, K\]'): score([0, 1], [.5, .5])


def test_every_class_needs_a_training_image_and_no_test_set_has_more():
    x, y = three(12, size=8)
    with pytest.raises(UserError, match='no image of class 1 among 3 classes'): train_classifier((x[y != 1], y[y != 1]), {}, epochs=1)
    with pytest.raises(UserError, match='no image of class 3 among 4 classes'): train_classifier((x, y), {}, epochs=1, n_classes=4)
    with pytest.raises(UserError, match='t: label 2, but there are 2 classes'): train_classifier((x8, y8), dict(t=(x, y)), epochs=1)
    _, h = train_classifier((x, y), dict(t=(x[y < 2], y[y < 2])), epochs=1, batch_size=4)   # a test set may lack one
    assert np.isfinite(h.loss).all()


def test_settings_are_one_object():
    a = train_classifier((x8, y8), {}, training=Training(epochs=2, batch_size=4, lr=2e-3), seed=1)[1]
    b = train_classifier((x8, y8), {}, epochs=2, batch_size=4, lr=2e-3, seed=1)[1]
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert Training() == Training('paper', 10, 32, 1e-3, 'float32')
    with pytest.raises(UserError, match="no classifier 'big'"): Training('big')


@pytest.mark.parametrize('model', ['guide', 'tower'])
def test_a_classifier_on_the_guide_is_one_like_any_other(model):
    data, test, clip = blobs(32), blobs(20, 1), tiny_clip()
    net, h = train_classifier(data, dict(t=test), epochs=3, batch_size=8, model=model, clip=clip)
    losses = h[h.split == 'train'].loss.tolist()
    assert predict(net, test[0]).shape == (20, 2) and np.isfinite(losses).all()
    assert len(losses) == (1 if model == 'guide' else 3) and (model == 'tower' or at_epoch(h).accuracy['t'] > .8)
    _, again = train_classifier(data, dict(t=test), epochs=3, batch_size=8, model=model, clip=clip)
    pd.testing.assert_frame_equal(h, again, check_exact=True)


def test_an_unknown_classifier_is_told_which_there_are():
    with pytest.raises(UserError, match='no classifier .resnet.; there are: paper, small, guide, tower, timm:NAME'): Training(model='resnet')


def test_an_image_of_weight_zero_does_not_count():
    x, y = torch.randn(16, 3, 16, 16, generator=new_generator(0)), torch.arange(16) % 2
    w = [1.] * 12 + [0.] * 4
    wrong = torch.cat([y[:12], 1 - y[12:]])
    def weights_of(labels, w, **kw): return train_classifier((x, labels), {}, model='small', epochs=2, weights=w, **kw)[0].state_dict()
    one, other, plain = weights_of(y, w), weights_of(wrong, w), weights_of(y, None)
    assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values()))   # wrong labels, no weight
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.values(), weights_of(y, [1.] * 16).values()))
    assert not torch.equal(one['fc.weight'], plain['fc.weight'])


def test_weights_that_do_not_fit_are_refused():
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4) % 2
    with pytest.raises(UserError, match='3 weights for 4 training images'): train_classifier((x, y), {}, model='small', weights=[1.] * 3)
