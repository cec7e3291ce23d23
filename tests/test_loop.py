"One training loop: interruption, growth, refusals, the average and the rate"
import pytest
import torch
from torch import nn

from diffclip_da.core import UserError, new_generator
from diffclip_da.models import loop
from diffclip_da.models.loop import NanLoss, TrainingLoop, ahead, bfloat16_or_not, fast_bfloat16, moving_average, rate_factor, set_rate


def fit(path, n_steps=12, stop_at=None, settings=None, nan_at=None, **kw):
    "A small network with batch norm, its average and dropped numbers from a generator."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    mean, opt = moving_average(net, .99), torch.optim.AdamW(net.parameters(), .01)
    t = TrainingLoop(path, dict(net=net, mean=mean, opt=opt), dict(lr=.01, n_steps=n_steps) | (settings or {}), ['n_steps'], new_generator(0))
    def step(k):
        if k == stop_at: raise KeyboardInterrupt
        set_rate(opt, .01 * rate_factor(k, n_steps, 3))
        x = torch.rand(8, 2, generator=t.generator)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean() * (float('nan') if k == nan_at else 1)
        opt.zero_grad(); loss.backward(); opt.step(); mean.update_parameters(net)
        return dict(loss=loss.detach(), k=k)
    return t, mean, t.run(step, n_steps, every=4, **kw)


def state(mean): return mean.state_dict().values()


@pytest.mark.parametrize('dies_at', [2, 4, 7, 11])
def test_an_interruption_leaves_no_trace(tmp_path, dies_at):
    _, whole, h = fit(tmp_path/'whole.pt')
    with pytest.raises(KeyboardInterrupt): fit(tmp_path/'cut.pt', stop_at=dies_at)
    assert (tmp_path/'cut.pt').exists() == (dies_at >= 4) and not list(tmp_path.glob('*.tmp'))
    t, resumed, h2 = fit(tmp_path/'cut.pt')
    assert h == h2 and all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed)))
    assert [row['k'] for row in h] == list(range(12)) and t.step == 12 and all(isinstance(row['loss'], float) for row in h)


def test_a_finished_training_grows_and_takes_no_step_otherwise(tmp_path):
    _, longer, h = fit(tmp_path/'a.pt', 16)
    fit(tmp_path/'b.pt', 10)
    again, _, h10 = fit(tmp_path/'b.pt', 10, stop_at=0)
    assert len(h10) == 10 and again.seconds > 0
    _, grown, h2 = fit(tmp_path/'b.pt', 16)
    assert h == h2 and all(torch.equal(a, b) for a, b in zip(state(longer), state(grown)))


def test_a_foreign_checkpoint_is_refused_with_what_differs(tmp_path):
    fit(tmp_path/'a.pt', settings=dict(data='cats', size=(64, 64)))
    fit(tmp_path/'a.pt', settings=dict(data='cats', size=[64, 64]))
    with pytest.raises(UserError, match=r'other settings \(data\): data was cats and is dogs now'): fit(tmp_path/'a.pt', settings=dict(data='dogs', size=(64, 64)))
    with pytest.raises(UserError, match=r'other settings \(size\)'): fit(tmp_path/'a.pt', settings=dict(data='cats'))
    for bad in (b'not a checkpoint', b''):
        (tmp_path/'b.pt').write_bytes(bad)
        with pytest.raises(UserError, match='b.pt is not a readable checkpoint'): fit(tmp_path/'b.pt')


def test_a_loss_that_is_no_number_stops_and_the_checkpoint_before_stays(tmp_path):
    with pytest.raises(NanLoss, match=r'nan at step 6: lower lr \(now 0.01\)'): fit(tmp_path/'a.pt', nan_at=5)
    assert torch.load(tmp_path/'a.pt', weights_only=True)['step'] == 4


def test_the_log_is_called_at_each_checkpoint(tmp_path):
    seen = []
    fit(tmp_path/'a.pt', 10, log=lambda t: seen.append((t.step, len(t.history), t.path.exists())))
    assert seen == [(4, 4, True), (8, 8, True), (10, 10, True)]


def test_the_average_forgets_its_start_and_counts_nothing_in_between():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)); mean = moving_average(net, .9)
    nn.init.constant_(net[0].weight, 5.); mean.update_parameters(net)
    assert mean.module[0].weight.item() == 5 and not mean.module.training and not any(p.requires_grad for p in mean.parameters())
    nn.init.constant_(net[0].weight, 1.); net[1].num_batches_tracked.fill_(7)
    for _ in range(3): mean.update_parameters(net)
    want = 5 * (2 / 11) * (3 / 12) * (4 / 13) + 1 - (2 / 11) * (3 / 12) * (4 / 13)
    assert mean.module[0].weight.item() == pytest.approx(want, rel=1e-5) and mean.module[1].num_batches_tracked == 7


@pytest.mark.parametrize('step, decay, factor', [(0, .5, .1), (4, .5, .5), (20, .5, 1.), (75, .5, .5), (100, .5, 0.), (200, .5, 0.), (99, 0., 1.)])
def test_the_rate_climbs_stays_and_falls(step, decay, factor): assert rate_factor(step, 100, 10, decay) == pytest.approx(factor)


def test_bfloat16_only_where_it_is_fast(monkeypatch, capsys):
    for has, fast in ((dict(), False), (dict(avx2=True), False), (dict(avx512_bf16=True), True), (dict(amx_bf16=True), True)):
        monkeypatch.setattr(loop.torch.cpu, 'get_capabilities', lambda has=has: has)
        assert fast_bfloat16('cpu') is fast and bfloat16_or_not(True) is fast and bfloat16_or_not(False) is False
    assert capsys.readouterr().out.count('computing in float32') == 2


@pytest.mark.parametrize('has, want', [(dict(avx512_bf16=True), 'bfloat16'), (dict(amx_bf16=True), 'bfloat16'), (dict(avx2=True), 'float32'), ({}, 'float32')])
def test_the_fastest_number_type_is_that_of_the_processor(monkeypatch, has, want):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    assert loop.fast_dtype() == want
    monkeypatch.delattr(torch.cpu, 'get_capabilities')   # an older torch
    assert loop.fast_dtype() == 'float32'


def test_a_loss_that_has_grown_tenfold_stops_before_it_is_kept(tmp_path):
    net, losses = nn.Linear(1, 1), [1.] * 24 + [30.] * 16
    t = TrainingLoop(tmp_path/'a.pt', dict(net=net), dict(lr=.3))
    with pytest.raises(NanLoss, match=r'diverged: the loss was 1 in the first ten steps, and 30 in those before step 36; lower lr .now 0.3'):
        t.run(lambda k: losses[k], 40, every=12)
    assert TrainingLoop(tmp_path/'a.pt', dict(net=net), dict(lr=.3)).step == 24   # the checkpoint is from before
    t = TrainingLoop(tmp_path/'b.pt', dict(net=net), dict(lr=.3))
    t.run(lambda k: [0., 5., 9.][min(k, 2)] - 1, 40)   # a loss that begins at or below 0 says nothing


def test_checkpoints_come_by_the_clock(tmp_path, monkeypatch):
    from diffclip_da import store
    now, saved = [0.], []
    monkeypatch.setattr(store.time, 'monotonic', lambda: now[0])
    t = TrainingLoop(tmp_path/'a.pt', dict(net=nn.Linear(1, 1)), {})
    def step(k): now[0] += 4.; return 1.
    t.run(step, 50, log=lambda t: saved.append(t.step))
    assert saved == [3, 18, 33, 48, 50]   # after 12 s, then once a minute, and at the end


def test_a_flipped_bit_in_a_training_checkpoint_is_named(tmp_path):
    from test_store import flips
    fit(tmp_path/'a.pt')
    _, mean, h = fit(tmp_path/'a.pt')
    want, named = [v.clone() for v in state(mean)], 0
    for bit, b in flips(tmp_path/'a.pt', 150):
        (tmp_path/'b.pt').write_bytes(b)
        try: _, got, h2 = fit(tmp_path/'b.pt')
        except UserError as e: assert 'b.pt' in str(e); named += 1; continue
        assert h == h2 and all(torch.equal(a, b) for a, b in zip(want, state(got))), bit
    assert named > 50


def test_temporaries_of_a_killed_training_go(tmp_path):
    (tmp_path/'a.pt.99999999-0123abcd.tmp').write_bytes(b'half wri')
    fit(tmp_path/'a.pt')
    assert [p.name for p in tmp_path.iterdir()] == ['a.pt']


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_made_ahead_come_in_order_from_any_step(workers):
    got = list(ahead(lambda k: (torch.full((3,), k), str(k)), range(5, 16), workers))
    assert [int(x[0]) for x, _ in got] == list(range(5, 16)) and [s for _, s in got] == [str(k) for k in range(5, 16)]


def test_what_a_batch_maker_raises_reaches_the_training():
    def make(k):
        if k == 2: raise UserError('picture 2 is damaged')
        return torch.zeros(1)
    for workers in (0, 1):
        with pytest.raises(UserError, match='picture 2 is damaged'): list(ahead(make, range(4), workers))
