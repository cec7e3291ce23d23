"Records are refused when something is missing, and every plot draws what its table says."
import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from diffclip_da.core import COLOURS, UserError
from diffclip_da.study import figures
from diffclip_da.study.figures import (band, colours_of, make_record, plot_guides, plot_histories, plot_losses,
                                       plot_gallery, plot_methods, plot_pairs, plot_scripts, plot_sweeps, plot_targets,
                                       results_table, save_figure, span, validate_record, whisker)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def faces(n, seed=0): return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def history(seeds=(0, 1, 2)):
    level = dict(train=.99, test_original=.9, test_target=.6)
    return pd.DataFrame([dict(seed=s, epoch=e, split=k, loss=1 / e, accuracy=v - .3 / e + .01 * s)
                         for s in seeds for e in (1, 2, 3) for k, v in level.items()])


def entry(**kw): return dict(mean=.5, ci95=[.4, .6], n_seeds=3, **kw)


def record(**changes):
    made = dict(figure='figure9', profile='toy', config={}, seeds=[0], data={}, numbers={}, summary=dict(a=entry()),
                weights=dict(unet=dict(name='u', sha256='0', provenance='random')), tolerance=dict(a=.01))
    return make_record(**(made | changes))


def test_records_are_whole():
    r = record()
    assert {'commit', 'versions'} <= set(r)
    with pytest.raises(UserError, match='seeds is missing; commit is missing'):
        validate_record({k: v for k, v in r.items() if k not in ('seeds', 'commit')})
    for bad, message in ((dict(summary=dict(a=dict(mean=1))), 'summary.a lacks ci95; summary.a lacks n_seeds'),
                         (dict(summary=dict(a=dict(entry(), ci95=[.6, .4]))), r'ci95 is \[0.6, 0.4\]'),
                         (dict(tolerance=dict(b=1)), 'tolerance.b has no metric'),
                         (dict(weights=dict(unet=dict(name='', sha256='', provenance='found'))), "provenance is 'found'")):
        with pytest.raises(UserError, match=message): record(**bad)
    for where in ('shipped', 'local', 'published', 'random'):
        record(weights=dict(unet=dict(name='', sha256='', provenance=where)))


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    r = record()
    made = [save_figure(plot_histories(history(), .6, 'sketch', 'c', 't'), r, None, tmp_path/n) for n in 'ab']
    for ext in ('png', 'pdf', 'json', 'csv'): assert made[0][ext].read_bytes() == made[1][ext].read_bytes()
    assert made[0]['csv'].read_text() == 'metric,mean,n_seeds\na,0.5,3\n'


def test_bands_are_students():
    assert band([.5]) is None and whisker([.5]) == (.5, .5)
    assert whisker([.6, 1.]) == pytest.approx((0, 1)) and min(band([.6, 1.])) < 0 and max(band([.6, 1.])) > 1
    assert band([.85, .87, .89]) == pytest.approx([.87 - 4.3027 * .02 / 3**.5, .87 + 4.3027 * .02 / 3**.5], abs=1e-5)
    assert span(entry()) == '0.400 to 0.600' and span(dict(ci95=None)) == ''


def test_lines_are_the_means_over_seeds():
    fig = plot_histories(history(), .6, 'sketch', 'small print', 'title')
    accuracy = fig.axes[1]
    drawn = [l.get_ydata() for l in accuracy.lines if len(l.get_xdata()) == 3]
    assert any(np.allclose(y, [.6 - .3 / e + .01 for e in (1, 2, 3)]) for y in drawn)
    assert [l.get_text() for l in accuracy.get_legend().get_texts()] == ['train', 'test (original)', 'test (sketch)', 'majority class (60.0%)']
    assert len(accuracy.collections) == 3 and len(plot_histories(history((0,)), .6, 's', '', '').axes[1].collections) == 0


def test_domains_keep_their_colours():
    assert colours_of(['original', 'adapted', 'fs2k']) == {'original': COLOURS['source'], 'adapted': COLOURS['adapted'], 'fs2k': COLOURS['target']}
    more = colours_of(['"charcoal"', 'original', 'pencil filter', 'pencil'])
    assert len(set(more.values())) == 4 and more['pencil'] == COLOURS['target']


def test_pictures_stand_in_rows_of_their_class():
    x = faces(5)
    fig = plot_pairs(x, -x, ['a', 'b'], ['a', 'b', 'a', 'b', 'a'], '', '')
    shown = [ax.images[0].get_array() for ax in fig.axes if ax.images]
    want = [((v + 1) / 2).permute(1, 2, 0).numpy() for k in ([0, 2, 4], [1, 3]) for s in (1, -1) for v in s * x[k]]
    assert len(shown) == 10 and all(np.allclose(a, b, atol=1e-6) for a, b in zip(shown, want))


def test_methods_are_sorted_and_coloured_by_what_they_see():
    rows = pd.DataFrame([dict(method=m, sees=s, test=t, mean=v, low=v - .01, high=v + .01) for t in ('original', 'fs2k')
                         for m, s, v in (('oracle', 'target labels', .9), ('source_only', 'source only', .3), ('adapted', 'words', .6))])
    fig = plot_methods(rows, ['original', 'fs2k'], chance=1 / 3)
    ax = fig.axes[1]
    assert [l.get_text() for l in fig.axes[0].get_yticklabels()] == ['source only', 'adapted', 'oracle']
    dots = [(l.get_xdata()[0], l.get_color()) for l in ax.lines if l.get_marker() == 'o' and len(l.get_xdata()) == 1]
    assert dots == [(.3, COLOURS['source']), (.6, COLOURS['adapted']), (.9, COLOURS['other'])]
    assert any(np.allclose(l.get_xdata(), 1 / 3) for l in ax.lines)


def test_every_plot_draws():
    n, seeds = 4, (0, 1)
    rows = pd.DataFrame([dict(trained_on=m, seed=s, epoch=e, split=t, accuracy=.5) for m in ('source_only', 'adapted') for s in seeds
                         for e in (1, 2) for t in ('original', 'fs2k')])
    sweep = pd.DataFrame([dict(panel=p, x=x, method=m, test='adapted', seed=s, balanced_accuracy=.5 + .1 * s)
                          for p, x, m in (('a', 1, 'source_only'), ('a', 1, 'adapted'), ('b', 3, 'adapted')) for s in seeds])
    prompts = pd.DataFrame([dict(prompt=p, seed=s, balanced_accuracy=.5) for p in 'ab' for s in seeds])
    drift = pd.DataFrame(dict(attribute=['Male'], flips_filter=[.1], flips_adapted=[.2]))
    images = pd.DataFrame(dict(label=['cat', 'dog', 'cow'], flipped=[True, False, False], flipped_filter=[False] * 3))
    groups = pd.DataFrame([dict(method=m, test='adapted', group='Young', n=9, error=.1) for m in ('source_only', 'adapted')])
    guides = pd.DataFrame([dict(guide=g, method='adapted', seed=s, balanced_accuracy=.5) for g in ('no guide', 'one', 'two') for s in seeds])
    made = dict(targets=plot_targets(rows, dict(original=faces(1)[0], fs2k=faces(1)[0])), sweeps=plot_sweeps(sweep),
                prompts=plot_gallery(faces(2), dict(a=(faces(2), 'look 50%'), b=(faces(2), '')), prompts, .5, 'fs2k'), losses=plot_losses(drift, images, groups, faces(n), faces(n)),
                scripts=plot_scripts(faces(n), dict(one=faces(n)), dict(one='numbers'), n=3), guides=plot_guides(guides, dict(photo=faces(n), one=faces(n)), 'fs2k'))
    for name, fig in made.items():
        fig.savefig(buffer := io.BytesIO(), format='png')
        assert len(buffer.getvalue()) > 2000, name
    solid = {l.get_linestyle() for l in made['sweeps'].axes[0].lines}
    assert {'--', '-'} <= solid   # photos dashed
    assert to_hex(made['losses'].axes[0].patches[0].get_facecolor()).upper() != to_hex(made['losses'].axes[0].patches[-1].get_facecolor()).upper()


def test_nothing_is_computed_here():
    "A figure function draws: no model, no experiment, no training is in reach."
    names = set(vars(figures))
    assert not names & {'torch', 'Experiment', 'Evaluation', 'train_classifier', 'METHODS', 'load_unet'}


def test_a_majority_of_three_classes_scores_a_third():
    r = record(numbers=dict(majority=.4), data=dict(classes=['a', 'b', 'c']), figure='figure3',
               summary={'test_target_accuracy': entry(), 'test_target_balanced_accuracy': entry()}, tolerance={})
    assert results_table(r).loc['majority class', 'balanced accuracy'] == .333


def test_a_long_title_of_a_row_does_not_part_its_pictures():
    fig = plt.figure(figsize=(6, 2), layout='constrained')
    figures.titled_rows(fig, {'a title much longer than the first picture is wide': torch.zeros(5, 3, 8, 8)})
    fig.canvas.draw()
    left = np.array([ax.get_position().x0 for ax in fig.axes])
    assert np.ptp(np.diff(left)) < .01
