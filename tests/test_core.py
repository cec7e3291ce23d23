import io
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_store import Config, listing

from diffclip_da import core
from diffclip_da.core import (COLOURS, LineBar, Plan, UserError, command, default_device, fold_seed, friendly_exit, from_pil,
                              from_uint8, image_grid, new_generator, progress, set_seed, show_images, shows_lines,
                              side_by_side, to_pil, to_uint8, whole_plan)
from diffclip_da.store import git_commit, read_json, versions
from diffclip_da.study.figures import make_record, save_figure, validate_record


# ---- errors -----------------------------------------------------------------------------------------------------------------

def test_friendly_exit_prints_one_line_and_exits_with_2(capsys):
    @friendly_exit
    def main(x):
        if x: raise UserError('photos/: no such folder')
        return 7
    assert main(0) == 7
    with pytest.raises(SystemExit) as e: main(1)
    assert e.value.code == 2
    assert capsys.readouterr().err == 'error: photos/: no such folder\n'


def test_friendly_exit_keeps_bugs_visible_and_ctrl_c_apart(capsys):
    @friendly_exit
    def main(e): raise e
    with pytest.raises(ZeroDivisionError): main(ZeroDivisionError())
    with pytest.raises(SystemExit) as e: main(KeyboardInterrupt())
    assert e.value.code == 130 and 'resumes' in capsys.readouterr().err


def test_user_error_is_a_value_error(): assert issubclass(UserError, ValueError)


# ---- seeds, devices ---------------------------------------------------------------------------------------------------------

def test_generator_is_independent_of_the_global_one():
    a = torch.randn(4, generator=new_generator(3))
    torch.randn(10)
    assert torch.equal(a, torch.randn(4, generator=new_generator(3)))
    assert not torch.equal(a, torch.randn(4, generator=new_generator(4)))


def test_set_seed_seeds_all_three():
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    set_seed(5); a = draw()
    set_seed(5)
    assert draw() == a
    set_seed(2**40)   # beyond numpy's range
    assert draw() != a


def test_default_device_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert default_device() == torch.device('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert default_device() == torch.device('mps')
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert default_device() == torch.device('cpu')


def test_folded_seeds_differ_for_each_purpose():
    assert fold_seed(0, 'noise', 3) == fold_seed(0, 'noise', 3)
    seeds = {fold_seed(*a) for a in [(0,), (1,), (0, 'a'), (0, 'b'), (0, 'a', 0), (0, 'a', 1), (0, 0, 'a'), (0, '0'), (0, 0)]}
    assert len(seeds) == 9 and all(0 <= s < 2**53 for s in seeds)
    assert all(float(s) == s for s in seeds)                     # exact in JSON
    new_generator(max(seeds)); set_seed(max(seeds))              # and every generator takes it


# ---- command lines ----------------------------------------------------------------------------------------------------------

@dataclass
class Steps:
    n_inv: int = 6    # inversion steps


@dataclass
class Options:
    "Turn photos into sketches."
    target: str       # words for the domain wanted
    walk: Steps = field(default_factory=Steps)
    skip_bad: bool = False   # leave out images that cannot be read
    passes: int|None = None  # fine-tuning passes


def test_command_reads_a_dataclass():
    a = command(Options, ['--target', 'a sketch', '--n-inv', '4', '--skip-bad', '--passes', '2'])
    assert a == Options('a sketch', Steps(4), True, 2)
    assert command(Options, ['--target', 'x']) == Options('x')
    assert command(Options, ['--n-inv', '3'], default=Options('y', passes=7)) == Options('y', Steps(3), passes=7)


def test_command_help_comes_from_the_comments(capsys):
    with pytest.raises(SystemExit) as e: command(Options, ['--help'], 'diffclip-x')
    said = capsys.readouterr().out
    assert e.value.code == 0 and 'diffclip-x' in said and 'Turn photos into sketches.' in said
    for text in ('--n-inv INT', 'inversion steps', '--skip-bad', 'leave out images', 'default: 6'): assert text in said, text
    assert '--walk' not in said and '--no-skip-bad' not in said


@pytest.mark.parametrize('argv', [[], ['--target'], ['--target', 'x', '--nope', '1'], ['--target', 'x', '--n-inv', 'six']])
def test_command_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as e: command(Options, argv)
    said = capsys.readouterr()
    assert e.value.code == 2 and 'Traceback' not in said.err + said.out


# ---- images -----------------------------------------------------------------------------------------------------------------

def test_bytes_survive_the_round_trip():
    u = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(to_uint8(from_uint8(u)), u)
    assert torch.equal(to_uint8(from_pil(to_pil(from_uint8(u)))), u)
    assert to_uint8(torch.tensor([-9., 9.])).tolist() == [0, 255]
    x = torch.rand(3, 5, 7, requires_grad=True)
    assert to_pil(x).size == (7, 5) and to_pil(x[:1]).mode == 'RGB'


def test_from_pil_resizes_and_converts():
    x = from_pil(Image.new('L', (10, 20), 255), 8)
    assert x.shape == (3, 8, 8) and torch.allclose(x, torch.ones(()))


def test_image_errors():
    with pytest.raises(UserError, match='NaN or infinite'): to_uint8(torch.tensor([float('nan')]))
    with pytest.raises(UserError, match=r'one image \[3, h, w\], got shape \(2, 3, 4, 4\)'): to_pil(torch.zeros(2, 3, 4, 4))
    with pytest.raises(UserError, match=r'images \[b, c, h, w\], got shape \(3, 4, 4\)'): image_grid(torch.zeros(3, 4, 4), 2)


def test_image_grid_places_each_image():
    x = torch.arange(5.).reshape(5, 1, 1, 1).expand(5, 1, 4, 3) / 10
    g = image_grid(x, n_cols=2, pad=1)
    assert g.shape == (3, 3 * 5 + 1, 2 * 4 + 1)
    for k in range(5):
        r, c = divmod(k, 2)
        assert torch.all(g[:, r * 5 + 1:r * 5 + 5, c * 4 + 1:c * 4 + 4] == k / 10)
    assert torch.all(g[:, 11:, 5:] == 1) and torch.all(g[:, 0] == 1)   # the empty place and the margin are white


def test_show_images():
    fig = show_images(torch.zeros(5, 3, 4, 4), titles=range(5), n_cols=3, row_labels=['a', 'b'])
    assert len(fig.axes) == 6 and fig.axes[4].get_title() == '4' and fig.axes[3].get_ylabel() == 'b'
    assert not plt.fignum_exists(fig.number)   # closed, so notebooks show it once


def test_colours_are_told_apart_without_red_or_green():
    assert set(COLOURS) == {'source', 'target', 'adapted', 'train', 'other'}
    rgb = np.array([[int(c[k:k + 2], 16) for k in (1, 3, 5)] for c in COLOURS.values()]) / 255
    for M in ([[.567, .433, 0], [.558, .442, 0], [0, .242, .758]], [[.625, .375, 0], [.7, .3, 0], [0, .3, .7]]):   # protanopia, deuteranopia
        seen = rgb @ np.array(M).T
        d = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(5, 1)]
        assert d.min() > .1


def test_progress(monkeypatch, capsys):
    monkeypatch.setenv('DIFFCLIP_QUIET', '1')
    bar = progress(range(3), desc='x')
    assert bar.disable and list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('DIFFCLIP_QUIET', '0')
    with progress(total=2) as bar: assert not bar.disable


def test_progress_in_a_log_is_whole_lines_with_the_time_left(monkeypatch):
    monkeypatch.setenv('DIFFCLIP_PROGRESS', 'lines'); monkeypatch.delenv('DIFFCLIP_QUIET', raising=False)
    assert isinstance(progress(range(2)), LineBar) and shows_lines()
    log = io.StringIO()
    bar = LineBar(range(4), desc='drawing: ', file=log, mininterval=0, miniters=1)
    assert list(bar) == [0, 1, 2, 3]
    bar.display()                                       # nothing new since the last line
    lines = log.getvalue().splitlines()
    assert [l.split(',')[0] for l in lines] == ['drawing:  25% 1/4', 'drawing:  50% 2/4', 'drawing:  75% 3/4', 'drawing: 100% 4/4']
    assert all('left' in l and '\r' not in l for l in lines)
    monkeypatch.setenv('DIFFCLIP_PROGRESS', 'bar')
    assert not isinstance(progress(range(2)), LineBar)


def test_the_time_left_of_a_whole_command(monkeypatch, tmp_path):
    plan = Plan(dict(tune=60., draw=40.))
    assert plan.left() == 100.                          # nothing known of this machine: as recorded
    plan.begin('tune'); plan.tic -= 30                  # 30 s ago, and its bar says that 90 are left
    assert plan.left(90.) == pytest.approx(90 + 2 * 40, rel=.01)
    plan.end('tune'); plan.took = 120.
    assert plan.left() == pytest.approx(80)             # drawing, on a machine half as fast
    plan.begin('draw'); plan.end('draw', found=True)
    assert plan.left() is None
    odd = Plan(dict(tune=60.)); odd.begin('unknown')
    assert odd.left(10.) == 70.                         # a step that no record knows
    record = tmp_path/'figure2.json'; record.write_text('{"seconds": {"finetune": 10, "odd": "x"}}')
    monkeypatch.setenv('DIFFCLIP_WHOLE', os.pathsep.join([str(record), str(tmp_path/'missing.json')]))
    whole_plan.cache_clear()
    assert whole_plan().steps == dict(finetune=10)
    monkeypatch.delenv('DIFFCLIP_WHOLE'); whole_plan.cache_clear()
    assert whole_plan().left() is None


def test_side_by_side_keeps_the_order_and_passes_errors_on():
    assert list(side_by_side(math.sqrt, [9, 0, 4], workers=1)) == [3, 0, 2]
    assert list(side_by_side(math.sqrt, [9, 0, 4], workers=2)) == [3, 0, 2]
    with pytest.raises(ValueError, match='math domain'): list(side_by_side(math.sqrt, [1, -1], workers=2))
    assert list(side_by_side(math.sqrt, [])) == []


# ---- records and figures ----------------------------------------------------------------------------------------------------

def a_record(**kw):
    args = dict(figure='figure3', profile='embedded', config=Config(), seeds=range(2), weights=dict(unet=dict(name='a', sha256='0', provenance='shipped')),
                data=dict(name='faces'), numbers=dict(loss=torch.tensor([1., 2.])), summary=dict(acc=dict(mean=.5, ci95=(.4, .6), n_seeds=2)), tolerance=dict(acc=.02))
    return make_record(**{**args, **kw})


def test_make_record():
    r = a_record()
    assert r['config'] == dict(t0=500, where='runs', sizes=[1, 2]) and r['seeds'] == [0, 1] and r['numbers'] == dict(loss=[1., 2.])
    assert r['versions'] == versions() and r['commit'] == git_commit()
    assert json.loads(json.dumps(r)) == r


@pytest.mark.parametrize('change, message', [
    (dict(weights=dict(unet=dict(name='a'))), r'record of figure3: weights.unet lacks sha256; weights.unet lacks provenance'),
    (dict(weights=dict(clip=dict(name='a', sha256='0', provenance='mine'))), r"weights.clip.provenance is 'mine', not one of shipped, local, published, random"),
    (dict(summary=dict(acc=dict(mean=.5))), r'summary.acc lacks ci95; summary.acc lacks n_seeds'),
    (dict(summary=dict(acc=dict(mean=.5, ci95=[.6, .4], n_seeds=2))), r'summary.acc.ci95 is \[0.6, 0.4\], not \[low, high\]'),
    (dict(tolerance=dict(accuracy=.1)), r'tolerance.accuracy has no metric of that name'),
    (dict(numbers=[1]), r'numbers is not a dict'),
])
def test_bad_records_are_refused(change, message):
    with pytest.raises(UserError, match=message): a_record(**change)


def test_record_lists_all_missing_keys():
    r = a_record()
    for k in ('seeds', 'commit'): del r[k]
    with pytest.raises(UserError, match='record of figure3: seeds is missing; commit is missing'): validate_record(r)


def draw(seed):
    core.set_style()
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot(np.random.default_rng(seed).random(5), label='a', color=COLOURS['source'])
    ax.legend()
    plt.close(fig)
    return fig


def test_save_figure_writes_four_files_and_the_same_bytes(tmp_path):
    table = pd.DataFrame(dict(epoch=[1, 2], accuracy=[.1, 1 / 3]))
    one, two = (save_figure(draw(0), a_record(), table, root=tmp_path/n) for n in 'ab')
    assert listing(tmp_path/'a') == ['embedded'] + [f'embedded/figure3.{e}' for e in ('csv', 'json', 'pdf', 'png')]
    for ext in ('png', 'pdf', 'json', 'csv'): assert one[ext].read_bytes() == two[ext].read_bytes(), ext
    other = save_figure(draw(1), a_record(), table, root=tmp_path/'c')
    assert other['png'].read_bytes() != one['png'].read_bytes()
    assert read_json(one['json']) == a_record()
    pd.testing.assert_frame_equal(pd.read_csv(one['csv']), table)
    assert Image.open(one['png']).width > 300 and one['pdf'].read_bytes()[:4] == b'%PDF'


def test_save_figure_same_bytes_from_another_process(tmp_path):
    "Neither the time nor Python's hash seed shows in the files."
    code = ('import sys; sys.path.insert(0, sys.argv[1]); import test_core as t\n'
            't.save_figure(t.draw(0), t.a_record(), root=sys.argv[2])')
    subprocess.run([sys.executable, '-c', code, str(Path(__file__).parent), str(tmp_path/'a')], check=True, env={**os.environ, 'PYTHONHASHSEED': '1', 'MPLBACKEND': 'Agg'})
    save_figure(draw(0), a_record(), root=tmp_path/'b')
    for ext in ('png', 'pdf', 'json', 'csv'):
        a, b = ((tmp_path/n/'embedded'/f'figure3.{ext}').read_bytes() for n in 'ab')
        assert a == b, ext


def test_save_figure_without_table_writes_the_summary(tmp_path):
    paths = save_figure(draw(0), a_record(), root=tmp_path)
    assert paths['csv'].read_text() == 'metric,mean,n_seeds\nacc,0.5,2\n'


def test_save_figure_checks_the_record_first(tmp_path):
    r = a_record()
    del r['weights']
    with pytest.raises(UserError, match='weights is missing'): save_figure(draw(0), r, root=tmp_path)
    assert listing(tmp_path) == []


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'utf-8'])
def test_names_in_any_script_are_told_on_any_console(encoding):
    "A console of Windows knows 256 characters; one more in a file's name must not end the command."
    code = "from diffclip_da.core import UserError, friendly_exit\n@friendly_exit\ndef main():\n    print('reading \u0444\u043e\u0442\u043e.jpg')\n    raise UserError('\u732b.png: damaged')\nmain()"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, env={**os.environ, 'PYTHONIOENCODING': encoding, 'PYTHONUTF8': '0'})
    assert done.returncode == 2 and b'Traceback' not in done.stderr
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert ('\u0444\u043e\u0442\u043e.jpg' if encoding == 'utf-8' else '\\u0444\\u043e\\u0442\\u043e.jpg') in out and ('\u732b' if encoding == 'utf-8' else '\\u732b') in err
