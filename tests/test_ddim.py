"The DDIM step, its grids, its truth for Gaussian data, and the way back."
import math

import pytest
import torch

from diffclip_da.core import UserError, new_generator
from diffclip_da.diffusion.ddim import (INVERSIONS, check_pairs, ddim_sigma, ddim_step, evaluations, gaussian_angle, gaussian_flow,
                              invert, reconstruct, sample, step_pairs)
from diffclip_da.diffusion.forward import predict_x0
from diffclip_da.diffusion.reverse import GaussianDenoiser, MixtureDenoiser, posterior
from diffclip_da.diffusion.schedule import cosine_schedule, linear_schedule

S = linear_schedule()


def randn(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=new_generator(seed), dtype=dtype)


class Counting:
    "An eps_model that notes the times it was asked for."
    def __init__(self, model): self.model, self.times = model, []
    def __call__(self, x, t):
        self.times.append(t)
        return self.model(x, t)


@pytest.mark.parametrize('t0', [0, 1, 2, 17, 300, 601, 999])
def test_step_pairs_every_n(t0):
    for n in range(1, t0 + 2):
        pairs = step_pairs(t0, n)
        assert len(pairs) == n and pairs[0][0] == t0 and pairs[-1][1] == -1
        assert all(a > b for a, b in pairs) and all(p[1] == q[0] for p, q in zip(pairs, pairs[1:]))
        if n > 1:
            assert pairs[-1] == (0, -1)
            gaps = [a - b for a, b in pairs[:-1]]
            assert max(gaps) - min(gaps) <= 1  # as even as whole numbers allow


def test_step_pairs_known():
    assert step_pairs(999, 1000) == [(t, t - 1) for t in range(999, -1, -1)]
    assert step_pairs(500, 1) == [(500, -1)]
    assert step_pairs(500, 6) == [(500, 400), (400, 300), (300, 200), (200, 100), (100, 0), (0, -1)]


@pytest.mark.parametrize('t0,n,text', [(-1, 1, 't0 = -1'), (10, 0, 'n = 0'), (10, 12, 'use n <= 11')])
def test_step_pairs_refuses(t0, n, text):
    with pytest.raises(UserError, match=text): step_pairs(t0, n)


@pytest.mark.parametrize('pairs,text', [([], 'empty'), ([(-1, 0), (0, 5)], 'must go down'), ([(1000, 0), (0, -1)], 'T - 1 = 999'),
                                        ([(9, 5), (4, -1)], 'starts at 4'), ([(9, -2)], 'must go down')])
def test_pairs_refused_by_sampler_and_inversion(pairs, text):
    x = torch.zeros(1, 1)
    for f in (sample, invert):
        with pytest.raises(UserError, match=text): f(lambda x, t: x, x, pairs, S)
    with pytest.raises(UserError, match=text): check_pairs(pairs, S)


@pytest.mark.parametrize('schedule', [linear_schedule(), cosine_schedule(), linear_schedule(50)], ids=['linear', 'cosine', 'T=50'])
def test_eta_one_is_the_ddpm_posterior(schedule):
    x, eps = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for t in range(schedule.T):
        mean, var = posterior(predict_x0(x, t, eps, schedule), x, t, schedule)
        ours = ddim_step(x, t, t - 1, eps, schedule, eta=1., noise=torch.zeros_like(x))
        assert ((ours - mean).abs() <= 1e-11 * mean.abs().clamp(min=1)).all(), t
        assert abs(ddim_sigma(t, t - 1, 1., schedule)**2 - var) < 1e-14, t


@pytest.mark.parametrize('eta', [0., .3, 1.])
def test_marginals_are_kept_by_any_eta_and_stride(eta):
    for t, t_prev in ((999, 400), (500, 499), (20, 3), (7, -1)):  # noise kept + fresh = noise due at t_prev
        sigma, ab_prev = ddim_sigma(t, t_prev, eta, S), S.ab(t_prev)
        step = ddim_step(S.rates(t)[1].reshape(1, 1), t, t_prev, torch.ones(1, 1, dtype=torch.float64), S, eta, torch.zeros(1, 1))
        assert abs(step.item()**2 + sigma.item()**2 - (1 - ab_prev.item())) < 1e-12


def test_batch_of_times_equals_one_by_one():
    x, eps, z = (randn(3, 2, 4, 4, seed=s) for s in range(3))
    t, t_prev = torch.tensor([999, 500, 0]), torch.tensor([700, 499, -1])
    for eta in (0., .5):
        together = ddim_step(x, t, t_prev, eps, S, eta, z)
        for i in range(3):
            alone = ddim_step(x[i:i+1], t[i].item(), t_prev[i].item(), eps[i:i+1], S, eta, z[i:i+1])
            assert torch.allclose(together[i:i+1], alone, atol=1e-12)


def test_same_eps_undoes_the_step():
    x, eps = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for a, b in ((-1, 0), (0, 999), (300, 400)):
        assert torch.allclose(ddim_step(ddim_step(x, a, b, eps, S), b, a, eps, S), x, atol=1e-11)
    assert torch.allclose(ddim_step(x, 7, 7, eps, S), x, atol=1e-12)


def test_float32_stays_close_to_float64():
    model, x = GaussianDenoiser(.2, .3, S), randn(2, 3, 8, 8)
    out = sample(model, x.float(), step_pairs(999, 50), S)
    assert out.dtype == torch.float32
    assert (out - sample(model, x, step_pairs(999, 50), S)).abs().max() < 1e-4


@pytest.mark.parametrize('n,eta', [(1, 0.), (1, 1.), (7, 0.), (7, 1.), (50, 0.), (50, 1.), (1000, 1.)])
def test_diffusers_ddim(n, eta):
    from diffusers import DDIMScheduler
    ddim = DDIMScheduler(1000, 1e-4, .02, clip_sample=False, set_alpha_to_one=True, timestep_spacing='leading')
    ddim.alphas_cumprod, ddim.final_alpha_cumprod = S.alpha_bar, torch.ones((), dtype=torch.float64)
    ddim.set_timesteps(n)
    model = MixtureDenoiser([[-1.], [1.]], .2, S) if n < 1000 else GaussianDenoiser(.1, .2, S)  # the faster one
    x, g = randn(16, 1), new_generator(1)
    pairs = step_pairs((n - 1) * (1000 // n), n)
    assert [t for t, _ in pairs] == ddim.timesteps.tolist()
    theirs = x
    for t in ddim.timesteps.tolist():
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype) if eta else None
        theirs = ddim.step(model(theirs, t), t, theirs, eta=eta, variance_noise=noise).prev_sample
    assert (sample(model, x, pairs, S, eta, new_generator(1)) - theirs).abs().max() < 1e-10


def test_diffusers_inverse_step():
    from diffusers import DDIMInverseScheduler
    inverse = DDIMInverseScheduler(1000, 1e-4, .02, clip_sample=False, set_alpha_to_one=True)
    inverse.alphas_cumprod, inverse.initial_alpha_cumprod = S.alpha_bar, torch.ones((), dtype=torch.float64)
    inverse.set_timesteps(20)
    pairs = step_pairs(950, 20)
    assert [t for t, _ in pairs[::-1]] == inverse.timesteps.tolist()
    x, eps = randn(4, 3), randn(4, 3, seed=1)
    for t, t_prev in pairs[::-1]:
        assert (inverse.step(eps, t, x).prev_sample - ddim_step(x, t_prev, t, eps, S)).abs().max() < 1e-11


@pytest.mark.parametrize('std', [1., .2])
def test_gaussian_steps_are_the_flow_times_cosines(std):
    mean, x = .4, randn(5, 1)
    for n in (1, 2, 9, 100):
        pairs = step_pairs(800, n)
        cosines = math.prod((gaussian_angle(t, std, S) - gaussian_angle(p, std, S)).cos().item() for t, p in pairs)
        flow = gaussian_flow(x, 800, -1, mean, std, S)
        assert torch.allclose(sample(GaussianDenoiser(mean, std, S), x, pairs, S) - mean, cosines * (flow - mean), atol=1e-12)
    there_and_back = gaussian_flow(gaussian_flow(x, 800, 3, mean, std, S), 3, 800, mean, std, S)
    assert torch.allclose(there_and_back, x, atol=1e-12)


def test_first_order():
    x, model = torch.ones(1, 1, dtype=torch.float64), GaussianDenoiser(0., .5, S)
    exact = gaussian_flow(x, 999, 0, 0., .5, S)
    error = [(exact - sample(model, x, step_pairs(999, n + 1)[:-1], S)).item() for n in (50, 100, 200)]
    assert all(1.9 < a / b < 2.1 for a, b in zip(error, error[1:]))


@pytest.mark.parametrize('method', INVERSIONS)
@pytest.mark.parametrize('n,n_iter', [(1, 1), (5, 1), (5, 3)])
def test_evaluations_are_counted_right(method, n, n_iter):
    model, x = Counting(GaussianDenoiser(0., .5, S)), randn(2, 1)
    invert(model, x, step_pairs(500, n), S, method, n_iter)
    assert len(model.times) == evaluations(method, n, n_iter)
    assert all(0 <= t <= 500 for t in model.times)  # no model is asked for t = -1
    model.times.clear()
    sample(model, x, step_pairs(500, n), S)
    assert model.times == [t for t, _ in step_pairs(500, n)]


@pytest.mark.parametrize('method', ['fixed_point', 'average', 'anderson'])
def test_iterated_inversion_converges_to_the_inverse_of_the_sampler(method):
    model, x0 = GaussianDenoiser(.1, .5, S), randn(4, 3, 2, 2)
    error = [(reconstruct(model, x0, 500, 12, 12, S, method, k) - x0).abs().max().item() for k in (1, 4, 30)]
    assert error[0] > error[1] and error[2] < 1e-8
    plain = (reconstruct(model, x0, 500, 12, 12, S) - x0).abs().max().item()
    assert error[0] < plain  # at equal cost


def test_plain_inversion_error_follows_the_cosines():
    std, x0 = .3, torch.full((1, 1), .3, dtype=torch.float64)
    for n in (6, 40):
        times = torch.tensor([t for t, _ in step_pairs(500, n)] + [-1])
        expected = gaussian_angle(times, std, S).diff().cos().square().prod().item()
        assert abs((reconstruct(GaussianDenoiser(0., std, S), x0, 500, n, n, S) / std).item() - expected) < .002


def test_inverting_with_the_fine_tuned_model_undoes_the_edit():
    before, after, x0 = GaussianDenoiser(0., .2, S), GaussianDenoiser(1., .2, S), torch.zeros(1, 1, dtype=torch.float64)
    def edit(model, n_inv, n_gen): return sample(after, invert(model, x0, step_pairs(500, n_inv), S), step_pairs(500, n_gen), S).item()
    assert edit(before, 40, 6) == pytest.approx(.97, abs=.005)
    assert edit(after, 40, 6) == pytest.approx(.52, abs=.005)
    assert edit(after, 40, 40) == pytest.approx(.15, abs=.005)


def test_gradients_flow_through_sample_not_through_invert():
    model = GaussianDenoiser(torch.nn.Parameter(torch.tensor(.1)), .5, S)
    x, pairs = torch.ones(1, 1), step_pairs(500, 6)
    out = sample(model, x, pairs, S)
    assert out.requires_grad
    out.sum().backward()
    shift = lambda m: sample(GaussianDenoiser(m, .5, S), x.double(), pairs, S).item()
    assert model.mean.grad.item() == pytest.approx((shift(.2) - shift(.1)) / .1, rel=1e-3)  # linear in the mean
    assert not invert(model, x, pairs, S).requires_grad
    with torch.no_grad(): assert not sample(model, x, pairs, S).requires_grad


def test_generator_decides_the_noise():
    model, x, pairs = GaussianDenoiser(0., 1., S), randn(2, 1), step_pairs(999, 10)
    a, b, c = (sample(model, x, pairs, S, .5, new_generator(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(sample(model, x, pairs, S), sample(model, x, pairs, S, generator=new_generator(0)))  # eta = 0 draws nothing


@pytest.mark.parametrize('call,text', [
    (lambda x: ddim_sigma(5, 4, 1.5, S), r'eta = 1.5 is outside \[0, 1\]'),
    (lambda x: ddim_step(x, 5, 9, x, S, eta=.5, noise=x), 'only eta = 0 runs backwards'),
    (lambda x: ddim_step(x, 9, 5, x, S, eta=.5), 'pass noise='),
    (lambda x: sample(lambda x, t: x, x, step_pairs(9, 2), S, eta=1.), 'generator=new_generator'),
    (lambda x: invert(lambda x, t: x, x, step_pairs(9, 2), S, 'magic'), "'magic' is not one of ddim, fixed_point"),
    (lambda x: invert(lambda x, t: x, x, step_pairs(9, 2), S, 'average', 0), 'n_iter = 0'),
    (lambda x: ddim_step(x, 1000, 5, x, S), 't = 1000')])
def test_bad_input(call, text):
    with pytest.raises(UserError, match=text): call(torch.ones(1, 1))


def test_a_condition_reaches_the_model_at_every_step_both_ways():
    seen = []
    def model(x, t, shift): seen.append(shift); return .1 * x + shift
    x, pairs, shift = torch.ones(2, 1), step_pairs(300, 3), torch.tensor([[0.], [.5]])
    both = sample(model, x, pairs, S, shift=shift)
    one = [sample(model, x[k:k + 1], pairs, S, shift=shift[k:k + 1]) for k in (0, 1)]
    assert torch.equal(both, torch.cat(one)) and not torch.equal(*one) and len(seen) == 9
    up = invert(model, x, pairs, S, 'anderson', 2, shift=shift)
    assert torch.allclose(up, torch.cat([invert(model, x[k:k + 1], pairs, S, 'anderson', 2, shift=shift[k:k + 1]) for k in (0, 1)]))


def test_an_asymmetric_step_takes_the_image_from_one_eps_and_the_direction_from_the_other():
    x, a, b = randn(2, 1), randn(2, 1, seed=1), randn(2, 1, seed=2)
    x0_hat, noise = predict_x0(x, 400, a, S), S.rates(300)[1]
    want = S.rates(300)[0] * x0_hat + noise * b
    assert torch.allclose(ddim_step(x, 400, 300, a, S, eps_direction=b), want, atol=1e-12)
    assert torch.equal(ddim_step(x, 400, 300, a, S, eps_direction=a), ddim_step(x, 400, 300, a, S))
    pair = sample(lambda x, t: (a, b), x, [(400, 300)], S)
    assert torch.allclose(pair, want, atol=1e-12)
    assert torch.equal(invert(lambda x, t: (a, b), x, [(400, 300)], S), invert(lambda x, t: a, x, [(400, 300)], S))


def test_forgetting_activations_changes_neither_the_picture_nor_the_gradient():
    got = {}
    for forget in (False, True):
        model = GaussianDenoiser(torch.nn.Parameter(torch.tensor(.1)), .5, S)
        out = sample(model, torch.ones(1, 1), step_pairs(500, 4), S, checkpointed=forget)
        out.sum().backward()
        got[forget] = out.detach(), model.mean.grad
    assert all(torch.equal(a, b) for a, b in zip(got[False], got[True]))
