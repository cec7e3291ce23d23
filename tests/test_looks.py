"What the shipped guide can mean, and what it is asked before any work"
import json

import pytest
from PIL import Image

from diffclip_da.adaptation.folder import main
from diffclip_da.models.clip import ClipEnsemble
from diffclip_da.models.load import load_guide
from diffclip_da.models.looks import NONE, doubts, looks_of, meaning, unread, words_in
from diffclip_da.store import asset_file
from diffclip_da.workshop.train_clip import STYLE_WORDS, MEASURED_STYLES, taught


@pytest.fixture(scope='module')
def guide(): return load_guide('shipped')


@pytest.fixture(scope='module')
def looks(guide): return looks_of(guide)


def test_what_ships_is_what_the_grammar_taught():
    said = json.loads(asset_file('clip', 'looks.json').read_text())
    assert said == json.loads(json.dumps(taught()))


def test_words():
    assert words_in('An 8-bit image, Van Gogh\'s "sketch"') == ['an', '8-bit', 'image', 'van', 'gogh', 's', 'sketch']


def test_words_that_were_never_read_are_named_with_those_spelt_alike(looks):
    assert unread('a pencil sketch of an old man', looks) == {}
    assert unread('a pixar charcoel', looks) == {'pixar': [], 'charcoel': ['charcoal']}


def test_other_wordings_of_the_looks_are_known(guide, looks):
    texts = [(k, text) for k, (_, unseen) in STYLE_WORDS.items() if k != 'photo' for text in unseen]   # never read in training
    found = {text: (k, *meaning(guide, 'photo', text, looks)[:2]) for k, text in texts}
    lost = [text for text, (k, _, cosine) in found.items() if cosine <= NONE]
    other = [text for text, (k, look, _) in found.items() if look != k]
    assert len(texts) == 60 and len(lost) <= 2 and len(other) <= 4, (lost, other)


def test_doubts(guide):
    for text in ('sketch', 'a watercolour', 'a pencil drawing of a woman'): assert doubts(guide, 'photo', text) == []
    assert "never read 'pixar'" in doubts(guide, 'photo', 'a pixar character')[0]
    assert 'expect nonsense' in doubts(guide, 'photo', 'a zebra')[1]
    assert 'weak' in doubts(guide, 'photo', 'a smiling man')[0]
    assert 'hardly differs' in doubts(guide, 'photo', 'a snapshot')[0]
    assert all('--clip ViT-B-16/openai' in doubts(guide, 'photo', t)[-1] for t in ('a zebra', 'a snapshot'))


def test_another_guide_is_not_doubted(guide):
    toy = load_guide('toy')
    assert looks_of(toy) is None and doubts(toy, 'photo', 'a zebra') == []
    assert doubts(ClipEnsemble([guide, toy]), 'photo', 'a zebra') == [], 'the other one may know it'


def test_the_command_line_lists_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['--list-looks', '--preview']) == 0
    said = capsys.readouterr().out
    assert all(k.replace('_', ' ') in said for k in MEASURED_STYLES) and 'looks.png' in said
    assert Image.open(tmp_path/'looks.png').size[0] > 500
