"Intervals, paired comparisons and summaries: each against SciPy, scikit-learn, or the definition."
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from diffclip_da.study.stats import (correlation, gap_closed, hit_rates, image_interval, over_images, over_seeds, paired,
                                     paired_bootstrap, recall_bootstrap, recalls, summarise, t_interval, tolerances)


def test_intervals_are_scipys():
    v = [.81, .84, .9, .86]
    assert t_interval(v)['ci95'] == pytest.approx(stats.t.interval(.95, 3, np.mean(v), stats.sem(v)))
    assert t_interval(v)['ci95'] == pytest.approx(list(stats.ttest_1samp(v, 0).confidence_interval()))
    assert t_interval(v, .8)['ci95'] == pytest.approx(stats.t.interval(.8, 3, np.mean(v), stats.sem(v)))
    assert t_interval([.5]) == dict(mean=.5, ci95=None, n_seeds=1)
    assert t_interval([.5, .5, .5]) == dict(mean=.5, ci95=[.5, .5], n_seeds=3)
    assert t_interval([.4, np.nan, .6])['n_seeds'] == 2 and np.isnan(t_interval([])['mean'])
    low, high = image_interval(.87, 300)
    assert low < .87 < high and high - low == pytest.approx(.076, abs=.005)
    assert over_images(v)['n_images'] == 4 and over_images(v)['n_seeds'] == 1 and over_seeds(v)['values'] == v


def test_paired_is_scipys_test():
    ours, theirs = ({'a': dict(values=v)} for v in ([.8, .9, .85], [.7, .75, .8]))
    d, want = paired('a', ours, theirs), stats.ttest_rel([.8, .9, .85], [.7, .75, .8])
    assert d['p_value'] == pytest.approx(want.pvalue) and d['ci95'] == pytest.approx(list(want.confidence_interval()))
    assert paired('a', ours, ours)['p_value'] is None


@pytest.mark.parametrize('k', (2, 3, 5))
def test_recalls_are_balanced_accuracy(k):
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, k, (2, 50))
    assert recalls(y == p, y) == pytest.approx(balanced_accuracy_score(y, p))
    many = recalls(np.stack([y == p, y == y]), np.stack([y, y]))
    assert many.shape == (2,) and many[1] == 1


def test_recalls_of_a_resample_that_lacks_a_class():
    y = np.array([[0, 0, 1, 2], [0, 0, 1, 1]])
    assert recalls(np.array([[1, 0, 1, 1], [1, 0, 1, 1]]), y) == pytest.approx([(.5 + 1 + 1) / 3, .75])


def two(labels): return np.eye(2)[labels]


def test_bootstrap_covers_what_it_should():
    rng, held = np.random.default_rng(1), 0
    for _ in range(60):   # the true difference is .8 - .7 = .1
        y = rng.integers(0, 2, 200)
        a, b = (two(np.where(rng.random((2, 200)) < s, y, 1 - y)) for s in (.8, .7))
        lo, hi = paired_bootstrap(y, a, b, n_resamples=400)['ci95']
        held += lo <= .1 <= hi
    assert held >= 52


def test_bootstrap_of_three_classes():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 3, 300)
    a, b = (np.eye(3)[np.where(rng.random((2, 300)) < s, y, (y + 1) % 3)] for s in (.9, .6))
    d = paired_bootstrap(y, a, b, n_resamples=300)
    mean = lambda p: np.mean([balanced_accuracy_score(y, q.argmax(1)) for q in p])
    assert d['mean'] == pytest.approx(mean(a) - mean(b)) and d['ci95'][0] < d['mean'] < d['ci95'][1]
    assert paired_bootstrap(y, a, a) | dict(interval='') == dict(mean=0, ci95=[0, 0], n_seeds=2, interval='')
    assert hit_rates(y, a).shape == (300,) and set(hit_rates(y, a)) <= {0, .5, 1}


def test_summary_has_both_epochs_and_all_measures():
    rows = [dict(seed=s, epoch=e, split=k, accuracy=a + .01 * s, balanced_accuracy=a, auroc=a)
            for s in (0, 1) for k, accs in dict(valid=[.5, .9, .7], test=[.6, .7, .8]).items() for e, a in enumerate(accs, 1)]
    got = summarise(pd.DataFrame(rows), dict(test=100))
    assert got['test_accuracy']['mean'] == pytest.approx(.805) and got['test_accuracy_selected']['mean'] == pytest.approx(.705)
    assert got['test_auroc']['values'] == [.8, .8] and got['test_accuracy']['ci95_images'] == image_interval(.805, 100)
    assert got['test_accuracy']['interval'] == 'Student, 95 %, over the seeds of the classifier'
    assert len(got) == 2 * 3 * 2


def test_tolerances_lie_within_their_bounds():
    ci = dict(narrow=[.5, .51], wide=[.2, .9], fair=[.5, .6], none=None)
    assert tolerances({k: dict(ci95=v) for k, v in ci.items()}) == dict(narrow=.03, wide=.1, fair=.05, none=.1)


def test_gap_and_correlation():
    assert gap_closed(.6, .7, .8) == pytest.approx(.5) and np.isnan(gap_closed(.6, .7, .6))
    x, y = [1, 2, 3, 4, 5], [1, 3, 2, 5, 4]
    r = correlation(x, y, 3, 'prompts')
    half = 1.959964 / np.sqrt(len(x) - 3)   # Fisher's z
    assert r['mean'] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert r['ci95'] == pytest.approx(np.tanh([np.arctanh(r['mean']) - half, np.arctanh(r['mean']) + half]), abs=1e-5)
    assert r['interval'].endswith('over the prompts') and correlation(x, [1] * 5, 3, '') is None


def test_the_interval_of_a_share_ends_at_one():
    plain, share = over_seeds([.98, .99, 1.]), over_seeds([.98, .99, 1.], share=True)
    assert plain['ci95'][1] > 1 == share['ci95'][1] and share['ci95'][0] == plain['ci95'][0] and share['mean'] == plain['mean']
    assert over_seeds([.0, .01, .02], share=True)['ci95'][0] == 0 and over_seeds([.5], share=True)['ci95'] is None
    rows = [dict(seed=s, epoch=1, split=split, accuracy=a, balanced_accuracy=a, auroc=a) for s, a in enumerate((.98, .99, 1.)) for split in ('train', 'valid')]
    assert summarise(pd.DataFrame(rows), {})['train_auroc']['ci95'][1] == 1


def test_shares_over_images_end_at_nothing_and_all():
    few = [0.] * 19 + [1.]
    assert over_images(few)['ci95'][0] < 0 == over_images(few, share=True)['ci95'][0]
    y, p = np.array([0, 0, 0, 1]), np.eye(2)[[[0, 0, 1, 1], [0, 0, 0, 1]]]
    s = recall_bootstrap(y, p)
    assert s['mean'] == pytest.approx((2.5 / 3 + 1) / 2) and s['ci95'][0] <= s['mean'] <= s['ci95'][1] <= 1 and s['n_seeds'] == 2
