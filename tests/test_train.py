"Training: learns, resumes bit for bit, refuses what it cannot use"
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from diffclip_da.models import train
from diffclip_da.core import UserError
from diffclip_da.data import toy_faces
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.models.loop import NanLoss
from diffclip_da.models.train import (Options, TrainConfig, check_training_set, initial_unet, main, train_diffusion, training_batch, training_identity,
                                      training_pictures)
from diffclip_da.models.unet import small_unet, tiny_unet
from diffclip_da.models.load import load_unet
from diffclip_da.store import Packed

SCHEDULE = linear_schedule()
CFG = TrainConfig(n_images=32, batch_size=4, warmup=2, checkpoint_every=3) # 8 steps


@pytest.fixture
def images(): return torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def weights(m): return torch.cat([p.flatten() for p in m.parameters()])


def test_loss_falls_on_one_picture(tmp_path):
    one = torch.zeros(1, 3, 16, 16, dtype=torch.uint8); one[..., 8:] = 255
    _, h = train_diffusion(tiny_unet(), one, None, SCHEDULE, TrainConfig(n_images=1200, batch_size=16, lr=3e-3, warmup=5), tmp_path)
    assert len(h) == 75 and sum(h[-10:]) < 0.6 * sum(h[:10])


@pytest.mark.parametrize('dies_at', [1, 4, 7])
def test_resume_is_bitwise(tmp_path, images, monkeypatch, dies_at):
    labels = torch.arange(12) % 2
    whole, h = train_diffusion(tiny_unet(n_classes=2), images, labels, SCHEDULE, CFG, tmp_path / 'whole')
    step, n = train.train_step, iter(range(100))
    def dying(*a):
        if next(n) == dies_at: raise KeyboardInterrupt
        return step(*a)
    monkeypatch.setattr(train, 'train_step', dying)
    with pytest.raises(KeyboardInterrupt): train_diffusion(tiny_unet(n_classes=2), images, labels, SCHEDULE, CFG, tmp_path / 'parts')
    monkeypatch.setattr(train, 'train_step', step)
    assert (tmp_path / 'parts/checkpoint.pt').exists() == (dies_at >= CFG.checkpoint_every)
    resumed, h2 = train_diffusion(tiny_unet(n_classes=2), images, labels, SCHEDULE, CFG, tmp_path / 'parts')
    assert torch.equal(weights(whole), weights(resumed)) and h == h2


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, images, monkeypatch):
    loss = train.diffusion_loss
    calls = iter(range(100))
    monkeypatch.setattr(train, 'diffusion_loss', lambda *a, **k: loss(*a, **k) * (float('nan') if next(calls) == 4 else 1))
    with pytest.raises(NanLoss, match='nan at step 5: lower lr'): train_diffusion(tiny_unet(), images, None, SCHEDULE, CFG, tmp_path)
    s = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    assert s['step'] == 3 and all(torch.isfinite(v).all() for v in s['model'].values())


def test_other_settings_do_not_silently_continue(tmp_path, images):
    train_diffusion(tiny_unet(), images, None, SCHEDULE, CFG, tmp_path)
    with pytest.raises(UserError, match=r'other settings \(lr\)'): train_diffusion(tiny_unet(), images, None, SCHEDULE, replace(CFG, lr=1.), tmp_path)


def test_other_pictures_labels_or_networks_do_not_silently_continue(tmp_path, images):
    labels, small = torch.arange(12) % 2, lambda **kw: tiny_unet(16, **kw)
    train_diffusion(small(n_classes=2), images, labels, SCHEDULE, CFG, tmp_path)
    for what, model, x, y in [('images', small(n_classes=2), images.flip(0), labels), ('labels', small(n_classes=2), images, 1 - labels),
                              ('images, network', tiny_unet(32, n_classes=2), images.repeat(1, 1, 2, 2), labels), ('labels, network', small(), images, None)]:
        with pytest.raises(UserError, match=rf'other settings \({what}\).*another output folder'): train_diffusion(model, x, y, SCHEDULE, CFG, tmp_path)
    with pytest.raises(UserError, match=r'other settings \(start\)'): train_diffusion(small(n_classes=2), images, labels, SCHEDULE, CFG, tmp_path, start='shipped')


def test_a_broken_checkpoint_is_named(tmp_path, images):
    (tmp_path / 'checkpoint.pt').write_bytes(b'not a checkpoint')
    with pytest.raises(UserError, match='checkpoint.pt is not a readable checkpoint'): train_diffusion(tiny_unet(), images, None, SCHEDULE, CFG, tmp_path)


@pytest.mark.parametrize('change, message', [
    (lambda x: (x.float(), None), 'must be uint8'),
    (lambda x: (x[..., :8], None), 'images are 16x8, the model wants 16x16'),
    (lambda x: (x[:0], None), 'is empty'),
])
def test_images_it_cannot_use(tmp_path, images, change, message):
    with pytest.raises(UserError, match=message): train_diffusion(tiny_unet(), *change(images), SCHEDULE, CFG, tmp_path)


@pytest.mark.parametrize('labels, message', [(None, '12 images but 0 labels'), (torch.arange(5), '12 images but 5 labels'), (torch.arange(12), r'labels must lie in 0..1')])
def test_labels_it_cannot_use(tmp_path, images, labels, message):
    with pytest.raises(UserError, match=message): train_diffusion(tiny_unet(n_classes=2), images, labels, SCHEDULE, CFG, tmp_path)


def test_command_line_trains_on_a_folder_and_writes_a_model(tmp_path, images, capsys):
    from PIL import Image
    (tmp_path / 'photos').mkdir()
    for i, x in enumerate(images): Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / f'photos/{i}.png')
    args = ['--images', str(tmp_path / 'photos'), '--out', str(tmp_path / 'out'), '--image-size', '16', '--n-images', '4', '--batch-size', '4', '--device', 'cpu']
    assert main(args) == 0 and 'wrote' in capsys.readouterr().out
    assert load_unet(str(tmp_path / 'out/model')).image_size == 16
    assert main(args) == 0, 'a finished training is found'
    (tmp_path / 'photos/0.png').unlink()
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2 and 'other settings (images)' in capsys.readouterr().err
    for bad, message in [(['--out', 'x'], 'exactly one of --celeba and --images'), (['--images', str(tmp_path / 'none'), '--out', str(tmp_path / 'o2')], str(tmp_path / 'none'))]:
        with pytest.raises(SystemExit) as e: main(bad)
        assert e.value.code == 2 and message in capsys.readouterr().err


def test_command_line_learns_the_classes_of_a_folder_per_class(tmp_path, images, capsys):
    from PIL import Image
    for i, x in enumerate(images):
        (tmp_path / f'photos/{"abc"[i % 3]}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / f'photos/{"abc"[i % 3]}/{i}.png')
    args = ['--images', str(tmp_path / 'photos'), '--labels', 'folders', '--image-size', '16', '--n-images', '4', '--batch-size', '4', '--device', 'cpu']
    assert main([*args, '--attention', '1', '--out', str(tmp_path / 'a')]) == 0
    assert load_unet(str(tmp_path / 'a/model')).n_classes == 3
    assert main([*args, '--out', str(tmp_path / 'b'), '--init', str(tmp_path / 'a/model')]) == 0
    for more, message in [(['--init', str(tmp_path / 'a/model'), '--v'], '3 classes, predicting noise; asked for is one of 16 px, 3 classes, predicting v'), (['--init', 'shipped'], 'shipped is a network of 64 px')]:
        with pytest.raises(SystemExit) as e: main([*args, '--out', str(tmp_path / 'c'), *more])
        assert e.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / 'c').exists()


def test_attention_grows_on_a_trained_network_and_calm_is_measured(tmp_path, images, capsys):
    from PIL import Image
    (tmp_path / 'photos').mkdir()
    for k, u in enumerate(images[:6]): Image.fromarray(u.permute(1, 2, 0).numpy()).save(tmp_path / f'photos/{k}.png')
    args = ['--images', str(tmp_path / 'photos'), '--image-size', '16', '--n-images', '4', '--batch-size', '4', '--device', 'cpu', '--v']
    assert main([*args, '--attention', '1', '--out', str(tmp_path / 'a')]) == 0
    old = load_unet(str(tmp_path / 'a/model')); assert old.spectrum is None
    options = Options(out='', v=True, image_size=16, attention=2, init=str(tmp_path / 'a/model'))
    new, x = initial_unet(options, 0).eval(), torch.randn(2, 3, 16, 16)
    assert len(new.state_dict()) > len(old.state_dict())
    with torch.no_grad(): torch.testing.assert_close(new(x, 300), old(x, 300), atol=1e-5, rtol=1e-5)
    assert main([*args, '--out', str(tmp_path / 'b'), '--init', str(tmp_path / 'a/model'), '--attention', '2', '--calm']) == 0
    made = load_unet(str(tmp_path / 'b/model')); assert len(made.spectrum) == 2
    assert initial_unet(Options(out='', v=True, image_size=16, attention=2, init=str(tmp_path / 'b/model')), 0).spectrum == made.spectrum
    with pytest.raises(SystemExit): main([*args[:-1], '--out', str(tmp_path / 'c'), '--calm'])
    assert '--calm needs --v' in capsys.readouterr().err and not (tmp_path / 'c').exists()


def test_bfloat16_that_would_be_slow_is_answered_by_a_line(tmp_path, images, monkeypatch, capsys):
    from PIL import Image
    (tmp_path / 'photos').mkdir(); Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / 'photos/a.png')
    monkeypatch.setattr(torch.cpu, 'get_capabilities', dict)
    assert main(['--images', str(tmp_path / 'photos'), '--out', str(tmp_path / 'out'), '--image-size', '16', '--n-images', '4', '--batch-size', '4', '--device', 'cpu', '--bf16']) == 0
    assert 'computing in float32' in capsys.readouterr().out and torch.load(tmp_path / 'out/checkpoint.pt')['settings']['bf16'] is False


TWO = '''
import sys, torch
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.models.train import TrainConfig, train_diffusion
from diffclip_da.models.unet import tiny_unet
g = torch.Generator().manual_seed(0)
images, labels = torch.randint(0, 256, (20, 3, 16, 16), generator=g, dtype=torch.uint8), torch.arange(20) % 2
cfg = TrainConfig(n_images=40, batch_size=int(sys.argv[2]), warmup=2, checkpoint_every=2)
model, history = train_diffusion(tiny_unet(16, n_classes=2), images, labels, linear_schedule(), cfg, sys.argv[1])
print(len(history))
'''


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def launch(script, world, *args):
    "What `accelerate launch --num_processes world` does."
    env = {**os.environ, 'DIFFCLIP_QUIET': '1', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'ACCELERATE_USE_CPU': 'true'}
    if world > 1: env |= dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    ps = [subprocess.Popen([sys.executable, '-c', script, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=env | (dict(RANK=str(r), LOCAL_RANK=str(r)) if world > 1 else {})) for r in range(world)]
    return [(p, *p.communicate(timeout=300)) for p in ps]


def test_nothing_is_trained_into_the_photos_or_at_no_size(tmp_path, capsys):
    from PIL import Image
    photos = tmp_path/'photos'
    photos.mkdir()
    for k in range(2): Image.new('RGB', (16, 16), (k, k, k)).save(photos/f'{k}.png')
    for out, more, words in ((photos, (), 'would lie inside the photos'), (photos/'net', (), 'would lie inside the photos'),
                             (tmp_path/'u', ('--image-size', '0'), 'image_size = 0')):
        with pytest.raises(SystemExit) as e: main(['--images', str(photos), '--out', str(out), '--device', 'cpu', *more])
        assert e.value.code == 2 and words in capsys.readouterr().err
    assert {p.name for p in photos.iterdir()} == {'0.png', '1.png'} and not (tmp_path/'u').exists()


def test_two_processes_take_the_steps_of_one(tmp_path):
    for world in (1, 2):
        for p, out, err in launch(TWO, world, tmp_path/str(world), 8): assert p.returncode == 0 and out.strip() == '5', err
    one, two = (torch.load(tmp_path/d/'checkpoint.pt', weights_only=True) for d in '12')
    assert one['step'] == two['step'] == 5
    torch.testing.assert_close(one['history'], two['history'], rtol=1e-4, atol=1e-6)
    for k, v in one['average'].items(): torch.testing.assert_close(v, two['average'][k], rtol=1e-2, atol=2e-4)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    for p, out, err in launch(TWO, 2, tmp_path/'odd', 5): assert p.returncode != 0 and 'batch_size = 5 cannot be shared by 2 processes' in err


def test_pictures_from_the_disk_train_like_pictures_in_memory(tmp_path):
    images = toy_faces(tmp_path/'faces', 10, 0)
    memory, disk = training_pictures(images, 16), training_pictures(images, 16, tmp_path/'pack')
    assert isinstance(memory, torch.Tensor) and isinstance(disk, Packed) and torch.equal(disk[:], memory)
    model, labels, cfg = small_unet(16, channels=(32, 32)), images.labels_of(), TrainConfig(batch_size=4)
    assert training_identity(model, disk, labels) == training_identity(model, memory, labels)
    check_training_set(model, disk, labels)
    for one, other in zip(*(training_batch(x, labels, 2, cfg, linear_schedule(), torch.Generator().manual_seed(3)) for x in (memory, disk))): assert torch.equal(one, other)
    with pytest.raises(UserError, match='images are 16x16, the model wants 32x32'): check_training_set(small_unet(32, channels=(32, 32)), disk, labels)


def test_pictures_stay_where_they_are_without_a_gpu(images):
    from diffclip_da.models.train import generator_for, near
    disk = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert near(disk, 'cpu') is disk and generator_for('cpu', 3).device.type == 'cpu'
    assert torch.equal(torch.rand(2, generator=generator_for('cpu', 3)), torch.rand(2, generator=torch.Generator().manual_seed(3)))
