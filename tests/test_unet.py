"The U-Net's protocol, and what loading refuses"
import json

import pytest
import torch
from diffusers import UNet2DModel

from diffclip_da.core import UserError
from diffclip_da.store import state_hash
from diffclip_da.models.published import GuidedUNet
from diffclip_da.models.unet import WEIGHTS_NAME, EpsUNet, save_unet, small_unet, tiny_unet
from diffclip_da.diffusion.guidance import guided
from diffclip_da.models.load import load_unet


@pytest.fixture
def x(): return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_plain_diffusers_model_is_passed_through_unchanged(x):
    unet = tiny_unet().unet
    plain = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16, 32), norm_num_groups=16, layers_per_block=1,
                        down_block_types=('DownBlock2D', 'AttnDownBlock2D'), up_block_types=('AttnUpBlock2D', 'UpBlock2D'), attention_head_dim=32).eval()
    with torch.no_grad(): assert torch.equal(EpsUNet(plain)(x, 7), plain(x, 7).sample)
    assert EpsUNet(plain).image_size == 16 and tiny_unet().image_size == 16 and unet.config.sample_size == 8


def test_time_may_be_an_int_or_one_per_image(x):
    m = tiny_unet()
    with torch.no_grad():
        both = m(x, torch.tensor([5, 5, 900]))
        torch.testing.assert_close(both[:2], m(x, 5)[:2]); torch.testing.assert_close(both[2:], m(x, 900)[2:])
        assert not torch.allclose(m(x, 5), m(x, 900))


def test_no_label_means_the_null_class(x):
    m = tiny_unet(n_classes=2)
    with torch.no_grad():
        assert torch.equal(m(x, 3), m(x, 3, label=torch.tensor([2, 2, 2])))
        assert not torch.equal(m(x, 3), m(x, 3, label=1))
    with pytest.raises(UserError, match='unconditional'): tiny_unet()(x, 3, label=1)


def test_guidance_interpolates_between_the_two_answers(x):
    m = tiny_unet(n_classes=2)
    with torch.no_grad():
        e, ey = m(x, 9), m(x, 9, label=0)
        torch.testing.assert_close(guided(m, 0, 3.)(x, 9), e + 3 * (ey - e), atol=1e-5, rtol=1e-5)
        assert torch.equal(guided(m, scale=3.)(x, 9, label=0), guided(m, 0, 3.)(x, 9))
        per_image = torch.tensor([0, 1, 0])
        torch.testing.assert_close(guided(m, per_image, 3.)(x, 9)[::2], guided(m, 0, 3.)(x[::2], 9), atol=1e-5, rtol=1e-5)
        assert not torch.equal(guided(m, 0)(x, 9, delta_h=1.), guided(m, 0)(x, 9)), 'other conditions pass through'
    with pytest.raises(UserError, match='class-conditional'): guided(tiny_unet(), 0)
    with pytest.raises(UserError, match='no label to go to'): guided(m)(x, 9)


def test_guidance_is_a_formula_over_any_noise_predictor():
    def eps_model(x_t, t, label=None, shift=0.): return x_t + shift if label is None else x_t * (2 + label) + shift
    x = torch.ones(1, 1, 1, 1)
    assert guided(eps_model, 1, 2.)(x, 5, shift=.5).item() == 1.5 + 2 * (3.5 - 1.5)


def networks():
    "One of each kind: diffusers' and guided diffusion's."
    torch.manual_seed(0)
    there = GuidedUNet(16, channels=(32, 64), attention=(1,), width=32, head_channels=16)
    return dict(ours=(tiny_unet(), (32, 4, 4)), guided=(EpsUNet(there).eval(), (64, 8, 8)))


@pytest.mark.parametrize('kind', ['ours', 'guided'])
def test_the_bottleneck_can_be_read_and_edited(x, kind):
    (m, shape), seen = networks()[kind], []
    handle = m.bottleneck.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    with torch.no_grad():
        plain = m(x, 9)
        assert torch.equal(m(x, 9, delta_h=torch.zeros(3, *shape)), plain) and torch.equal(m(x, 9, delta_h=0), plain)
        one = torch.zeros(3, *shape); one[1] = 1.
        edited = m(x, 9, delta_h=one)
    assert [s.shape for s in seen] == [(3, *shape)] * 4 and torch.equal(seen[3], seen[0] + one), 'a hook sees what goes on'
    assert torch.equal(edited[::2], plain[::2]) and not torch.allclose(edited[1], plain[1]), 'each image has its own edit'
    handle.remove()
    with torch.no_grad(): assert torch.equal(m(x, 9), plain), 'nothing stays behind'
    delta = torch.zeros(shape[0], 1, 1, requires_grad=True)
    m(x, 9, delta_h=delta).sum().backward()
    assert delta.grad.abs().sum() > 0


def test_conditions_it_does_not_have_are_refused(x):
    m = tiny_unet()
    with pytest.raises(UserError, match='no condition lable'): m(x, 9, lable=1)
    with pytest.raises(UserError, match=r'delta_h is \[3, 5, 1, 1\], the bottleneck \[3, 32, 4, 4\]'): m(x, 9, delta_h=torch.zeros(3, 5, 1, 1))
    with pytest.raises(UserError, match='delta_h is'): m(x[:1], 9, delta_h=torch.zeros(2, 32, 4, 4))
    with torch.no_grad(): m(x, 9)
    assert not m.bottleneck._forward_hooks


def test_tiny_unet_is_deterministic_and_leaves_the_global_seed_alone():
    torch.manual_seed(5); a = torch.rand(1); torch.manual_seed(5); h = state_hash(tiny_unet()); b = torch.rand(1)
    assert torch.equal(a, b) and h == state_hash(tiny_unet()) != state_hash(tiny_unet(seed=1))


def test_size_that_cannot_be_halved_is_refused():
    with pytest.raises(UserError, match='image_size 60 must be a multiple of 16'): small_unet(60)


def test_save_and_load_round_trip(tmp_path, x):
    m = tiny_unet(n_classes=2); save_unet(m, tmp_path / 'm')
    again = load_unet(str(tmp_path / 'm'))
    assert state_hash(again) == state_hash(m) and not again.training and again.info['provenance'] == 'published' and len(again.info['sha256']) == 64
    assert not any(p.requires_grad for p in again.parameters())
    with torch.no_grad(): assert torch.equal(again(x, 4), m(x, 4))
    assert sorted(p.name for p in (tmp_path / 'm').iterdir()) == ['config.json', 'diffclip.json', WEIGHTS_NAME]


def test_half_precision_files_compute_in_float32(tmp_path, x):
    save_unet(tiny_unet(), tmp_path, torch.float16)
    again = load_unet(str(tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again(x, 4), tiny_unet()(x, 4).detach(), atol=5e-3, rtol=0)


def test_a_folder_saved_by_diffusers_loads(tmp_path, x):
    m = tiny_unet(); m.unet.save_pretrained(tmp_path)
    got = load_unet(str(tmp_path))
    assert got.patch == 1 and got(torch.randn(1, 12, 8, 8), 3).shape == (1, 12, 8, 8)


@pytest.mark.parametrize('spoil, message', [
    (lambda d: (d / WEIGHTS_NAME).write_bytes(b'<!DOCTYPE html><title>Quota exceeded'), 'is a web page'),
    (lambda d: (d / WEIGHTS_NAME).write_bytes((d / WEIGHTS_NAME).read_bytes()[:-100]), 'cut short or damaged'),
    (lambda d: (d / WEIGHTS_NAME).unlink(), 'is missing'),
    (lambda d: (d / 'config.json').unlink(), 'is missing'),
    (lambda d: (d / 'config.json').write_text('{"sample_size": '), 'config.json'),
    (lambda d: (d / 'config.json').write_text(json.dumps({**json.loads((d / 'config.json').read_text()), 'block_out_channels': [32, 32]})), 'does not fit'),
])
def test_a_broken_folder_names_the_file(tmp_path, spoil, message):
    save_unet(tiny_unet(), tmp_path); spoil(tmp_path)
    with pytest.raises(UserError, match=message) as e: load_unet(str(tmp_path))
    assert str(tmp_path) in str(e.value)


def test_a_name_that_is_nothing_is_refused():
    with pytest.raises(UserError, match='no U-Net at .*nowhere'): load_unet('nowhere/at/all')


def test_the_finest_frequencies_are_answered_by_the_photos_spectrum(tmp_path):
    from diffclip_da.diffusion.forward import q_sample
    from diffclip_da.diffusion.schedule import linear_schedule
    from diffclip_da.models.unet import CALM_ALL, CALM_FROM, calm, cosines, fine_spectrum, radius
    g, s, (a, b) = torch.Generator().manual_seed(1), linear_schedule(), (-1., 8.)
    c, r = cosines(32), radius(32, 32)
    assert torch.allclose(c @ c.T, torch.eye(32), atol=1e-5) and r[0, 16] == .25 and r.max() < .71
    x0 = c.T @ (torch.exp((a - b * r) / 2) * torch.randn(400, 3, 32, 32, generator=g)) @ c   # of this very spectrum
    fitted = fine_spectrum(x0); assert abs(fitted[0] - a) < .1 and abs(fitted[1] - b) < .2
    for t in (5, 300, 900):
        eps = torch.randn(x0.shape, generator=g); x_t = q_sample(x0, t, eps, s)
        ab = s.ab(t).item(); v = ab**.5 * eps - (1 - ab)**.5 * x0
        def error(guess): return (c @ (guess - v) @ c.T)[..., r >= CALM_ALL].square().mean().item()
        best = error(calm(torch.zeros_like(v), x_t, t, fitted, s))
        for other in ((a + 1, b), (a - 1, b)):   # no other linear guess is nearer
            assert best <= error(calm(torch.zeros_like(v), x_t, t, other, s)) * 1.001
        near = c @ (calm(v, x_t, t, fitted, s) - v) @ c.T   # what lies below is the network's own
        assert near[..., r < CALM_FROM].abs().max() < 1e-4 < near.abs().max()
    m = small_unet(64, channels=(32, 32), v_schedule=s, n_classes=0).eval(); m.spectrum = -1., 9.
    save_unet(m, tmp_path / 'a')
    again, x = load_unet(str(tmp_path / 'a')), torch.randn(2, 3, 64, 64, generator=g)
    with torch.no_grad():
        assert again.spectrum == (-1., 9.) and torch.equal(again(x, 300), m(x, 300))
        before = m(x, 300); m.unet.conv_out.bias[::4] += 1.   # one place in four of each block: a lattice
        def lattice(u): return max(torch.fft.fft2(u).abs()[..., i, j].max().item() for i, j in ((32, 0), (0, 32), (32, 32)))
        written = lattice(m(x, 300) - before)
        m.spectrum = None; plain = m(x, 300); m.unet.conv_out.bias[::4] -= 1.
        assert written < lattice(plain - m(x, 300)) / 8
    with pytest.raises(ValueError, match='predicts v'): EpsUNet(m.unet, 2, spectrum=(1, 1))
