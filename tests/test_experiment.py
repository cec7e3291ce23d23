"Profiles, stages, statistics, records and the three figure notebooks, on drawn faces and tiny random networks."
import contextlib
import io
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from diffclip_da.study import experiment
from diffclip_da.adaptation.adapt import AdaptConfig
from diffclip_da.core import UserError
from diffclip_da.study.figures import validate_record
from diffclip_da.store import read_json, write_json
from diffclip_da.study.experiment import (PAPER_NUMBERS, PROFILES, RENAMED, SPLITS, Experiment, Profile,
                                          compare_records, figure2, figure3, figure4, find_celeba,
                                          get_profile, given, image_interval, load_models, load_splits,
                                          main, paired, repo_root, results_table, summarise, t_interval,
                                          tolerances, toy_faces)
from diffclip_da.models.load import load_guide
from diffclip_da.adaptation.finetune import FinetuneConfig

REPO = Path(__file__).parent.parent
NOTEBOOKS = dict(figure2='20_figure2', figure3='21_figure3', figure4='22_figure4')


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "The three figures of the toy profile: folder, figure -> (record, table), and what was printed."
    root, printed = tmp_path_factory.mktemp('toy'), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exp = Experiment(get_profile('toy'), root/'runs', root/'figures', device='cpu')
        made = {f.__name__: f(exp)[1:] for f in (figure2, figure3, figure4)}
    return root, made, printed.getvalue()


def again(root, **overrides):
    "A new object on the same cache, and what its stages print while Figure 4 is made."
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exp = Experiment(get_profile('toy', **overrides), root/'runs', root/'figures-2', device='cpu')
        fig, record, table = figure4(exp)
    return record, {line.split(':')[0]: line.split(': ')[1].split(' ')[0].strip(',') for line in printed.getvalue().splitlines() if 'done in' not in line}


def test_files_and_records_are_complete(toy):
    root, made, _ = toy
    for name, (record, table) in made.items():
        stem = root/'figures'/'toy'/name
        for ext in ('png', 'pdf', 'json', 'csv'): assert stem.with_suffix(f'.{ext}').stat().st_size > 300, ext
        saved = read_json(stem.with_suffix('.json'))
        validate_record(saved)
        assert saved['summary'] == json.loads(json.dumps(record['summary'])) and saved['profile'] == 'toy'
        assert set(saved['config']) == {f.name for f in fields(Profile)}
        assert {w['provenance'] for w in saved['weights'].values()} == {'random'}
        assert saved['data']['counts'] == dict(train={'long hair': 12, 'beard': 12}, valid={'long hair': 6, 'beard': 6}, test={'long hair': 8, 'beard': 8})
        pd.testing.assert_frame_equal(pd.read_csv(stem.with_suffix('.csv')), table.reset_index(drop=True), check_dtype=False)
        assert set(saved['tolerance']) == set(saved['summary']) and not results_table(saved).empty


def test_summary_is_what_the_table_says(toy):
    _, made, _ = toy
    for name in ('figure3', 'figure4'):
        record, table = made[name]
        last = table[(table.epoch == table.epoch.max()) & (table.split == 'test_target')].accuracy
        got = record['summary']['test_target_accuracy']
        assert got['mean'] == pytest.approx(last.mean()) and got['n_seeds'] == 3
        low, high = stats.t.interval(.95, 2, last.mean(), stats.sem(last)) if last.std() else (last.mean(),) * 2
        assert got['ci95'] == pytest.approx([low, high])
        assert record['numbers']['test_target']['accuracy']['1'] == table[(table.seed == 1) & (table.split == 'test_target')].accuracy.tolist()
        assert record['numbers']['majority'] == .5
    gain = made['figure4'][0]['summary']['adapted_minus_original_test_target_accuracy']
    a, b = (made[f][0]['summary']['test_target_accuracy']['values'] for f in ('figure4', 'figure3'))
    assert gain['values'] == pytest.approx([i - j for i, j in zip(a, b)])


def test_both_experiments_share_their_test_sets(toy):
    root, made, _ = toy
    exp = Experiment(get_profile('toy'), root/'runs', device='cpu')
    assert exp.splits['test'].ids == exp.adapted['test'].ids and exp.splits['test'].labels == exp.adapted['test'].labels
    x, y = exp.tensors('test', 'adapted')
    assert x.shape == (16, 3, 16, 16) and y.tolist() == [exp.splits['test'].labels[i] for i in exp.splits['test'].ids]
    assert not torch.equal(x, exp.tensors('test', 'original')[0])
    with pytest.raises(UserError, match='original, adapted'): exp.tensors('test', 'sketch')


def test_every_stage_runs_once_and_is_found_again(toy):
    root, made, printed = toy
    assert printed.count('working') == 1 + 3 + 6
    record, stages = again(root)
    assert set(stages.values()) == {'found'} and len(stages) == 10
    assert {k: v for k, v in record.items() if k != 'seconds'} == {k: v for k, v in made['figure4'][0].items() if k != 'seconds'}
    for ext in ('png', 'csv'): assert (root/'figures-2/toy/figure4.png').read_bytes() == (root/'figures/toy/figure4.png').read_bytes()


def test_a_change_runs_what_lies_below_it_and_no_more(toy):
    root = toy[0]
    _, stages = again(root, classifier_lr=2e-3, seeds='0')
    assert {k for k, v in stages.items() if v == 'working'} == {'classify original 0', 'classify adapted 0'}
    _, stages = again(root, seeds='0', inversion_model='finetuned')
    assert stages['finetune'] == 'found' and {v for k, v in stages.items() if k != 'finetune'} == {'working'}
    configs = [read_json(p)['inputs']['config']['inversion_model'] for p in (root/'runs'/'toy').glob('adapt-test-*/config.json')]
    assert sorted(configs) == ['finetuned', 'pretrained']


def test_a_broken_history_is_named(toy):
    root = toy[0]
    def one(): return Experiment(get_profile('toy', seeds='7', epochs=1), root/'runs', root/'figures', device='cpu').histories('original')
    first = one()
    path = next((root/'runs/toy').glob('classify-original-7-*/history.json'))
    pd.testing.assert_frame_equal(one(), first, check_exact=True)
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match='history.json: not valid JSON.*delete it so that it is made anew'): one()


def test_own_images(tmp_path):
    sets = {s: toy_faces(tmp_path/s, 12, k, f'own-{s}') for k, s in enumerate(SPLITS)}
    exp = Experiment(get_profile('toy', n_images=2), tmp_path/'runs', sets=sets, device='cpu')
    assert exp.splits['train'] is sets['train']
    with pytest.raises(UserError, match='give all of train, valid, test'): Experiment(get_profile('toy'), tmp_path, sets=dict(train=sets['train']))
    twice = Experiment(get_profile('toy'), tmp_path, sets={**sets, 'test': sets['train']})
    with pytest.raises(UserError, match='share the same images'): twice.splits


# profiles

def test_profiles_are_the_papers_and_ours():
    e, c, p = (PROFILES[k] for k in ('embedded', 'celeba64', 'paper'))
    assert (e.n_train, e.n_valid, e.n_test, e.n_inv, e.n_gen, e.n_images) == (400, 100, 300, 6, 6, 200)
    assert (c.n_train, c.n_valid, c.n_test, c.n_inv, c.n_gen, c.source, c.target) == (1200, 100, 300, 6, 6, 'photo', 'sketch')
    assert (c.inversion, c.n_iter) == (e.inversion, e.n_iter) == ('anderson', 2)
    assert (p.size, p.t0, p.n_inv, p.n_gen, p.clip, p.embedder) == (256, 601, 40, 6, 'ViT-B-16/openai', 'facenet:vggface2')
    for q in PROFILES.values(): q.config(FinetuneConfig).validate(1000); q.config(AdaptConfig).validate(1000)


@pytest.mark.parametrize('cls', [FinetuneConfig, AdaptConfig])
def test_every_setting_can_be_overridden(cls):
    names = {f.name: RENAMED[cls].get(f.name, f.name) for f in fields(cls)}
    assert set(names.values()) <= {f.name for f in fields(Profile)}
    other = {n: {int: 3, bool: True, float: .5, str: 'finetuned' if n == 'inversion_model' else 'x'}[f.type if isinstance(f.type, type) else eval(f.type)]
             for f in fields(cls) for n in [names[f.name]]}
    got = get_profile('embedded', **other).config(cls)
    assert all(getattr(got, f) == other[n] for f, n in names.items())


def test_overrides_are_checked():
    assert get_profile('embedded') is not PROFILES and get_profile('embedded', n_inv=None) == PROFILES['embedded']
    assert get_profile('embedded', lr=1, balanced='true', seeds=4, n_inv='12') == replace(PROFILES['embedded'], lr=1., balanced=True, seeds=(4,), n_inv=12)
    for bad, message in ((dict(n_innv=20), "no field 'n_innv'; there are: dataset, .*n_inv"), (dict(n_inv=20.5), 'n_inv = 20.5 .float.; give int'),
                         (dict(n_inv=True), 'n_inv = True'), (dict(n_inv='many'), "n_inv = 'many'"), (dict(seeds='1,1'), 'all different'),
                         (dict(seeds=''), 'seeds'), (dict(n_test=0), 'n_test = 0: must be 1 or more'), (dict(classifier='big'), 'there are: paper, small')):
        with pytest.raises(UserError, match=message): get_profile('embedded', **bad)
    with pytest.raises(UserError, match="no profile 'embeded'; there are: embedded, celeba64, paper, toy"): get_profile('embeded')


def test_given_takes_parameters_and_nothing_else():
    space = dict(profile='toy', celeba='', n_inv=3, t0=None, _x=1, exp=object(), In=['a'], Out={}, figure2=figure2)
    assert given(space) == dict(n_inv=3, t0=None)
    with pytest.raises(UserError, match="no field 'n_innv'"): get_profile('toy', **given(dict(n_innv=3)))


# data and networks

def test_celeba_is_found_or_explained(mini_celeba, monkeypatch):
    monkeypatch.delenv('CELEBA', raising=False)
    with pytest.raises(UserError, match='needs CelebA.*img_align_celeba.zip.*environment variable CELEBA'): find_celeba()
    with pytest.raises(UserError, match='CelebA is not at /nowhere'): find_celeba('/nowhere')
    monkeypatch.setenv('CELEBA', str(mini_celeba))
    assert find_celeba() == mini_celeba
    sets = load_splits(get_profile('celeba64', n_train=10, n_valid=6, n_test=6))
    ids = {s: sorted(i.ids) for s, i in sets.items()}
    assert ids['valid'] == [f'{k:06}.jpg' for k in range(13, 19)] and ids['test'] == [f'{k:06}.jpg' for k in range(19, 25)]
    assert len(ids['train']) == 10 and max(ids['train']) <= '000012.jpg'
    with pytest.raises(UserError, match='cannot draw 1,200 of 12'): load_splits(get_profile('celeba64'))


def test_impossible_data_are_refused():
    with pytest.raises(UserError, match="attribute = 'Smiling'.*take a CelebA profile"): load_splits(get_profile('embedded', attribute='Smiling'))
    with pytest.raises(UserError, match="dataset = 'imagenet'; there are: faces, celeba, toy"): load_splits(get_profile('embedded', dataset='imagenet'))


def test_networks_that_do_not_fit_are_refused():
    unet, guide, face = load_models(get_profile('toy'))
    assert unet.image_size == 16 and {m.info['provenance'] for m in (unet, guide, face)} == {'random'}
    with pytest.raises(UserError, match='neither a folder nor a model'): load_guide('ViT-B-17/openai')
    with pytest.raises(UserError, match="no weights 'nowhere'"): load_guide('ViT-B-16/nowhere')
    wrong = replace(get_profile('toy'), unet=str(REPO))
    with pytest.raises(UserError, match='config.json'): load_models(wrong)


# statistics

def test_intervals_are_scipys():
    v = [.81, .84, .9, .86]
    assert t_interval(v)['ci95'] == pytest.approx(stats.t.interval(.95, 3, np.mean(v), stats.sem(v)))
    assert t_interval([.5]) == dict(mean=.5, ci95=None, n_seeds=1)
    low, high = image_interval(.87, 300)
    assert (low, high) == pytest.approx((.8272, .9034), abs=1e-3)
    assert tolerances(dict(a=dict(ci95=[.5, .52]), b=dict(ci95=[.2, .9]), c=dict(ci95=None), d=dict(ci95=[.4, .5]))) == dict(a=.03, b=.1, c=.1, d=.05)


def test_paired_difference():
    a, b = dict(m=dict(values=[.9, .8, .85])), dict(m=dict(values=[.6, .55, .5]))
    got = paired('m', a, b)
    want = stats.ttest_rel(a['m']['values'], b['m']['values'])
    assert got['mean'] == pytest.approx(.3) and got['p_value'] == pytest.approx(want.pvalue)
    assert got['ci95'] == pytest.approx(list(want.confidence_interval(.95)))
    assert paired('m', dict(m=dict(values=[.9])), dict(m=dict(values=[.6])))['p_value'] is None


def test_selection_ignores_the_test_sets(toy):
    _, table = toy[1]['figure3']
    changed = table.assign(accuracy=table.accuracy.where(~table.split.str.startswith('test'), np.random.default_rng(0).random(len(table))))
    n = dict(test_target=16)
    a, b = summarise(table, n), summarise(changed, n)
    assert a['valid_accuracy_selected'] == b['valid_accuracy_selected'] and a['train_accuracy_selected'] == b['train_accuracy_selected']


def test_papers_numbers():
    a, b = PAPER_NUMBERS['figure3'], PAPER_NUMBERS['figure4']
    assert (a['test_target'][-1], b['test_target'][-1], a['test_original'][-1], b['test_original'][-1]) == (.5933, .87, .89, .71)
    assert all(len(v) == 10 and 0 < min(v) and max(v) <= 1 for f in (a, b) for v in f.values())


# comparing records

def test_compare_records(toy):
    record = toy[1]['figure3'][0]
    assert compare_records(record, record).ok.all()
    off = json.loads(json.dumps(record))
    off['summary']['test_target_accuracy']['mean'] += .2
    del off['summary']['train_accuracy']
    table = compare_records(off, record)
    assert sorted(table.index[~table.ok]) == ['test_target_accuracy', 'train_accuracy']
    with pytest.raises(UserError, match="figure is 'figure4' and 'figure3'"): compare_records(toy[1]['figure4'][0], record)
    with pytest.raises(UserError, match='settings differ: epochs = 3 and 2'): compare_records(dict(record, config=dict(record['config'], epochs=3)), record)


def test_compare_command(toy, tmp_path, capsys):
    saved = toy[0]/'figures'/'toy'/'figure3.json'
    off = read_json(saved)
    off['summary']['train_accuracy']['mean'] = 0.
    write_json(tmp_path/'off.json', off)
    assert main(['compare', str(saved), str(saved)]) == 0
    assert main(['compare', str(tmp_path/'off.json'), str(saved)]) == 1
    assert 'train_accuracy' in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: main(['compare', str(tmp_path/'none.json'), str(saved)])
    assert e.value.code == 2 and 'none.json: no such file' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: main(['figures', 'toy', '--set', 'n_inv'])
    assert e.value.code == 2 and 'write FIELD=VALUE' in capsys.readouterr().err
    got = subprocess.run([sys.executable, '-m', 'diffclip_da.study.experiment', 'compare', str(tmp_path/'off.json'), str(saved)], capture_output=True, text=True, cwd=REPO)
    assert got.returncode == 1 and 'False' in got.stdout


# the notebooks

def cells(figure):
    return [c for c in read_json(REPO/'nbs'/f'{NOTEBOOKS[figure]}.ipynb')['cells'] if c['cell_type'] == 'code']


@pytest.mark.parametrize('figure', NOTEBOOKS)
def test_figure_notebooks_hold_parameters_and_calls(figure):
    code = cells(figure)
    tagged = [c for c in code if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    space = {}
    exec(''.join(tagged[0]['source']), space)
    assert space['profile'] == 'embedded' and set(given(space)) <= {f.name for f in fields(Profile)} and set(given(space).values()) == {None}
    text = '\n'.join(''.join(c['source']) for c in code)
    assert 'def ' not in text and '#| export' not in text and 'default_exp' not in text
    assert all(''.join(c['source']).startswith('#| slow') for c in code if c is not tagged[0])


@pytest.mark.parametrize('figure', NOTEBOOKS)
def test_figure_notebooks_run(figure, toy, tmp_path, monkeypatch, capsys):
    "As papermill does it: the parameters' cell, the injected values, the rest; in a folder that is no clone."
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs'/'toy').symlink_to(toy[0]/'runs'/'toy')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, 'default_device', lambda: torch.device('cpu'))
    space = {}
    for c in cells(figure):
        exec(''.join(c['source']), space)
        if 'parameters' in c['metadata'].get('tags', []): space.update(profile='toy', seeds='0,1,2')
    assert 'working' not in capsys.readouterr().out
    saved = read_json(tmp_path/'runs'/'figures'/'toy'/f'{figure}.json')
    assert saved['summary'] == read_json(toy[0]/'figures'/'toy'/f'{figure}.json')['summary']


def test_the_clone_is_found_from_its_notebooks(monkeypatch, tmp_path):
    monkeypatch.chdir(REPO/'nbs')
    assert repo_root() == REPO
    exp = Experiment(get_profile('embedded'))
    assert (exp.root, exp.figures) == (REPO/'runs', REPO/'figures')
    monkeypatch.chdir(tmp_path)
    assert repo_root() == tmp_path


def test_a_record_from_before_a_field_came_can_be_compared():
    new = dict(figure='figure3', profile='embedded', config=dict(t0=400, compile=False), summary=dict(m=dict(mean=.5)), tolerance=dict(m=.1))
    old = dict(new, config=dict(t0=400))
    assert compare_records(new, old).ok.all()
    with pytest.raises(UserError, match='compile = True and False'): compare_records(dict(new, config=dict(t0=400, compile=True)), old)


def test_code_is_hashed_as_it_was_when_the_run_began(monkeypatch):
    "An edit during a run would name the results of the code before it."
    before = experiment.sources_hash('ddim')
    assert before != experiment.sources_hash('ddim', 'adapt') and experiment.SOURCES['ddim'] == (Path(experiment.__file__).parent/'ddim.py').read_text(encoding='utf-8')
    monkeypatch.setattr(Path, 'read_text', lambda *a, **k: pytest.fail('read again'))
    assert experiment.sources_hash('ddim') == before
    monkeypatch.setitem(experiment.SOURCES, 'ddim', experiment.SOURCES['ddim'] + '\nx = 1\n')
    assert experiment.sources_hash('ddim') != before
    monkeypatch.setitem(experiment.SOURCES, 'ddim', '# said\n' + experiment.SOURCES['ddim'].removesuffix('\nx = 1\n'))
    assert experiment.sources_hash('ddim') == before
