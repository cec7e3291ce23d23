"""Published weights: each layout against an independent account of it, and every way in which a foreign file can be wrong.

The files are of the published formats with random weights; the references are plain functions of a state dict.
"""
import http.server
import json
import math
import shutil
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from huggingface_hub.utils import LocalEntryNotFoundError, filter_repo_objects
from safetensors.torch import save_file

from diffclip_da.models import published
from diffclip_da.core import UserError
from diffclip_da.store import sha256_file
from diffclip_da.diffusion.ddim import invert, sample, step_pairs
from diffclip_da.adaptation.finetune import Recipe, finetune
from diffclip_da.diffusion.walk import Walk
from diffclip_da.models.published import (BIN_NAME, GuidedUNet, checked_sha256, download, guess_size, guided_config,
                                          load_folder, load_hub, load_weights)
from diffclip_da.store import read_tensors
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.models.unet import WEIGHTS_NAME, EpsUNet, save_unet
from diffclip_da.models.load import load_unet

T = torch.tensor([3, 877])


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "The networks are tiny: a second thread would only wait, for long where other programs compute"
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def gen(seed): return torch.Generator().manual_seed(seed)


@pytest.fixture
def x(): return torch.randn(2, 3, 16, 16, generator=gen(0))


def close(a, b):
    assert b.std() > .05, 'the comparison would be empty'
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


class Random(dict):
    "A state dict that grows: random tensors of a sensible size"
    def __init__(self, seed): self.g = gen(seed)
    def weight(self, name, c_out, c_in, *kernel):
        self[f'{name}.weight'] = torch.randn(c_out, c_in, *kernel, generator=self.g) / math.sqrt(c_in * math.prod(kernel))
        self[f'{name}.bias'] = torch.randn(c_out, generator=self.g) * .1
    def norm(self, name, c):
        self[f'{name}.weight'] = 1 + torch.randn(c, generator=self.g) * .2
        self[f'{name}.bias'] = torch.randn(c, generator=self.g) * .2


# ---------------------------------------------------------------- the DDPM port's layout

def ddpm_state(ch=32, mult=(1, 2), layers=2, attn=(1,), seed=0):
    s, temb, n = Random(seed), 4 * ch, len(mult)
    def block(name, c_in, c_out):
        s.norm(f'{name}.norm1', c_in); s.weight(f'{name}.conv1', c_out, c_in, 3, 3); s.weight(f'{name}.temb_proj', c_out, temb)
        s.norm(f'{name}.norm2', c_out); s.weight(f'{name}.conv2', c_out, c_out, 3, 3)
        if c_in != c_out: s.weight(f'{name}.nin_shortcut', c_out, c_in, 1, 1)
    def attention(name, c):
        s.norm(f'{name}.norm', c)
        for k in ('q', 'k', 'v', 'proj_out'): s.weight(f'{name}.{k}', c, c, 1, 1)
    s.weight('temb.dense.0', temb, ch); s.weight('temb.dense.1', temb, temb); s.weight('conv_in', ch, 3, 3, 3)
    c, widths = ch, [ch]
    for i in range(n):
        for j in range(layers):
            block(f'down.{i}.block.{j}', c, ch * mult[i]); c = ch * mult[i]; widths.append(c)
            if i in attn: attention(f'down.{i}.attn.{j}', c)
        if i < n - 1: s.weight(f'down.{i}.downsample.conv', c, c, 3, 3); widths.append(c)
    block('mid.block_1', c, c); attention('mid.attn_1', c); block('mid.block_2', c, c)
    for i in range(n)[::-1]:
        for j in range(layers + 1):
            block(f'up.{i}.block.{j}', c + widths.pop(), ch * mult[i]); c = ch * mult[i]
            if i in attn: attention(f'up.{i}.attn.{j}', c)
        if i: s.weight(f'up.{i}.upsample.conv', c, c, 3, 3)
    s.norm('norm_out', c); s.weight('conv_out', 3, c, 3, 3)
    return dict(s)


def ddpm_reference(s, x, t):
    "Ho et al.'s U-Net, straight from the names in a state dict"
    def conv(name, h, **kw): return F.conv2d(h, s[f'{name}.weight'], s[f'{name}.bias'], **kw)
    def dense(name, h): return F.linear(h, s[f'{name}.weight'], s[f'{name}.bias'])
    def norm(name, h): return F.group_norm(h, 32, s[f'{name}.weight'], s[f'{name}.bias'], eps=1e-6)
    swish = lambda h: h * h.sigmoid()
    def block(name, h):
        r = conv(f'{name}.conv1', swish(norm(f'{name}.norm1', h)), padding=1) + dense(f'{name}.temb_proj', swish(temb))[:, :, None, None]
        r = conv(f'{name}.conv2', swish(norm(f'{name}.norm2', r)), padding=1)
        return r + (conv(f'{name}.nin_shortcut', h) if f'{name}.nin_shortcut.weight' in s else h)
    def attention(name, h):
        if f'{name}.q.weight' not in s: return h
        n = norm(f'{name}.norm', h)
        q, k, v = (conv(f'{name}.{part}', n).flatten(2) for part in 'qkv')
        w = torch.einsum('bci,bcj->bij', q, k).div(h.shape[1] ** .5).softmax(-1)
        return h + conv(f'{name}.proj_out', torch.einsum('bij,bcj->bci', w, v).reshape(h.shape))

    half = s['temb.dense.0.weight'].shape[1] // 2
    angle = t[:, None] * torch.tensor([10_000 ** (-k / (half - 1)) for k in range(half)])
    temb = dense('temb.dense.1', swish(dense('temb.dense.0', torch.cat([angle.sin(), angle.cos()], 1))))
    h = conv('conv_in', x, padding=1); seen = [h]; i = 0
    while f'down.{i}.block.0.conv1.weight' in s:
        j = 0
        while f'down.{i}.block.{j}.conv1.weight' in s:
            h = attention(f'down.{i}.attn.{j}', block(f'down.{i}.block.{j}', h)); seen.append(h); j += 1
        if f'down.{i}.downsample.conv.weight' in s:
            below_right = torch.zeros(*h.shape[:2], h.shape[2] + 1, h.shape[3] + 1); below_right[..., :-1, :-1] = h
            h = conv(f'down.{i}.downsample.conv', below_right, stride=2); seen.append(h)
        i += 1
    h = block('mid.block_2', attention('mid.attn_1', block('mid.block_1', h)))
    for i in range(i)[::-1]:
        for k in range(j + 1): h = attention(f'up.{i}.attn.{k}', block(f'up.{i}.block.{k}', torch.cat([h, seen.pop()], 1)))
        if i: h = conv(f'up.{i}.upsample.conv', h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    return conv('conv_out', swish(norm('norm_out', h)), padding=1)


ddpm_shapes = pytest.mark.parametrize('kw', [dict(), dict(layers=1, attn=(0,)), dict(mult=(1, 1, 2), layers=1, attn=(1, 2)), dict(mult=(1, 2, 2), layers=1, attn=(0, 2))])


@ddpm_shapes
def test_a_ddpm_checkpoint_computes_what_the_original_does(tmp_path, x, kw):
    s = ddpm_state(**kw); torch.save(s, tmp_path / 'celeba_hq.ckpt')
    m = load_weights(tmp_path / 'celeba_hq.ckpt')
    with torch.no_grad(): close(m(x, T), ddpm_reference(s, x, T)); close(m(x, 41), ddpm_reference(s, x, torch.tensor([41, 41])))
    assert isinstance(m.unet, UNet2DModel) and sum(p.numel() for p in m.parameters()) == sum(v.numel() for v in s.values())
    assert m.info == dict(name='celeba_hq.ckpt', sha256=sha256_file(tmp_path / 'celeba_hq.ckpt'), provenance='published')


def test_the_reference_notices_each_convention(x):
    "Sine and cosine, K - 1, the padding and the eps of the norms all matter at the tolerance used"
    s = ddpm_state(); state, config = published.ddpm_to_diffusers(s), published.ddpm_config(s)
    for wrong in (dict(flip_sin_to_cos=True), dict(freq_shift=0), dict(downsample_padding=1), dict(norm_eps=1e-3), dict(attention_head_dim=8)):
        net = UNet2DModel(**{**config, **wrong}).eval(); net.load_state_dict(state)
        with torch.no_grad(): assert (net(x, T).sample - ddpm_reference(s, x, T)).abs().max() > 1e-4, wrong


@pytest.mark.parametrize('wrap', [
    lambda s, old: s,
    lambda s, old: {f'module.{k}': v for k, v in s.items()},
    lambda s, old: [old, {'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': [{'lr': 1e-4}]}, 17, 4000, {k: v for k, v in s.items()}],
    lambda s, old: [{f'module.{k}': v for k, v in s.items()}, {'state': {}, 'param_groups': []}],
    lambda s, old: {'model': s, 'step': 5},
    lambda s, old: {f'module._orig_mod.{k}': v for k, v in s.items()},
    lambda s, old: {'state_dict': {f'module.{k}': v for k, v in s.items()}, 'epoch': 3, 'betas': torch.zeros(5)},
    lambda s, old: {'model': old, 'optimizer': {}, 'model_ema': s},
    lambda s, old: {'model': old, 'ema': {f'module.{k}': v for k, v in s.items()}},
    lambda s, old: {**s, 'logvar': torch.zeros(1000)},
    lambda s, old: {k: v.double() for k, v in s.items()},
])
def test_the_weights_are_found_wherever_they_are(tmp_path, x, wrap):
    s, old = ddpm_state(layers=1), ddpm_state(layers=1, seed=1)
    torch.save(wrap(s, old), tmp_path / 'm.pth')
    with torch.no_grad(): close(load_weights(tmp_path / 'm.pth')(x, T), ddpm_reference(s, x, T))


def test_safetensors_and_the_old_file_format_load_too(tmp_path, x):
    s = ddpm_state(layers=1); want = ddpm_reference(s, x, T)
    save_file(s, tmp_path / 'm.safetensors'); torch.save([s, {}], tmp_path / 'm.ckpt', _use_new_zipfile_serialization=False)
    for name in ('m.safetensors', 'm.ckpt'):
        with torch.no_grad(): close(load_unet(tmp_path / name)(x, T), want)


def test_a_learned_variance_is_left_out(tmp_path, x):
    s = ddpm_state(layers=1); two = dict(s)
    for k in ('weight', 'bias'): two[f'conv_out.{k}'] = torch.cat([s[f'conv_out.{k}'], torch.ones_like(s[f'conv_out.{k}'])])
    torch.save(two, tmp_path / 'm.pt')
    with torch.no_grad(): close(load_weights(tmp_path / 'm.pt')(x, T), ddpm_reference(s, x, T))


def test_the_image_size_is_guessed_from_what_attends_and_can_be_told(tmp_path):
    assert guess_size([0, 0, 0, 0, 1, 0]) == 256 and guess_size([0, 1, 0, 0]) == 32              # celeba_hq.ckpt, DDPM's CIFAR-10
    assert guess_size([0, 0, 0, 1, 1, 1]) == 256 and guess_size([0, 1, 1, 1]) == 64 and guess_size([0, 1, 1, 0]) == 32 # ADM 256, ADM 64, iDDPM's CIFAR-10
    torch.save(ddpm_state(layers=1, attn=()), tmp_path / 'm.pt')
    with pytest.raises(UserError, match='m.pt.*give image_size='): load_weights(tmp_path / 'm.pt')
    assert load_unet(tmp_path / 'm.pt', image_size=48).image_size == 48


def test_celeba_hq_is_given_the_configuration_of_its_copy_on_the_hub():
    "What `google/ddpm-celebahq-256` says in its config.json, inferred from the names and shapes (a quarter as wide) of `celeba_hq.ckpt`"
    config = published.ddpm_config(ddpm_state(32, mult=(1, 1, 2, 2, 4, 4), attn=(4,)))
    assert config.pop('block_out_channels') == tuple(c // 4 for c in (128, 128, 256, 256, 512, 512))
    assert config == dict(sample_size=256, in_channels=3, out_channels=3, layers_per_block=2, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
                          freq_shift=1, norm_eps=1e-6, norm_num_groups=32, down_block_types=('DownBlock2D',) * 4 + ('AttnDownBlock2D', 'DownBlock2D'),
                          up_block_types=('UpBlock2D', 'AttnUpBlock2D') + ('UpBlock2D',) * 4)
    with torch.device('meta'): net = UNet2DModel(**config, block_out_channels=(128, 128, 256, 256, 512, 512))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 113.7


# ---------------------------------------------------------------- guided diffusion's layout

def guided_state(channels=(32, 64), layers=1, attn=(1,), width=32, updown=True, film=True, out=6, seed=0):
    s, e, n = Random(seed), 4 * width, len(channels)
    def block(name, c_in, c_out):
        s.norm(f'{name}.in_layers.0', c_in); s.weight(f'{name}.in_layers.2', c_out, c_in, 3, 3); s.weight(f'{name}.emb_layers.1', 2 * c_out if film else c_out, e)
        s.norm(f'{name}.out_layers.0', c_out); s.weight(f'{name}.out_layers.3', c_out, c_out, 3, 3)
        if c_in != c_out: s.weight(f'{name}.skip_connection', c_out, c_in, 1, 1)
    def attention(name, c): s.norm(f'{name}.norm', c); s.weight(f'{name}.qkv', 3 * c, c, 1); s.weight(f'{name}.proj_out', c, c, 1)
    s.weight('time_embed.0', e, width); s.weight('time_embed.2', e, e)
    s.weight('input_blocks.0.0', channels[0], 3, 3, 3)
    c, widths = channels[0], [channels[0]]
    for i, w in enumerate(channels):
        for _ in range(layers):
            k = len(widths); block(f'input_blocks.{k}.0', c, w); c = w; widths.append(c)
            if i in attn: attention(f'input_blocks.{k}.1', c)
        if i < n - 1:
            k = len(widths); widths.append(c)
            if updown: block(f'input_blocks.{k}.0', c, c)
            else: s.weight(f'input_blocks.{k}.0.op', c, c, 3, 3)
    block('middle_block.0', c, c); attention('middle_block.1', c); block('middle_block.2', c, c)
    k = 0
    for i in range(n)[::-1]:
        for j in range(layers + 1):
            name = f'output_blocks.{k}'; block(f'{name}.0', c + widths.pop(), channels[i]); c = channels[i]; k += 1
            if i in attn: attention(f'{name}.1', c)
            if i and j == layers:
                last = f'{name}.{1 + (i in attn)}'
                if updown: block(last, c, c)
                else: s.weight(f'{last}.conv', c, c, 3, 3)
    s.norm('out.0', c); s.weight('out.2', out, c, 3, 3)
    return dict(s)


def guided_reference(s, x, t, layers, head, order, film, n_heads=None):
    "ADM's U-Net as a walk over the names of a state dict; one attention head after another"
    def conv(name, h, **kw): return F.conv2d(h, s[f'{name}.weight'], s[f'{name}.bias'], **kw)
    def dense(name, h): return F.linear(h, s[f'{name}.weight'], s[f'{name}.bias'])
    def norm(name, h): return F.group_norm(h, 32, s[f'{name}.weight'], s[f'{name}.bias'], eps=1e-5)
    swish = lambda h: h * h.sigmoid()
    halve = lambda h: (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
    double = lambda h: h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    def block(name, h, size=lambda h: h):
        r = conv(f'{name}.in_layers.2', size(swish(norm(f'{name}.in_layers.0', h))), padding=1)
        e = dense(f'{name}.emb_layers.1', swish(emb))[:, :, None, None]
        if film: r = norm(f'{name}.out_layers.0', r) * (1 + e[:, :r.shape[1]]) + e[:, r.shape[1]:]
        else: r = norm(f'{name}.out_layers.0', r + e)
        h = size(h)
        return conv(f'{name}.out_layers.3', swish(r), padding=1) + (conv(f'{name}.skip_connection', h) if f'{name}.skip_connection.weight' in s else h)
    def attention(name, h):
        b, c, *side = h.shape
        rows = F.conv1d(norm(f'{name}.norm', h.flatten(2)), s[f'{name}.qkv.weight'], s[f'{name}.qkv.bias'])
        wide = head or c // n_heads
        heads = []
        for i in range(c // wide):
            at = [3 * wide * i + wide * part for part in range(3)] if order == 'heads' else [c * part + wide * i for part in range(3)]
            q, k, v = (rows[:, a:a + wide] for a in at)
            w = torch.einsum('bci,bcj->bij', q * wide ** -.25, k * wide ** -.25).softmax(-1)
            heads.append(torch.einsum('bij,bcj->bci', w, v))
        return h + F.conv1d(torch.cat(heads, 1), s[f'{name}.proj_out.weight'], s[f'{name}.proj_out.bias']).reshape(b, c, *side)
    def stage(name, h, size):
        for j in range(3):
            if f'{name}.{j}.qkv.weight' in s: h = attention(f'{name}.{j}', h)
            elif f'{name}.{j}.in_layers.0.weight' in s: h = block(f'{name}.{j}', h, size if size and (j or 'input' in name) else lambda h: h)
            elif f'{name}.{j}.op.weight' in s: h = conv(f'{name}.{j}.op', h, stride=2, padding=1)
            elif f'{name}.{j}.conv.weight' in s: h = conv(f'{name}.{j}.conv', double(h), padding=1)
        return h

    half = s['time_embed.0.weight'].shape[1] // 2
    angle = t[:, None] * torch.tensor([10_000 ** (-k / half) for k in range(half)])
    emb = dense('time_embed.2', swish(dense('time_embed.0', torch.cat([angle.cos(), angle.sin()], 1))))
    h = conv('input_blocks.0.0', x, padding=1); seen = [h]; n = len({k.split('.')[1] for k in s if k.startswith('input_blocks')})
    for i in range(1, n): h = stage(f'input_blocks.{i}', h, halve if i % (layers + 1) == 0 else None); seen.append(h)
    h = stage('middle_block', h, None)
    for i in range(n): h = stage(f'output_blocks.{i}', torch.cat([h, seen.pop()], 1), double if i % (layers + 1) == layers else None)
    return conv('out.2', swish(norm('out.0', h)), padding=1)[:, :3]


@pytest.mark.parametrize('order', ['heads', 'qkv'])
@pytest.mark.parametrize('kw', [dict(), dict(layers=2, attn=(0, 1)), dict(updown=False, film=False, out=3), dict(channels=(32, 32, 64), attn=(1,), film=False),
                                dict(channels=(32, 64, 64), attn=(1, 2), updown=False, width=64)])
def test_a_guided_checkpoint_computes_what_the_original_does(tmp_path, x, kw, order):
    s = guided_state(**kw); torch.save(s, tmp_path / 'ema.pt')
    m = load_weights(tmp_path / 'ema.pt', head_channels=16, qkv_order=order)
    args = kw.get('layers', 1), 16, order, kw.get('film', True)
    with torch.no_grad(): close(m(x, T), guided_reference(s, x, T, *args)); close(m(x, 41), guided_reference(s, x, torch.tensor([41, 41]), *args))
    assert list(m.unet.state_dict()) != [] and set(m.unet.state_dict()) == set(s) and m.info['provenance'] == 'published'


def test_heads_have_to_be_told_and_they_and_the_order_matter(tmp_path, x):
    s = guided_state(channels=(32, 128)); torch.save(s, tmp_path / 'm.pt')
    load = lambda **kw: load_unet(tmp_path / 'm.pt', **kw)
    with torch.no_grad():
        close(load(head_channels=64)(x, T), guided_reference(s, x, T, 1, 64, 'heads', True))
        for kw in (dict(head_channels=32), dict(head_channels=64, qkv_order='qkv')): assert (load(**kw)(x, T) - load(head_channels=64)(x, T)).abs().max() > 1e-3
    with pytest.raises(UserError, match='128 channels cannot be cut into heads of 48.*head_channels'): load(head_channels=48)
    with pytest.raises(UserError, match="qkv_order = 'new': choose heads, qkv"): load(qkv_order='new', head_channels=64)
    with pytest.raises(UserError, match=r"m\.pt: its tensors do not tell how many heads.*head_channels=64 \(ADM, P2\), or num_heads=4.*'model.pt\?num_heads=4'"): load()
    with pytest.raises(UserError, match='128 channels cannot be cut into 3 heads'): load(num_heads=3)
    with pytest.raises(UserError, match='head_channels or num_heads, not both'): load(num_heads=2, head_channels=64)
    assert not list(tmp_path.glob('*.sha256')) or load(head_channels=64)          # a refused start notes nothing that hinders


@pytest.mark.parametrize('heads', [4, 2, 1])
def test_a_number_of_heads_is_computed_as_the_original_does(tmp_path, x, heads):
    "Widths differ from level to level, so no width of a head would do."
    s = guided_state(channels=(32, 64, 128), attn=(1, 2)); torch.save(s, tmp_path / 'm.pt')
    with torch.no_grad():
        for m in (load_unet(tmp_path / 'm.pt', num_heads=heads), load_unet(f"{tmp_path / 'm.pt'}?num_heads={heads}&image_size=16")):
            close(m(x, T), guided_reference(s, x, T, 1, None, 'heads', True, heads))
    save_unet(m, tmp_path / 'own')
    with torch.no_grad(): close(load_unet(tmp_path / 'own')(x, T), m(x, T))


def test_published_architectures_keep_their_heads():
    for known in published.HEADS_OF_64:
        with torch.device('meta'): state = GuidedUNet(256, **known).state_dict()
        config = guided_config(state)
        assert config['sample_size'] == 256 and all(config[k] == v for k, v in known.items())
        with torch.device('meta'): assert published.guided_network(state)[0].config.head_channels == 64


@pytest.mark.parametrize('attention, guess', [((1, 2), 32), ((3,), 128), ((2,), 64)])
def test_a_guess_of_the_size_is_told_and_can_be_overruled(tmp_path, capsys, attention, guess):
    torch.save(GuidedUNet(64, channels=(32,) * 4, attention=attention, width=32, head_channels=16).state_dict(), path := tmp_path / 'm.pt')
    assert load_unet(path, head_channels=16).image_size == guess
    assert f'{path}: guessed from where it attends: images of {guess} px' in (said := capsys.readouterr().out) and '?image_size=' in said
    assert load_unet(f'{path}?image_size=64&head_channels=16').image_size == 64 and capsys.readouterr().out == ''
    with pytest.raises(UserError, match=f'seem to be of {guess} px'): load_unet(path)


@pytest.mark.parametrize('change, message', [
    (lambda k, v: v * float('nan'), 'NaN or infinite'), (lambda k, v: v / 0 if k.startswith('out.') else v, 'NaN or infinite'), (lambda k, v: v.to(torch.int8), 'int8, no fractions'), (lambda k, v: v.to(torch.float8_e4m3fn), 'float8_e4m3fn, no fractions'),
    (lambda k, v: v.to(torch.complex64), 'complex64, no fractions'), (lambda k, v: v[:1].clone().expand(v.shape) if v.ndim > 2 else v, r'sparse, quantised or repeated'), (lambda k, v: v.to_sparse(), 'sparse, quantised or repeated')])
def test_weights_that_are_no_weights_are_refused_by_every_reader(tmp_path, change, message):
    state = GuidedUNet(16, channels=(32, 32), attention=(0,), width=32, head_channels=16).state_dict()
    torch.save({k: change(k, v) for k, v in state.items()}, tmp_path / 'm.pt')
    with pytest.raises(UserError, match=rf'm\.pt: .*{message}'): load_unet(tmp_path / 'm.pt', head_channels=16)
    unet = UNet2DModel(sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2)
    unet.save_config(tmp_path)
    torch.save({k: change('out.', v) for k, v in unet.state_dict().items()}, tmp_path / BIN_NAME)
    with pytest.raises(UserError, match=rf'{BIN_NAME}.*{message}'): load_unet(tmp_path)


@pytest.mark.parametrize('kw, ok', [
    (dict(rescale_betas_zero_snr=True), False), (dict(rescale_betas_zero_snr=True, prediction_type='v_prediction'), False), (dict(trained_betas=torch.linspace(1e-4, .02, 1000).tolist()), True),
    (dict(trained_betas=torch.linspace(1e-4, .021, 1000).tolist()), False), (dict(trained_betas=[.1] * 7, num_train_timesteps=7), False), (dict(beta_end=.0201), False),
    (dict(beta_schedule='scaled_linear'), False)])
def test_schedules_are_compared_by_their_numbers(tmp_path, kw, ok):
    from diffusers import DDIMScheduler
    net = UNet2DModel(sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2)
    net.save_pretrained(tmp_path); DDIMScheduler(**kw).save_pretrained(tmp_path)
    if ok: assert load_unet(tmp_path).v_schedule is None
    else:
        with pytest.raises(UserError, match=f'was trained for .*{next(iter(kw))}') as e: load_unet(tmp_path)
        assert len(str(e.value)) < 600


def test_schedulers_that_do_not_count_noise_in_betas_are_refused(tmp_path):
    for name in ('EDMEulerScheduler', 'FlowMatchEulerDiscreteScheduler', 'ScoreSdeVeScheduler', 'CMStochasticIterativeScheduler'):
        (tmp_path / 'scheduler_config.json').write_text(json.dumps(dict(_class_name=name, sigma_max=80)))
        with pytest.raises(UserError, match=name): published.trained_for(tmp_path)


def test_p2_face_model_has_its_published_size():
    "256 px, 128 channels times 1 1 2 2 4 4, one block, attention at 16 px: 93.56 million parameters"
    with torch.device('meta'): net = GuidedUNet(256, channels=tuple(128 * m for m in (1, 1, 2, 2, 4, 4)), attention=(4,), layers=1, width=128)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 93.56
    config = guided_config(net.state_dict())
    assert config.pop('sample_size') == 256 and all(net.config[k] == v for k, v in config.items()) and net.config.head_channels == 64


def test_p2_layout_built_from_its_description_alone_has_the_same_names():
    with torch.device('meta'): net = GuidedUNet()
    widths = tuple(128 * m for m in (1, 1, 2, 2, 4, 4))
    small = guided_state(tuple(w // 4 for w in widths), attn=(4,), width=32)
    assert set(small) == set(net.state_dict())


def test_a_class_conditional_model_is_refused(tmp_path):
    torch.save({**guided_state(), 'label_emb.weight': torch.zeros(10, 128)}, tmp_path / 'm.pt')
    with pytest.raises(UserError, match='m.pt.*conditional on a class.*unconditional model'): load_weights(tmp_path / 'm.pt', head_channels=16)


# ---------------------------------------------------------------- as a part of the rest

def of_each_kind(folder):
    torch.save(ddpm_state(layers=1), folder / 'ddpm.ckpt'); torch.save(guided_state(), folder / 'guided.pt')
    plain(folder / 'folder')
    return dict(ddpm=load_unet(folder / 'ddpm.ckpt', image_size=16), guided=load_unet(folder / 'guided.pt', image_size=16, head_channels=16), folder=load_unet(folder / 'folder'))


def plain(folder, **kw):
    "A small `UNet2DModel` as diffusers saves it"
    torch.manual_seed(3)
    unet = UNet2DModel(**{**dict(sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=16, down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
                                 up_block_types=('AttnUpBlock2D', 'UpBlock2D'), attention_head_dim=None), **kw}).eval()
    unet.save_pretrained(folder)
    return unet


@pytest.mark.parametrize('kind', ['ddpm', 'guided', 'folder'])
def test_each_kind_inverts_samples_and_can_be_tuned(tmp_path, x, kind):
    m, schedule, pairs, x0 = of_each_kind(tmp_path)[kind], linear_schedule(), step_pairs(200, 2), x.tanh()
    assert isinstance(m, EpsUNet) and (m.image_size, m.n_classes, m.patch, m.v_schedule) == (16, 0, 1, None) and not m.training
    assert not any(p.requires_grad or p.is_meta for p in m.parameters())
    with torch.no_grad(): latents = invert(m, x0, pairs, schedule); back = sample(m, latents, pairs, schedule)
    assert back.shape == x0.shape and back.isfinite().all() and not torch.equal(back, x0)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    recipe = Recipe(n_images=2, passes=1, images_per_update=2, clip_weight=0., l1_weight=1., id_weight=0., lr=1e-3)
    tuned, history = finetune(m, x0, 'photo', 'sketch', None, None, schedule, Walk(t0=200, n=2), recipe)
    assert history.grad_norm.iloc[0] > 0 and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert all(not torch.equal(v, before[k]) for k, v in tuned.state_dict().items() if k.endswith('conv_in.weight') or k.endswith('input_blocks.0.0.weight'))
    with pytest.raises(UserError, match='unconditional'): m(x, 3, label=1)


def test_gradients_reach_every_parameter_and_the_input(x):
    net = GuidedUNet(16, channels=(32, 64), attention=(1,), width=32, head_channels=16); m = EpsUNet(net)
    x.requires_grad_(); m(x, T).square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert net.out[2].weight.grad[3:].abs().sum() == 0 # the learned variance has no say


@pytest.mark.parametrize('kind', ['ddpm', 'guided', 'folder'])
def test_each_kind_can_be_saved_and_loaded_as_our_own(tmp_path, x, kind):
    m = of_each_kind(tmp_path)[kind]; save_unet(m, tmp_path / 'own')
    again = load_unet(tmp_path / 'own')
    with torch.no_grad(): close(again(x, T), m(x, T))
    assert type(again.unet) is type(m.unet) and again.image_size == 16
    with pytest.raises(UserError, match='sha256: only for published weights'): load_unet(tmp_path / 'own', sha256='0' * 64)


# ---------------------------------------------------------------- folders and the hub

def old_names(state):
    "Attention as diffusers named it in 2022, when the published models were uploaded"
    for new, old in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out.0', 'proj_attn')): state = {k.replace(f'.{new}.', f'.{old}.'): v for k, v in state.items()}
    return state


@pytest.mark.parametrize('place', ['.', 'unet'])
@pytest.mark.parametrize('weights', ['safetensors', 'bin', 'old bin'])
def test_folders_pipelines_and_old_files_load(tmp_path, x, place, weights):
    unet = plain(tmp_path / place)
    if weights != 'safetensors':
        (tmp_path / place / WEIGHTS_NAME).unlink()
        torch.save(old_names(unet.state_dict()) if 'old' in weights else unet.state_dict(), tmp_path / place / BIN_NAME)
    m = load_unet(tmp_path)
    with torch.no_grad(): close(m(x, T), unet(x, T).sample)
    file = tmp_path / place / (WEIGHTS_NAME if weights == 'safetensors' else BIN_NAME)
    assert m.info == dict(name=tmp_path.name, sha256=sha256_file(file), provenance='published') and 'query' in ' '.join(old_names(unet.state_dict()))


def test_the_schedulers_file_is_heard(tmp_path, x):
    unet = plain(tmp_path / 'unet'); (tmp_path / 'scheduler').mkdir()
    say = lambda **kw: (tmp_path / 'scheduler/scheduler_config.json').write_text(json.dumps(kw))
    say(beta_schedule='linear', beta_start=1e-4, beta_end=.02, num_train_timesteps=1000, trained_betas=None, clip_sample=True)
    assert load_folder(tmp_path).v_schedule is None
    say(prediction_type='v_prediction')
    with torch.no_grad(): close(load_folder(tmp_path)(x, 300), EpsUNet(unet, v_schedule=linear_schedule())(x, 300))
    for kw in (dict(beta_schedule='squaredcos_cap_v2'), dict(num_train_timesteps=4000), dict(prediction_type='sample')):
        say(**kw)
        with pytest.raises(UserError, match=f'scheduler_config.json.*{list(kw)[0]} = .*another model'): load_folder(tmp_path)


@pytest.mark.parametrize('change, message', [
    (dict(_class_name='UNet2DConditionModel'), 'describes a UNet2DConditionModel.*unconditional'),
    (dict(num_class_embeds=10), 'needs more than'), (dict(time_embedding_type='fourier'), 'counts time otherwise'),
    (dict(block_out_channels=[32, 64]), 'does not fit its network.*shape'), (dict(norm_num_groups=7), 'etch it again'), (dict(out_channels=6), 'does not fit')])
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, change, message):
    plain(tmp_path); path = tmp_path / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as e: load_folder(tmp_path)
    assert str(tmp_path) in str(e.value) and not list(tmp_path.glob('*.sha256'))


def test_an_empty_folder_says_what_it_should_hold(tmp_path):
    with pytest.raises(UserError, match='holds no U-Net.*config.json'): load_unet(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A stand-in for the hub: `snapshot_download` that copies what the patterns allow, and remembers what it was asked"
    repo, asked = tmp_path / 'repo', []
    def snapshot_download(name, revision=None, cache_dir=None, local_files_only=False, allow_patterns=None):
        asked.append((name, revision, local_files_only))
        if name != 'owner/faces': raise LocalEntryNotFoundError(f'no {name}')
        for f in filter_repo_objects([p.relative_to(repo).as_posix() for p in repo.rglob('*') if p.is_file()], allow_patterns=allow_patterns):
            (cache_dir / f).parent.mkdir(parents=True, exist_ok=True); shutil.copy(repo / f, cache_dir / f)
        return str(cache_dir)
    monkeypatch.setattr(published, 'snapshot_download', snapshot_download); monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    return repo, asked


@pytest.mark.parametrize('place', ['.', 'unet'])
@pytest.mark.parametrize('safe', [True, False])
def test_the_hub_gives_configuration_and_weights_and_nothing_else(tmp_path, x, hub, place, safe):
    repo, asked = hub
    unet = plain(repo / place); torch.save(unet.state_dict(), repo / place / BIN_NAME); (repo / 'README.md').write_text('big'); (repo / 'flax_model.msgpack').write_text('bigger')
    if not safe: (repo / place / WEIGHTS_NAME).unlink()
    m = load_hub('owner/faces', revision='v1', cache_dir=tmp_path / 'cache')
    with torch.no_grad(): close(m(x, T), unet(x, T).sample)
    weights = WEIGHTS_NAME if safe else BIN_NAME
    assert {p.name for p in (tmp_path / 'cache').rglob('*') if p.is_file()} == {'config.json', weights} and set(asked) == {('owner/faces', 'v1', False)}
    assert m.info == dict(name='owner/faces', sha256=sha256_file(repo / place / weights), provenance='published')


def test_load_unet_sends_a_hub_id_to_the_hub(tmp_path, hub, monkeypatch):
    with pytest.raises(UserError, match="cannot fetch owner/nothing from the hub.*none at 'owner/nothing'"): load_unet('owner/nothing')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(UserError, match='HF_HUB_OFFLINE is set and it is not in the cache'): load_unet('owner/nothing')
    assert hub[1][-1] == ('owner/nothing', None, True)
    for name in ('nowhere/at/all', './owner/name', 'just-a-name'):
        with pytest.raises(UserError, match='no U-Net at .*hub id'): load_unet(name)


def test_the_hubs_own_cache_serves_without_a_network(tmp_path, x, monkeypatch):
    "The layout in which huggingface_hub keeps a model, and the real `snapshot_download` on it"
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    root, commit = tmp_path / 'models--google--ddpm-celebahq-256', 'a' * 40
    unet = plain(root / 'snapshots' / commit); (root / 'refs').mkdir(); (root / 'refs/main').write_text(commit)
    m = load_hub('google/ddpm-celebahq-256', cache_dir=tmp_path)
    with torch.no_grad(): close(m(x, T), unet(x, T).sample)
    assert m.info['name'] == 'google/ddpm-celebahq-256' and not list(tmp_path.rglob('*.sha256'))
    with pytest.raises(UserError, match='hf download google/other'): load_hub('google/other', cache_dir=tmp_path)


# ---------------------------------------------------------------- what may be wrong with a file

class Trojan:
    def __reduce__(self): return pytest.fail, ('the file ran code',)


def spoiled(kind, s):
    return {'missing': {k: v for k, v in s.items() if k != 'mid.block_1.norm1.weight'}, 'unknown': {**s, 'extra.weight': torch.zeros(1)},
            'shape': {**s, 'down.0.block.0.conv2.weight': torch.zeros(32, 31, 3, 3)}, 'cut': {k: v for k, v in s.items() if not k.startswith('down.1.block')},
            'flat': {**s, 'down.0.block.0.conv1.weight': torch.zeros(())}, 'scalar': {**s, 'conv_in.weight': torch.zeros(())}, 'grey': {**s, 'conv_in.weight': torch.zeros(32, 1, 3, 3)},
            'groups': {**s, 'down.0.block.0.conv1.weight': torch.zeros(33, 32, 3, 3)}, 'foreign': {'visual.proj': torch.zeros(3)}, 'nothing': 5, 'trojan': {**s, 'hook': Trojan()}}[kind]


@pytest.mark.parametrize('kind, message', [('missing', 'mid_block.*is missing'), ('unknown', 'extra.weight is unknown'), ('shape', r'has the shape \[32, 31, 3, 3\] instead of'),
                                           ('cut', 'lacks tensors.*down.1.block.0.conv1.weight'), ('flat', 'of an odd shape'), ('scalar', 'of an odd shape'),
                                           ('grey', 'takes 1 channels.*RGB'), ('groups', 'etch it again'),
                                           ('foreign', "layout that is not known here.*visual.proj"), ('nothing', 'no tensors'), ('trojan', 'a pickle can run code')])
def test_a_file_that_does_not_fit_names_itself_and_the_fix(tmp_path, kind, message):
    path = tmp_path / 'm.ckpt'; torch.save(spoiled(kind, ddpm_state(layers=1)), path)
    with pytest.raises(UserError, match=message) as e: load_unet(path)
    assert str(path) in str(e.value) and not list(tmp_path.glob('*.sha256')), 'the hash of a bad file must not be noted'


@pytest.mark.parametrize('cut', ['input_blocks.1.0.out_layers.3.weight', 'input_blocks.1.0.emb_layers.1.weight', 'output_blocks.1.1.in_layers.0.weight', 'middle_block.1.qkv.bias'])
def test_a_guided_file_with_a_tensor_missing_is_refused(tmp_path, cut):
    s = guided_state(attn=()); del s[cut]; torch.save(s, tmp_path / 'm.pt')
    with pytest.raises(UserError, match='m.pt.*(is missing|lacks tensors|does not fit)'): load_weights(tmp_path / 'm.pt', head_channels=16, image_size=16)


@pytest.mark.parametrize('name', ['m.ckpt', 'm.safetensors'])
@pytest.mark.parametrize('content, message', [(lambda b: b'  <!DOCTYPE html><title>Quota exceeded', 'a web page.*fetch it again'), (lambda b: b[:len(b) // 2], 'etch it again'),
                                              (lambda b: b[:-3], 'etch it again'), (lambda b: b'', 'etch it again'), (lambda b: b'just text', 'etch it again')])
def test_a_file_that_is_none_names_itself_and_the_fix(tmp_path, name, content, message):
    path = tmp_path / name; s = ddpm_state(layers=1)
    save_file(s, path) if name.endswith('s') else torch.save(s, path)
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=message) as e: load_unet(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize('at', [.1, .5, .99])
def test_an_old_format_file_cut_short_is_refused(tmp_path, at):
    path = tmp_path / 'm.ckpt'; torch.save(ddpm_state(layers=1), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * at)])
    with pytest.raises(UserError, match='m.ckpt.*etch it again'): load_unet(path)


def test_a_missing_file_and_a_lone_diffusers_file_are_refused(tmp_path):
    with pytest.raises(UserError, match='runs/none.ckpt: no such file'): load_unet('runs/none.ckpt')
    plain(tmp_path)
    with pytest.raises(UserError, match='without its config.json: give the folder'): load_unet(tmp_path / WEIGHTS_NAME)
    (tmp_path / 'folder.pt').mkdir()
    with pytest.raises(UserError, match='no such file'): read_tensors(tmp_path / 'folder.pt')


def test_bin_weights_in_a_folder_never_run_code(tmp_path):
    unet = plain(tmp_path); (tmp_path / WEIGHTS_NAME).unlink()
    torch.save({**unet.state_dict(), 'hook': Trojan()}, tmp_path / BIN_NAME)
    with pytest.raises(UserError, match='a pickle can run code'): load_unet(tmp_path)


# ---------------------------------------------------------------- hashes and downloads

@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_the_hash_is_noted_compared_and_can_be_stated(tmp_path, kind):
    if kind == 'file': where = path = tmp_path / 'm.ckpt'; torch.save(ddpm_state(layers=1), path)
    else: where, path = tmp_path, tmp_path / WEIGHTS_NAME; plain(tmp_path)
    note, digest = tmp_path / f'{path.name}.sha256', sha256_file(path)
    with pytest.raises(UserError, match='expected 0000'): load_unet(where, sha256='0' * 64)
    assert not note.exists() and load_unet(where).info['sha256'] == digest
    assert note.read_text() == f'{digest}  {path.name}\n' and load_unet(where, sha256=digest.upper()).info['sha256'] == digest
    note.write_text(f'{"1" * 64}  {path.name}\n')
    with pytest.raises(UserError, match=f'{path.name}: SHA-256 is {digest[:12]}.*111111.*delete .*sha256'): load_unet(where)
    assert load_unet(where, sha256=digest) and note.read_text().startswith(digest), 'a stated hash outranks the note'
    note.write_text('')
    with pytest.raises(UserError, match='nothing'): load_unet(where)


def test_a_folder_that_may_not_be_written_to_is_no_hindrance(tmp_path, monkeypatch):
    torch.save(ddpm_state(layers=1), tmp_path / 'm.ckpt')
    def read_only(*args): raise UserError('cannot write')
    monkeypatch.setattr(published, 'atomic_write', read_only)
    assert load_unet(tmp_path / 'm.ckpt') and not list(tmp_path.glob('*.sha256'))


@pytest.fixture
def server(monkeypatch):
    "A web server with a file, a page, and a file that breaks off; counts its requests"
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            body = {'/w.pt': b'weights' * 1000, '/page': b'<html>Quota exceeded</html>', '/short': b'half'}.get(self.path)
            if body is None: return self.send_error(404)
            self.send_response(200); self.send_header('Content-Length', str(len(body) * (2 if self.path == '/short' else 1))); self.end_headers(); self.wfile.write(body)
        def log_message(self, *args): pass
    served = []; monkeypatch.setenv('no_proxy', '127.0.0.1')
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}', served
    s.shutdown(); s.server_close()


def test_download_makes_the_whole_file_once(tmp_path, server):
    url, served = server; path = tmp_path / 'new/w.pt'
    assert download(f'{url}/w.pt', path) == path and path.read_bytes() == b'weights' * 1000
    digest = sha256_file(path)
    assert download(f'{url}/w.pt', path, digest) == path and served == ['/w.pt'] and [p.name for p in path.parent.iterdir()] == ['w.pt']
    with pytest.raises(UserError, match='expected 0000.*delete it'): download(f'{url}/w.pt', path, '0' * 64)
    assert download(f'{url}/w.pt', tmp_path / 'again.pt', digest.upper()).exists()


@pytest.mark.parametrize('what, sha256, message', [('page', None, 'web page'), ('short', None, 'broke off after 4 of 8 bytes'), ('none', None, '404.*put it at'), ('w.pt', '0' * 64, 'expected 0000')])
def test_a_bad_download_leaves_nothing_behind(tmp_path, server, what, sha256, message):
    with pytest.raises(UserError, match=message): download(f'{server[0]}/{what}', tmp_path / 'm.pt', sha256)
    assert list(tmp_path.iterdir()) == []


def test_download_without_a_network_says_what_to_do(tmp_path, server):
    with pytest.raises(UserError, match='cannot download .*Fetch it on a machine with a network and put it at'): download('http://127.0.0.1:9/x.pt', tmp_path / 'x.pt', timeout=2)
    with pytest.raises(UserError, match='no address'): download('file:///etc/passwd', tmp_path / 'x.pt')
    assert checked_sha256(download(f'{server[0]}/w.pt', tmp_path / 'w.pt'))


@pytest.mark.parametrize('channels, size, words', [(1, 16, 'takes 1 channels; grey pictures and latents'), (4, 16, 'takes 4 channels'), (3, None, 'fill in "sample_size"'), (3, [16, 24], r'square here.*\[16, 24\]')])
def test_networks_of_grey_pictures_or_latents_or_without_a_size_are_refused_in_words(tmp_path, channels, size, words):
    from diffusers import UNet2DModel
    UNet2DModel(sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
                down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words): load_unet(tmp_path)


def test_the_averaged_weights_are_taken_wherever_they_stand_and_it_is_said(capsys):
    raw, ema = ({k: torch.full((1,), v) for k in published.LAYOUTS['ddpm']} for v in (1., 2.))
    for content in (dict(model_non_ema=raw, model_ema=ema), dict(model=raw, ema={f'ema_model.{k}': v for k, v in ema.items()}),
                    dict(model=raw, ema=dict(decay=.999, shadow_params=list(ema.values()))), dict(model=raw, ema={f'module.ema_model.{k}': v for k, v in ema.items()})):
        layout, state = published.pick_state(content, 'm.pt')
        assert layout == 'ddpm' and state['conv_in.weight'].item() == 2 and set(state) == set(raw)
        assert 'm.pt holds 2 copies of the weights; taken: ' in (said := capsys.readouterr().out) and 'ema' in said
    assert published.pick_state(raw, 'm.pt')[1]['conv_in.weight'].item() == 1 and capsys.readouterr().out == ''


def test_a_unet_inside_a_pipeline_takes_its_scheduler_from_beside_it(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    net = UNet2DModel(sample_size=16, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
                      down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2)
    DDPMPipeline(net, DDPMScheduler(prediction_type='v_prediction')).save_pretrained(tmp_path/'v')
    assert load_unet(tmp_path/'v').v_schedule is not None and load_unet(tmp_path/'v/unet').v_schedule is not None
    DDPMPipeline(net, DDPMScheduler(beta_schedule='squaredcos_cap_v2')).save_pretrained(tmp_path/'cosine')
    for name in ('cosine', 'cosine/unet'):
        with pytest.raises(UserError, match='squaredcos_cap_v2'): load_unet(tmp_path/name)
