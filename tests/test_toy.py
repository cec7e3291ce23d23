"The toy in the plane: its noise predictor is exact, its classes are what they say, and its pictures show what they are given."
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from diffclip_da.core import COLOURS, UserError, new_generator
from diffclip_da.diffusion.ddim import invert, sample, step_pairs
from diffclip_da.diffusion.guidance import guided
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.diffusion.toy import LIMIT, PlaneToy, branches, draw_plane, spiral

matplotlib.use('Agg')
SCHEDULE = linear_schedule()
TOY = PlaneToy(SCHEDULE)


def some(n, seed=0): return torch.randn(n, 2, generator=new_generator(seed), dtype=torch.float64)


@pytest.mark.parametrize('points', [branches()[0], spiral()], ids=['branches', 'spiral'])
def test_shapes_are_centred_and_as_wide_as_images(points):
    assert points.dtype == torch.float64 and points.shape[1] == 2
    assert points.mean(0).abs().max() < 1e-12 and abs(points.std() - .5) < 1e-9 and points.abs().max() < LIMIT


@pytest.mark.parametrize('label', [None, 0, 1])
@pytest.mark.parametrize('t', [10, 400, 999])
def test_the_noise_is_the_slope_of_the_density(t, label):
    x = some(20).requires_grad_()
    slope, = torch.autograd.grad(TOY.log_prob(x, t, label).sum(), x)
    assert torch.allclose(TOY(x, t, label), -SCHEDULE.rates(t)[1] * slope, atol=1e-8)


def test_the_density_is_the_mean_of_the_classes():
    x = some(20)
    both = torch.stack([TOY.log_prob(x, 200, y) for y in (0, 1)]).logsumexp(0) - torch.tensor(2.).log()
    assert torch.allclose(TOY.log_prob(x, 200), both, atol=1e-9)   # the two trees have equally many points


def test_samples_of_a_class_lie_on_its_tree():
    points, label = branches()
    for y in (0, 1):
        near = torch.cdist(TOY.sample(200, new_generator(y), y), points[label == y]).min(1).values
        assert near.max() < .12 and near.mean() < .04


def test_labels_reach_it_through_the_sampler_and_guidance():
    points, label = branches()
    drawn = sample(guided(TOY, 1, 2.), some(40), step_pairs(999, 40), SCHEDULE)
    assert (label[torch.cdist(drawn, points).argmin(1)] == 1).double().mean() > .95


def test_there_and_back():
    x = TOY.sample(50, new_generator(3))
    way = step_pairs(500, 100)
    back = sample(TOY, invert(TOY, x, way, SCHEDULE, 'anderson', 3), way, SCHEDULE)
    assert (back - x).norm(dim=1).median() < 1e-3


def test_a_curve_without_classes_and_labels_that_do_not_fit():
    assert PlaneToy(SCHEDULE, spiral()).n_classes == 0 and TOY.n_classes == 2
    with pytest.raises(UserError, match='one label for each'): PlaneToy(SCHEDULE, spiral(), torch.zeros(3, dtype=torch.int64))


def test_a_picture_shows_points_paths_and_density():
    fig, ax = plt.subplots()
    draw_plane(ax, lambda v: TOY.log_prob(v, -1), [(some(7), 'source'), (some(5), 'target')], some(12).reshape(3, 4, 2), 'a title')
    assert [len(c.get_offsets()) for c in ax.collections] == [7, 5] and len(ax.lines) == 4 and len(ax.images) == 1
    assert matplotlib.colors.to_hex(ax.collections[1].get_facecolor()[0]) == COLOURS['target'].lower()
    assert ax.get_title() == 'a title' and ax.get_xlim() == (-LIMIT, LIMIT)
    plt.close(fig)
