"""Losses: the closed forms, the degenerate pair, the shared views, and what bad input says."""
import open_clip
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from diffclip_da.models.clip import Clip, ClipEnsemble
from diffclip_da.core import UserError, new_generator
from diffclip_da.adaptation.losses import (ClampInward, augment, colour_loss, cosine_loss, diffusionclip_loss, directional_loss, global_loss, grid_loss, l1_loss,
                                text_direction, view_params)


def random_clip(seed, dim):
    torch.manual_seed(seed)
    model = open_clip.CLIP(dim, vision_cfg=dict(layers=1, width=32, head_width=16, patch_size=8, image_size=32),
                           text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))
    model.visual.preprocess_cfg = dict(mean=(.5, .5, .5), std=(.5, .5, .5))
    return Clip(model, open_clip.get_tokenizer('ViT-B-32'), dict(name=f'random{dim}', sha256='0', provenance='random'))


@pytest.fixture(scope='module')
def clip(): return random_clip(0, 24)

@pytest.fixture(scope='module')
def pair():
    g = new_generator(0)
    return torch.rand(2, 3, 32, 32, generator=g) * 2 - 1, torch.rand(2, 3, 32, 32, generator=g) * 2 - 1

class Mean:
    "An embedder whose answer is known: mean colour."
    def embed(self, x): return F.normalize(x.mean((2, 3)) + 2, dim=-1)


def test_cosine_loss_closed_form():
    a, b = torch.tensor([[3., 4.]]), torch.tensor([[4., 3.]])
    assert cosine_loss(a, b).item() == pytest.approx(1 - 24 / 25, abs=1e-6)
    assert cosine_loss(a, -a).item() == pytest.approx(2, abs=1e-6)
    assert cosine_loss(.03 * b, b, eps=.2).item() == pytest.approx(1 - .15 / (.15**2 + .2**2)**.5, abs=1e-5)


def test_cosine_gradient_bounded_at_zero():
    for length in (0., 1e-8, 1e-3, 1.):
        a = (length * torch.tensor([[1., 2., -1.]])).requires_grad_()
        cosine_loss(a, torch.tensor([[0., 2., 0.]]), eps=.01).backward()
        assert torch.isfinite(a.grad).all() and a.grad.norm() <= 1 / .01 + 1e-3


def test_direction_is_the_normalised_difference(clip):
    s, t = clip.encode_text(['photo']), clip.encode_text(['a pencil sketch'])
    assert torch.allclose(text_direction(clip, 'photo', 'a pencil sketch'), F.normalize(t - s, dim=-1), atol=1e-6)
    assert torch.allclose(text_direction(clip, 'photo', 'a pencil sketch'), -text_direction(clip, 'a pencil sketch', 'photo'), atol=1e-5)
    many = text_direction(clip, ['photo', 'photograph'], 'sketch')
    assert many.shape == (1, 24) and not torch.allclose(many, text_direction(clip, 'photo', 'sketch'), atol=1e-3)


def test_directional_loss_by_hand(clip, pair):
    x, ref = pair
    dt = text_direction(clip, 'photo', 'sketch')
    di = clip.encode_image(x) - clip.encode_image(ref)
    assert directional_loss(clip, x, ref, dt, eps=0.).item() == pytest.approx((1 - F.cosine_similarity(di, dt)).mean().item(), abs=1e-5)


def test_ensemble_is_the_mean_of_members(clip, pair):
    other = random_clip(1, 40)
    both = ClipEnsemble([clip, other])
    dt = text_direction(both, 'photo', 'sketch')
    assert dt.shape == (1, 64)
    single = [directional_loss(c, *pair, text_direction(c, 'photo', 'sketch')).item() for c in (clip, other)]
    assert directional_loss(both, *pair, dt).item() == pytest.approx(sum(single) / 2, abs=1e-5)
    single = [global_loss(c, pair[0], c.encode_text('sketch')).item() for c in (clip, other)]
    assert global_loss(both, pair[0], both.encode_text('sketch')).item() == pytest.approx(sum(single) / 2, abs=1e-5)


@pytest.mark.parametrize('n_crops', [0, 3])
def test_equal_pictures_give_finite_loss_and_gradient(clip, pair, n_crops):
    x = pair[0][:1].clone().requires_grad_()
    total, terms = diffusionclip_loss(x, pair[0][:1], clip, Mean(), text_direction(clip, 'photo', 'sketch'), id_weight=1., n_crops=n_crops, generator=new_generator(0))
    total.backward()
    assert terms['clip'].item() == pytest.approx(1, abs=1e-2) and terms['l1'] == 0 and terms['id'].item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(x.grad).all() and x.grad.norm() > 0


def test_views_are_shared_and_reproducible(pair):
    x = pair[0]
    a, b = augment(x, x, 5, new_generator(3))
    assert a.shape == (10, 3, 32, 32) and torch.equal(a, b)
    c, d = augment(*pair, 5, new_generator(3))
    assert torch.equal(a, c) and not torch.equal(c, d)
    assert not torch.equal(a[:2], a[2:4])                     # another view of the same two images
    assert not torch.equal(a, augment(x, x, 5, new_generator(4))[0])


def test_no_crops_is_the_identity_and_full_view_too(pair):
    assert augment(*pair, 0, None)[0] is pair[0]
    full, _ = augment(*pair, 2, new_generator(0), scale=1., shift=0., noise=0.)
    assert torch.allclose(full, pair[0].repeat(2, 1, 1, 1), atol=1e-5)


def test_views_stay_within_the_shift():
    theta = view_params(2000, new_generator(0), .7, .1)
    side, centre = theta[:, 0, 0], theta[:, :, 2].abs()
    assert side.min() >= .7 and side.max() <= 1 and torch.equal(side, theta[:, 1, 1])
    assert (centre + side[:, None]).max() <= 1 + 2 * .1 + 1e-6 and (centre + side[:, None]).max() > 1.15


def test_augment_is_differentiable(pair):
    x = pair[0].clone().requires_grad_()
    augment(x, pair[1], 2, new_generator(0))[0].sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad != 0).float().mean() > .5


def test_terms_add_up(clip, pair):
    dt = text_direction(clip, 'photo', 'sketch')
    total, t = diffusionclip_loss(*pair, clip, Mean(), dt, 3., .3, .7, n_crops=2, generator=new_generator(1))
    assert total.item() == pytest.approx(3 * t['clip'].item() + .3 * t['l1'].item() + .7 * t['id'].item(), abs=1e-5)
    assert t['l1'].item() == pytest.approx((pair[0] - pair[1]).abs().mean().item(), abs=1e-6) == l1_loss(*pair).item()
    assert set(diffusionclip_loss(*pair, clip, None, dt, n_crops=0)[1]) == {'total', 'clip', 'l1'}


def test_descends_in_its_own_space(clip, pair):
    dt, x = text_direction(clip, 'photo', 'sketch'), pair[1].clone().requires_grad_()
    opt, trace = torch.optim.Adam([x], .02), []
    for _ in range(10):
        loss = directional_loss(clip, x, pair[1], dt)
        opt.zero_grad(); loss.backward(); opt.step(); trace.append(loss.item())
    assert trace[-1] < .95 * trace[0]


@pytest.mark.parametrize('call, text', [
    (lambda c, p: text_direction(c, 'photo', 'photo'), 'different words'),
    (lambda c, p: text_direction(c, 'photo', '   '), 'blank'),
    (lambda c, p: text_direction(c, '', 'sketch'), 'blank'),
    (lambda c, p: text_direction(c, 'photo', []), 'no prompt'),
    (lambda c, p: directional_loss(c, p[0], p[1][:1], torch.zeros(1, 24)), 'same shape'),
    (lambda c, p: directional_loss(c, *p, torch.ones(1, 30)), 'text_direction with the same CLIP'),
    (lambda c, p: l1_loss(p[0], p[1][:1]), 'same shape'),
    (lambda c, p: augment(*p, -1, new_generator(0)), 'n_crops = -1'),
    (lambda c, p: augment(*p, 1, new_generator(0), scale=0), 'scale = 0'),
    (lambda c, p: diffusionclip_loss(*p, c, None, torch.ones(1, 24)), 'new_generator'),
    (lambda c, p: diffusionclip_loss(*p, c, None, torch.ones(1, 24), id_weight=1, n_crops=0), 'face embedder'),
    (lambda c, p: diffusionclip_loss(*p, c, None, torch.ones(1, 24), 0, 0, 0, n_crops=0), 'all loss weights are 0'),
])
def test_bad_input(clip, pair, call, text):
    with pytest.raises(UserError, match=text): call(clip, pair)


@pytest.mark.parametrize('pattern', ['rows', 'columns', 'both'])
@pytest.mark.parametrize('size', [(32, 32), (20, 34), (6, 7)])
def test_grid_loss_is_a_third_of_the_amplitude_of_one_pattern(pattern, size):
    i, j = ((-1.)**torch.arange(n) for n in size)
    p = dict(rows=i[:, None].expand(size), columns=j.expand(size), both=i[:, None] * j)[pattern]
    x = torch.zeros(2, 3, *size)
    assert grid_loss(x + .3 * p, x).item() == pytest.approx(.1, abs=.02 if min(size) < 16 else 1e-6)

def test_grid_loss_sees_neither_flat_changes_nor_period_four():
    x = torch.zeros(1, 3, 32, 32)
    waves = torch.cos(torch.pi / 2 * torch.arange(32)).expand(32, 32)
    assert grid_loss(x + .5, x) == 0 and grid_loss(x + waves, x).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match='2 x 2 pixels'): grid_loss(x[..., :1], x[..., :1])

def test_grid_weight_enters_the_total(pair):
    total, terms = diffusionclip_loss(*pair, None, None, None, clip_weight=0., l1_weight=.5, grid_weight=2., n_crops=0)
    assert total.item() == pytest.approx(.5 * terms['l1'].item() + 2 * terms['grid'].item(), rel=1e-6) and set(terms) == {'total', 'l1', 'grid'}


def test_views_are_blurred_alike_and_by_no_more_than_asked(pair):
    x, how = pair[0], dict(scale=1., shift=0., noise=0.)
    a, b = augment(x, x, 4, new_generator(0), blur=.1, **how)
    assert torch.equal(a, b)
    def rough(v): return (v[..., 1:] - v[..., :-1]).abs().mean((1, 2, 3))
    r = rough(a).reshape(4, 2) / rough(x)
    assert (r < 1.001).all() and len(set(r[:, 0].round(decimals=4).tolist())) == 4      # each view has a strength of its own
    strongest = rough(gaussian_blur(x, 21, 3.2)) / rough(x)
    assert (r > strongest - 1e-3).all()
    plain = augment(x, x, 4, new_generator(0), **how)[0]
    assert torch.allclose(rough(plain), rough(x).repeat(4), atol=1e-5)
    with pytest.raises(UserError, match='blur = 0.5'): augment(x, x, 1, new_generator(0), blur=.5)


def test_colours_may_fade_but_not_change():
    ref = torch.tensor([.6, 0., -.3]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    grey = ref.mean(1, keepdim=True).expand_as(ref)
    for k in (0., .5, 1.): assert colour_loss(grey + k * (ref - grey), ref).item() == pytest.approx(0, abs=1e-3)
    assert colour_loss(ref + .4, ref).item() == pytest.approx(0, abs=1e-3)              # brightness is free
    far = (ref - grey)[0, :, 0, 0].norm().item()
    assert colour_loss(grey + 2 * (ref - grey), ref).item() == pytest.approx(far, rel=.01)
    assert colour_loss(grey - (ref - grey), ref).item() == pytest.approx(far, rel=.01)  # the opposite hue: nearest is grey
    x = grey.clone().requires_grad_()
    colour_loss(x, grey).backward()
    assert torch.isfinite(x.grad).all()                                                # grey on grey


def test_a_picture_is_judged_as_it_is_saved(clip, pair):
    dt = text_direction(clip, 'photo', 'sketch')
    def total(x): return diffusionclip_loss(x, pair[1], clip, None, dt, colour_weight=1., grid_weight=1., n_crops=0)[0]
    x = 3 * pair[0]
    assert total(x).item() == total(x.clamp(-1, 1)).item()
    y = torch.tensor([-2., -2., .5, 2., 2.], requires_grad=True)
    (ClampInward.apply(y) * torch.tensor([1., -1., 1., 1., -1.])).sum().backward()
    assert y.grad.tolist() == [0., -1., 1., 1., 0.]                                    # outside, only what leads back


def test_hues_turn_alike_for_both_and_greys_stay():
    x = torch.rand(2, 3, 8, 8, generator=new_generator(0)) * 2 - 1
    how = dict(n_crops=3, scale=1., shift=0., noise=0.)
    a, b = augment(x, x, generator=new_generator(1), hue=1., **how)
    assert torch.equal(a, b) and not torch.allclose(a, x.repeat(3, 1, 1, 1))
    # a rotation about the axis of the greys: brightness and the distance from grey stay
    def parts(v): return v.mean(1), (v - v.mean(1, keepdim=True)).norm(dim=1)
    for got, want in zip(parts(a), parts(x.repeat(3, 1, 1, 1))): assert torch.allclose(got, want, atol=1e-5)
    red = torch.zeros(64, 3, 4, 4); red[:, 0] = 1
    angles = augment(red, red, 1, new_generator(2), 1., 0., 0., hue=1.)[0][:, :, 0, 0]
    hue = torch.atan2(3**.5 * (angles[:, 1] - angles[:, 2]), 2 * angles[:, 0] - angles[:, 1] - angles[:, 2])
    assert hue.min() < -2.5 and hue.max() > 2.5   # the whole circle, in radians
    near = augment(red, red, 1, new_generator(2), 1., 0., 0., hue=.1)[0][:, :, 0, 0]
    assert ((near - torch.tensor([1., 0, 0])).norm(dim=1) < .3).all()
    assert torch.equal(*(augment(x, x, generator=new_generator(1), **how | k)[0] for k in ({}, dict(hue=0.))))
    with pytest.raises(UserError, match='hue = 2'): augment(x, x, 1, new_generator(0), hue=2)
