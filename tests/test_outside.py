"Figures 23 to 29 in small on the shipped assets, as papermill runs them."
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from diffclip_da.study import experiment, outside
from diffclip_da.study.baselines import METHODS
from diffclip_da.core import UserError, from_uint8, to_pil
from diffclip_da.store import read_json
from diffclip_da.study.evaluate import Evaluation, open_evaluation, variant
from diffclip_da.study.experiment import Experiment
from diffclip_da.adaptation.losses import text_direction
from diffclip_da.study.outside import Judge, attribute_table, figure24, figure28, figure29, judge_labels, lean, with_labelled
from diffclip_da.study.gallery import LookJudge, drawn_in_looks, figure26, gallery_answers, look_of
from diffclip_da.study.page import CHAPTERS, main, percent
from diffclip_da.study.profile import get_profile, given
from diffclip_da.study.unlabelled import figure35

ROOT = Path(__file__).parents[1]
SMALL = dict(profile='embedded', dtype='float32', seeds='0,1', n_train=40, n_valid=10, n_test=24, n_images=4, passes=1, epochs=1)
OWN = {23: {}, 24: dict(longer=True), 25: dict(sizes='20,40', tuned_on='2', steps='3', returns='300'), 26: dict(prompts='sketch; cartoon', n_look=2), 27: {}, 28: dict(steps='3,6'),
       29: dict(other=str(ROOT/'diffclip_da/assets/clip')), 35: dict(sizes='20,40', draws=2)}
PARAMETERS = {n: {'dtype', *own} for n, own in {23: ['prompt'], 24: ['longer'], 25: ['sizes', 'tuned_on', 'steps', 'returns'], 26: ['prompts', 'judge', 'n_look'], 27: ['judge'], 28: ['steps'], 29: ['other'], 35: ['other', 'sizes', 'draws']}.items()}


def code_of(n): return [c for c in read_json(ROOT/'nbs'/f'{n}_figure{n}.ipynb')['cells'] if c['cell_type'] == 'code']


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('small')


@pytest.mark.parametrize('n', OWN)
def test_the_small_version_runs(n, folder, monkeypatch):
    "The parameters' cell, the injected values, the rest, in a folder that is no clone; caches are shared between the figures."
    monkeypatch.chdir(folder)
    monkeypatch.setattr(experiment, 'default_device', lambda: torch.device('cpu'))
    space = {}
    for c in code_of(n):
        exec(''.join(c['source']), space)
        if 'parameters' in c['metadata'].get('tags', []): space.update(SMALL, **OWN[n])
    r = read_json(folder/f'figures/embedded/figure{n}.json')
    assert r['summary'] and r['data']['target']['name'] == 'pencil' and r['config']['n_train'] == 40
    assert all(np.isfinite(s['mean']) for s in r['summary'].values() if s['mean'] is not None)
    for ext in ('png', 'csv'): assert (folder/f'figures/embedded/figure{n}.{ext}').stat().st_size > 100


def test_the_page_of_the_small_version(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(['embedded', '--out', 'PAGE.md']) == 0
    page = (folder/'PAGE.md').read_text(encoding='utf-8')
    assert 'Not run yet' not in page and all(f'## {c.title}' in page for c in CHAPTERS.values())
    for m in METHODS: assert m.replace('_', ' ') in page
    s = read_json(folder/'figures/embedded/figure24.json')['summary']
    assert percent(s['oracle/pencil/balanced_accuracy']) in page and percent(s['adapted_minus_source_only/pencil/balanced_accuracy']) in page


@pytest.mark.parametrize('n', OWN)
def test_notebooks_hold_parameters_and_calls(n):
    code = [c for c in code_of(n)
            if 'def your_' not in ''.join(c['source'])]   # all but the reader's exercise
    tagged = [c for c in code if 'parameters' in c['metadata'].get('tags', [])]
    space = {}
    exec(''.join(tagged[0]['source']), space)
    assert space['profile'] == 'celeba64' and set(given(space, *PARAMETERS[n]).values()) == {None} and PARAMETERS[n] <= set(space)
    get_profile('celeba64', **given(space, *PARAMETERS[n]))
    text = '\n'.join(''.join(c['source']) for c in code)
    assert 'def ' not in text and '#| export' not in text
    assert all(''.join(c['source']).startswith('#| slow') for c in code if c is not tagged[0])


def test_variants_share_data_and_models_unless_they_differ(tmp_path):
    ev = Evaluation(Experiment(get_profile('toy', seeds='0'), tmp_path, device='cpu'))
    v = variant(ev, t0=100)
    assert v.exp.splits is ev.exp.splits and v.exp.models is ev.exp.models and v.exp.profile.walk.t0 == 100 and ev.exp.profile.walk.t0 == 200
    assert len(lean(ev, n_train=12).exp.splits['train']) == 12 and lean(ev).exp.profile.recipe.n_images == 4


def test_a_lean_fine_tuning_shows_as_many_pictures_however_few_they_are(tmp_path):
    ev = Evaluation(Experiment(get_profile('toy', seeds='0', n_images=20, passes=40), tmp_path, device='cpu'))
    for n, passes in ((5, 80), (20, 20), (3, 134), (50, 20)):
        p = lean(ev, n_images=n).exp.profile.recipe
        assert (p.n_images, p.passes) == (min(n, 20), passes)


def test_fewer_labelled_photos_keep_the_share_of_the_classes(tmp_path):
    ev = Evaluation(Experiment(get_profile('toy', seeds='0'), tmp_path, device='cpu'))
    t, whole = with_labelled(ev, 8).task(()), ev.task(())
    assert len(t.source[1]) == 8 and t.source[1].float().mean() == .5 and len(whole.source[1]) == 24
    assert with_labelled(ev, 24) is ev


def test_the_correlation_over_prompts(tmp_path, monkeypatch):
    value = {'sketch': .7, 'cartoon': .6, 'oil painting': .55, 'line art': .65}
    monkeypatch.setattr(outside, 'seeds_of', lambda e, *a: [value[e.exp.profile.target]] * 2)
    ev = Evaluation(Experiment(get_profile('toy', seeds='0,1'), tmp_path/'runs', tmp_path/'figures', device='cpu'))
    s = figure26(ev, '; '.join(value), n_look=4)[1]['summary']
    r = np.corrcoef([s[f'{q}/similarity']['mean'] for q in value], list(value.values()))[0, 1]
    half = 1.959964 / np.sqrt(len(value) - 3)   # Fisher's z
    assert s['correlation']['mean'] == pytest.approx(r)
    assert s['correlation']['ci95'] == pytest.approx(np.tanh([np.arctanh(r) - half, np.arctanh(r) + half]), abs=1e-5)
    assert s['correlation']['interval'].endswith('over the prompts')
    value.update(dict.fromkeys(value, .6))
    assert 'correlation' not in figure26(ev, '; '.join(value), n_look=4)[1]['summary']   # of equal numbers there is none


def test_a_prompt_names_a_look_with_and_without_its_article():
    assert [look_of(q) for q in ('sketch', 'a Sketch', 'the watercolour', 'oil on canvas', 'a pixar character')] == [
        'pencil', 'pencil', 'watercolour', 'oil', None]


def test_the_judge_of_looks_is_judged_on_people_it_never_saw(tmp_path):
    exp = Experiment(get_profile('embedded', n_train=40, n_valid=10, n_test=24), tmp_path, device='cpu')
    judge = LookJudge(exp, n=12, epochs=2)
    drawn, look = drawn_in_looks(exp.splits['test'].subset(exp.splits['test'].ids[:4]), judge.looks)
    assert len(drawn) == 4 * 28 and look[29] == 1 and set(judge.says(from_uint8(drawn))) <= set(judge.looks)
    assert .1 < judge.accuracy <= 1   # by chance 1 / 28
    again = LookJudge(exp, n=12, epochs=2)   # from what was kept
    assert again.accuracy == judge.accuracy and all(torch.equal(a, b) for a, b in zip(again.net.state_dict().values(), judge.net.state_dict().values()))


def test_the_gallery_counts_what_the_judge_says(tmp_path, monkeypatch):
    ev = Evaluation(Experiment(get_profile('toy', seeds='0', target='cartoon'), tmp_path, device='cpu'))
    class Half:
        def says(self, x): return np.array(['cartoon', 'oil'])[np.arange(len(x)) % 2]
    said = gallery_answers(ev, 'cartoon', Half(), ev.exp.models[2])
    n = len(ev.exp.splits['test'])
    assert said['look'].mean() == pytest.approx(.5, abs=.5 / n) and len(said['identity']) == n
    assert set(said['gender']) <= {0., 1.} and 'look' not in gallery_answers(ev, 'a fresco', Half(), ev.exp.models[2])


def test_direction_of_figure28_is_a_mean_of_cosines(tmp_path):
    "Feature by feature, for each picture; the reference is numpy's."
    ev = Evaluation(Experiment(get_profile('toy', seeds='0'), tmp_path/'runs', tmp_path/'figures', device='cpu'))
    _, r, _ = figure28(ev, (1, 2))
    base, clip = lean(ev), ev.exp.models[1]
    before, after = (base.exp.tensors('test', d)[0] for d in ('original', 'adapted'))
    d = (clip.encode_image(after) - clip.encode_image(before)).detach().double().numpy()
    t = text_direction(clip, 'photo', 'sketch')[0].double().numpy()
    assert r['summary']['pretrained_2/direction']['mean'] == pytest.approx((d @ t / np.linalg.norm(d, axis=1) / np.linalg.norm(t)).mean(), abs=1e-5)


def test_another_guide_must_be_named(tmp_path):
    with pytest.raises(UserError, match='give the folder of a CLIP trained without sketches'):
        figure29(Evaluation(Experiment(get_profile('toy'), tmp_path, device='cpu')), '')


def test_the_judge_reads_the_classes_whatever_their_number(tmp_path):
    "Features that are the classes: nothing flips where the adapted images keep them, everything where they are turned round."
    ev = Evaluation(Experiment(get_profile('toy', seeds='0'), tmp_path/'runs', device='cpu'))
    judge = Judge(ev, ev.exp.models[2])
    y = {s: ev.exp.tensors(s, 'original')[1].numpy() for s in ('train', 'test')}
    judge.photo = judge.line = {s: np.eye(2)[v] for s, v in y.items()}
    judge.after = judge.photo['test']
    assert not judge_labels(ev, judge).flipped.any() and judge_labels(ev, judge).confidence_lost.max() < 1e-9
    judge.after = 1 - judge.photo['test']
    assert judge_labels(ev, judge).flipped.all() and not judge_labels(ev, judge).flipped_filter.any()
    assert attribute_table(ev, ev.exp.splits['test'])['Male'].tolist() == y['test'].tolist()


def own_pictures(root, classes, n=12):
    "A folder for each class, with as many different pictures in it."
    g = torch.Generator().manual_seed(0)
    for k, c in enumerate(classes):
        for j in range(n):
            (root/c).mkdir(parents=True, exist_ok=True)
            x = (.3 * torch.randn(3, 16, 16, generator=g) + .5 * k - .4).clamp(-1, 1)
            to_pil(x).save(root/c/f'{j:02}.png')
    return root


@pytest.mark.parametrize('classes', [('male', 'female'), ('cat', 'dog', 'fox')])
def test_a_target_of_ones_own_gets_the_same_figures_and_page(classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, 'default_device', lambda: torch.device('cpu'))
    target, photos = own_pictures(tmp_path/'fs2k', classes), own_pictures(tmp_path/'photos', classes, 40)
    how = dict(n_train=12, n_valid=4, n_test=6, balanced=True, unet='toy', clip='toy', embedder='toy', size=16, n_images=4, passes=1, epochs=1,
               seeds='0', dataset='folder')
    ev = open_evaluation('toy', str(photos), dtype='float32', own=str(target), **how)
    assert ev.name == 'own fs2k' and set(ev.target) == {'train', 'test'} and ev.target['test'].classes == ev.exp.splits['train'].classes
    figure24(ev, ('source_only', 'adapted', 'oracle'))
    _, r, _ = figure35(ev, sizes=(12,), draws=2)
    assert r['data']['target']['name'] == 'own fs2k' and 'guide/adapted/m=16/own fs2k/balanced_accuracy' in r['summary']
    assert main(['toy', '--own', str(target)]) == 0
    page = (tmp_path/'figures/own fs2k/toy/RESULTS.md').read_text(encoding='utf-8')
    assert page.startswith('# Results: toy, tested on own fs2k\n\n1. **A regression on the guide') and 'figure35.png' in page
    assert len(re.findall(r'Not run yet', page)) == len(CHAPTERS) - 2


def test_a_target_of_other_classes_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='cat, dog, the source has'): open_evaluation('embedded', own=str(own_pictures(tmp_path/'drawn', ('cat', 'dog'))))
    assert not (tmp_path/'runs').exists() and not (tmp_path/'figures').exists()
