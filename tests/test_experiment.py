"Profiles, stages, statistics, records and the three figure notebooks, on drawn faces and tiny random networks."
import contextlib
import io
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from diffclip_da.core import UserError
from diffclip_da.data import repo_root, toy_faces
from diffclip_da.settings import homes, override
from diffclip_da.store import read_json, write_json
from diffclip_da.study import experiment
from diffclip_da.study.experiment import Experiment, compare_records, figure2, figure3, figure4, lattice, main, peaks, spectra
from diffclip_da.study.figures import PAPER_NUMBERS, results_table, validate_record
from diffclip_da.study.profile import SPLITS, Profile, get_profile, given
from diffclip_da.study.stats import summarise

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
        for ext in ('png', 'json', 'csv'): assert stem.with_suffix(f'.{ext}').stat().st_size > 300, ext
        assert stem.with_suffix('.pdf').exists() == (name != 'figure2'), 'of lines there is a pdf, of photos none'
        saved = read_json(stem.with_suffix('.json'))
        validate_record(saved)
        assert saved['summary'] == json.loads(json.dumps(record['summary'])) and saved['profile'] == 'toy'
        assert set(saved['config']) == {f.name for f in fields(Profile)}
        assert {w['provenance'] for w in saved['weights'].values()} == {'random'}
        assert saved['data']['counts'] == dict(train={'long hair': 12, 'beard': 12}, valid={'long hair': 6, 'beard': 6}, test={'long hair': 8, 'beard': 8})
        pd.testing.assert_frame_equal(pd.read_csv(stem.with_suffix('.csv')), table.reset_index(drop=True), check_dtype=False)
        assert set(saved['tolerance']) == set(saved['summary']) and not results_table(saved).empty


def test_a_lattice_is_seen_and_told_from_noise():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 3, 32, 32, generator=g) * .2
    assert all(.5 < v < 2 for p in (2, 4) for v in peaks(spectra(noise).mean(0), p).values())
    along_x, along_y, both, four = (torch.zeros(32, 32) for _ in range(4))
    along_x[:, ::2] = along_y[::2] = four[:, ::4] = .2
    both[::2, ::2] = both[1::2, 1::2] = .2
    for pattern, key in ((along_x, 'x'), (along_y, 'y'), (both, 'xy')):
        got = {k: v['mean'] for k, v in lattice(noise, noise + pattern, draws=10).items()}
        assert got[f'lattice_{key}'] > 10 and all(got[f'lattice_{k}'] < 2 for k in ('x', 'y', 'xy') if k != key)
    got = lattice(noise, noise + four, draws=10)
    assert got['lattice4_x']['mean'] > 3 and .5 < got['lattice4_y']['mean'] < 2
    assert got['lattice4_x']['ci95'][0] <= got['lattice4_x']['mean'] <= got['lattice4_x']['ci95'][1] * 1.2
    black = lattice(torch.zeros(4, 3, 16, 16), torch.zeros(4, 3, 16, 16), draws=2)
    assert black['lattice_x']['mean'] == 0


def test_summary_is_what_the_table_says(toy):
    _, made, _ = toy
    for name in ('figure3', 'figure4'):
        record, table = made[name]
        last = table[(table.epoch == table.epoch.max()) & (table.split == 'test_target')].accuracy
        got = record['summary']['test_target_accuracy']
        assert got['mean'] == pytest.approx(last.mean()) and got['n_seeds'] == 3
        low, high = stats.t.interval(.95, 2, last.mean(), stats.sem(last)) if last.std() else (last.mean(),) * 2
        assert got['ci95'] == pytest.approx([max(0, low), min(1, high)])   # an accuracy stays in [0, 1]
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
    _, stages = again(root, training__lr=2e-3, seeds='0')
    assert {k for k, v in stages.items() if v == 'working'} == {'classify original 0', 'classify adapted 0'}
    _, stages = again(root, seeds='0', inverter='finetuned')
    assert stages['finetune'] == 'found' and {v for k, v in stages.items() if k != 'finetune'} == {'working'}
    configs = [read_json(p)['inputs']['inverter'] for p in (root/'runs'/'toy').glob('adapt-test-*/config.json')]
    assert len(set(configs)) == 2


def test_a_broken_history_is_named_and_made_anew(toy):
    root = toy[0]
    def one(): return Experiment(get_profile('toy', seeds='7', epochs=1), root/'runs', root/'figures', device='cpu').histories('original')
    first = one()
    path = next((root/'runs/toy').glob('classify-original-7-*/history.json'))
    pd.testing.assert_frame_equal(one(), first, check_exact=True)
    path.write_text(path.read_text()[:40])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed): pd.testing.assert_frame_equal(one(), first, check_exact=True)
    assert 'history.json is damaged or gone: it is made anew' in printed.getvalue()


def test_own_images(tmp_path):
    sets = {s: toy_faces(tmp_path/s, 12, k, f'own-{s}') for k, s in enumerate(SPLITS)}
    exp = Experiment(get_profile('toy', n_images=2), tmp_path/'runs', sets=sets, device='cpu')
    assert exp.splits['train'] is sets['train']
    with pytest.raises(UserError, match='give all of train, valid, test'): Experiment(get_profile('toy'), tmp_path, sets=dict(train=sets['train']))
    twice = Experiment(get_profile('toy'), tmp_path, sets={**sets, 'test': sets['train']})
    with pytest.raises(UserError, match='share the same images'): twice.splits


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
    with pytest.raises(UserError, match='settings differ: training.epochs = 3 and 2'):
        compare_records(dict(record, config=dict(record['config'], training=dict(record['config']['training'], epochs=3))), record)


def test_a_record_from_before_a_setting_had_its_default(toy):
    record = toy[1]['figure3'][0]
    old = json.loads(json.dumps(record))
    del old['config']['training']['strength']
    assert compare_records(record, old).ok.all()
    with pytest.raises(UserError, match='settings differ: training.strength = 2.0 and 1.0'):
        compare_records(dict(record, config=dict(record['config'], training=dict(record['config']['training'], strength=2.))), old)


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
    assert e.value.code == 2 and 'write NAME=VALUE' in capsys.readouterr().err
    got = subprocess.run([sys.executable, '-m', 'diffclip_da.study.experiment', 'compare', str(tmp_path/'off.json'), str(saved)], capture_output=True, text=True, cwd=REPO)
    assert got.returncode == 1 and 'False' in got.stdout


# the notebooks

def cells(figure):
    return [c for c in read_json(REPO/'nbs'/f'{NOTEBOOKS[figure]}.ipynb')['cells'] if c['cell_type'] == 'code']


@pytest.mark.parametrize('figure', NOTEBOOKS)
def test_figure_notebooks_hold_parameters_and_calls(figure):
    code = [c for c in cells(figure)
            if 'def your_' not in ''.join(c['source'])]   # all but the reader's exercise
    tagged = [c for c in code if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    space = {}
    exec(''.join(tagged[0]['source']), space)
    assert space['profile'] == 'embedded' and {k.rpartition('__')[2] for k in given(space)} <= {k.rpartition('__')[2] for k in homes(get_profile('toy'))} and set(given(space).values()) == {None}
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


def test_an_edit_of_the_classifier_trains_again_and_a_text_does_not(toy, monkeypatch):
    monkeypatch.setattr(experiment, 'code_hash', lambda *a: 'another')
    _, stages = again(toy[0], seeds='0')
    assert {k for k, v in stages.items() if v == 'working'} == {'classify original 0', 'classify adapted 0'}
