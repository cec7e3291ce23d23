import diffusers
import matplotlib.pyplot as plt
import pytest
import torch

from diffclip_da.diffusion import forward
from diffclip_da.core import UserError, new_generator
from diffclip_da.diffusion.forward import draw_face, explore, has_live_kernel, noise_like, predict_eps, predict_x0, q_sample
from diffclip_da.diffusion.schedule import cosine_schedule, linear_schedule

LINEAR = linear_schedule()
SCHEDULES = [LINEAR, cosine_schedule(1000), linear_schedule(1), linear_schedule(7)]


def pair(*shape, dtype=torch.float64, seed=0): return torch.randn(2, *shape, generator=new_generator(seed), dtype=dtype)


@pytest.mark.parametrize('schedule', [SCHEDULES[0], *SCHEDULES[2:]], ids=lambda s: f'{s.name}{s.T}')
def test_round_trip_at_every_step(schedule):
    t = torch.arange(schedule.T)
    x0, eps = pair(schedule.T, 3, 4, 4)
    x_t = q_sample(x0, t, eps, schedule)
    assert (predict_x0(x_t, t, eps, schedule) - x0).abs().max() < 1e-10
    assert (predict_eps(x_t, t, x0, schedule) - eps).abs().max() < 1e-10


def test_round_trip_cosine():  # its last steps hold no more than 1e-5 of the image, so the tolerance follows the amplification
    s, t = SCHEDULES[1], torch.arange(1000)
    x0, eps = pair(1000, 2)
    x_t = q_sample(x0, t, eps, s)
    assert ((predict_x0(x_t, t, eps, s) - x0).abs().amax(1) * s.rates(t)[0]).max() < 1e-14
    assert (predict_eps(x_t, t, x0, s) - eps).abs().max() < 1e-10


def test_clean_end():
    x0, eps = pair(2, 3, 4, 4)
    assert torch.equal(q_sample(x0, -1, eps, LINEAR), x0) and torch.equal(predict_x0(x0, -1, eps, LINEAR), x0)
    mixed = q_sample(x0, torch.tensor([-1, 999]), eps, LINEAR)
    assert torch.equal(mixed[0], x0[0]) and (mixed[1] - eps[1]).abs().max() < 0.05


@pytest.mark.parametrize('t', [0, 250, 999])
def test_moments_of_the_jump(t):
    n = 200_000
    x = q_sample(torch.full((n,), 0.8, dtype=torch.float64), t, torch.randn(n, generator=new_generator(t), dtype=torch.float64), LINEAR)
    signal, noise = LINEAR.rates(t)
    assert abs(x.mean() - 0.8 * signal) < 4 * noise / n**0.5
    assert abs(x.var() / noise**2 - 1) < 4 * (2 / n)**0.5


def test_chain_has_the_same_moments():
    "Carry mean and variance through the chain exactly."
    mean, var = 1., 0.
    for t, beta in enumerate(LINEAR.beta):
        mean, var = (1 - beta).sqrt() * mean, (1 - beta) * var + beta
        if t in (0, 1, 500, 999):
            signal, noise = LINEAR.rates(t)
            assert abs(mean - signal) < 1e-13 and abs(var - noise**2) < 1e-13


def test_error_of_x0_grows_with_the_inverse_root_of_the_snr():
    t = torch.tensor([0, 500, 999])
    x_t, eps = pair(3, 4)
    moved = (predict_x0(x_t, t, eps + 0.1, LINEAR) - predict_x0(x_t, t, eps, LINEAR)).abs()
    torch.testing.assert_close(moved, (0.1 / LINEAR.snr(t).sqrt())[:, None].expand(3, 4), rtol=1e-9, atol=0)


def test_agrees_with_diffusers():
    theirs = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule='linear')
    x0, eps = pair(5, 3, 8, 8, dtype=torch.float32)
    t = torch.tensor([0, 1, 300, 998, 999])
    torch.testing.assert_close(q_sample(x0, t, eps, LINEAR), theirs.add_noise(x0, eps, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_dtype_stays(dtype):
    x0, eps = pair(2, 3, 4, 4, dtype=torch.float32).to(dtype)
    for t in (0, 999, torch.tensor([0, 999])):
        x_t = q_sample(x0, t, eps, LINEAR)
        assert {x_t.dtype, predict_x0(x_t, t, eps, LINEAR).dtype, predict_eps(x_t, t, x0, LINEAR).dtype} == {dtype}
        assert predict_eps(x_t, t, x0, LINEAR).isfinite().all()


def test_gradients_flow():
    x0, eps = pair(2, 3, 4, 4)
    eps.requires_grad_()
    g, = torch.autograd.grad(predict_x0(x0, 500, eps, LINEAR).sum(), eps)
    torch.testing.assert_close(g, torch.full_like(g, -1 / LINEAR.snr(500).sqrt().item()))


def test_errors():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(UserError, match=r't = -1 is outside \[0, 999\]'): predict_eps(x, -1, x, LINEAR)
    with pytest.raises(UserError, match=r't = 1000 is outside \[-1, 999\]'): q_sample(x, 1000, x, LINEAR)
    with pytest.raises(UserError, match='t has 3 entries but the batch'): predict_x0(x, [1, 2, 3], x, LINEAR)


def test_noise_is_reproducible():
    x = torch.zeros(2, 3, dtype=torch.float32)
    a, b, c = (noise_like(x, new_generator(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == x.dtype and a.shape == x.shape
    torch.manual_seed(3); a = noise_like(x)
    torch.manual_seed(3); assert torch.equal(a, noise_like(x))


@pytest.mark.parametrize('size', [16, 64, 100])
def test_face(size):
    face = draw_face(size)
    assert face.shape == (3, size, size) and face.dtype == torch.float32 and face.min() >= -1 and face.max() <= 1 and face.std() > 0.2
    assert torch.equal(face, draw_face(size))


def test_explore_is_static_without_a_live_kernel(monkeypatch):
    calls, shown = [], []
    monkeypatch.setattr('IPython.display.display', shown.append)
    def draw(t, eta):
        calls.append((t, eta))
        return plt.figure()
    assert not has_live_kernel()
    explore(draw, t=(0, 999, 200), eta=(0., 1., 0.5))
    assert calls == [(200, 0.5)] and len(shown) == 1 and not plt.fignum_exists(shown[0].number)


def test_explore_shows_sliders_in_a_live_kernel(monkeypatch):
    widgets = pytest.importorskip('ipywidgets')
    made = {}
    monkeypatch.setattr(forward, 'has_live_kernel', lambda: True)
    monkeypatch.setattr(widgets, 'interact', lambda f, **sliders: made.update(sliders))
    explore(lambda **kw: None, t=(0, 999, 200), eta=(0., 1., 0.5))
    assert isinstance(made['t'], widgets.IntSlider) and (made['t'].min, made['t'].max, made['t'].value) == (0, 999, 200)
    assert isinstance(made['eta'], widgets.FloatSlider) and made['eta'].step == 0.05


def test_live_kernel_is_told_from_a_batch_run(monkeypatch):
    class Shell:
        class kernel: _allow_stdin = True
    pytest.importorskip('ipywidgets')
    monkeypatch.setattr('IPython.get_ipython', lambda: Shell)
    monkeypatch.delenv('DIFFCLIP_STATIC', raising=False)
    assert has_live_kernel()
    monkeypatch.setattr(Shell.kernel, '_allow_stdin', False)  # papermill, nbconvert
    assert not has_live_kernel()
    monkeypatch.setattr(Shell.kernel, '_allow_stdin', True)
    monkeypatch.setenv('DIFFCLIP_STATIC', '1')
    assert not has_live_kernel()
