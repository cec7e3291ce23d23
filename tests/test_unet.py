"The U-Net's protocol, and what loading refuses"
import json

import pytest
import torch
from diffusers import UNet2DModel

from diffclip_da.core import UserError
from diffclip_da.store import state_hash
from diffclip_da.models.unet import WEIGHTS_NAME, EpsUNet, guided, load_unet, save_unet, small_unet, tiny_unet


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
    with pytest.raises(UserError, match='class-conditional'): guided(tiny_unet(), 0)


def test_tiny_unet_is_deterministic_and_leaves_the_global_seed_alone():
    torch.manual_seed(5); a = torch.rand(1); torch.manual_seed(5); h = state_hash(tiny_unet()); b = torch.rand(1)
    assert torch.equal(a, b) and h == state_hash(tiny_unet()) != state_hash(tiny_unet(seed=1))


def test_size_that_cannot_be_halved_is_refused():
    with pytest.raises(UserError, match='image_size 60 must be a multiple of 8'): small_unet(60)


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
    (lambda d: (d / WEIGHTS_NAME).write_bytes(b'<!DOCTYPE html><title>Quota exceeded'), 'not a readable safetensors file'),
    (lambda d: (d / WEIGHTS_NAME).write_bytes((d / WEIGHTS_NAME).read_bytes()[:-100]), 'not a readable safetensors file'),
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
