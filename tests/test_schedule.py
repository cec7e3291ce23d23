import copy, pickle

import diffusers
import pytest
import torch

from diffclip_da.core import UserError
from diffclip_da.diffusion.schedule import Schedule, cosine_schedule, linear_schedule, match_like

LINEAR, COSINE = linear_schedule(), cosine_schedule()


def test_alpha_bar_is_the_running_product():
    s = Schedule(torch.tensor([0.1, 0.2, 0.5]))
    assert s.T == 3 and s.beta.dtype == torch.float64 and s.name == 'custom'
    torch.testing.assert_close(s.alpha_bar, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64), rtol=1e-7, atol=0)
    assert s.alpha_bar is s.alpha_bar  # computed once


@pytest.mark.parametrize('ours, kind', [(LINEAR, 'linear'), (COSINE, 'squaredcos_cap_v2')])
def test_agrees_with_diffusers(ours, kind):
    theirs = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=kind)
    torch.testing.assert_close(ours.beta.float(), theirs.betas, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('T', [1, 2, 7, 1000])
def test_any_number_of_steps(T):
    for s in (linear_schedule(T), cosine_schedule(T)):
        assert s.T == T
        ab = s.ab(torch.arange(-1, T))
        assert ab[0] == 1 and (ab.diff() < 0).all() and (ab > 0).all()
    assert cosine_schedule(T).alpha_bar[-1] < 2e-3


def test_linear_endpoints():
    s = linear_schedule(50, 0.01, 0.3)
    assert s.beta[0] == 0.01 and s.beta[-1] == 0.3
    torch.testing.assert_close(s.beta.diff(), torch.full((49,), 0.29 / 49, dtype=torch.float64))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_lookup_takes_type_and_shape_from_like(dtype):
    x = torch.zeros(4, 3, 2, 2, dtype=dtype)
    for t, shape in ((7, ()), (torch.tensor(7), ()), (torch.tensor([7]), (1, 1, 1, 1)), ([0, 1, 2, 3], (4, 1, 1, 1)), (torch.arange(4, dtype=torch.int32), (4, 1, 1, 1))):
        for c in (LINEAR.ab(t, x), *LINEAR.rates(t, x)):
            assert c.dtype == dtype and c.shape == shape
        assert (x + LINEAR.ab(t, x)).shape == x.shape
    assert LINEAR.ab(7).dtype == torch.float64 and LINEAR.ab([1, 2]).shape == (2,)


def test_first_last_and_clean():
    assert LINEAR.ab(-1) == 1 and LINEAR.ab(0) == 1 - LINEAR.beta[0] and LINEAR.ab(999) == LINEAR.alpha_bar[-1]
    torch.testing.assert_close(LINEAR.ab(torch.tensor([-1, 0, 999])), torch.stack([LINEAR.ab(t) for t in (-1, 0, 999)]), rtol=0, atol=0)
    signal, noise = LINEAR.rates(-1)
    assert signal == 1 and noise == 0 and LINEAR.snr(-1) == torch.inf


def test_rates_and_snr():
    t = torch.arange(1000)
    signal, noise = LINEAR.rates(t)
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(LINEAR.snr(t), (signal / noise)**2, rtol=1e-12, atol=0)
    assert (LINEAR.snr(t).diff() < 0).all()


def test_noise_rate_survives_half_precision():
    x = torch.zeros(1, dtype=torch.float16)
    assert (1 - LINEAR.ab(0, x)).sqrt() == 0  # what casting early would give
    assert abs(LINEAR.rates(0, x)[1].item() - 0.01) < 1e-5


@pytest.mark.parametrize('t', [-2, 1000, torch.tensor(-2), torch.tensor([3, 1000]), [-7]])
def test_out_of_range(t):
    with pytest.raises(UserError, match=r"outside \[-1, 999\] of schedule 'linear' with T = 1000 steps; .* -1 is the clean image"): LINEAR.ab(t)
    with pytest.raises(UserError, match='outside'): LINEAR.rates(t)
    with pytest.raises(UserError, match='outside'): LINEAR.snr(t)


def test_lowest():
    assert LINEAR.ab(0, lowest=0) == LINEAR.ab(0)
    with pytest.raises(UserError, match=r't = -1 is outside \[0, 999\]'): LINEAR.ab(-1, lowest=0)


@pytest.mark.parametrize('t', [1.0, True, torch.tensor([0.5]), torch.zeros(2, 2, dtype=torch.long)])
def test_t_that_is_no_integer(t):
    with pytest.raises(UserError, match='give an integer, or a 1-d integer tensor'): LINEAR.ab(t)


def test_t_that_does_not_fit_the_batch():
    with pytest.raises(UserError, match=r't has 3 entries but the batch has shape \[4, 3, 8, 8\]'): LINEAR.ab([1, 2, 3], torch.zeros(4, 3, 8, 8))
    assert match_like(torch.ones(3), torch.zeros(1, 2)).shape == (3, 1)  # one image, many t: broadcasts


@pytest.mark.parametrize('beta, message', [([0.1, 1.0], r'beta\[1\] = 1; every beta must lie strictly between 0 and 1'), ([0.], r'beta\[0\] = 0'),
                                           ([0.1, float('nan')], r'beta\[1\] = nan'), ([], 'beta has shape'), ([[0.1]], 'give a 1-d tensor')])
def test_bad_betas(beta, message):
    with pytest.raises(UserError, match=message): Schedule(beta, 'mine')


@pytest.mark.parametrize('make', [linear_schedule, cosine_schedule])
def test_bad_step_counts(make):
    with pytest.raises(UserError, match='T = 0: a schedule needs at least one step'): make(0)
    with pytest.raises(UserError, match='T = 2.5: the number of steps must be a whole number'): make(2.5)


def test_copies_work():
    LINEAR.ab([1, 2])
    for s in (copy.deepcopy(LINEAR), pickle.loads(pickle.dumps(LINEAR))):
        assert s.name == 'linear' and torch.equal(s.ab([1, 2]), LINEAR.ab([1, 2]))
    with pytest.raises(AttributeError): LINEAR.beta = None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    x, t = torch.zeros(3, 3, 2, 2, device='cuda'), torch.tensor([-1, 5, 999])
    LINEAR.rates(t.cuda(), x)  # fills the table
    torch.cuda.set_sync_debug_mode('error')
    try:
        got, one = LINEAR.rates(t.cuda(non_blocking=True), x)[0], LINEAR.ab(500, x)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert got.device == one.device == x.device and torch.equal(got.cpu(), LINEAR.rates(t, x.cpu())[0])
    assert LINEAR.ab(torch.tensor([1000, -2], device='cuda')).isnan().all()
