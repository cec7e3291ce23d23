"The walk: its grids over every number of steps, its checks, and that it is the sampler and the inversion of `ddim`."
from dataclasses import replace

import pytest
import torch

from diffclip_da.core import UserError, new_generator
from diffclip_da.diffusion.ddim import invert, sample, step_pairs
from diffclip_da.diffusion.reverse import GaussianDenoiser
from diffclip_da.diffusion.schedule import Schedule, cosine_schedule, linear_schedule
from diffclip_da.diffusion.walk import GRIDS, Walk, log_snr, logsnr_pairs

S = linear_schedule()


@pytest.mark.parametrize('t0', [1, 2, 17, 300, 400, 601, 999])
@pytest.mark.parametrize('grid', GRIDS)
def test_every_grid_runs_down_without_gap_or_repeat_for_every_n(grid, t0):
    for schedule in (S, cosine_schedule()):
        for n in range(1, t0 + 2):
            pairs = GRIDS[grid](t0, n, schedule)
            starts, ends = zip(*pairs)
            assert len(pairs) == n and starts[0] == t0 and ends[-1] == -1 and starts[1:] == ends[:-1]
            assert all(a > b >= -1 for a, b in pairs)


def test_the_logsnr_grid_is_even_in_logsnr():
    assert [t for t, _ in logsnr_pairs(400, 3, S)] == [400, 101, 14]
    assert [t for t, _ in logsnr_pairs(400, 4, S)] == [400, 155, 40, 7]
    assert [t for t, _ in logsnr_pairs(400, 6, S)] == [400, 226, 101, 40, 14, 3]
    lam = log_snr(S)
    steps = torch.tensor([lam[t] for t, _ in logsnr_pairs(600, 5, S)]).diff()
    assert (steps / steps.mean() - 1).abs().max() < .05
    assert [t for t, _ in logsnr_pairs(9, 10, S)] == list(range(9, -1, -1))


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('t0, n, words', [(-1, 1, 't0 = -1'), (5, 0, 'n = 0'), (5, 7, 'do not fit')])
def test_impossible_grids_are_refused(grid, t0, n, words):
    with pytest.raises(UserError, match=words): GRIDS[grid](t0, n, S)


def test_a_walk_is_the_inversion_and_the_sampler_on_its_grid():
    model, x0 = GaussianDenoiser(.2, .4, S), torch.randn(3, 1, generator=new_generator(0), dtype=torch.float64)
    walk = Walk(t0=500, n_inv=7, n_gen=4, grid='linear', inversion='average', n_iter=3)
    z = walk.invert(model, x0, S)
    assert torch.equal(z, invert(model, x0, step_pairs(500, 7), S, 'average', 3))
    assert torch.equal(walk.generate(model, z, S), sample(model, z, step_pairs(500, 4), S))
    noisy = replace(walk, eta=1., grid='logsnr')
    want = sample(model, z, logsnr_pairs(500, 4, S), S, 1., new_generator(5))
    assert torch.equal(noisy.generate(model, z, S, new_generator(5)), want)
    assert walk.evaluations == (21, 4) and replace(walk, inversion='ddim').evaluations == (7, 4)


def test_the_published_script_takes_the_photo_for_time_0():
    "39 evaluations of 40: no step from the clean image to t = 0."
    model, times = GaussianDenoiser(.2, .4, S), []
    def counted(x, t): times.append(t); return model(x, t)
    x0 = torch.randn(3, 1, generator=new_generator(0), dtype=torch.float64)
    walk = Walk(t0=500, n_inv=40, n_gen=6, grid='linear', inversion='ddim')
    script = replace(walk, photo_time=0)
    z = script.invert(counted, x0, S)
    assert len(times) == 39 == script.evaluations[0] and walk.evaluations[0] == 40 and times[0] == 0
    assert torch.equal(z, invert(model, x0, step_pairs(500, 40)[:-1], S, 'ddim'))
    assert 0 < (z - walk.invert(model, x0, S)).abs().max() < .02      # the noise of t = 0
    assert torch.equal(script.generate(model, z, S), walk.generate(model, z, S))


def test_no_grid_has_a_smaller_worst_contraction_bound():
    "1 - exp(-step in log-SNR) bounds the fixed-point map for every Gaussian; equal steps make the worst one smallest."
    lam = log_snr(S)
    def worst(times): return max(1 - (lam[t] - lam[s]).exp().item() for t, s in zip(times, times[1:]))
    g = new_generator(1)
    for n in (4, 6):
        ours = [t for t, _ in logsnr_pairs(400, n, S)] + [0]
        for _ in range(200):
            other = sorted({400, 0, *(torch.randperm(399, generator=g)[:n - 1] + 1).tolist()}, reverse=True)
            assert worst(ours) <= worst(other) + .02


def test_n_sets_both_numbers_and_replace_keeps_them():
    walk = Walk(n=4)
    assert (walk.n_inv, walk.n_gen) == (4, 4) and replace(walk, n_gen=9).n_inv == 4
    assert Walk(n=4) == Walk(n_inv=4, n_gen=4) and hash(Walk(n=4)) == hash(Walk(n_inv=4, n_gen=4))


@pytest.mark.parametrize('change, words', [
    (dict(t0=0), 't0 = 0'), (dict(t0=1000), '1 and 999'), (dict(n_inv=0), 'n_inv = 0'), (dict(n_gen=401), 'lower n_gen'),
    (dict(grid='cubic'), 'linear or logsnr'), (dict(inversion='magic'), 'ddim or fixed_point'), (dict(sampler='dpm'), 'choose ddim'),
    (dict(photo_time=1), '-1 .the clean image. or 0'), (dict(photo_time=0), "only grid = 'linear'"), (dict(photo_time=0, grid='linear', n_inv=1), '2 or more'),
    (dict(inverter='x'), 'pretrained or finetuned'), (dict(n_iter=0), 'n_iter = 0'), (dict(eta=2.), 'between 0 and 1')])
def test_a_walk_that_cannot_be_gone_is_refused(change, words):
    with pytest.raises(UserError, match=words): Walk(**change).check(S)
    assert Walk().check(S) == Walk()
    with pytest.raises(UserError, match='schedule of 50 steps'): Walk().check(Schedule(torch.full((50,), .01)))
