"The U-Net of the lesson: shapes, what each switch takes away, and that it fits wherever the library takes a U-Net."
import pytest
import torch

from diffclip_da.core import UserError, new_generator
from diffclip_da.diffusion.reverse import diffusion_loss
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.models.plain_unet import PixelAttention, PlainUNet, TimeBlock, time_features
from diffclip_da.models.unet import EpsUNet, read_unet, save_unet

SCHEDULE = linear_schedule()


def net(seed=0, **kw):
    torch.manual_seed(seed)
    return PlainUNet(**dict(sample_size=16, channels=(8, 16), n_time=32) | kw)


def some(*shape, seed=0): return torch.randn(*shape, generator=new_generator(seed))


def test_time_features_by_hand():
    f = time_features(torch.tensor([0, 7]), 4)
    assert torch.allclose(f[0], torch.tensor([0., 0., 1., 1.]))
    assert torch.allclose(f[1], torch.tensor([7., .07, 7., .07]).sin() * torch.tensor([1., 1., 0., 0.]) + torch.tensor([7., .07, 7., .07]).cos() * torch.tensor([0., 0., 1., 1.]), atol=1e-5)


@pytest.mark.parametrize('kw', [dict(), dict(skips=False), dict(times=False), dict(in_channels=12), dict(channels=(8, 16, 24))])
def test_the_answer_has_the_pictures_shape(kw):
    x = some(2, kw.get('in_channels', 3), 16, 16)
    out, = net(**kw)(x, torch.tensor([3, 900]))
    assert out.shape == x.shape and torch.isfinite(out).all()


def test_without_the_clock_every_time_is_alike():
    x = some(1, 3, 16, 16)
    with torch.no_grad():
        whole, without = ([m(x, torch.tensor([t]))[0] for t in (5, 900)] for m in (net(), net(times=False)))
    assert torch.equal(*without) and not torch.equal(*whole)


def test_without_skips_fine_detail_cannot_pass():
    "A chequerboard vanishes when halved; only a skip connection can carry its sign to the answer."
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2. - 1).expand(1, 3, 16, 16)
    def moved(m):
        with torch.no_grad():
            for p in m.first.parameters(): p.zero_()
            for c in range(3): m.first.weight[c, c, 1, 1] = 1.   # the first layer hands the picture on
            m.down[0] = Hand()                                    # and so does the first block
            return (m(board, torch.tensor([5]))[0] - m(-board, torch.tensor([5]))[0]).abs().max().item()
    assert moved(net(skips=False)) < 1e-5 < moved(net())


class Hand(torch.nn.Module):
    def forward(self, x, time): return x


def test_attention_treats_all_places_alike():
    look, x, order = PixelAttention(8), some(1, 8, 4, 4), torch.randperm(16)
    def shuffled(v): return v.flatten(2)[..., order].reshape(v.shape)
    with torch.no_grad(): assert torch.allclose(look(shuffled(x)), shuffled(look(x)), atol=1e-5)


def test_a_block_leaves_room_to_do_nothing():
    block = TimeBlock(8, 8, 4)
    with torch.no_grad():
        for p in (*block.conv2.parameters(),): p.zero_()
        x = some(2, 8, 4, 4)
        assert torch.equal(block(x, some(2, 4)), x)


def test_it_is_a_u_net_of_the_library(tmp_path):
    model = EpsUNet(net(num_class_embeds=3), n_classes=2, v_schedule=SCHEDULE).eval()
    x = some(2, 3, 16, 16)
    with torch.no_grad():
        plain, told = model(x, 500), model(x, 500, label=1)
        assert plain.shape == x.shape and not torch.equal(plain, told)
        assert torch.equal(model(x, 500, label=2), plain)
        assert not torch.equal(model(x, 500, delta_h=.5), plain) and model.image_size == 16 and model.size_multiple == 2
        save_unet(model, tmp_path)
        assert torch.allclose(read_unet(tmp_path, PlainUNet=PlainUNet).eval()(x, 500), plain, atol=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match='multiples of 8'): PlainUNet(16, channels=(8, 12))
    with pytest.raises(UserError, match='one of 4'): PlainUNet(18, channels=(8, 8, 8))


def test_the_ablation_in_small():
    "Trained alike for a few seconds at one noise level, the network without skips cannot say what the noise is."
    g, size = new_generator(1), 16
    cx, cy = torch.rand(2, 128, 1, 1, generator=g) * 6 + 5
    at = torch.arange(size) + .5
    discs = (((at[None, None] - cx)**2 + (at[None, :, None] - cy)**2 < 12).float() * 1.6 - .8)[:, None].expand(-1, 3, -1, -1)
    def error(**kw):
        model, g = EpsUNet(net(**kw), v_schedule=SCHEDULE), new_generator(2)
        opt = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(60):
            x0, t = discs[torch.randint(128, (16,), generator=g)], torch.full((16,), 200)
            loss = diffusion_loss(model, x0, t, torch.randn(x0.shape, generator=g), SCHEDULE, lambda t, s: 1 / s.ab(t))
            opt.zero_grad(); loss.backward(); opt.step()
        with torch.no_grad(): return diffusion_loss(model, discs, 200, some(*discs.shape, seed=3), SCHEDULE).item()
    whole, without = error(), error(skips=False)
    assert whole < .6 * without, (whole, without)
