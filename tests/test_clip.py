"clip and train_clip: the interface on a tiny random model, loading and its errors, the losses, resuming."
import json, shutil

import numpy as np, open_clip, pytest, torch
from PIL import Image
from torch.nn import functional as F

from diffclip_da.models import clip as C
from diffclip_da.workshop import train_clip as T
from diffclip_da.models.clip import (TEMPLATES, TINY, Clip, ClipEnsemble, class_features, fill, new_clip,
                                     tiny_clip, zero_shot)
from diffclip_da.models.load import load_guide
from diffclip_da.core import UserError
from diffclip_da.store import asset_dir, load_card


@pytest.fixture(scope='module')
def tiny(): return tiny_clip()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny CLIP in open_clip's local layout."
    d = tmp_path_factory.mktemp('clip')
    T.save_clip(new_clip(TINY)[0].eval(), d, TINY, 'tiny')
    return d


@pytest.fixture()
def copy(folder, tmp_path): return shutil.copytree(folder, tmp_path/'copy')


def images(n=2, h=32, w=32, seed=0): return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- prompts

def test_templates_are_many_and_each_holds_one_place():
    assert 20 <= len(TEMPLATES) <= 80 and len(set(TEMPLATES)) == len(TEMPLATES) and all(t.count('{}') == 1 for t in TEMPLATES)


@pytest.mark.parametrize('prompt,expected', [('sketch', 'this is a sketch'), ('a sketch', 'this is a sketch'), ('oil painting', 'this is an oil painting'),
                                             ('oil paintings', 'this is oil paintings'), ('the face of a man', 'this is the face of a man')])
def test_fill_gives_an_article_where_one_is_missing(prompt, expected): assert fill('this is {}', prompt) == expected


@pytest.mark.parametrize('texts,message', [([], 'empty list'), ('', 'blank'), (['photo', '  '], 'prompt 1 is blank'), ([3], 'prompt 0 is 3'), (['word ' * 40], 'make it shorter')])
def test_bad_prompts(tiny, texts, message):
    with pytest.raises(UserError, match=message): tiny.encode_text(texts)


# --- the interface

def test_features_are_unit_vectors_of_any_size_with_gradients(tiny):
    for h, w in ((32, 32), (64, 64), (40, 90), (16, 20)):
        x = images(2, h, w).requires_grad_()
        f = tiny.encode_image(x)
        assert f.shape == (2, 32) and torch.allclose(f.norm(dim=-1), torch.ones(2), atol=1e-5)
        g, = torch.autograd.grad(f[:, 0].sum(), x)
        assert torch.isfinite(g).all() and g.abs().sum() > 0
    assert not any(p.requires_grad for p in tiny.parameters())


def test_resize_crops_the_centre(tiny):
    x = images(1)
    wide = torch.cat([-torch.ones(1, 3, 32, 10), x, torch.ones(1, 3, 32, 10)], -1)
    assert torch.allclose(tiny.encode_image(x), tiny.encode_image(wide), atol=1e-6)


def test_wrong_image_shape(tiny):
    for x in (torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32)):
        with pytest.raises(UserError, match=r'\[b, 3, h, w\]'): tiny.encode_image(x)


def test_normalisation_is_the_models_own():
    model, tokenizer = new_clip(TINY)
    x = images(2)
    direct = F.normalize(model.eval().encode_image((x + 1) / 2 / .5 - 1), dim=-1)
    assert torch.allclose(Clip(model, tokenizer, dict(name='t')).encode_image(x), direct, atol=1e-5)


def test_text_is_the_normalised_mean_over_templates(tiny):
    each = tiny.encode_text([fill(t, 'sketch') for t in TEMPLATES], None)
    assert torch.allclose(tiny.encode_text('sketch')[0], F.normalize(each.mean(0), dim=-1), atol=1e-5)
    assert torch.allclose(tiny.encode_text(['sketch'], ['{}']), tiny.encode_text(['sketch'], None))


def test_stays_in_eval_mode(tiny):
    tiny.train()
    assert not tiny.training and not tiny.model.training
    x = images(3)
    assert torch.allclose(tiny.encode_image(x)[:1], tiny.encode_image(x[:1]), atol=1e-5)  # batch norm does not look at the batch


def test_ensemble_cosine_is_the_mean_of_its_members():
    pair = ClipEnsemble([tiny_clip(0), tiny_clip(1)])
    x, words = images(3), ['photo', 'a sketch']
    each = torch.stack([m.encode_image(x) @ m.encode_text(words).T for m in pair.members])
    assert torch.allclose(pair.encode_image(x) @ pair.encode_text(words).T, each.mean(0), atol=1e-5)
    assert len(tiny_clip().members) == 1 and pair.info['name'] == 'tiny+tiny'
    with pytest.raises(UserError, match='at least one'): ClipEnsemble([])


def test_zero_shot_is_a_distribution_and_takes_several_prompts(tiny):
    p = zero_shot(tiny, images(4), ['a photo', ['a sketch', 'a drawing']])
    assert p.shape == (4, 2) and torch.allclose(p.sum(-1), torch.ones(4), atol=1e-5)
    assert torch.allclose(class_features(tiny, ['a photo', ['a sketch', 'a sketch']]), class_features(tiny, ['a photo', 'a sketch']), atol=1e-6)
    with pytest.raises(UserError, match='two classes'): zero_shot(tiny, images(1), ['photo'])
    with pytest.raises(UserError, match='empty list'): zero_shot(tiny, images(1), ['photo', []])


# --- loading

def test_a_folder_loads_like_a_published_model(folder):
    c = load_guide(folder)
    assert c.info['name'] == folder.name and len(c.info['sha256']) == 64 and next(c.parameters()).dtype == torch.float32
    assert torch.allclose(c.encode_image(images()), tiny_clip().encode_image(images()), atol=5e-3)  # float16 on disk
    assert isinstance(load_guide([folder, folder]), ClipEnsemble) and load_guide(f'local-dir:{folder}').info == c.info


def test_random_weights_only_when_asked_for():
    assert 'ViT-S-32-alt' in C.open_clip.list_models()
    assert load_guide('ViT-S-32-alt', pretrained='random').info['provenance'] == 'random'
    with pytest.raises(UserError, match='has no weights None'): load_guide('ViT-S-32-alt')


@pytest.mark.parametrize('name,message', [('ViT-B-61', 'nearest: ViT-B-16'), ('/no/such/folder', 'neither a folder nor a model'), ('', 'neither a folder')])
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message): load_guide(name)


def test_unknown_tag_lists_the_tags():
    with pytest.raises(UserError, match="no weights 'mine'.*openai"): load_guide('ViT-B-16', 'mine')


def test_without_network_the_fix_is_named(monkeypatch):
    def offline(*args, **kwargs): raise RuntimeError('Failed to download weights: connection refused')
    monkeypatch.setattr(C.open_clip, 'create_model', offline)
    for name in ('ViT-B-16', 'hf-hub:somebody/something'):
        with pytest.raises(UserError, match='network on.*another machine'): load_guide(name)


def test_quickgelu_follows_the_tag(monkeypatch):
    asked = {}
    def create(name, pretrained, **kwargs):
        asked[pretrained] = kwargs['force_quick_gelu']
        return new_clip(TINY)[0]
    monkeypatch.setattr(C.open_clip, 'create_model', create)
    for tag in ('openai', 'laion2b_s34b_b88k'): load_guide('ViT-B-16', tag)
    assert asked == {'openai': True, 'laion2b_s34b_b88k': False}


def test_a_guide_that_does_not_fit_in_memory_is_not_called_damaged(copy, monkeypatch):
    def full(*args, **kw): raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")
    monkeypatch.setattr(open_clip, 'create_model', full)
    for load in (lambda: load_guide(copy), lambda: load_guide('ViT-B-16', 'random')):
        with pytest.raises(UserError, match='not enough memory for this guide.*take a smaller one') as e: load()
        assert 'does not' not in str(e.value) and 'fetch' not in str(e.value)


def test_broken_folders(copy):
    weights, config = copy/'open_clip_model.safetensors', copy/'open_clip_config.json'
    (copy/'card.json').write_text(json.dumps(dict(files={weights.name: '0' * 64})))
    with pytest.raises(UserError, match='SHA-256'): load_guide(copy)
    (copy/'card.json').unlink()
    good = weights.read_bytes(); weights.write_bytes(good[:1000])
    with pytest.raises(UserError, match='cut short or damaged'): load_guide(copy)
    weights.unlink()
    with pytest.raises(UserError, match='holds no weights'): load_guide(copy)
    weights.write_bytes(good)
    config.write_text('{}')
    with pytest.raises(UserError, match='model_cfg'): load_guide(copy)
    config.write_text('{')
    with pytest.raises(UserError, match='not valid JSON'): load_guide(copy)
    config.unlink()
    with pytest.raises(UserError, match='no such file'): load_guide(copy)


def test_weights_of_another_architecture(copy):
    config = copy/'open_clip_config.json'; c = json.loads(config.read_text())
    c['model_cfg']['embed_dim'] = 48; config.write_text(json.dumps(c))
    with pytest.raises(UserError, match='does not fit'): load_guide(copy)


# --- the shipped model

def test_shipped_model_and_card_agree():
    card, c = load_card('clip'), load_guide('shipped')
    assert c.info == dict(name='diffclip-small', sha256=card['files']['open_clip_model.safetensors'], provenance='shipped')
    for k in ('measured', 'targets', 'data', 'licence_note', 'training', 'limits', 'files'): assert card[k], k
    for k in ('style_zero_shot', 'gender_zero_shot_photo', 'gender_zero_shot_sketch', 'attributes_above_080', 'unseen_wording_gap'): assert k in card['measured'] and k in card['targets']
    assert sum(f.stat().st_size for f in asset_dir('clip').iterdir()) < 14e6


def test_shipped_model_knows_styles_in_words_it_never_saw():
    import matplotlib
    from PIL import Image
    from diffclip_da.core import from_pil
    from diffclip_da.styles import render
    photo = Image.open(matplotlib.cbook.get_sample_data('grace_hopper.jpg', asfileobj=False)).convert('RGB').crop((60, 10, 420, 370)).resize((148, 148), Image.LANCZOS)
    names = ('photo', 'pencil', 'cartoon', 'negative', 'sepia', 'grayscale')
    x = torch.stack([from_pil(render(photo, s, np.random.default_rng(k), 64)) for s in names for k in range(3)])
    with torch.no_grad(): p = zero_shot(load_guide(), x, [list(T.STYLE_WORDS[s][1]) for s in names])
    assert (p.argmax(-1).view(-1, 3) == torch.arange(len(names))[:, None]).float().mean() >= .8


# --- captions, truth, losses

def test_captions_are_true_of_their_picture():
    rng, tokenizer = np.random.default_rng(0), C.open_clip.SimpleTokenizer()
    for n in range(200):
        style = T.STYLE_NAMES[n % len(T.STYLE_NAMES)]
        known = {k: bool(rng.random() < .5) for k in T.ATTRIBUTES} if n % 3 else {}
        c = T.draw_caption(style, known, rng)
        a = torch.tensor([[(1 if known[k] else -1) if known else 0 for k in T.ATTRIBUTES]])
        assert T.truth([c], torch.tensor([T.STYLE_NAMES.index(style)]), a).item() == 1, c
        assert len(tokenizer.encode(c.text)) <= 30, c.text  # fits the small model


def test_no_unseen_wording_is_ever_used():
    rng = np.random.default_rng(1)
    unseen = {w for _, side in T.STYLE_WORDS.values() for w in side}
    assert all(w not in T.draw_caption(s, dict(Male=True), rng).text for s in T.STYLE_NAMES for _ in range(20) for w in unseen if len(w.split()) > 2)


def test_every_look_has_words_of_its_own_and_unseen_wordings_no_new_word():
    from diffclip_da.models.looks import words_in
    from diffclip_da.styles import STYLES
    assert set(T.STYLE_WORDS) == set(STYLES) and {s for v in T.AMBIGUOUS.values() for s in v} <= set(STYLES)
    wordings = [w for sides in T.STYLE_WORDS.values() for side in sides for w in side]
    assert len(set(wordings)) == len(wordings)
    known = {w for t in [*TEMPLATES, *(t for seen, _ in T.STYLE_WORDS.values() for t in seen)] for w in words_in(t)}
    for style, (seen, unseen) in T.STYLE_WORDS.items():
        assert len(unseen) >= 2 and set(seen) - set(T.AMBIGUOUS), style
        assert {w for t in unseen for w in words_in(t)} <= known, style
    assert len(set(T.MEASURED_STYLES)) == 20 and set(T.MEASURED_STYLES) <= set(STYLES) - {'photo', 'tinted'}


def test_truth_table():
    known = torch.zeros(3, len(T.ATTRIBUTES)); known[0, 0], known[1, 0] = 1, -1
    style = torch.tensor([T.STYLE_NAMES.index(s) for s in ('pencil', 'photo', 'charcoal')])
    P = T.truth([T.Caption('a man', None, dict(Male=True)), T.Caption('a sketch', 'pencil', {}, T.AMBIGUOUS['a sketch']), T.Caption('a photo of a man', 'photo', dict(Male=True))], style, known)
    assert P.tolist() == [[1, 1, 0], [0, 0, 0], [-1, -1, 0]]


def test_contrastive_loss_limits():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    assert torch.allclose(T.contrastive_loss(logits, torch.eye(5)), expected)
    P = torch.eye(5); P[1, 2] = -1
    other = logits.clone(); other[1, 2] = 50
    assert torch.allclose(T.contrastive_loss(logits, P), T.contrastive_loss(other, P))
    P = torch.eye(5); P[0] = 0  # a picture of which no caption is true
    assert torch.isfinite(T.contrastive_loss(logits, P))


def test_balanced_bce_counts_both_classes_equally():
    y = torch.tensor([[1.]] * 9 + [[-1.]])
    always = lambda m: T.balanced_bce(torch.full((10, 1), m), y, torch.tensor([.9])).item()
    assert always(2.) == pytest.approx(always(-2.), rel=1e-5)  # saying yes always is no better than saying no always
    assert T.balanced_bce(torch.ones(4, 2), torch.zeros(4, 2), torch.tensor([.5, .5])).item() == 0


def test_disturb_keeps_range_and_repeats():
    u = np.random.default_rng(0).integers(0, 256, (6, 80, 80, 3), dtype=np.uint8)
    a, b, c = (T.disturb(u, 64, np.random.default_rng(s)) for s in (0, 0, 1))
    assert a.shape == (6, 3, 64, 64) and a.abs().max() <= 1 and (a == b).all() and (a != c).any()


def test_the_box_blur_is_an_average_pool():
    x = images(3, 20, 24)
    assert torch.allclose(T.box_blur(x), F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode='replicate'), 3, 1), atol=1e-6)


# --- pictures

class Photos:
    "A stand-in for CelebA."
    ids, name = [f'{i}.jpg' for i in range(70)], 'stand-in'
    def __init__(self, half=False): self.half = half
    def __len__(self): return len(self.ids)
    def pil(self, id):
        im = Image.fromarray(np.random.default_rng(int(id[:-4])).integers(0, 256, (218, 178, 3), dtype=np.uint8))
        return im.resize((89, 109)) if self.half else im


def test_a_round_is_the_same_for_any_number_of_processes(tmp_path):
    a, b = (T.draw_round(Photos(), 1, size=16, at=32, workers=n) for n in (0, 2))
    c = T.cached_round(Photos(), 1, tmp_path, 2, size=16, at=32)
    for other in (b, c): assert all(np.array_equal(u, v) for u, v in zip(a, other))
    assert len(set(a[1])) > 5 and len(list(tmp_path.iterdir())) == 2
    T.cached_round(Photos(), 1, tmp_path, 0, size=16, at=32)
    assert len(list(tmp_path.iterdir())) == 2, 'processes are no part of the name'


def test_photos_of_half_the_size_are_cropped_alike():
    for seed in range(20):
        a, b = (T.wide_crop(Photos(half).pil('1.jpg'), np.random.default_rng(seed)) for half in (False, True))
        assert a.width == a.height and abs(a.width - 2 * b.width) <= 2 and abs(b.width - b.height) <= 1


def test_packed_fs2k_is_read_instead(tmp_path, monkeypatch):
    class Set(Photos):
        def __init__(self, root, split, kind): super().__init__(); self.kind, self.crop = kind, None; assert split == 'train'
        def pil(self, id): return super().pil(id).rotate(90 * (self.kind == 'photo') + 180 * (self.crop == 'fs2k'))
    monkeypatch.setattr(T, 'fs2k', Set)
    published = T.fs2k_crops('FS2K', 80)
    T.pack_fs2k('FS2K', tmp_path/'train_crops.npz')
    monkeypatch.undo()
    for a, b in zip(published, T.fs2k_crops(tmp_path)): assert a.shape == (140, 80, 80, 3) and np.array_equal(a, b)


# --- training

@pytest.fixture(scope='module')
def pool():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (12, 80, 80, 3), dtype=np.uint8)
    return T.Pool([x], [rng.integers(0, len(T.STYLE_NAMES), 12)], rng.choice([-1, 1], (12, len(T.ATTRIBUTES))), x[:3], x[3:6], torch.full((len(T.ATTRIBUTES),), .5))


def tiny_config(steps): return T.ClipConfig(steps=steps, batch_size=8, n_sketches=2, n_photos=1, n_captions=6, n_probes=2, warmup=2)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(pool, tmp_path):
    say = lambda *a: None
    whole, *_ = T.train_clip(pool, tiny_config(4), tmp_path/'whole', TINY, every=2, log=say)
    class Stop(Exception): pass
    def stop(*a): raise Stop
    with pytest.raises(Stop): T.train_clip(pool, tiny_config(4), tmp_path/'cut', TINY, every=2, log=stop)
    resumed, _, history, _ = T.train_clip(pool, tiny_config(4), tmp_path/'cut', TINY, every=2, log=say)
    assert [h['step'] for h in history] == [0, 1, 2, 3]
    for (k, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()): assert torch.equal(a, b), k


def test_the_adversary_raises_the_style_loss_by_at_most_its_length(pool):
    cfg = tiny_config(1); model, tokenizer = C.new_clip(TINY, 0); anchors = T.Anchors(TINY['embed_dim'])
    batch, other = (T.prepare(pool, cfg, k, TINY['vision_cfg']['image_size'], tokenizer) for k in (0, 1)); model.train()
    def style_loss(x): return anchors(T.encode(model, x, cfg), batch[1], torch.zeros_like(batch[2]), pool.rate).item()
    moved = T.worst_case(model, anchors, batch, pool.rate, cfg)
    length = (moved - batch[0]).flatten(1).norm(dim=1)
    assert style_loss(moved) > style_loss(batch[0]) and 0 < length.max() <= cfg.adversary + 1e-4 and moved.abs().max() <= 1
    assert torch.equal(moved, T.worst_case(model, anchors, batch, pool.rate, cfg))
    assert not torch.equal(moved, T.worst_case(model, anchors, batch._replace(length=other.length), pool.rate, cfg))


def test_processes_that_prepare_batches_change_nothing(pool, tmp_path):
    a, b = (T.train_clip(pool, tiny_config(3), tmp_path/str(n), TINY, log=lambda *a: None, workers=n) for n in (0, 2))
    for (k, u), v in zip(a[0].state_dict().items(), b[0].state_dict().values()): assert torch.equal(u, v), k
    assert a[2] == b[2] and all(isinstance(v, (int, float)) for h in a[2] for v in h.values())


def test_what_a_step_gets_is_tensors_alone_and_a_function_of_its_number(pool):
    tokenizer = C.new_clip(TINY)[1]
    a, b, c = (T.prepare(pool, tiny_config(1), k, 32, tokenizer) for k in (5, 5, 6))
    assert all(isinstance(v, torch.Tensor) for v in a) and all(torch.equal(u, v) for u, v in zip(a, b)) and not torch.equal(a.ids, c.ids)


def test_a_checkpoint_of_another_configuration_is_refused(pool, tmp_path):
    T.train_clip(pool, tiny_config(1), tmp_path, TINY, log=lambda *a: None)
    other = T.ClipConfig(**{**T.asdict(tiny_config(1)), 'lr': 5e-4})
    with pytest.raises(UserError, match=r'other settings \(lr\)'): T.train_clip(pool, other, tmp_path, TINY)
    elsewhere = T.Pool(**{**vars(pool), 'attributes': -pool.attributes})
    with pytest.raises(UserError, match=r'other settings \(data\)'): T.train_clip(elsewhere, tiny_config(1), tmp_path, TINY)


def test_the_command_of_the_card_says_what_is_not_the_default():
    assert T.command_line(T.ClipConfig(bf16=True, steps=7)).endswith('--out OUT --steps 7 --rounds 2 --adversary 3 --bf16 --seed 0')


def test_the_command_line_names_a_missing_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: T.main(['--celeba', str(tmp_path/'none'), '--fs2k', str(tmp_path), '--out', str(tmp_path/'out')])
    assert e.value.code == 2 and 'none' in capsys.readouterr().err
