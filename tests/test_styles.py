"The styles: shapes, ranges, determinism, and what each filter must do by definition."
import numpy as np, pytest
from PIL import Image

from diffclip_da.core import UserError
from diffclip_da.styles import STYLES, blur, dodge, grey, kuwahara, luma, pencil, render, stretch, strokes, to_array, to_image, xdog


@pytest.fixture(scope='module')
def photo():
    "A made-up portrait: a bright oval with dark features on a coloured ground, 96 px."
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    a = np.stack([.3 + .2 * x, .4 + .1 * y, .5 + 0 * x], -1)
    a[(x / .6)**2 + (y / .8)**2 < 1] = (.85, .7, .6)
    for cx in (-.25, .25): a[(x - cx)**2 + (y + .2)**2 < .01] = .1
    a[(abs(x) < .25) & (abs(y - .4) < .04)] = (.6, .1, .1)
    return a


@pytest.mark.parametrize('style', STYLES)
def test_each_style_keeps_shape_and_range_and_repeats(style, photo):
    for seed in range(3):
        out = STYLES[style](photo, np.random.default_rng(seed))
        assert out.shape == photo.shape and np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
        assert (out == STYLES[style](photo, np.random.default_rng(seed))).all()
    if style != 'photo': assert abs(out - photo).mean() > .02  # it does something


def test_a_style_leaves_its_input_alone(photo):
    before = photo.copy()
    for f in STYLES.values(): f(photo, np.random.default_rng(0))
    assert (photo == before).all()


def test_parameters_vary_with_the_generator(photo):
    for s in STYLES:
        if s != 'photo': assert (np.asarray(render(photo, s, np.random.default_rng(0))) != np.asarray(render(photo, s, np.random.default_rng(1)))).any(), s


def test_drawn_styles_are_grey_and_painted_ones_are_not(photo):
    spread = {s: np.ptp(STYLES[s](photo, np.random.default_rng(0)), axis=-1).mean() for s in STYLES}
    assert all(spread[s] < 1e-6 for s in ('charcoal', 'line_art', 'grayscale', 'halftone'))
    assert all(spread[s] > .05 for s in ('photo', 'oil', 'cartoon', 'pixel_art', 'negative', 'sepia'))


def test_dodge_is_white_on_flat_and_dark_beside_an_edge():
    assert np.allclose(dodge(np.full((20, 20), .4), 3), 1)
    step = np.where(np.arange(40) < 20, .2, .8)[None].repeat(40, 0)
    d = dodge(step, 3)
    assert d[20, 19] < .7 and d[20, 20] == 1 and d[20, 2] > .98  # ink on the dark side only
    assert dodge(step, 3, 2.)[20, 19] == pytest.approx(d[20, 19]**2)


def test_kuwahara_keeps_an_edge_and_flattens_noise():
    step = np.zeros((24, 24, 3)); step[:, 12:] = 1
    for r in (3, 4, 5, 6): assert np.allclose(kuwahara(step, r), step), r
    noise = np.random.default_rng(0).uniform(0, 1, (64, 64, 3))
    assert kuwahara(noise, 5).std() < .5 * noise.std()


def test_xdog_is_paper_where_nothing_happens():
    assert np.allclose(xdog(np.full((16, 16), .9), 1.), 1)
    assert xdog(np.full((16, 16), .05), 1., eps=.5).max() < .05  # and ink in the dark


def test_strokes_run_along_their_angle():
    n = strokes((96, 96), np.random.default_rng(0), 0., 6)
    assert n.mean() == pytest.approx(0, abs=1e-9) and n.std() == pytest.approx(1)
    assert (n[:, :-4] * n[:, 4:]).mean() > .7 > .2 > abs((n[:-4] * n[4:]).mean())


def test_stretch_uses_the_whole_range():
    g = stretch(np.linspace(.4, .5, 400).reshape(20, 20))
    assert g.min() == 0 and g.max() > .99


def test_arrays_images_and_sizes(photo):
    im = to_image(photo)
    assert abs(to_array(im) - photo).max() <= .5 / 255 + 1e-9
    assert (to_array(np.asarray(im)) == to_array(im)).all()
    assert (to_array(im.convert('L').convert('RGB')) == to_array(im.convert('L'))).all()
    assert render(im, 'pencil', np.random.default_rng(0), 64).size == (64, 64) and render(im, 'pencil', np.random.default_rng(0)).size == (96, 96)
    assert grey(luma(photo)).shape == photo.shape and blur(photo, 2).shape == photo.shape


def test_errors_name_the_value_and_the_choices(photo):
    with pytest.raises(UserError, match="'fresco'.*pencil"): render(photo, 'fresco', np.random.default_rng(0))
    with pytest.raises(UserError, match=r'\[3, 8, 8\]'): to_array(np.zeros((3, 8, 8)))
    with pytest.raises(UserError, match="'crayon'.*hatching"): pencil(photo, np.random.default_rng(0), 'crayon')


def test_tinted_is_far_from_grey_whatever_it_is_made_of(photo):
    def chroma(style, seed): return np.percentile(np.ptp(np.asarray(render(photo, style, np.random.default_rng(seed)), int), axis=-1), 99)
    assert min(chroma('tinted', s) for s in range(20)) > max(chroma('pencil', s) for s in range(20))
