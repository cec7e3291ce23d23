"The page made from records: what it says of them, and that nothing of it is made up."
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from diffclip_da.study.figures import results_table
from diffclip_da.study.baselines import METHODS, QUESTIONS
from diffclip_da.study.page import (CHAPTERS, baseline_section, findings, main, page_of, percent, picked, plain_section, records_in,
                                    settings_that_differ, summary_table)
from diffclip_da.study.profile import get_profile
from diffclip_da.store import read_json, write_json

ROOT = Path(__file__).parents[1]


def lines(text): return [re.sub(r' +', ' ', l) for l in text.splitlines()]   # tables are padded


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
    rows = re.findall(r'^\| \**(\w[\w ]*?)\** +\| (?:source only|words|the guide|target)', text, re.M)
    assert rows == ['oracle', 'pencil filter', 'adapted', 'source only', 'dann', 'clip zero shot']   # best first, question by question


def test_the_page_says_so_when_ours_is_best():
    text = baseline_section(record(source_only=.6, pencil_filter=.65, adapted=.7, source_and_adapted=.72, oracle=.8))
    assert 'Trained on adapted images: 70.0' in text and 'The best of its variants, chosen after the fact, is source and adapted: 72.0' in text and 'It is the best row among those that see no target picture.' in text and '| **source and adapted** |' in ' '.join(lines(text))


def test_the_larger_budget_is_read_against_its_own_photos():
    r = record(source_only=.6, pencil_filter=.65, adapted=.7, oracle=.8, source_only_long=.66, adapted_long=.68, pencil_long=.73, oracle_long=.86)
    for m, v in dict(adapted_long=.02, pencil_long=.07, oracle_long=.2).items(): r['summary'][f'{m}_minus_source_only_long/fs2k/balanced_accuracy'] = dict(mean=v, ci95=[v - .01, v + .01], n_seeds=5)
    text = baseline_section(r)
    short, long = text.split('\n\n')[:2]
    assert '50% of the gap' in short and 'It is the best row' in short
    assert 'Trained on adapted images: 68.0' in long and '2.0 [1.0, 3.0] points against source only long' in long and '10% of the gap' in long and 'pencil long is, with 73.0' in long
    row = next(l for l in lines(text) if l.startswith('| adapted long'))
    assert row.endswith('2.0 [1.0, 3.0] |') and all(f'| **{m}** |' in ' '.join(lines(text)) for m in ('pencil long', 'adapted'))


def test_our_row_is_trained_on_nothing_but_adapted_pictures_and_photos():
    text = baseline_section(record(source_only=.6, pencil_filter=.7, adapted=.65, adapted_and_pencil=.75, oracle=.8))
    assert 'Trained on adapted images: 65.0' in text and 'variants' not in text and 'adapted and pencil is, with 75.0' in text


def test_the_page_names_settings_that_differ(tmp_path):
    "A figure made with another recipe than the table of methods says so; old records, flat ones, compare among themselves."
    now = json.loads(json.dumps(asdict(get_profile('embedded'))))
    write_json(tmp_path/'figure24.json', dict(config=now))
    assert settings_that_differ(dict(config=now), tmp_path/'figure24.json') == ''
    other = json.loads(json.dumps(asdict(get_profile('embedded', passes=8, t0=300, seeds='0'))))
    assert settings_that_differ(dict(config=other), tmp_path/'figure24.json') == 'recipe.passes = 8, walk.t0 = 300'
    write_json(tmp_path/'old.json', dict(config=dict(t0=400, lr=2e-4)))
    assert settings_that_differ(dict(config=dict(t0=300, lr=2e-4)), tmp_path/'old.json') == 't0 = 300'
    assert settings_that_differ(dict(config=other), tmp_path/'none.json') == ''
    assert settings_that_differ(dict(config=dict(t0=300)), tmp_path/'old.json') == 't0 = 300, some that only one of the two has'


def test_the_committed_page_is_what_the_records_say(tmp_path, monkeypatch):
    if not (ROOT/'figures/celeba64/figure24.json').exists(): pytest.skip('no records of celeba64')
    by_hand = (ROOT/'figures/celeba64/discussion.md').read_text(encoding='utf-8').strip()
    assert page_of('celeba64', ROOT/'figures', ROOT/'RESULTS.md', by_hand) == (ROOT/'RESULTS.md').read_text(encoding='utf-8')
    for n, r in records_in(ROOT/'figures/celeba64').items():
        assert plain_section(r) in (ROOT/'figures/celeba64/tables.md').read_text(encoding='utf-8'), n


def test_every_link_and_picture_of_the_page_is_there():
    for page in (ROOT/'RESULTS.md', ROOT/'figures/celeba64/tables.md'):
        for link in re.findall(r'\]\(([^)#]+)', page.read_text(encoding='utf-8')):
            if '://' not in link: assert (page.parent/link).exists(), (page.name, link)


def test_shares_stay_between_nothing_and_all():
    for n, r in records_in(ROOT/'figures/celeba64').items():
        for k, s in r['summary'].items():
            if k.endswith(('/accuracy', '/balanced_accuracy', '/auroc')) and '_minus_' not in k and s['ci95']:
                assert 0 <= s['ci95'][0] <= s['ci95'][1] <= 1, (n, k)


def test_every_method_answers_one_question_of_at_most_ten_rows():
    named = [m for names in QUESTIONS.values() for m in names]
    assert sorted(named) == sorted(METHODS) and max(map(len, QUESTIONS.values())) <= 10


def differences(gain, cost=0.):
    "A record of Figure 35 with these differences."
    entry = lambda v: dict(mean=v, ci95=[v - .01, v + .01], n_seeds=1)
    s = {f'guide/{n}/m=16/{t}/balanced_accuracy': entry(.8) for t in ('fs2k', 'fs2k photos')
         for n in ('photos', 'adapted', 'filter', 'photos_and_adapted', 'zero_shot', 'oracle')}
    s |= {f'guide/adapted_minus_{o}/m=16/fs2k/balanced_accuracy': entry(gain) for o in ('photos', 'filter')}
    return dict(summary=s, data=dict(target=dict(name='fs2k')))


@pytest.mark.parametrize('gain,words', [(.05, 'more than from photos (+5.0'), (-.05, 'less than from photos (-5.0'), (.005, 'neither more nor less than from photos (+0.5')])
def test_findings_say_what_the_intervals_allow(gain, words):
    said = findings(dict(figure35=differences(gain)))
    assert words in said[0] and 'other cameras' in said[1] and len(said) == 2
    both = findings(dict(figure35=differences(gain), figure24=record(source_only=.6, pencil_filter=.75, adapted=.7)))
    assert len(both) == 3 and 'trained from nothing' in both[2] and '70.0 [69.0, 71.0]' in both[2]
    assert findings({}) == []


def test_only_rows_that_answer_are_picked():
    r = dict(data=dict(target=dict(name='a+b')), summary={f'{m}/{t}/{c}': dict(mean=.5, ci95=None, n_seeds=1) for m in ('x_y', 'z') for t in ('a+b', 'aab') for c in ('p', 'q')})
    t = picked(r, r'(?P<row>\w+)/%T%/(?P<column>p)')
    assert t[''].tolist() == ['x y', 'z'] and list(t.columns) == ['', 'p'] and len(picked(r, r'(?P<row>\w+)/%T%/(?P<column>p)', most=1)) == 1


def test_folders_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit): main(['celeba64'])
    assert 'figures/celeba64: no such folder; make the figures first' in capsys.readouterr().err
    (tmp_path/'figures/embedded').mkdir(parents=True)
    with pytest.raises(SystemExit): main(['embedded', '--discussion', 'nowhere.md'])
    assert 'nowhere.md: no such file' in capsys.readouterr().err
    Path('figures/embedded/discussion.md').write_text('Said by hand.')
    assert main(['embedded', '--out', 'PAGE.md']) == 0
    page = Path('PAGE.md').read_text(encoding='utf-8')
    assert page.endswith('\n## Discussion\n\nSaid by hand.\n') and page.count('Not run yet') == len(CHAPTERS)


def test_tables_for_notebooks():
    s = {'a_b/t/balanced_accuracy': dict(mean=.61234, ci95=[.6, .62], n_seeds=5), 'a_b/t/accuracy': dict(mean=.5, ci95=None, n_seeds=5),
         'c/t/similarity': dict(mean=1, ci95=None, n_seeds=1)}
    t = summary_table(dict(summary=s))
    assert list(t.index) == ['a b/t/balanced accuracy', 'c/t/similarity'] and t.loc['a b/t/balanced accuracy', 'high'] == .62
    assert percent(s['a_b/t/balanced_accuracy']) == '61.2 [60.0, 62.0]' and percent(None) == '–'
    for figure in ('figure3', 'figure4'):
        r = read_json(ROOT/f'figures/embedded/{figure}.json')
        assert results_table(r).loc['test target', 'accuracy'].iloc[0] == round(r['summary']['test_target_accuracy']['mean'], 3)


def test_weights_that_no_longer_ship_are_told_from_those_that_do():
    from diffclip_da.study.page import origin
    from diffclip_da.store import load_card
    now = load_card('embedder')['files']['embedder.safetensors']
    assert origin('identity', dict(provenance='shipped', sha256=now)) == 'shipped'
    assert origin('unet', dict(provenance='shipped', sha256='0' * 64)) == 'shipped before'
    assert origin('clip', dict(provenance='local', sha256='0' * 64)) == 'local'
