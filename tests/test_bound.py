"The terms of the variational bound, each against a distribution of torch and against Gaussian data whose truth is known."
import math

import pytest
import torch
from torch import distributions as D

from diffclip_da.core import UserError, new_generator
from diffclip_da.diffusion.bound import bound_terms, decoder_nll, prior_kl, step_kl
from diffclip_da.diffusion.forward import noise_like, q_sample
from diffclip_da.diffusion.reverse import GaussianDenoiser, ddpm_mean, elbo_weight, posterior
from diffclip_da.diffusion.schedule import cosine_schedule, linear_schedule

MU, STD = .3, .4
SCHEDULE = linear_schedule()


def some(shape, seed): return torch.randn(shape, generator=new_generator(seed), dtype=torch.float64)
def wrong(x, t): return .5 * x + .1   # a network that is far from right


def test_the_end_is_torchs_kl():
    x, few = some((5, 2, 3), 0), linear_schedule(50)
    signal, noise = few.rates(few.T - 1)
    want = D.kl_divergence(D.Normal(signal * x, noise), D.Normal(0., 1.)).flatten(1).sum(1)
    assert torch.allclose(prior_kl(x, few), want)
    assert (prior_kl(x, SCHEDULE) < prior_kl(x, few)).all() and prior_kl(x.float(), SCHEDULE).dtype == torch.float64


@pytest.mark.parametrize('t', [1, 300, 999])
@pytest.mark.parametrize('factor', [None, 1., 2.5])
def test_a_step_is_torchs_kl(t, factor):
    x, eps = some((4, 3), 1), some((4, 3), 2)
    x_t = q_sample(x, t, eps, SCHEDULE)
    mean, small = posterior(x, x_t, t, SCHEDULE)
    var = small if factor is None else factor * small
    want = D.kl_divergence(D.Normal(mean, small.sqrt()), D.Normal(ddpm_mean(x_t, t, wrong(x_t, t), SCHEDULE), var.sqrt())).sum(1)
    assert torch.allclose(step_kl(wrong, x, t, eps, SCHEDULE, factor and var), want, rtol=1e-7)


@pytest.mark.parametrize('t', [1, 50, 999])
def test_a_step_is_its_weight_times_the_simple_loss(t):
    x, eps = some((6, 2), 3), some((6, 2), 4)
    error = (wrong(q_sample(x, t, eps, SCHEDULE), t) - eps).square().sum(1)
    assert torch.allclose(step_kl(wrong, x, t, eps, SCHEDULE), elbo_weight(t, SCHEDULE) * error, rtol=1e-7)


def test_the_last_step_is_a_log_density():
    x, eps, var = some((4, 3), 5), some((4, 3), 6), .02
    mean = ddpm_mean(q_sample(x, 0, eps, SCHEDULE), 0, wrong(q_sample(x, 0, eps, SCHEDULE), 0), SCHEDULE)
    assert torch.allclose(decoder_nll(wrong, x, eps, SCHEDULE, var), -D.Normal(mean, var**.5).log_prob(x).sum(1))
    with pytest.raises(UserError, match='above 0'): decoder_nll(wrong, x, eps, SCHEDULE, 0.)


def exact_variance(t, schedule):
    "Of q(x_{t-1} | x_t) for data N(MU, STD^2), from the joint covariance of both."
    ab, before = schedule.ab(t).item(), schedule.ab(t - 1).item()
    v, v_before = (a * STD**2 + 1 - a for a in (ab, before))
    return v_before - (math.sqrt(ab / before) * v_before)**2 / v


@pytest.mark.parametrize('T', [1, 4, 40])
def test_the_bound_is_tight_for_gaussian_data_and_the_right_variance(T):
    schedule, n = cosine_schedule(T), 40_000
    x = MU + STD * some((n, 1), 7)
    terms = bound_terms(GaussianDenoiser(MU, STD, schedule), x, schedule, new_generator(8), lambda t: exact_variance(t, schedule))
    assert terms['steps'].shape == (T - 1, n)
    total = terms['prior'] + terms['steps'].sum(0) + terms['decoder']
    ab = schedule.ab(T - 1)
    v = ab * STD**2 + 1 - ab
    start = .5 * (v + ab * MU**2 - 1 - v.log())
    entropy = .5 * math.log(2 * math.pi * math.e * STD**2)
    assert abs(total.mean() - entropy - start) < 5 * total.std() / n**.5


def test_another_network_has_a_larger_bound():
    schedule, x = cosine_schedule(20), MU + STD * some((4000, 1), 9)
    def bound(model):
        t = bound_terms(model, x, schedule, new_generator(10), lambda t: exact_variance(t, schedule))
        return (t['prior'] + t['steps'].sum(0) + t['decoder']).mean()
    assert bound(GaussianDenoiser(MU, STD, schedule)) < min(bound(GaussianDenoiser(MU + .2, STD, schedule)), bound(GaussianDenoiser(MU, 2 * STD, schedule)))


def test_the_noise_comes_from_the_generator():
    schedule, x = cosine_schedule(5), some((3, 2), 11)
    one, same, other = (bound_terms(wrong, x, schedule, new_generator(s), lambda t: .1)['steps'] for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and noise_like(x, new_generator(0)).shape == x.shape
