import diffusers
import pytest
import torch
from torch import nn

from diffclip_da.core import UserError, new_generator
from diffclip_da.diffusion.forward import predict_x0, q_sample
from diffclip_da.diffusion.reverse import (GaussianDenoiser, MixtureDenoiser, ddpm_mean, ddpm_sample, ddpm_step, diffusion_loss, elbo_weight, p2_weight,
                                 posterior, simple_weight)
from diffclip_da.diffusion.schedule import Schedule, cosine_schedule, linear_schedule

LINEAR, ALL = linear_schedule(), torch.arange(1000)


def pair(*shape, dtype=torch.float64, seed=0): return torch.randn(2, *shape, generator=new_generator(seed), dtype=dtype)


@pytest.mark.parametrize('schedule', [LINEAR, linear_schedule(1), linear_schedule(2), cosine_schedule(20)], ids=lambda s: f'{s.name}{s.T}')
def test_mean_is_the_posterior_mean_of_x0_hat(schedule):
    t = torch.arange(schedule.T)
    x_t, eps = pair(schedule.T, 3, 2, 2)
    mean, var = posterior(predict_x0(x_t, t, eps, schedule), x_t, t, schedule)
    torch.testing.assert_close(ddpm_mean(x_t, t, eps, schedule), mean, rtol=1e-10, atol=1e-12)
    assert var.shape == (schedule.T, 1, 1, 1) and var[0] == 0 and (var[1:] > 0).all()


def test_posterior_by_bayes():
    "precision and precision-weighted mean of the two Gaussians that Bayes' rule multiplies"
    x0, x_t = pair(1000, 2)
    mean, var = posterior(x0, x_t, ALL, LINEAR)
    beta, prev = LINEAR.beta[1:, None], LINEAR.ab(ALL - 1)[1:, None]
    precision = (1 - beta) / beta + 1 / (1 - prev)
    expected = ((1 - beta).sqrt() * x_t[1:] / beta + prev.sqrt() * x0[1:] / (1 - prev)) / precision
    torch.testing.assert_close(1 / var[1:], precision, rtol=1e-10, atol=0)
    torch.testing.assert_close(mean[1:], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean[0], x0[0], rtol=1e-14, atol=1e-14)


def test_forward_then_posterior_keeps_the_marginal():
    "x_t ~ q(x_t | x0) followed by the posterior must give q(x_{t-1} | x0), mean and variance"
    one, zero = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    c_0, var = posterior(one, zero, ALL, LINEAR)
    c_t, _ = posterior(zero, one, ALL, LINEAR)
    ab, prev = LINEAR.ab(ALL)[:, None], LINEAR.ab(ALL - 1)[:, None]
    torch.testing.assert_close(c_0 + c_t * ab.sqrt(), prev.sqrt(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(c_t**2 * (1 - ab) + var, 1 - prev, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('t', [0, 1, 10, 500, 999])
def test_step_agrees_with_diffusers(t):
    theirs = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type='fixed_small', clip_sample=False)
    x, eps = pair(4, 3, 8, 8, dtype=torch.float32)
    theirs.betas, theirs.alphas, theirs.alphas_cumprod = LINEAR.beta, 1 - LINEAR.beta, LINEAR.alpha_bar  # its float32 tables lose digits at t = 1
    out = theirs.step(eps, t, x, generator=new_generator(1))
    got = ddpm_step(x, t, eps, LINEAR, generator=new_generator(1))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, out.prev_sample, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(predict_x0(x, t, eps, LINEAR), out.pred_original_sample, rtol=1e-5, atol=1e-4)
    if t: torch.testing.assert_close(posterior(x, x, t, LINEAR)[1], theirs._get_variance(t).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize('t', [0, 1, 500, 999])
def test_step_agrees_with_diffusers_as_shipped(t):
    theirs = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type='fixed_small', clip_sample=False)
    x, eps = pair(4, 3, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(ddpm_step(x, t, eps, LINEAR, generator=new_generator(1)), theirs.step(eps, t, x, generator=new_generator(1)).prev_sample, rtol=2e-4, atol=2e-4)


def test_one_t_or_one_t_per_image():
    x, eps = pair(3, 3, 4, 4)
    ts, z = torch.tensor([0, 7, 999]), pair(3, 3, 4, 4, seed=5)[0]
    together = ddpm_step(x, ts, eps, LINEAR, noise=z)
    for i, t in enumerate(ts.tolist()): torch.testing.assert_close(together[i], ddpm_step(x[i:i+1], t, eps[i:i+1], LINEAR, noise=z[i:i+1])[0], rtol=1e-14, atol=1e-14)
    assert torch.equal(together, ddpm_step(x, ts.tolist(), eps, LINEAR, noise=z))


def test_last_step_adds_no_noise():
    x, eps = pair(2, 3, 4, 4)
    assert torch.equal(ddpm_step(x, 0, eps, LINEAR, generator=new_generator(0)), ddpm_mean(x, 0, eps, LINEAR))


@pytest.mark.parametrize('t', [-1, 1000, torch.tensor([5, -1])])
def test_out_of_range(t):
    x = torch.zeros(2, 1)
    for f in (lambda: ddpm_mean(x, t, x, LINEAR), lambda: posterior(x, x, t, LINEAR), lambda: ddpm_step(x, t, x, LINEAR), lambda: simple_weight(t, LINEAR)):
        with pytest.raises(UserError, match=r'outside \[0, 999\] of schedule'): f()


@pytest.mark.parametrize('t', [5, 300, 999])
def test_gaussian_denoiser_is_the_conditional_mean(t):
    "orthogonality: the residual of a conditional mean is uncorrelated with x_t, and its variance is the known floor"
    n, mu, std, g = 100_000, 0.4, 0.5, new_generator(t)
    x0, eps = mu + std * torch.randn(n, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    x_t = q_sample(x0, t, eps, LINEAR)
    left = eps - GaussianDenoiser(mu, std, LINEAR)(x_t, t)
    ab = LINEAR.ab(t)
    assert abs((left * x_t).mean()) < 4 * (left * x_t).std() / n**0.5 and abs(left.mean()) < 4 * left.std() / n**0.5
    assert abs(left.var() / (ab * std**2 / (ab * std**2 + 1 - ab)) - 1) < 4 * (2 / n)**0.5


def test_gaussian_denoiser_of_a_point_finds_all_the_noise():
    x0, eps = torch.full((4, 2), 0.3, dtype=torch.float64), pair(4, 2)[0]
    t = torch.tensor([0, 9, 500, 999])
    torch.testing.assert_close(GaussianDenoiser(0.3, 0., LINEAR)(q_sample(x0, t, eps, LINEAR), t), eps, rtol=1e-9, atol=1e-9)


def test_denoisers_keep_dtype_and_take_any_shape():
    x = torch.randn(3, 2, 4, 4, generator=new_generator(0))
    for m in (GaussianDenoiser(torch.zeros(2, 4, 4), torch.full((2, 1, 1), 0.5), LINEAR), MixtureDenoiser(torch.randn(5, 2, 4, 4), 0.3, LINEAR)):
        for t in (0, 999, torch.tensor([0, 5, 999])): assert m(x, t).dtype == torch.float32 and m(x, t).shape == x.shape


def test_trainable_mean():
    m = GaussianDenoiser(nn.Parameter(torch.tensor(-1.)), 0.5, LINEAR)
    x0, eps = pair(8, 1, dtype=torch.float32)
    diffusion_loss(m, x0, torch.arange(8) * 100, eps, LINEAR).backward()
    assert [n for n, _ in m.named_parameters()] == ['mean'] and m.mean.grad.abs() > 0
    assert not list(GaussianDenoiser(0., 0.5, LINEAR).parameters())


@pytest.mark.parametrize('t', [0, 250, 999, torch.arange(7) * 150])
def test_mixture_is_the_slope_of_its_density(t):
    m = MixtureDenoiser(torch.tensor([[-1., 0.], [1., 0.5], [0., 2.]], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4]), LINEAR, weights=[1, 2, 3])
    x = pair(7, 2)[0].requires_grad_()
    slope, = torch.autograd.grad(m.log_prob(x, t).sum(), x)
    noise = LINEAR.rates(t)[1]
    torch.testing.assert_close(m(x, t), -(noise[:, None] if noise.dim() else noise) * slope, rtol=1e-9, atol=1e-11)


def test_mixture_density_is_normalised_and_clean_at_minus_one():
    m = MixtureDenoiser([[-1.], [1.]], 0.25, LINEAR, weights=[0.3, 0.7])
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    for t in (-1, 0, 400, 999): assert abs(torch.trapezoid(m.log_prob(grid[:, None], t).exp(), grid) - 1) < 1e-7
    peak = lambda m: torch.exp(-(grid - m)**2 / (2 * 0.25**2)) / (0.25 * (2 * torch.pi)**0.5)
    clean = 0.3 * peak(-1) + 0.7 * peak(1)
    torch.testing.assert_close(m.log_prob(grid[:, None], -1).exp(), clean, rtol=1e-9, atol=1e-12)


def test_mixture_with_one_component_is_gaussian():
    x = pair(5, 3)[0]
    for t in (0, 700): torch.testing.assert_close(MixtureDenoiser([[.1, .2, .3]], 0.4, LINEAR)(x, t), GaussianDenoiser(torch.tensor([.1, .2, .3], dtype=torch.float64), 0.4, LINEAR)(x, t))


def test_mixture_samples():
    x, k = MixtureDenoiser([[-1.], [1.]], [0.1, 0.2], LINEAR, weights=[0.3, 0.7]).sample(20_000, new_generator(0))
    assert x.shape == (20_000, 1) and abs(k.double().mean() - 0.7) < 0.02 and abs(x[k == 1].std() - 0.2) < 0.01 and abs(x[k == 0].mean() + 1) < 0.01


def test_sampling_a_mixture_gives_its_distribution():
    schedule = cosine_schedule(100)
    m = MixtureDenoiser([[-1.], [1.]], 0.25, schedule, weights=[0.3, 0.7])
    g = new_generator(0)
    x = ddpm_sample(m, torch.randn(2000, 1, generator=g, dtype=torch.float64), schedule, g)
    right = x[x > 0]
    assert abs((x > 0).double().mean() - 0.7) < 0.04 and abs(right.mean() - 1) < 0.03 and abs(right.std() - 0.25) < 0.03


def test_sampler_moments_in_closed_form():
    "carry the variance of Gaussian data through all steps: with the exact reverse variance it ends at the data's, for any T"
    one, std = torch.ones(1, dtype=torch.float64), 0.5
    for schedule in (linear_schedule(1), cosine_schedule(5), cosine_schedule(50)):
        model, v = GaussianDenoiser(0., std, schedule), schedule.ab(schedule.T - 1) * std**2 + 1 - schedule.ab(schedule.T - 1)
        for t in range(schedule.T - 1, -1, -1):
            ab = schedule.ab(t)
            c_0, small = posterior(one, 0 * one, t, schedule)
            v = ddpm_mean(one, t, model(one, t), schedule)**2 * v + small + c_0**2 * std**2 * (1 - ab) / (ab * std**2 + 1 - ab)
        assert abs(v.sqrt() - std) < 1e-10


def test_sampling_is_reproducible_and_needs_no_gradients():
    m, x = GaussianDenoiser(nn.Parameter(torch.tensor(0.)), 0.5, linear_schedule(20)), pair(3, 2, dtype=torch.float32)[0]
    before = x.clone()
    a, b, c = (ddpm_sample(m, x, m.schedule, new_generator(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad and a.dtype == torch.float32 and torch.equal(x, before)
    assert torch.equal(a, ddpm_sample(m, x, m.schedule, new_generator(0), progress=True))


def test_sampling_asks_the_model_once_per_step():
    asked = []
    ddpm_sample(lambda x, t: asked.append(t) or x, torch.zeros(1, 1), linear_schedule(5))
    assert asked == [4, 3, 2, 1, 0]


def test_one_step_paints_the_mean():
    s = Schedule(torch.tensor([0.9999]), 'one step')
    m = MixtureDenoiser([[-1.], [1.]], 0.25, s, weights=[0.3, 0.7])
    x_T = pair(100, 1)[0]
    assert torch.equal(ddpm_sample(m, x_T, s), ddpm_mean(x_T, 0, m(x_T, 0), s))
    assert (ddpm_sample(m, x_T, s) - 0.4).abs().max() < 0.1


def test_weights():
    assert torch.equal(simple_weight(ALL, LINEAR), torch.ones(1000, dtype=torch.float64))
    snr = LINEAR.alpha_bar / (1 - LINEAR.alpha_bar)
    torch.testing.assert_close(p2_weight(ALL, LINEAR), 1 / (1 + snr), rtol=1e-12, atol=0)
    torch.testing.assert_close(p2_weight(ALL, LINEAR), 1 - LINEAR.alpha_bar, rtol=1e-9, atol=0)  # k = gamma = 1
    torch.testing.assert_close(p2_weight(ALL, LINEAR, k=0.5, gamma=2.), 1 / (0.5 + snr)**2, rtol=1e-12, atol=0)
    assert torch.equal(p2_weight(ALL, LINEAR, gamma=0.), simple_weight(ALL, LINEAR))
    assert p2_weight(5, LINEAR).shape == simple_weight(5, LINEAR).shape == ()


def test_elbo_weight_is_the_kl_per_squared_error():
    t = ALL[1:]
    beta, ab, var = LINEAR.beta[t], LINEAR.ab(t), posterior(torch.zeros(999, 1).double(), torch.zeros(999, 1).double(), t, LINEAR)[1][:, 0]
    torch.testing.assert_close(elbo_weight(t, LINEAR), beta**2 / (2 * var * (1 - beta) * (1 - ab)), rtol=1e-7, atol=0)
    with pytest.raises(UserError, match=r't = 0 is outside \[1, 999\]'): elbo_weight(0, LINEAR)


def test_loss_by_hand():
    x0, eps = pair(4, 3, 2, 2)
    t = torch.tensor([0, 10, 500, 999])
    got = diffusion_loss(lambda x, t: torch.zeros_like(x), x0, t, eps, LINEAR, weight=p2_weight)
    assert got.shape == () and torch.isclose(got, (p2_weight(t, LINEAR) * eps.square().mean((1, 2, 3))).mean())
    assert diffusion_loss(lambda x, t: eps, x0, t, eps, LINEAR) == 0
    assert torch.isclose(diffusion_loss(lambda x, t: 0 * x, x0, 7, eps, LINEAR), eps.square().mean())


def test_loss_dtype_and_gradients():
    net = nn.Conv2d(3, 3, 1)
    x0, eps = pair(4, 3, 2, 2, dtype=torch.float32)
    loss = diffusion_loss(lambda x, t: net(x), x0, torch.tensor([0, 1, 500, 999]), eps, LINEAR, weight=p2_weight)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_best_network_beats_all_near_it():
    n, g = 20_000, new_generator(0)
    x0, eps = torch.randn(2, n, 1, generator=g, dtype=torch.float64)
    x0 = 0.4 + 0.5 * x0
    t = torch.randint(1000, (n,), generator=g)
    best = diffusion_loss(GaussianDenoiser(0.4, 0.5, LINEAR), x0, t, eps, LINEAR)
    for mean, std in ((0.2, 0.5), (0.6, 0.5), (0.4, 0.4), (0.4, 0.65)): assert diffusion_loss(GaussianDenoiser(mean, std, LINEAR), x0, t, eps, LINEAR) > best
