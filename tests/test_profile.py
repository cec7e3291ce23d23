"Profiles: what they hold, how a setting is replaced, and the images and networks that they name."
from dataclasses import replace
from pathlib import Path

import pytest

from diffclip_da.adaptation.adapter import Compute
from diffclip_da.adaptation.finetune import CAREFUL, Recipe
from diffclip_da.core import UserError
from diffclip_da.data import find_celeba
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.diffusion.walk import Walk
from diffclip_da.models.load import load_guide
from diffclip_da.models.loop import fast_dtype
from diffclip_da.settings import homes, override
from diffclip_da.study.classify import Training
from diffclip_da.study.profile import PROFILES, get_profile, given, load_models, load_splits

REPO = Path(__file__).parent.parent


def test_profiles_are_the_papers_and_ours():
    e, c, p, script = (PROFILES[k] for k in ('embedded', 'celeba64', 'paper', 'paper_script'))
    assert (e.n_train, e.n_valid, e.n_test, e.walk, e.recipe, e.training) == (400, 100, 300, Walk(), Recipe(), Training())
    assert (c.n_train, c.n_valid, c.n_test, c.source, c.target, c.recipe) == (1200, 100, 300, 'photo', 'sketch', Recipe())
    assert e.compute.dtype == e.training.dtype == 'float32' and c.compute.dtype == c.training.dtype == fast_dtype()
    assert (p.size, p.walk, p.clip, p.embedder) == (256, Walk(t0=601), 'ViT-B-16/openai', 'facenet:vggface2')
    assert (p.recipe.images_per_update, p.recipe.n_images, p.recipe.passes) == (1, 50, 6)
    assert (script.walk.t0, script.walk.n_inv, script.walk.n_gen, script.walk.inversion, script.walk.grid) == (601, 40, 6, 'ddim', 'linear')
    assert script.walk.inverter == 'finetuned' and script.walk.evaluations == (39, 6)
    assert replace(script, name='paper', walk=p.walk) == p
    for q in PROFILES.values():
        q.walk.check(linear_schedule()); q.compute.check(); q.recipe.check(q.source, q.target)


def test_no_setting_is_stated_twice_with_another_meaning():
    "Two places may have a field of one name only where both names are needed to tell them apart."
    names = [k.rpartition('__')[2] for k in homes(PROFILES['embedded'])]
    assert sorted({n for n in names if names.count(n) > 1}) == ['batch_size', 'dtype', 'lr']


@pytest.mark.parametrize('name', [k for k in homes(PROFILES['embedded']) if k != 'name'])
def test_every_setting_can_be_overridden_by_its_full_name(name):
    now = PROFILES['embedded']
    for part in name.split('__'): now = getattr(now, part)
    other = (7, 8) if isinstance(now, tuple) else (not now if isinstance(now, bool) else 3 if isinstance(now, int) or now is None
             else now + .5 if isinstance(now, float) else dict(dtype='bfloat16', model='small').get(name.rpartition('__')[2], 'x'))
    got = override(PROFILES['embedded'], **{name: other})
    for part in name.split('__'): got = getattr(got, part)
    assert got == other


def test_overrides_are_checked():
    e = PROFILES['embedded']
    assert get_profile('embedded', n_inv=None) == e
    assert get_profile('embedded', recipe__lr=1, balanced='true', seeds=4, n_inv='12') == replace(
        e, recipe=replace(e.recipe, lr=1.), balanced=True, seeds=(4,), walk=replace(e.walk, n_inv=12))
    for bad, message in ((dict(n_innv=20), "no setting 'n_innv'; there are: name, dataset, .*n_inv"), (dict(n_inv=20.5), 'n_inv = 20.5 .float.; give int'),
                         (dict(n_inv=True), 'n_inv = True'), (dict(n_inv='many'), "n_inv = 'many'"), (dict(seeds='1,1'), 'all different'),
                         (dict(seeds=''), 'seeds'), (dict(n_test=0), 'n_test = 0: must be 1 or more'), (dict(model='big'), 'there are: paper, small'),
                         (dict(lr=1e-3), 'say recipe__lr or training__lr'), (dict(epochs=0), 'at least 1')):
        with pytest.raises(UserError, match=message): get_profile('embedded', **bad)
    with pytest.raises(UserError, match="no profile 'embeded'; there are: embedded, celeba64, paper, toy"): get_profile('embeded')


def test_given_takes_parameters_and_nothing_else():
    space = dict(profile='toy', celeba='', n_inv=3, t0=None, _x=1, exp=object(), In=['a'], Out={}, f=print)
    assert given(space) == dict(n_inv=3, t0=None)
    with pytest.raises(UserError, match="no setting 'n_innv'"): get_profile('toy', **given(dict(n_innv=3)))


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
    smiling = load_splits(get_profile('celeba64', n_train=10, n_valid=6, n_test=6, attribute='Smiling'))['train']
    assert smiling.classes == ['not Smiling', 'Smiling'] and not any('man' in c for c in smiling.captions)


def test_impossible_data_are_refused():
    with pytest.raises(UserError, match="attribute = 'Smiling'.*take a CelebA profile"): load_splits(get_profile('embedded', attribute='Smiling'))
    with pytest.raises(UserError, match="dataset = 'imagenet'; there are: faces, celeba"): load_splits(get_profile('embedded', dataset='imagenet'))


def test_networks_that_do_not_fit_are_refused():
    unet, guide, face = load_models(get_profile('toy'))
    assert unet.image_size == 16 and {m.info['provenance'] for m in (unet, guide, face)} == {'random'}
    with pytest.raises(UserError, match='neither a folder nor a model'): load_guide('ViT-B-17/openai')
    with pytest.raises(UserError, match="no weights 'nowhere'"): load_guide('ViT-B-16/nowhere')
    with pytest.raises(UserError, match='config.json'): load_models(replace(get_profile('toy'), unet=str(REPO)))
    with pytest.raises(UserError, match='works at 64 px; give size=64'): load_models(get_profile('embedded', size=32))
