"Figures 23 to 29 in small on the shipped assets, as papermill runs them, and the page made from records."
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from diffclip_da.study import experiment
from diffclip_da.study import results
from diffclip_da.study.baselines import METHODS
from diffclip_da.core import UserError
from diffclip_da.store import read_json, write_json
from diffclip_da.study.evaluate import Evaluation, variant
from diffclip_da.study.experiment import Experiment, get_profile, given
from diffclip_da.adaptation.losses import text_direction
from diffclip_da.study.results import CHAPTERS, baseline_section, few, figure26, figure28, figure29, lean, main, percent, settings_that_differ

ROOT = Path(__file__).parents[1]
SMALL = dict(profile='embedded', dtype='float32', seeds='0,1', n_train=40, n_valid=10, n_test=24, n_images=4, passes=1, epochs=1)
OWN = {23: {}, 24: {}, 25: dict(sizes='20,40', tuned_on='2', steps='3', returns='300'), 26: dict(prompts='sketch; cartoon'), 27: {}, 28: dict(steps='3,6'),
       29: dict(other=str(ROOT/'diffclip_da/assets/clip'))}
PARAMETERS = {n: {'dtype', *own} for n, own in {23: ['prompt'], 24: [], 25: ['sizes', 'tuned_on', 'steps', 'returns'], 26: ['prompts'], 27: ['judge'], 28: ['steps'], 29: ['other']}.items()}


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
    for ext in ('png', 'pdf', 'csv'): assert (folder/f'figures/embedded/figure{n}.{ext}').stat().st_size > 100


def test_the_page_of_the_small_version(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(['embedded', '--out', 'PAGE.md']) == 0
    page = (folder/'PAGE.md').read_text(encoding='utf-8')
    assert 'Not run yet' not in page and all(f'## {t}' in page for t in CHAPTERS.values())
    for m in METHODS: assert m.replace('_', ' ') in page
    s = read_json(folder/'figures/embedded/figure24.json')['summary']
    assert percent(s['oracle/pencil/balanced_accuracy']) in page and percent(s['adapted_minus_source_only/pencil/balanced_accuracy']) in page
    Path('figures/embedded/discussion.md').write_text('Said by hand.')
    main(['embedded', '--out', 'PAGE.md'])
    assert Path('PAGE.md').read_text(encoding='utf-8') == page + '\n## Discussion\n\nSaid by hand.\n'
    with pytest.raises(SystemExit): main(['embedded', '--discussion', 'nowhere.md'])
    assert 'nowhere.md: no such file' in capsys.readouterr().err
    with pytest.raises(SystemExit): main(['celeba64'])
    assert 'figures/celeba64: no such folder; make the figures first' in capsys.readouterr().err


@pytest.mark.parametrize('n', OWN)
def test_notebooks_hold_parameters_and_calls(n):
    code = code_of(n)
    tagged = [c for c in code if 'parameters' in c['metadata'].get('tags', [])]
    space = {}
    exec(''.join(tagged[0]['source']), space)
    assert space['profile'] == 'celeba64' and set(given(space, *PARAMETERS[n]).values()) == {None} and PARAMETERS[n] <= set(space)
    get_profile('celeba64', **given(space, *PARAMETERS[n]))
    text = '\n'.join(''.join(c['source']) for c in code)
    assert 'def ' not in text and '#| export' not in text
    assert all(''.join(c['source']).startswith('#| slow') for c in code if c is not tagged[0])


def record(**values): # method -> balanced accuracy on the target
    s = {}
    for m, v in values.items():
        for t in ('original', 'adapted', 'fs2k'):
            for c in ('accuracy', 'balanced_accuracy', 'auroc'): s[f'{m}/{t}/{c}'] = dict(mean=v, ci95=[v - .01, v + .01], n_seeds=5)
        if m != 'source_only': s[f'{m}_minus_source_only/fs2k/balanced_accuracy'] = dict(mean=v - values['source_only'], ci95=[0., .1], n_seeds=5)
    return dict(summary=s, data=dict(target=dict(name='fs2k')))


def test_the_page_says_so_when_a_simple_baseline_wins():
    text = baseline_section(record(source_only=.6, pencil_filter=.75, adapted=.7, dann=.8, clip_zero_shot=.9, oracle=.85))
    assert '**It is not the best row among those that see no target picture: pencil filter is, with 75.0 [74.0, 76.0].**' in text
    assert '| **pencil filter** |' in text and '40% of the gap' in text and 'Better rows of any kind, oracle aside: pencil filter, dann, clip zero shot.' in text
    rows = re.findall(r'^\| \**(\w[\w ]*?)\** \| (?:source only|words|the guide|target)', text, re.M)
    assert rows == ['clip zero shot', 'oracle', 'dann', 'pencil filter', 'adapted', 'source only']


def test_the_page_says_so_when_ours_is_best():
    text = baseline_section(record(source_only=.6, pencil_filter=.65, adapted=.7, source_and_adapted=.72, oracle=.8))
    assert 'Trained on adapted images: 70.0' in text and 'The best of its variants, chosen after the fact, is source and adapted: 72.0' in text and 'It is the best row among those that see no target picture.' in text and '| **source and adapted** |' in text


def test_the_larger_budget_is_read_against_its_own_photos():
    r = record(source_only=.6, pencil_filter=.65, adapted=.7, oracle=.8, source_only_long=.66, adapted_long=.68, pencil_long=.73, oracle_long=.86)
    for m, v in dict(adapted_long=.02, pencil_long=.07, oracle_long=.2).items(): r['summary'][f'{m}_minus_source_only_long/fs2k/balanced_accuracy'] = dict(mean=v, ci95=[v - .01, v + .01], n_seeds=5)
    text = baseline_section(r)
    short, long = text.split('\n\n')[:2]
    assert '50% of the gap' in short and 'It is the best row' in short
    assert 'Trained on adapted images: 68.0' in long and '2.0 [1.0, 3.0] points against source only long' in long and '10% of the gap' in long and 'pencil long is, with 73.0' in long
    row = next(l for l in text.splitlines() if l.startswith('| adapted long'))
    assert row.endswith('2.0 [1.0, 3.0] |') and '| **pencil long** |' in text and '| **adapted** |' in text


def test_our_row_is_trained_on_nothing_but_adapted_pictures_and_photos():
    text = baseline_section(record(source_only=.6, pencil_filter=.7, adapted=.65, adapted_and_pencil=.75, oracle=.8))
    assert 'Trained on adapted images: 65.0' in text and 'variants' not in text and 'adapted and pencil is, with 75.0' in text


def test_variants_share_data_and_models_unless_they_differ(tmp_path):
    ev = Evaluation(Experiment(get_profile('toy', seeds='0'), tmp_path, device='cpu'))
    v = variant(ev, t0=100)
    assert v.exp.splits is ev.exp.splits and v.exp.models is ev.exp.models and v.exp.profile.t0 == 100 and ev.exp.profile.t0 == 200
    assert len(lean(ev, n_train=12).exp.splits['train']) == 12 and lean(ev).exp.profile.n_images == 4


def test_a_lean_fine_tuning_shows_as_many_pictures_however_few_they_are(tmp_path):
    ev = Evaluation(Experiment(get_profile('toy', seeds='0', n_images=20, passes=40), tmp_path, device='cpu'))
    for n, passes in ((5, 80), (20, 20), (3, 134), (50, 20)):
        p = lean(ev, n_images=n).exp.profile
        assert (p.n_images, p.passes) == (min(n, 20), passes)


def test_few_keeps_the_share_of_the_classes(tmp_path):
    ev = Evaluation(Experiment(get_profile('toy', seeds='0'), tmp_path, device='cpu'))
    t, whole = few(ev, 8).task(()), ev.task(())
    assert len(t.source[1]) == 8 and t.source[1].float().mean() == .5 and len(whole.source[1]) == 24
    assert few(ev, 24) is ev


def test_the_correlation_over_prompts(tmp_path, monkeypatch):
    value = {'sketch': .7, 'cartoon': .6, 'oil painting': .55, 'line art': .65}
    monkeypatch.setattr(results, 'seeds_of', lambda e, *a: [value[e.exp.profile.target]] * 2)
    ev = Evaluation(Experiment(get_profile('toy', seeds='0,1'), tmp_path/'runs', tmp_path/'figures', device='cpu'))
    s = figure26(ev, '; '.join(value))[1]['summary']
    r = np.corrcoef([s[f'{q}/similarity']['mean'] for q in value], list(value.values()))[0, 1]
    half = 1.959964 / np.sqrt(len(value) - 3)   # Fisher's z
    assert s['correlation']['mean'] == pytest.approx(r)
    assert s['correlation']['ci95'] == pytest.approx(np.tanh([np.arctanh(r) - half, np.arctanh(r) + half]), abs=1e-5)
    assert s['correlation']['interval'].endswith('over the prompts')
    value.update(dict.fromkeys(value, .6))
    assert 'correlation' not in figure26(ev, '; '.join(value))[1]['summary']   # of equal numbers there is none


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


def test_the_page_names_settings_that_differ(tmp_path):
    "A figure made with another recipe than the table of methods says so, also when its record is older than a field."
    now = asdict(get_profile('embedded'))
    write_json(tmp_path/'figure24.json', dict(config=now))
    assert settings_that_differ(dict(config=now), tmp_path/'figure24.json') == ''
    older = {k: v for k, v in now.items() if k != 'colour_weight'} | dict(passes=8, seeds=[0])
    assert settings_that_differ(dict(config=older), tmp_path/'figure24.json') == 'colour_weight = 0.0, passes = 8'
    assert settings_that_differ(dict(config=older), tmp_path/'none.json') == ''
