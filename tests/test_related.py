"The other systems of the paper: each formula against its closed form or bit for bit, and Figures 30 to 34 in small on random networks."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffclip_da.adaptation.losses import text_direction
from diffclip_da.core import UserError, from_uint8, new_generator
from diffclip_da.data import shipped_faces
from diffclip_da.diffusion.ddim import ddim_step, gaussian_flow, sample, step_pairs
from diffclip_da.diffusion.forward import q_sample
from diffclip_da.diffusion.guidance import classifier_guided, guided
from diffclip_da.diffusion.reverse import GaussianDenoiser, MixtureDenoiser
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.diffusion.walk import Walk
from diffclip_da.models.load import toy_models
from diffclip_da.models.unet import tiny_unet
from diffclip_da.models.train import mirrored
from diffclip_da.related.bench import Bench, attribute_of, by_profile
from diffclip_da.related.classifier_guidance import (NoisyClassifier, NoisyTraining, coverage, draw_labelled, figure30, load_noisy,
                                                     main as noisy_main, principal, train_noisy)
from diffclip_da.related.gan import (Discriminator, GanConfig, GanState, Generator, diff_augment, figure33, gan_step,
                                     hinge_d, invert_gan, layer_scores, load_gan, main as gan_main, train_gan,
                                     tune_generator)
from diffclip_da.related.hspace import (ClassMeans, ImplicitFunction, asymmetric, bottleneck_of, class_means, combined,
                                        composition_error, edit_end, edit_latents, figure31, homogeneity,
                                        mean_difference, moved_h, prediction_distance, fit_probe, probe_auroc, step_gain,
                                        train_edit, watched)
from diffclip_da.related.mixing import blend_people, figure32, lerp, mix_models, relay, slerp, translate
from diffclip_da.related.shift import (GroupReader, attribute_auroc, bbse, biased_choice, bootstrap_shares,
                                       confusion_matrix_of, edit_plan, em_shares, figure34, group_weights,
                                       shifted_bench)
from diffclip_da.store import fingerprint
from diffclip_da.study.experiment import Experiment
from diffclip_da.study.figures import validate_record
from diffclip_da.study.profile import get_profile

schedule, PAIRS = linear_schedule(), step_pairs(500, 4)


def normal(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=new_generator(seed), dtype=dtype)


@pytest.fixture(scope='module')
def unet(): return tiny_unet().requires_grad_(False)


@pytest.fixture(scope='module')
def guide(): return toy_models()[1]


@pytest.fixture
def toy(tmp_path): return Bench(Experiment(get_profile('toy'), tmp_path, device='cpu'), n_judge=20, judge_epochs=1)


# guidance

MEANS = torch.tensor([[-1., 0.], [1., .6]], dtype=torch.float64)
BOTH, SINGLE = MixtureDenoiser(MEANS, .5, schedule), [MixtureDenoiser(m[None], .5, schedule) for m in MEANS]


def log_classifier(x, t, y): return SINGLE[y].log_prob(x, t) + np.log(.5) - BOTH.log_prob(x, t)


@pytest.mark.parametrize('t', [5, 300, 900])
@pytest.mark.parametrize('scale', [0., 1., 3.])
def test_classifier_guidance_is_the_exact_score_and_classifier_free_guidance(t, scale):
    "score of p(x_t) p(y | x_t)^s, for the classifier that the mixture implies"
    x_t = normal(6, 2)
    ours = classifier_guided(BOTH, log_classifier, schedule, 1, scale)(x_t, t)
    x = x_t.clone().requires_grad_()
    score, = torch.autograd.grad((BOTH.log_prob(x, t) + scale * log_classifier(x, t, 1)).sum(), x)
    assert torch.allclose(ours, -(1 - schedule.ab(t)).sqrt() * score, atol=1e-10)
    free = guided(lambda x, t, label=None: BOTH(x, t) if label is None else SINGLE[label](x, t), 1, scale)
    assert torch.allclose(ours, free(x_t, t), atol=1e-12)


def test_classifier_guidance_works_where_gradients_are_off_and_takes_its_label_from_the_call():
    model, x_t = classifier_guided(BOTH, log_classifier, schedule, scale=2.), normal(3, 2)
    want = classifier_guided(BOTH, log_classifier, schedule, 0, 2.)(x_t, 300)
    with torch.inference_mode(): assert torch.equal(model(x_t.clone(), 300, label=0), want)
    with torch.no_grad(): assert not model(x_t, 300, label=0).requires_grad
    with pytest.raises(UserError, match='no label to go to'): model(x_t, 300)
    silent = lambda x, t, label=None: BOTH(x, t)
    out = [sample(classifier_guided(silent, log_classifier, schedule, y, 1.), normal(200, 2), step_pairs(999, 30), schedule).mean(0)
           for y in (0, 1)]
    assert (torch.stack(out) - MEANS).abs().max() < .15


def test_a_noisy_classifier_goes_on_where_it_was_interrupted(tmp_path):
    x, y, cfg = normal(8, 3, 16, 16, dtype=torch.float32), torch.arange(8) % 2, NoisyTraining(n_images=24, batch_size=4)
    whole = train_noisy(x, y, schedule, cfg, tmp_path/'a')
    train_noisy(x, y, schedule, NoisyTraining(n_images=8, batch_size=4), tmp_path/'b')
    resumed = train_noisy(x, y, schedule, cfg, tmp_path/'b')
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    p = whole.log_prob(x, torch.full((8,), 300), 0).exp() + whole.log_prob(x, 300, torch.ones(8, dtype=torch.long)).exp()
    assert torch.allclose(p, torch.ones(8))
    loaded = load_noisy(tmp_path/'a/noisy.pt')
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), loaded.state_dict().values()))
    u = torch.arange(8 * 3 * 256).reshape(8, 3, 16, 16).byte()   # a byte a value: the same numbers
    a, b = (train_noisy(v, y, schedule, cfg, tmp_path/n) for v, n in ((u, 'u'), (from_uint8(u), 'f')))
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    with pytest.raises(UserError, match='8 pictures but 3 labels'): train_noisy(x, y[:3], schedule, cfg, tmp_path/'c')


def test_the_command_of_the_noisy_classifier(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('diffclip_da.related.classifier_guidance.celeba_photos', lambda root, part: shipped_faces(part))
    assert noisy_main(['--celeba', 'x', '--out', str(tmp_path), '--n-images', '16', '--batch-size', '8']) == 0
    net = load_noisy(tmp_path/'noisy.pt')
    assert 'noisy.pt' in capsys.readouterr().out and net.log_prob(normal(2, 3, 64, 64, dtype=torch.float32), 500, 1).shape == (2,)


def test_scale_zero_draws_what_the_unguided_model_draws(unet):
    net, plain = NoisyClassifier(2, schedule).requires_grad_(False), lambda x_t, t, label=None: unet(x_t, t)
    a, b = (draw_labelled(m, [0, 1], PAIRS, schedule, new_generator(3), size=16)
            for m in (classifier_guided(plain, net.log_prob, schedule, scale=0.), plain))
    assert torch.equal(a, b)


def test_coverage_is_recall_one_way_and_precision_the_other():
    real = normal(100, 3).numpy()
    assert coverage(real, real) == 1 and coverage(real, real + 50) == 0
    one_place = real[:1] + 1e-3 * normal(20, 3, seed=1).numpy()
    assert coverage(one_place, real) == 1 and coverage(real, one_place) < .1
    with pytest.raises(UserError, match='no 3-th neighbour'): coverage(real, real[:3])
    a, b = principal(real, one_place, 3)   # all axes: distances stay
    assert np.allclose(np.linalg.norm(a[0] - b, axis=1), np.linalg.norm(real[0] - one_place, axis=1))


# h-space

@pytest.mark.parametrize('asymmetric_step', [True, False])
def test_the_gain_of_a_step_is_its_derivative(asymmetric_step):
    x, eps, d = normal(1, 3, 4, 4), normal(1, 3, 4, 4, seed=1), normal(1, 3, 4, 4, seed=2)
    for t, t_prev in [(900, 880), (400, 0), (20, -1)]:
        moved = ddim_step(x, t, t_prev, eps + d, schedule, eps_direction=eps if asymmetric_step else None)
        assert torch.allclose(moved - ddim_step(x, t, t_prev, eps, schedule),
                              step_gain(t, t_prev, schedule, asymmetric_step) * d, atol=1e-10)


def test_a_symmetric_edit_vanishes_with_the_step_and_an_asymmetric_one_does_not():
    both, only_p = ([step_gain(400, 400 - k, schedule, a) for k in (100, 10, 1)] for a in (False, True))
    assert abs(both[2]) < .02 * abs(both[0]) and abs(only_p[2]) > .5 * abs(only_p[0])


def test_the_bottleneck_is_read_without_the_way_up(unet):
    x, calls = normal(3, 3, 16, 16, dtype=torch.float32), []
    hook = unet.unet.up_blocks[0].register_forward_hook(lambda *a: calls.append(1))
    h = bottleneck_of(unet, x, 100, batch_size=2)
    assert not calls
    with torch.no_grad(), watched(unet.bottleneck) as seen: unet(x, 100)
    hook.remove()
    assert torch.allclose(h, seen[0], atol=1e-5) and h.shape == (3, 32, 4, 4)
    with torch.no_grad(): unet(x, 100)
    assert len(seen) == 1   # the hook is gone


def test_scale_zero_is_bit_equal_and_each_image_can_have_its_own_scale(unet):
    x, push = normal(3, 3, 16, 16, dtype=torch.float32), ClassMeans({0: torch.ones(1, 32, 4, 4)})
    with torch.no_grad(): plain = sample(unet, x, PAIRS, schedule)
    assert torch.equal(edit_latents(unet, x, PAIRS, schedule, combined((push, 0.))), plain)
    assert torch.equal(edit_latents(unet, x, PAIRS, schedule, push, lowest=501), plain)
    each = edit_latents(unet, x, PAIRS, schedule, combined((push, torch.tensor([0., 1., 0.]))))
    assert torch.equal(each[[0, 2]], plain[[0, 2]]) and not torch.equal(each[1], plain[1])
    assert not torch.equal(edit_latents(unet, x, PAIRS, schedule, push), plain)


def test_the_asymmetric_step_leaves_the_direction_alone(unet):
    x, push = normal(1, 3, 16, 16, dtype=torch.float32), ClassMeans({0: torch.ones(1, 32, 4, 4)})
    with torch.no_grad():
        edited, plain = asymmetric(unet, push)(x, 300)
        assert torch.equal(plain, unet(x, 300)) and torch.equal(edited, unet(x, 300, delta_h=1.))
        assert isinstance(asymmetric(unet, push, lowest=301)(x, 300), torch.Tensor)


def test_quality_boosting_draws_fresh_noise_below_its_time_only(unet):
    x, none = normal(2, 3, 16, 16, dtype=torch.float32), combined((ClassMeans({0: torch.ones(1, 32, 4, 4)}), 0.))
    a, b = (edit_latents(unet, x, PAIRS, schedule, none, boost=200, generator=new_generator(k)) for k in (0, 1))
    with torch.no_grad(): plain = sample(unet, x, PAIRS, schedule)
    assert not torch.equal(a, b) and not torch.equal(a, plain)
    assert torch.equal(edit_latents(unet, x, PAIRS, schedule, none, boost=-1, generator=new_generator(0)), plain)
    with pytest.raises(UserError, match='generator'): edit_latents(unet, x, PAIRS, schedule, none, boost=200)


def test_means_within_groups_do_not_carry_the_group():
    "h = group + attribute exactly; the attribute goes with the group, and the direction must not"
    y, g = np.array([1, 1, 1, 0, 1, 0, 0, 0]), np.array([1, 1, 1, 1, 0, 0, 0, 0])
    h = torch.tensor(np.stack([10. * g, 1. * y], 1))[:, :, None, None]
    assert mean_difference(h, y, g).flatten().tolist() == [0, 1]
    assert mean_difference(h, y).flatten().tolist() == [5, 1]
    with pytest.raises(UserError, match='no group'): mean_difference(h, np.ones(8))


def test_the_nearest_time_counts(unet):
    d = ClassMeans({100: torch.full((1, 1, 1, 1), 1.), 400: torch.full((1, 1, 1, 1), 4.)})
    assert [d(torch.zeros(1), t).item() for t in (0, 240, 260, 900)] == [1, 1, 4, 4]
    made = class_means(unet, normal(4, 3, 16, 16, dtype=torch.float32), [0, 1, 0, 1], (100, 400), schedule, new_generator(0))
    assert list(made.deltas) == [100, 400] and made.deltas[100].shape == (1, 32, 4, 4)


def test_a_probe_reads_what_is_there_and_nothing_else():
    y = np.arange(40) % 2
    h = normal(40, 8, 2, 2, dtype=torch.float32)
    assert probe_auroc(h + 2 * torch.tensor(y)[:, None, None, None], y, h + 2 * torch.tensor(y)[:, None, None, None], y) > .95
    with pytest.raises(UserError, match='with and without'): fit_probe(h, np.ones(40))


def test_where_an_edit_ends():
    found = {600: .5, 300: .2, 100: .05}
    assert edit_end(found, .2) == 300 and edit_end(found, .01) == 100
    with pytest.raises(UserError, match='largest is 0.500'): edit_end(found, .9)
    exact = GaussianDenoiser(0., .5, schedule)
    x0 = .5 * normal(64, 2)
    z = gaussian_flow(x0, -1, 500, 0., .5, schedule)
    d = prediction_distance(exact, z, x0, step_pairs(500, 50), schedule, lambda a, b: (a - b).abs().mean())
    assert d[500] > 2 * d[102] > 0 and set(d) == {t for t, _ in step_pairs(500, 50)}


def test_measures_of_edits(unet):
    d, e = normal(2, 30), .01 * normal(3, 10, 30, seed=1)
    a, b = d[0] + e[0], d[1] + e[1]
    assert homogeneity(a) > .99 and abs(homogeneity(normal(50, 400, seed=3))) < .1
    assert composition_error(a, b, a + b) < 1e-9
    assert composition_error(a, a, a) == pytest.approx(.5)
    x = normal(2, 3, 16, 16, dtype=torch.float32).clamp(-1, 1)
    assert not moved_h(unet, x, x, 100, schedule).any() and moved_h(unet, -x, x, 100, schedule).shape == (2, 512)


def test_an_untrained_implicit_function_changes_nothing_and_a_trained_one_obeys_the_words(unet, guide):
    x = normal(4, 3, 16, 16, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        f = ImplicitFunction(32)
    with torch.no_grad(): plain = sample(unet, x, PAIRS, schedule)
    assert torch.equal(edit_latents(unet, x, PAIRS, schedule, f, 100), plain)
    delta_t = text_direction(guide, 'photo', 'sketch')
    losses = train_edit(unet, f, x, PAIRS, schedule, guide, delta_t, 100, passes=12, n_crops=0, l1_weight=0.,
                        generator=new_generator(0))
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - .05


# mixing

def test_slerp_keeps_the_length_and_lerp_loses_the_known_part():
    a, b = normal(2, 10, 3, 40, 40).unbind()
    for s in (.1, .5, .8):
        assert (lerp(a, b, s).square().mean() - (1 - s)**2 - s**2).abs() < .02
        assert (slerp(a, b, s).square().mean() - 1).abs() < .02
    assert torch.allclose(slerp(a, b, 0.), a) and torch.allclose(slerp(a, b, 1.), b)
    assert torch.allclose(slerp(a, a, .3), a) and torch.isfinite(slerp(a, -a, .3)).all()
    assert torch.equal(slerp(a, b, .3)[1:2], slerp(a[1:2], b[1:2], .3))   # image by image
    e = torch.eye(2, dtype=torch.float64)
    assert torch.allclose(slerp(e[:1], e[1:], 1 / 3), torch.tensor([[3**.5 / 2, .5]], dtype=torch.float64))


def test_mixed_models_are_the_model_of_the_mixed_means():
    means, w = normal(3, 2), [.5, .7, -.2]
    blend = GaussianDenoiser((torch.tensor(w)[:, None] * means).sum(0), .3, schedule)
    assert torch.allclose(mix_models([GaussianDenoiser(m, .3, schedule) for m in means], w)(normal(5, 2), 400),
                          blend(normal(5, 2), 400), atol=1e-12)
    with pytest.raises(UserError, match='sum to 0.9'): mix_models([blend, blend], [.5, .4])
    with pytest.raises(UserError, match='2 models and 1 weights'): mix_models([blend, blend], [1.])


def test_a_relay_hands_over_at_its_times():
    say = [lambda x, t, k=k: x + k for k in range(3)]
    model = relay(say, [600, 200])
    assert [model(torch.zeros(1), t).item() for t in (999, 600, 599, 200, 199, 0)] == [0, 0, 1, 1, 2, 2]
    for times in ([600], [200, 600]):
        with pytest.raises(UserError, match='need 2 falling times'): relay(say, times)


def test_there_and_back_between_two_domains():
    photo, sketchy = GaussianDenoiser(0., .2, schedule), GaussianDenoiser(1., .2, schedule)
    x, walk = .2 * normal(50, 4), Walk(t0=600, n=60)
    there = translate(x, photo, sketchy, walk, schedule)
    assert there.mean() > .9 and torch.allclose(translate(there, sketchy, photo, walk, schedule), x, atol=.05)


def test_nothing_of_the_other_person_changes_nothing(unet):
    a, b = normal(2, 2, 3, 16, 16, dtype=torch.float32).unbind()
    with torch.no_grad(): plain = sample(unet, a, PAIRS, schedule)
    assert torch.equal(blend_people(unet, a, b, PAIRS, schedule, 0.), plain)
    assert torch.equal(blend_people(unet, a, a, PAIRS, schedule, 1.), plain)
    assert not torch.equal(blend_people(unet, a, b, PAIRS, schedule, 1.), plain)


# GAN

def uint8_pictures(n=12): return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=new_generator(0))


def test_hinge_and_shapes():
    assert hinge_d(torch.tensor([1., 2.]), torch.tensor([-1., -2.])) == 0 and hinge_d(torch.zeros(1), torch.zeros(1)) == 2
    g = Generator().eval()
    x = g(normal(2, g.n_z, dtype=torch.float32))
    assert x.shape == (2, 3, 64, 64) and x.abs().max() <= 1 and Discriminator()(x).shape == (2,)
    assert sum(p.numel() for p in g.parameters()) * 4 < 6e6   # bytes


def test_shifts_of_zero_are_none_and_each_reaches_the_picture():
    g, z = Generator().eval().requires_grad_(False), normal(1, 128, dtype=torch.float32)
    n = sum(g.widths)
    assert torch.equal(g(z), g(z, torch.zeros(1, n)))
    for k in range(len(g.widths)):
        s = torch.zeros(1, n).split(g.widths, 1)
        s[k].add_(1.)
        assert not torch.equal(g(z), g(z, torch.cat(s, 1)))


def test_augmentation_is_the_same_for_the_same_state_and_differentiable():
    x = normal(2, 3, 64, 64, dtype=torch.float32).clamp(-1, 1).requires_grad_()
    a, b, c = (diff_augment(x, new_generator(k)) for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == x.shape
    a.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert ((a == 0).all(1).double().mean((1, 2)) > .05).all()   # the square left out, or its part inside


def test_a_gan_goes_on_where_it_was_interrupted(tmp_path):
    images, cfg = uint8_pictures(), GanConfig(n_images=6, batch_size=2)
    whole, history = train_gan(images, cfg, tmp_path/'a')
    train_gan(images, GanConfig(n_images=2, batch_size=2), tmp_path/'b')
    resumed, _ = train_gan(images, cfg, tmp_path/'b')
    loaded, known = load_gan(tmp_path/'b/checkpoint.pt')
    for other in (resumed, loaded):
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values()))
    assert len(history) == 3 and known['images_seen'] == 6 and known['seconds'] > 0
    with pytest.raises(UserError, match='other settings'): train_gan(images.flip(0), cfg, tmp_path/'b')
    with pytest.raises(UserError, match=r'uint8 \[n, 3, 64, 64\]'): train_gan(images[..., :32], cfg, tmp_path/'c')


def test_the_command_of_the_gan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('diffclip_da.related.gan.training_pictures', lambda source, size: uint8_pictures())
    words = ['--out', str(tmp_path/'gan'), '--n-images', '4', '--batch-size', '2']
    assert gan_main(words) == 0 and '4 images' in capsys.readouterr().out
    g, known = load_gan(tmp_path/'gan')   # what ships
    assert known['images_seen'] == 4 and (g(torch.ones(1, 128)) - load_gan(tmp_path/'gan/checkpoint.pt')[0](torch.ones(1, 128))).abs().max() < .01
    wide = ['--n-images', '2', '--batch-size', '2', '--widths', '16', '8', '8', '8', '4', '--d-widths', '8', '8', '8', '8']
    assert gan_main(['--out', str(tmp_path/'wide'), *wide]) == 0
    for path in ('wide', 'wide/checkpoint.pt'): assert load_gan(tmp_path/path)[0].widths == (16, 8, 8, 8, 4)
    assert gan_main([*words[:-3], '400', *words[-2:], '--minutes', '1e-9']) == 0   # stops at its first checkpoint
    assert 'time is up' in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: gan_main(['--celeba', str(tmp_path/'none')])
    assert e.value.code == 2


def test_only_the_chosen_layers_are_tuned(guide):
    g, delta_t = GanState(GanConfig()).g.eval().requires_grad_(False), text_direction(guide, 'photo', 'sketch')
    scores = layer_scores(g, guide, delta_t, n=2, n_steps=2)
    assert set(scores) == {'4', '8', '16', '32', '64'} and min(scores.values()) >= 0 < max(scores.values())
    before = {k: v.clone() for k, v in g.state_dict().items()}
    tuned, losses = tune_generator(g, guide, delta_t, ['64'], n_steps=8, batch_size=2)
    assert all(torch.equal(v, g.state_dict()[k]) for k, v in before.items())
    assert {k.split('.')[0] for k, v in tuned.state_dict().items() if not torch.equal(v, before[k])} == {'last'}
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match='no layer 128'): tune_generator(g, guide, delta_t, ['128'])


def test_a_drawing_of_its_own_is_found_again():
    g = GanState(GanConfig()).g.eval().requires_grad_(False)
    with torch.no_grad(): own = g(normal(2, g.n_z, seed=5, dtype=torch.float32))
    z, shift, losses = invert_gan(g, own, n_steps=25, lr=.1, n_starts=8)
    assert shift is None and losses[-1] < .5 * losses[0] and torch.isclose((g(z) - own).abs().mean(), torch.tensor(losses[-1]), rtol=.5)
    assert invert_gan(g, own, shifts=True, n_steps=1)[1].shape == (2, sum(g.widths))


# a shift of attributes

CONFUSION = np.array([[.8, .1, .1, .0], [.1, .7, .1, .1], [.1, .1, .7, .2], [.0, .1, .1, .7]])


@pytest.mark.parametrize('q', [[.25] * 4, [.45, .05, .05, .45], [0., .5, .5, 0.]])
def test_bbse_inverts_the_confusion_exactly(q):
    assert np.allclose(bbse(CONFUSION, CONFUSION @ np.array(q)), q, atol=1e-12)


def test_bbse_stays_within_what_shares_can_be_and_refuses_groups_that_cannot_be_told_apart():
    q = bbse(CONFUSION, [1., 0., 0., 0.])
    assert (q >= 0).all() and q.sum() == pytest.approx(1)
    with pytest.raises(UserError, match='cannot tell some groups apart'): bbse(np.full((4, 4), .25), [.25] * 4)


def test_em_finds_the_shares_of_greatest_likelihood():
    "against a grid over the shares of two groups"
    rng, p = np.random.default_rng(0), np.array([.9, .1])
    x = np.concatenate([rng.normal(-1, 1, 60), rng.normal(1, 1, 140)])
    density = np.exp(-(x[:, None] - np.array([-1., 1.]))**2 / 2)
    r = density * p
    found = em_shares(r / r.sum(1, keepdims=True), p)
    grid = np.linspace(.001, .999, 999)
    best = grid[np.argmax([np.log(density @ np.array([1 - g, g])).sum() for g in grid])]
    assert found.sum() == pytest.approx(1) and abs(found[1] - best) < .002 and abs(found[1] - .7) < .1


def test_confusions_by_hand():
    c = confusion_matrix_of([0, 0, 1, 1], [0, 1, 1, 1], 2)
    assert c.tolist() == [[.5, 0], [.5, 1]]
    with pytest.raises(UserError, match='a group has no picture'): confusion_matrix_of([0, 0], [0, 1], 2)


def test_the_bias_is_as_asked():
    rng = np.random.default_rng(0)
    y, a = rng.integers(0, 2, (2, 1000))
    picked = biased_choice(y, a, 100, .9, 0)
    assert np.bincount(2 * y[picked] + a[picked]).tolist() == [5, 45, 45, 5] and len(set(picked)) == 100
    assert (picked == biased_choice(y, a, 100, .9, 0)).all() and (picked != biased_choice(y, a, 100, .9, 1)).any()
    with pytest.raises(UserError, match='100 photos of class 0 with the attribute are needed'): biased_choice(y, y, 400, .5, 0)
    with pytest.raises(UserError, match='between 0 and 1'): biased_choice(y, a, 100, 1., 0)


def test_plan_and_weights_lead_to_the_shares_wanted():
    y = np.repeat([0, 1], 100)
    a, q = np.concatenate([np.arange(100) < 90, np.arange(100) < 10]).astype(int), np.array([.2, .3, .05, .45])
    plan = edit_plan(y, a, q)
    after = a + plan
    assert set(after) == {0, 1} and after[y == 0].mean() == .6 and after[y == 1].mean() == .9
    assert np.abs(plan).sum() == 30 + 80   # no photo is edited in vain
    w = group_weights(y, a, q)
    assert np.average(a[y == 0], weights=w[y == 0]) == pytest.approx(.6) and w.mean() == pytest.approx(1)
    assert w[y == 0].sum() == pytest.approx(w[y == 1].sum())   # labels keep their shares
    assert not edit_plan(y, a, np.array([.05, .45, .45, .05])).any()


def test_the_reader_estimates_a_reversed_shift():
    rng = np.random.default_rng(0)
    def cloud(n, shares):
        g = rng.choice(4, n, p=shares)
        return g, torch.tensor(np.stack([g // 2, g % 2], 1) * 3. + rng.normal(size=(n, 2))).float()[:, :, None, None]
    (g, h), (g_test, h_test) = cloud(500, [.05, .45, .45, .05]), cloud(500, [.45, .05, .05, .45])
    reader = GroupReader(h, g, C=1.)
    posterior, true = reader.posterior(h_test), np.bincount(g_test, minlength=4) / 500
    for v in reader.estimate(posterior).values(): assert np.abs(v - true).max() < .1
    spread = bootstrap_shares(reader, posterior, 20)
    assert all(.001 < v.std(0).max() < .1 for v in spread.values()) and attribute_auroc(posterior, g_test % 2) > .95
    with pytest.raises(UserError, match='two training photos'): GroupReader(h[:7], [0, 1, 2, 3, 1, 2, 1])


def test_a_rare_group_is_read_although_its_photos_are_few_and_wide():
    "Twelve photos of a rare group in 100 dimensions: label and attribute are read apart, so the shares are found."
    rng = np.random.default_rng(0)
    def cloud(n, shares):
        g, x = rng.choice(4, n, p=shares), rng.normal(size=(n, 100))
        x[:, :20] += .8 * (g // 2)[:, None]; x[:, 20:40] += .8 * (g % 2)[:, None]
        return g, torch.tensor(x).float()[:, :, None, None]
    (g, h), (g_test, h_test) = cloud(240, [.05, .45, .45, .05]), cloud(400, [.45, .05, .05, .45])
    reader = GroupReader(h, g, C=.01)
    true = np.bincount(g_test, minlength=4) / 400
    assert np.abs(reader.estimate(reader.posterior(h_test))['EM'] - true).max() < .15
    assert reader.weights @ (g == 0) == pytest.approx(60)
    assert reader.unseen.sum(1) == pytest.approx(1)
    biased = np.stack([.5 * (g < 2), .5 * (g < 2), .5 * (g > 1), .5 * (g > 1)], 1)   # knows the label alone
    tilted = biased + .01 * (g < 2)[:, None] * [[0, 1, 0, 1]]
    assert attribute_auroc(tilted, g % 2) > .8 and attribute_auroc(tilted, g % 2, reader.weights) == pytest.approx(.5)


# the bench, and the figures in small

def test_the_bench_knows_and_is_told(toy):
    labels = toy.exp.splits['test'].labels_of().numpy()
    assert (attribute_of(toy.exp, toy.exp.splits['test'], toy.exp.profile.attribute) == labels).all()
    smile = toy.truth('test', 'Smiling')
    assert set(smile) == {0, 1} and smile.mean() == .5   # cut at the median
    toy.tell('test', 'Smiling', 1 - smile)
    assert (toy.truth('test', 'Smiling', 5) == 1 - smile[:5]).all()
    with pytest.raises(UserError, match='3 values'): toy.tell('test', 'Smiling', [0, 1, 0])
    assert by_profile('embedded', dict(a=None, b=0), a=(1, 2), b=(3, 4)) == dict(a=1, b=0)


def test_a_judge_sees_no_photo_of_the_experiment_and_is_trained_once(toy, capsys):
    assert not set(toy.spare().ids) & set(toy.exp.splits['train'].ids) and len(toy.spare()) <= 20
    net = toy.judge('Male')
    capsys.readouterr()
    again = Bench(toy.exp, n_judge=20, judge_epochs=1).judge('Male')
    assert 'judge Male: found in' in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    x = toy.photos('test', 4)
    assert np.allclose(toy.likeness(x, x), 1, atol=1e-5) and ((0 <= (p := toy.yes('Male', x))) & (p <= 1)).all()
    assert torch.equal(mirrored(mirrored(x, new_generator(0)), new_generator(0)), x)


def checked(made, figure, tmp_path, *metrics):
    "Figure, record and table as a reader finds them."
    fig, record, table = made
    place = tmp_path/f'figures/toy/{figure}'
    validate_record(json.loads(place.with_suffix('.json').read_text()))
    assert all(place.with_suffix(s).stat().st_size > 100 for s in ('.png', '.csv')) and len(table)
    assert set(metrics) <= set(record['summary']) and {'unet', 'clip', 'identity', 'judge'} == set(record['weights'])
    for k, v in record['summary'].items():   # the interval of a share does not leave [0, 1]
        if k.endswith(('agreement', 'rate', 'balanced_accuracy')) and '_minus_' not in k and v['ci95']:
            assert 0 <= v['ci95'][0] <= v['ci95'][1] <= 1, k
    return record['summary']


def test_figure30_in_small(toy, tmp_path):
    s = checked(figure30(toy, 8, 3, NoisyTraining(n_images=64), scales=(0., 1., 2.), free=(1.,)), 'figure30', tmp_path,
                'classifier/2/agreement', 'classifier/0/frechet', 'noisy classifier/400')
    assert not any(k.startswith('free') for k in s)   # the toy U-Net knows no labels


def test_figure30_takes_a_classifier_that_was_trained_elsewhere(toy, tmp_path):
    net = train_noisy(toy.photos('train'), toy.truth('train', 'Male'), toy.schedule, NoisyTraining(n_images=32), tmp_path/'noisy')
    fig, record, _ = figure30(toy, 8, 3, noisy=str(tmp_path/'noisy/noisy.pt'), scales=(0., 1., 2.))
    assert record['numbers']['noisy_classifier'] == fingerprint(net)
    with pytest.raises(UserError, match='none.pt'): figure30(toy, 8, 3, noisy=str(tmp_path/'none.pt'), scales=(0., 1., 2.))


def test_figure31_in_small(toy, tmp_path):
    s = checked(figure31(toy, scales=(-1., 0., 1., 2.), words=('sketch',), n_adapt=8, walk=Walk(t0=400, n=3), lowest=100,
                         n_probe=20, n_edit=8, n_tune=4), 'figure31', tmp_path, 'smile/0/rate', 'linearity', 'homogeneity/Smiling',
                'composition_error/Smiling+Male', 'sketch/h-space/direction', 'trained on h-space/pencil/balanced_accuracy')
    assert 0 <= s['smile/2/rate']['mean'] <= 1


def test_figure32_in_small(toy, tmp_path):
    checked(figure32(toy, toy.photos('test'), 4, 1, (0., 1.)), 'figure32', tmp_path, 'mixed/0/towards sketch', 'relay/identity',
            'drawing to photo, inverted by the sketch model/identity')


def test_figure33_in_small(tmp_path):
    train_gan(uint8_pictures(), GanConfig(n_images=4, batch_size=2), tmp_path/'gan')
    big = Bench(Experiment(get_profile('toy', size=64), tmp_path, device='cpu'), n_judge=20, judge_epochs=1)
    checked(figure33(big, tmp_path/'gan/checkpoint.pt', n=3, n_tune=2, tune_steps=2, invert_steps=2), 'figure33', tmp_path,
            'GAN, z: photo again/error', 'diffusion: photo again/identity', 'GAN, z and shifts: sketch/direction')


def test_figure34_in_small(tmp_path):
    bench = shifted_bench(get_profile('toy'), 'Smiling', .7, 12, 12, root=tmp_path, device='cpu')
    bench.n_judge, bench.judge_epochs = 20, 1
    assert set(bench.exp.splits['train'].ids).isdisjoint(bench.exp.splits['test'].ids)
    s = checked(figure34(bench, 'Smiling', times=(0, 400), seeds=range(2), walk=Walk(t0=400, n=3), lowest=100, epochs=1, scale=1.),
                'figure34', tmp_path, 'editing_minus_as they are', 'link/EM', 'oracle/balanced_accuracy', 'auroc/test/400')
    assert sum(s[k]['mean'] for k in s if k.startswith('share/EM')) == pytest.approx(1)
