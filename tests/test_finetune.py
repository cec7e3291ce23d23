"Fine-tuning: gradients, resume, divergence, bad input; tiny random networks."
import copy, json
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import diffclip_da.adaptation.finetune as F
from diffclip_da.models.load import load_guide
from diffclip_da.core import UserError, new_generator
from diffclip_da.store import state_hash
from diffclip_da.diffusion.ddim import ddim_step, sample, step_pairs
from diffclip_da.diffusion.walk import Walk
from diffclip_da.adaptation.finetune import (CAREFUL, DivergedError, FinetuneLoss, Recipe, accumulate_gradients,
                                             compute_latents, recipe_for, tune)
from diffclip_da.diffusion.forward import predict_x0
from diffclip_da.diffusion.reverse import GaussianDenoiser
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.models.unet import tiny_unet

schedule = linear_schedule()
walk = Walk(t0=400, n_inv=3, n_gen=2, inversion='ddim')
cfg = replace(CAREFUL, n_images=4, passes=3, images_per_update=2, lr=1e-4, lr_growth=1.1, n_crops=1)


def finetune(model, x0, clip, embedder, schedule, recipe, walk=walk, source='photo', target='sketch', **kw):
    "`F.finetune` with this file's walk and words."
    return F.finetune(model, x0, source, target, clip, embedder, schedule, walk, recipe, **kw)


def clip_folder(folder):
    "A random CLIP of open_clip's local layout, small enough for tests."
    model_cfg = dict(embed_dim=8, vision_cfg=dict(image_size=16, patch_size=8, width=16, layers=1, head_width=8),
                     text_cfg=dict(context_length=32, vocab_size=49408, width=8, heads=1, layers=1))
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = open_clip.CLIP(**model_cfg)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder/'open_clip_model.safetensors')
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=model_cfg, preprocess_cfg={})))
    return folder


@pytest.fixture(scope='module')
def clip(tmp_path_factory): return load_guide(str(clip_folder(tmp_path_factory.mktemp('clip')/'tiny')))

class Net(torch.nn.Module):
    "The cheapest network that predicts something like noise; the real U-Net stands in where its graph matters."
    def __init__(self, seed=0):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        g = new_generator(seed)
        with torch.no_grad():
            for p in self.parameters(): p.copy_(torch.randn(p.shape, generator=g) * .2)
        self.info = dict(name='net', sha256=None, provenance='random')
    def forward(self, x, t): return .3 * torch.tanh(self.conv(x)) * (1 + t / 1000)

@pytest.fixture(scope='module')
def unet(): return Net()

@pytest.fixture(scope='module')
def x0(): return torch.rand(6, 3, 16, 16, generator=new_generator(0)) * 2 - 1

class Face(torch.nn.Module):
    info = dict(name='face', sha256=None, provenance='random')
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Linear(3 * 16 * 16, 8)
    def embed(self, x): return torch.nn.functional.normalize(self.net(x.flatten(1)), dim=1)

def grads(model): return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize('change, words', [
    (dict(walk=Walk(t0=0)), 't0 = 0'), (dict(walk=Walk(t0=1000)), '999'), (dict(walk=Walk(n_gen=0)), 'n_gen = 0'),
    (dict(walk=Walk(n_inv=401)), 'lower n_inv or raise t0'),
    (dict(target='  '), 'target is empty'), (dict(source=''), 'source is empty'), (dict(target='photo'), 'no direction'),
    (dict(images_per_update=0), 'images_per_update = 0'), (dict(passes=0), 'passes = 0'), (dict(views=0), 'views = 0'),
    (dict(n_images=0), 'n_images = 0'), (dict(lr=0.), 'lr = 0'), (dict(lr=1e38), 'lr = 1e.38'), (dict(lr=float('nan')), 'lr = nan'),
    (dict(lr_growth=float('inf')), 'lr_growth = inf'), (dict(seed=2**64), 'seed = 18446744073709551616'), (dict(seed=-1), 'seed = -1'),
    (dict(clip_weight=float('nan')), 'none may be negative'), (dict(augment_scale=0.), 'augment_scale = 0'), (dict(n_crops=-1), 'n_crops = -1'), (dict(clip_weight=-1.), 'none may be negative'),
    (dict(clip_weight=0., l1_weight=0., grid_weight=0.), 'one must be above 0'), (dict(grad='half'), "choose full"),
    (dict(dtype='float16'), 'fine-tuning takes float32 or bfloat16'),
])
def test_bad_settings_are_refused(change, words, unet, x0, clip):
    args = {k: change.pop(k) for k in ('walk', 'source', 'target', 'dtype') if k in change}
    with pytest.raises(UserError, match=words): finetune(unet, x0, clip, None, schedule, replace(cfg, **change), **args)

def test_a_recipe_shows_as_many_pictures_whatever_the_number_of_photos():
    assert Recipe().n_passes(1000) == 4 and Recipe().n_passes(12) == 67 and Recipe(n_images=5000).n_passes(5000) == 1
    assert Recipe(passes=3).n_passes(12) == 3

def test_the_shipped_network_gets_its_recipe_and_others_a_careful_one():
    assert recipe_for('shipped') == Recipe() and recipe_for('published') == recipe_for(None) == CAREFUL
    assert (CAREFUL.lr, CAREFUL.passes, CAREFUL.n_images) == (6e-5, 6, 50)

def test_missing_guides_are_named(unet, x0, clip):
    with pytest.raises(UserError, match='clip_weight'): finetune(unet, x0, None, None, schedule, cfg)
    with pytest.raises(UserError, match='id_weight'): finetune(unet, x0, clip, None, schedule, replace(cfg, id_weight=1.))


def test_colours_are_free_where_the_words_do_not_ask_for_greys():
    from diffclip_da.data import shipped_faces
    from diffclip_da.models.load import load_guide
    guide, faces = load_guide('shipped'), shipped_faces('valid')
    photos = faces.tensor(faces.ids[:16], 64)
    def weight(target, photos=photos): return FinetuneLoss(guide, None, 'photo', target, Recipe(id_weight=0.), photos).recipe.colour_weight
    assert [weight(w) for w in ('sketch', 'a charcoal drawing', 'a woodcut')] == [Recipe().colour_weight] * 3
    assert [weight(w) for w in ('an oil painting', 'a watercolour', 'a cartoon', 'neon')] == [0.] * 4
    assert weight('an oil painting', None) == Recipe().colour_weight   # nothing to ask with
    def hue(target, photos=photos): return FinetuneLoss(guide, None, 'photo', target, Recipe(id_weight=0.), photos).recipe.augment_hue
    assert [hue(w) for w in ('sketch', 'a woodcut', 'an oil painting', 'a cartoon')] == [0, 0, 1, 1] and hue('an oil painting', None) == 0


def test_full_and_checkpointed_gradients_agree(x0, clip):
    unet = tiny_unet(16)
    latents, pairs, got = compute_latents(unet, x0, walk, schedule), step_pairs(400, 3), {}
    for grad in ('full', 'checkpoint', 'step'):
        model, loss, g = copy.deepcopy(unet).requires_grad_(True), FinetuneLoss(clip, Face(), 'photo', 'sketch', replace(cfg, id_weight=.5)), new_generator(0)
        terms = accumulate_gradients(model, latents, pairs, schedule, lambda x: loss(x, x0, g), grad)
        assert set(terms) == {'total', 'clip', 'l1', 'id', 'grid'} and not any(v.requires_grad for v in terms.values())
        got[grad] = grads(model), terms['total']
    scale = got['full'][0].abs().max()
    assert (got['full'][0] - got['checkpoint'][0]).abs().max() < 1e-6 * scale
    assert torch.equal(got['full'][1], got['checkpoint'][1])
    assert (got['full'][0] - got['step'][0]).abs().max() > 1e-2 * scale   # another objective, as documented

def test_step_gradient_is_what_it_says(unet, x0):
    z, pairs = torch.randn(2, 3, 16, 16, generator=new_generator(3)), step_pairs(300, 3)
    model = copy.deepcopy(unet).double().requires_grad_(True)
    def loss(x): return dict(total=(x - .1).square().mean())
    accumulate_gradients(model, z.double(), pairs, schedule, loss, 'step')
    reference, total, x = copy.deepcopy(unet).double().requires_grad_(True), 0, z.double()
    for t, t_prev in pairs:
        eps = reference(x, t)
        total = total + (predict_x0(x, t, eps, schedule) - .1).square().mean() / 3
        x = ddim_step(x, t, t_prev, eps, schedule).detach()
    total.backward()
    assert torch.allclose(grads(model), grads(reference), rtol=1e-9, atol=1e-15)


def test_pretrained_is_left_alone_and_history_is_complete(unet, x0, clip):
    before = state_hash(unet)
    tuned, history = finetune(unet, x0, clip, Face(), schedule, replace(cfg, id_weight=.3, images_per_update=3))
    assert state_hash(unet) == before != state_hash(tuned)
    assert list(history.columns) == ['pass', 'step', 'total', 'clip', 'l1', 'id', 'grid', 'grad_norm', 'lr', 'seconds']
    assert list(history['pass']) == [0, 0, 1, 1, 2, 2] and list(history.step) == list(range(6))
    assert history.lr.tolist() == pytest.approx([1e-4, 1e-4, 1.1e-4, 1.1e-4, 1.21e-4, 1.21e-4])
    assert (history['total'] - (3 * history['clip'] + .3 * history['l1'] + .3 * history['id'] + 3 * history['grid'])).abs().max() < 1e-5
    assert not tuned.training and not any(p.requires_grad for p in tuned.parameters()) and tuned.info['tuned_to'] == 'sketch'
    assert all(p.grad is None for p in clip.parameters())

def test_too_few_latents_are_refused(unet, x0, clip):
    with pytest.raises(UserError, match='3 latents for 4 images'): finetune(unet, x0, clip, None, schedule, cfg, latents=x0[:3])

def test_batch_of_one_image(unet, x0, clip):
    tuned, history = finetune(unet, x0[:1], clip, None, schedule, replace(cfg, n_images=1, images_per_update=1, passes=1, grad='checkpoint'))
    assert len(history) == 1 and state_hash(tuned) != state_hash(unet)

def test_tuning_moves_the_picture(unet, x0):
    latents = compute_latents(unet, x0, walk, schedule)
    _, history = tune(unet, latents, x0, lambda x, ref, g: dict(total=(x.mean() + .5).square()), schedule, walk, replace(cfg, passes=8, lr=1e-2, lr_growth=1.))
    assert history.total.iloc[-2:].mean() < .5 * history.total.iloc[:2].mean()


def test_toy_finds_the_closed_form():
    def gaussian(m): return GaussianDenoiser(torch.nn.Parameter(torch.tensor(m, dtype=torch.float64)), .2, schedule)
    data, pairs = torch.zeros(50, 1, 1, 1, dtype=torch.float64), step_pairs(500, 6)
    toy = Walk(t0=500, n_inv=20, n_gen=6, grid='linear', inversion='ddim')
    z = compute_latents(gaussian(0.), data, toy, schedule).double()
    tuned, _ = tune(gaussian(0.), z, data, lambda x, ref, g: dict(total=(x.mean() - 1)**2), schedule, toy,
                    Recipe(passes=150, images_per_update=50, lr=.03, n_images=50))
    with torch.no_grad(): a, b = (sample(gaussian(m), z, pairs, schedule).mean().item() for m in (0., 1.))
    assert tuned.mean.item() == pytest.approx((1 - a) / (b - a), abs=5e-3)


class Stop(BaseException): pass

def interrupt_after(monkeypatch, n):
    "The n-th gradient from now on raises, as a kill or Ctrl-C in the middle of a pass would."
    calls, real = [], F.accumulate_gradients
    def wrapped(*a, **k):
        calls.append(1)
        if len(calls) == n: raise Stop
        return real(*a, **k)
    monkeypatch.setattr(F, 'accumulate_gradients', wrapped)

@pytest.mark.parametrize('n', [1, 4, 6])
def test_interrupted_and_resumed_is_bitwise_the_same(n, tmp_path, monkeypatch, unet, x0, clip):
    straight, h0 = finetune(unet, x0, clip, None, schedule, cfg, out=tmp_path/'a')
    with monkeypatch.context() as m:
        interrupt_after(m, n)
        with pytest.raises(Stop): finetune(unet, x0, clip, None, schedule, cfg, out=tmp_path/'b')
    resumed, h1 = finetune(unet, x0, clip, None, schedule, cfg, out=tmp_path/'b')
    assert state_hash(straight) == state_hash(resumed)
    assert h0.drop(columns='seconds').equals(h1.drop(columns='seconds'))
    again, h2 = finetune(unet, x0, clip, None, schedule, cfg, out=tmp_path/'b')   # finished: only read
    assert state_hash(again) == state_hash(straight) and h2.equals(h1)

def test_more_passes_continue_fewer_are_refused(tmp_path, unet, x0, clip):
    straight, _ = finetune(unet, x0, clip, None, schedule, cfg)
    finetune(unet, x0, clip, None, schedule, replace(cfg, passes=1), out=tmp_path)
    longer, _ = finetune(unet, x0, clip, None, schedule, cfg, out=tmp_path)
    assert state_hash(longer) == state_hash(straight)
    with pytest.raises(UserError, match='already holds 3 passes'): finetune(unet, x0, clip, None, schedule, replace(cfg, passes=2), out=tmp_path)

def test_a_foreign_checkpoint_is_refused_and_a_broken_one_made_anew(tmp_path, unet, x0, clip, capsys):
    one = replace(cfg, passes=1)
    tuned, _ = finetune(unet, x0, clip, None, schedule, one, out=tmp_path)
    for change in (dict(lr=2e-4), dict(seed=1)):
        with pytest.raises(UserError, match='another run'): finetune(unet, x0, clip, None, schedule, replace(one, **change), out=tmp_path)
    for other in (dict(target='painting'), dict(walk=replace(walk, t0=300)), dict(dtype='bfloat16')):
        with pytest.raises(UserError, match='another run'): finetune(unet, x0, clip, None, schedule, one, out=tmp_path, **other)
    with pytest.raises(UserError, match='another run'): finetune(Net(5), x0, clip, None, schedule, one, out=tmp_path)
    with pytest.raises(UserError, match='another run'): finetune(unet, x0.flip(0), clip, None, schedule, one, out=tmp_path)
    whole = (tmp_path/'checkpoint.pt').read_bytes()
    (tmp_path/'checkpoint.pt').write_bytes(whole[:len(whole)//2])
    again, _ = finetune(unet, x0, clip, None, schedule, one, out=tmp_path)   # damaged: named, and made anew
    assert 'checkpoint.pt is not a readable checkpoint (OSError): the fine-tuning starts over' in capsys.readouterr().out and state_hash(again) == state_hash(tuned)

def test_divergence_is_named_and_the_last_good_checkpoint_kept(tmp_path, x0, clip):
    unet = tiny_unet(16)   # `Net` is bounded: no learning rate makes it diverge
    wild = replace(cfg, lr_growth=1e30)
    with pytest.raises(DivergedError) as e: finetune(unet, x0, clip, None, schedule, wild, out=tmp_path)
    text = str(e.value)
    assert isinstance(e.value, FloatingPointError) and isinstance(e.value, UserError)
    assert 'step 3 of pass 1' in text and 'Lower lr' in text and 'total = ' in text and 'clip = ' in text and str(tmp_path/'checkpoint.pt') in text
    kept, history = finetune(unet, x0, clip, None, schedule, replace(wild, passes=1), out=tmp_path)
    assert len(history) == 2 and all(p.isfinite().all() for p in kept.parameters())
    with pytest.raises(DivergedError, match='no pass was finished'):
        finetune(unet, x0, clip, None, schedule, replace(cfg, lr=1.), out=tmp_path/'other')


def test_latents_do_not_depend_on_the_batch(unet, x0):
    a, b = (compute_latents(unet, x0, walk, schedule, batch_size=n) for n in (1, 6))
    assert a.shape == x0.shape and a.dtype == torch.float32 and (a - b).abs().max() < 1e-5


def test_bfloat16_takes_nearly_the_same_step(unet, x0, clip):
    "Weights stay float32; the losses of the first update differ by what bfloat16 rounds off."
    latents, loss = compute_latents(unet, x0, walk, schedule), FinetuneLoss(clip, None, 'photo', 'sketch', cfg)
    (a, h), (b, g) = (tune(unet, latents, x0, loss, schedule, walk, replace(cfg, passes=1), d) for d in ('float32', 'bfloat16'))
    assert h.total[0] != g.total[0] and h.total[0] == pytest.approx(g.total[0], abs=.05)
    assert all(p.dtype == torch.float32 for p in b.parameters()) and state_hash(a) != state_hash(b)


def test_a_prompt_that_is_too_long_is_refused_before_any_work(tmp_path, monkeypatch, unet, x0, clip):
    monkeypatch.setattr(F, 'compute_latents', None)   # would fail if it were called
    with pytest.raises(UserError, match='make it shorter'):
        finetune(unet, x0, clip, None, schedule, cfg, target='a very detailed pencil sketch of a person ' * 5, out=tmp_path)
    assert not any(tmp_path.iterdir())


# --- memory that runs out ---

class Hungry:
    "A loss that runs out of memory above `limit` images, or as long as gradients are not checkpointed."
    def __init__(self, limit, error=RuntimeError('could not create a primitive'), recompute=False): self.limit, self.error, self.recompute = limit, error, recompute
    def __call__(self, x, ref, g):
        if len(x) > self.limit: raise self.error
        noise = torch.randn(x.shape, generator=g) * 0   # draws, as augmentation does
        return dict(total=(x + noise - .3).square().mean(), l1=(x - ref).abs().mean())

@pytest.mark.parametrize('error', [RuntimeError('could not create a primitive'), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(),
                                   RuntimeError("can't start new thread"), torch.OutOfMemoryError('CUDA out of memory'), RuntimeError('std::bad_alloc')])
def test_a_batch_that_does_not_fit_is_halved_and_its_gradients_add_up(error, unet, x0, capsys):
    args = unet, compute_latents(unet, x0, walk, schedule), x0
    recipe = replace(cfg, images_per_update=5, passes=2)
    want, h = tune(*args, Hungry(5), schedule, walk, recipe)
    assert capsys.readouterr().out == ''
    got, g = tune(*args, Hungry(1, error), schedule, walk, recipe)
    assert capsys.readouterr().out.count('memory ran out') == 2   # 5, 2, 1
    assert torch.allclose(torch.tensor(g.total), torch.tensor(h.total), rtol=1e-5) and torch.allclose(torch.tensor(g.l1), torch.tensor(h.l1), rtol=1e-5)
    assert max((a - b).abs().max() for a, b in zip(got.parameters(), want.parameters())) < 2e-5
    assert state_hash(got) != state_hash(unet)

def test_what_is_halved_is_what_was_tried(tmp_path, unet, x0, clip, monkeypatch, capsys):
    "One image, four to an update: trying it again as two and as one would only cost time."
    real = F.accumulate_gradients
    def only_checkpointed(model, z, pairs, schedule, loss, grad, **k):
        if grad == 'full': raise RuntimeError('could not create a primitive')
        return real(model, z, pairs, schedule, loss, grad, **k)
    monkeypatch.setattr(F, 'accumulate_gradients', only_checkpointed)
    finetune(unet, x0[:1], clip, None, schedule, replace(cfg, passes=1, images_per_update=4), out=tmp_path)
    said = capsys.readouterr().out
    assert said.count('memory ran out') == 1 and 'checkpointed gradients' in said

def test_then_gradients_are_checkpointed_and_only_then_it_gives_up(unet, x0, monkeypatch, capsys):
    real, seen = F.accumulate_gradients, []
    def only_checkpointed(model, z, pairs, schedule, loss, grad, **k):
        seen.append((len(z), grad))
        if grad == 'full': raise RuntimeError('could not create a primitive')
        return real(model, z, pairs, schedule, loss, grad, **k)
    latents = compute_latents(unet, x0, walk, schedule)
    want, _ = tune(unet, latents, x0, Hungry(9), schedule, walk, replace(cfg, passes=1, grad='checkpoint', images_per_update=2))
    monkeypatch.setattr(F, 'accumulate_gradients', only_checkpointed)
    got, _ = tune(unet, latents, x0, Hungry(9), schedule, walk, replace(cfg, passes=1, images_per_update=2))
    assert seen[:3] == [(2, 'full'), (1, 'full'), (1, 'checkpoint')] and 'checkpointed gradients' in capsys.readouterr().out
    assert max((a - b).abs().max() for a, b in zip(got.parameters(), want.parameters())) < 2e-5
    with pytest.raises(UserError, match='not enough memory to fine-tune on a single image .could not create.*smaller size'): tune(unet, latents, x0, Hungry(0), schedule, walk, cfg)
    with pytest.raises(RuntimeError, match='shapes'): tune(unet, latents, x0, Hungry(0, RuntimeError('shapes do not match')), schedule, walk, cfg)

def test_inversion_halves_its_batch(unet, x0, monkeypatch, capsys):
    real = Walk.invert
    def hungry(self, model, x, schedule):
        if len(x) > 2: raise RuntimeError('could not create a primitive')
        return real(self, model, x, schedule)
    want = compute_latents(unet, x0, walk, schedule, 2)
    monkeypatch.setattr(Walk, 'invert', hungry)
    assert torch.equal(compute_latents(unet, x0, walk, schedule), want) and 'batches of 2' in capsys.readouterr().out


# --- divergence that is still a number ---

class Drift(torch.nn.Module):
    "Adds its one weight to the picture on the last step: what it does to pictures is plain."
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(())); self.info = dict(name='drift', sha256=None, provenance='random')
    def forward(self, x, t): return x * 0 + self.w * 100

@pytest.mark.parametrize('lr', [.1, 1.])
def test_black_or_white_pictures_are_divergence_and_the_checkpoint_is_from_before(lr, tmp_path, x0, monkeypatch):
    monkeypatch.setenv('DIFFCLIP_CHECKPOINT_SECONDS', '0')
    def away(x, ref, g): return dict(total=-x.mean())
    with pytest.raises(DivergedError, match=r'(?s)of the pixels would be clipped to black or white.*Lower lr'):
        tune(Drift(), x0[:4], x0[:4], away, schedule, walk, replace(cfg, lr=lr, passes=20, images_per_update=4), out=tmp_path)
    if (tmp_path/'checkpoint.pt').exists():
        kept = F.load_state(tmp_path/'checkpoint.pt')
        with torch.no_grad():
            model = Drift(); model.load_state_dict(kept['model'])
            assert F.share_beyond(sample(model, x0[:4], walk.pairs(walk.n_gen, schedule), schedule)) <= F.TOO_MANY

def test_weights_after_the_last_update_are_looked_at_too(x0, tmp_path):
    def away(x, ref, g): return dict(total=-x.mean())
    with pytest.raises(DivergedError, match='clipped'): tune(Drift(), x0[:4], x0[:4], away, schedule, walk, replace(cfg, lr=1., passes=1, images_per_update=4), out=tmp_path)
    assert not (tmp_path/'checkpoint.pt').exists()

def test_a_loss_that_grows_is_divergence():
    row = {'pass': 0, 'step': 9, 'total': 9.5, 'lr': .1}
    F.check_sane(row, [2.8] * 9)
    F.check_sane(row, [2.8, 9.])
    F.check_sane(dict(row, total=.2), [.0, .1, .2, .3, .2])   # without CLIP a loss begins near 0
    with pytest.raises(DivergedError): F.check_sane(dict(row, total=2.), [.0, 1., 2., 3., 4.])
    with pytest.raises(DivergedError, match='more than 3 times as large as at the start.*Lower lr .it was 0.1'): F.check_sane(row, [2.8, 9., 9., 9., 9.])
    with pytest.raises(DivergedError, match='21%'): F.check_sane(row, [2.8], .21)
    assert F.share_beyond(torch.tensor([0., 1.4, -1.6, float('nan')])) == .5


# --- checkpoints by the clock ---

def test_a_single_photo_shown_often_is_not_written_often(tmp_path, unet, x0, monkeypatch):
    real, times = F.save_state, []
    monkeypatch.setattr(F, 'save_state', lambda *a: (times.append(len(a[1]['history'])), real(*a)))
    def loss(x, ref, g): return dict(total=x.square().mean())
    tune(unet, x0[:1], x0[:1], loss, schedule, walk, replace(cfg, passes=200, images_per_update=1), out=tmp_path)
    assert times == [1, 200]   # after the first pass, and at the end

@pytest.mark.parametrize('n', [2, 3, 5, 6])
def test_stopped_in_the_middle_of_a_pass_it_goes_on_from_there(n, tmp_path, monkeypatch, unet, x0, clip):
    monkeypatch.setenv('DIFFCLIP_CHECKPOINT_SECONDS', '0')
    straight, h0 = finetune(unet, x0, clip, None, schedule, cfg, out=tmp_path/'a')
    with monkeypatch.context() as m:
        interrupt_after(m, n)
        with pytest.raises(Stop): finetune(unet, x0, clip, None, schedule, cfg, out=tmp_path/'b')
    done = len(F.load_state(tmp_path/'b/checkpoint.pt')['history']) if n > 2 else 0
    assert done == max(0, n - 2)   # the weights of an update are kept once its successor has looked at them
    calls, real = [], F.accumulate_gradients
    monkeypatch.setattr(F, 'accumulate_gradients', lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    resumed, h1 = finetune(unet, x0, clip, None, schedule, cfg, out=tmp_path/'b')
    assert state_hash(straight) == state_hash(resumed) and len(calls) == 6 - done
    assert h0.drop(columns='seconds').equals(h1.drop(columns='seconds'))


# --- damage ---

def test_one_flipped_bit_anywhere_is_repaired_or_named(tmp_path, unet, x0, clip, capsys):
    from test_store import flips
    two = replace(cfg, passes=2, n_images=2)
    want, h = finetune(unet, x0, clip, None, schedule, two, out=tmp_path)
    for name, n in (('latents.safetensors', 25), ('checkpoint.pt', 25)):
        whole = (tmp_path/name).read_bytes()
        for bit, b in flips(tmp_path/name, n):
            (tmp_path/name).write_bytes(b)
            got, g = finetune(unet, x0, clip, None, schedule, two, out=tmp_path)
            assert state_hash(got) == state_hash(want), (name, bit)
            assert g.drop(columns='seconds').equals(h.drop(columns='seconds'))
        said = capsys.readouterr().out
        assert name in said and ('made anew' in said or 'starts over' in said)
        if name != 'checkpoint.pt': assert (tmp_path/name).read_bytes() == whole
    (tmp_path/'history.csv').write_text('damaged')
    finetune(unet, x0, clip, None, schedule, two, out=tmp_path)
    assert (tmp_path/'history.csv').read_text().startswith('pass,step,total')
