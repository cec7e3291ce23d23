"One door to every network: names, folders, tags, ensembles"
import pytest
import torch
from torch.nn import functional as F

from diffclip_da.core import UserError
from diffclip_da.models import load
from diffclip_da.models.clip import TINY, ClipEnsemble, new_clip
from diffclip_da.models.identity import MobileFaceNet
from diffclip_da.models.load import load_embedder, load_guide, load_unet, options_in, toy_models
from diffclip_da.workshop.train_clip import save_clip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny CLIP in open_clip's local layout, in a folder whose name has a plus and a slash before it."
    d = tmp_path_factory.mktemp('clips')/'ours+more'
    save_clip(new_clip(TINY)[0].eval(), d, TINY, 'tiny')
    return d


@pytest.fixture
def named(monkeypatch):
    "What `named_clip` is asked for, instead of a download."
    asked = []
    def ask(name, pretrained=None):
        asked.append((name, pretrained))
        return toy_models()[1]
    monkeypatch.setattr(load, 'named_clip', ask)
    return asked


@pytest.mark.parametrize('spec, asked', [
    ('ViT-B-16', [('ViT-B-16', None)]), ('ViT-B-16/openai', [('ViT-B-16', 'openai')]), ('ViT-B-16//some/where.pt', [('ViT-B-16', '/some/where.pt')]),
    ('ViT-B-16/weights/mine.pt', [('ViT-B-16', 'weights/mine.pt')]), ('hf-hub:timm/ViT-B-16-SigLIP', [('hf-hub:timm/ViT-B-16-SigLIP', None)]),
    ('ViT-B-16/openai+ViT-B-32/laion2b_s34b_b79k', [('ViT-B-16', 'openai'), ('ViT-B-32', 'laion2b_s34b_b79k')]),
    (['ViT-B-16/openai', 'ViT-B-32'], [('ViT-B-16', 'openai'), ('ViT-B-32', None)])])
def test_a_published_guide_is_named_with_its_weights(named, spec, asked):
    clip = load_guide(spec)
    assert named == asked and isinstance(clip, ClipEnsemble) == (len(asked) > 1)


def test_weights_may_be_named_apart(named):
    load_guide('ViT-B-16', 'mine.pt'); load_guide('ViT-B-16/openai', 'mine.pt')
    assert named == [('ViT-B-16', 'mine.pt'), ('ViT-B-16', 'openai')]


def test_a_folder_is_a_folder_whatever_its_name(folder, named):
    one = load_guide(folder)
    assert one.info['name'] == 'ours+more' and load_guide(str(folder)).info == load_guide(f'local-dir:{folder}').info == one.info and not named


def test_several_guides_are_one(folder):
    both = load_guide(['toy', folder])
    assert both.info['name'] == 'toy CLIP+ours+more' and both.info['provenance'] == 'published+random'
    assert both.encode_image(torch.zeros(1, 3, 16, 16)).shape == (1, 48)
    assert load_guide('toy+toy').encode_text('a sketch').shape == (1, 32) and load_guide(['toy']).info == load_guide('toy').info


@pytest.mark.parametrize('spec, message', [
    ([], 'list of names is empty'), ('', 'neither a folder nor a model'), ('toy+', "'' is neither"), ('toy,toy', "'toy,toy' is neither"),
    ('ViT-B-17/openai', 'neither a folder nor a model.*nearest'), ('ViT-B-16/nowhere', "no weights 'nowhere'.*openai"), ('/no/such/folder', 'neither a folder')])
def test_guides_that_are_not_there(spec, message):
    with pytest.raises(UserError, match=message): load_guide(spec)


def test_toys_answer_to_every_door():
    unet, clip, face = toy_models()
    assert load_unet('toy').info == unet.info and load_guide('toy').info == clip.info and load_embedder('toy').info == face.info
    assert load_unet('toy', image_size=32).image_size == 32 and {m.info['provenance'] for m in (unet, clip, face)} == {'random'}
    with pytest.raises(UserError, match='sha256'): load_unet('toy', sha256='0' * 64)


def test_a_mobilefacenet_is_known_by_its_content(tmp_path):
    torch.manual_seed(0); net = MobileFaceNet().eval(); torch.save(net.state_dict(), tmp_path/'judge.pt')
    judge, x = load_embedder(tmp_path/'judge.pt', face_box=(0, 0, 1, 1)), torch.rand(1, 3, 112, 112) * 2 - 1
    with torch.no_grad(): torch.testing.assert_close(judge.embed(x), F.normalize(net(x), dim=-1))
    assert judge.info['name'] == 'mobilefacenet/judge.pt' and judge.size == 112


# ---- settings in a name -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, bare, options', [
    ('adm.pt?num_heads=4&image_size=64', 'adm.pt', dict(num_heads=4, image_size=64)), ('C:\\models\\adm.pt?qkv_order=qkv', 'C:\\models\\adm.pt', dict(qkv_order='qkv')),
    ('owner/name?revision=main', 'owner/name', dict(revision='main')), ('shipped', 'shipped', {}), ('C:/models/unet', 'C:/models/unet', {})])
def test_a_name_carries_settings_behind_a_question_mark(name, bare, options): assert options_in(name) == (bare, options)


def test_settings_in_a_name_are_checked(tmp_path):
    for bad in ('m.pt?', 'm.pt?heads=4', 'm.pt?num_heads=four', 'm.pt?num_heads=4&'):
        with pytest.raises(UserError, match=r'behind the question mark stand settings of the form num_heads=4.*image_size'): load_unet(bad)
    (tmp_path/'really?num_heads=4').mkdir()
    assert options_in(tmp_path/'really?num_heads=4') == (str(tmp_path/'really?num_heads=4'), {})
    with pytest.raises(UserError, match='only for published weights'): load_unet('shipped?image_size=32')
    assert load_unet('toy?image_size=32').image_size == 32


@pytest.mark.parametrize('name', ['C:\\models\\unet', 'C:/models/unet', 'D:unet.pt', '\\\\server\\share\\unet.safetensors'])
def test_windows_paths_that_are_not_there_are_named(name):
    for load in (load_unet, load_guide, load_embedder):
        with pytest.raises(UserError) as e: load(name)
        assert name.replace('\\', '') in str(e.value).replace('\\', '')
