"The page to look at: what it shows, that it loads nothing, that names cannot break it; and how it behaves in a browser, where there is one."
import json, re, shutil, subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from conftest import encoded, picture

from diffclip_da.adaptation.report import MOST_PAIRS, curve, curves, page, roughly, spread, write_page
from diffclip_da.data import image_folder

ODD = 'a & <b>"b"<b> \'c\' é <script>alert(1)<script>.png'   # "/" is no part of a name
SAID = dict(source='photo', target='a <i>sketch</i>', skipped={'x<y.png': 'damaged & odd'}, recipe=dict(n_images=2), walk=dict(t0=400), compute=None,
            versions=dict(python='3'), models=dict(unet=dict(name='mine', provenance='published'), identity=None))
HISTORY = pd.DataFrame(dict(total=[3., 2., 1.], clip=[1., .8, .5], grad_norm=[1., 1., 1.], seconds=[30., 30., 30.]))


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp('sets')
    for kind in ('photos', 'sketches'):
        (root/kind).mkdir()
        for k, name in enumerate(('1.png', '2.png', ODD)): (root/kind/name).write_bytes(encoded(picture(k + 5 * (kind == 'photos')), 'PNG'))
    (root/'labels.csv').write_text('id,label\n1.png,"<u>x"\n2.png,y\n"' + ODD.replace('"', '""') + '",y\n')
    return image_folder(root/'photos', root/'labels.csv'), image_folder(root/'sketches')


@pytest.fixture(scope='module')
def text(sets): return page(*sets, 64, SAID, HISTORY)


class Reader(HTMLParser):
    "Elements that are not closed, and every attribute that could fetch something."
    VOID = 'meta', 'img', 'input', 'br', 'path', 'polyline'
    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.words = [], [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID: self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ('src', 'href', 'action', 'data', 'srcset', 'poster') or k.startswith('on')]
    def handle_startendtag(self, tag, attrs): self.tags.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.words.append(data)


def test_the_page_is_well_formed_and_asks_for_nothing(text):
    read = Reader(text)
    assert read.open == [] and read.tags.count('script') == 1 and read.tags.count('figure') == 3
    assert len(read.addresses) == 6 and all(a.startswith('data:image/png;base64,') for a in read.addresses)
    assert not re.search(r'https?:|url\(|@import|fetch\(|XMLHttp', text) and "default-src 'none'" in text


def test_names_labels_words_and_reasons_are_text(text):
    read = Reader(text)
    words = ' '.join(read.words)
    for w in (ODD, '<u>x', 'a <i>sketch</i>', 'x<y.png', 'damaged & odd'): assert w in words, w
    assert not {'b', 'u', 'i'} & {t for t in read.tags if t == 'u'} and read.tags.count('b') == 3 and read.tags.count('i') == 3   # labels and handles
    assert 'alert' not in text.replace('&lt;script&gt;alert(1)&lt;script&gt;', '')


def test_what_a_reader_wants_to_know_is_there(text):
    words = re.sub(r'\s+', ' ', ' '.join(Reader(text).words))
    for w in ('photo', '3 pictures, 64 px', 'fine-tuned on 2 of them in 3 updates, about 2 minutes', '1 left out', 'total loss', 'direction in CLIP', 'diffusion network',
              'mine (published or your own weights)', 't0', '400', 'all of them', '<u>x 1 · y 2'): assert w in words, w
    assert 'image-rendering: pixelated' in text and 'width=device-width' in text


def test_large_pictures_are_smooth_and_many_are_thinned_out(tmp_path, sets):
    assert 'data:image/jpeg' in (large := page(*sets, 200, SAID, None)) and 'pixelated' not in large and 'saved one' in large
    (tmp_path/'many').mkdir()
    for k in range(MOST_PAIRS + 20): (tmp_path/'many'/f'{k:03}.png').write_bytes(encoded(picture(k, (8, 8)), 'PNG'))
    many = image_folder(tmp_path/'many')
    text = page(many, many, 8, dict(SAID, skipped={}), None)
    assert text.count('<figure>') == MOST_PAIRS and f'{MOST_PAIRS} of {MOST_PAIRS + 20}' in text and 'every picture was used' in text
    assert '>000.png<' in text and f'>{MOST_PAIRS + 19:03}.png<' in text


def test_the_same_run_gives_the_same_page(tmp_path, sets, text):
    write_page(tmp_path/'r.html', *sets, 64, SAID, HISTORY.assign(seconds=[29., 32., 31.]))
    assert (tmp_path/'r.html').read_text(encoding='utf-8') == text


def test_curves_of_any_length_and_value():
    assert 'saved one' in curves(None) and 'saved one' in curves(HISTORY[:0])
    one = curve('x', [2.], '#000')
    assert 'nan' not in one and '48.0,110.0' in one
    y = [float(v) for v in re.findall(r',([\d.]+)', re.search(r'points="([^"]*)"', curve('x', [0., 1., .5], '#000'))[1])]
    assert y == [110, 22, 66]   # down is small
    assert spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([1], 5) == [1]
    assert [roughly(s) for s in (0, 59, 60, 480, 1_300, 18_000)] == ['under a minute', 'under a minute', 'about 1 minute', 'about 10 minutes', 'about 20 minutes', 'about 5 hours']


CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
PROBE = '''<script>window.addEventListener("load", () => {
  const box = document.querySelector(".wipe"), input = box.querySelector("input"), cut = () => getComputedStyle(box).getPropertyValue("--cut"), seen = [cut()];
  input.value = 80; input.dispatchEvent(new Event("input")); seen.push(cut());
  document.querySelectorAll(".bar button")[1].click(); seen.push(cut());
  input.focus();
  document.title = JSON.stringify({cuts: seen, wide: document.documentElement.scrollWidth, inner: innerWidth, focus: document.activeElement === input, picture: box.offsetWidth,
    loaded: [...document.images].every(i => i.naturalWidth > 0), columns: getComputedStyle(document.querySelector(".pairs")).gridTemplateColumns.split(" ").length}) })</script>'''


@pytest.mark.skipif(not CHROMIUM, reason='needs chromium')
@pytest.mark.parametrize('width', [1200, 500])   # headless chromium makes no window below 500
def test_in_a_browser_handles_move_and_nothing_sticks_out(tmp_path, text, width):
    (tmp_path/'r.html').write_text(text.replace('</body>', PROBE + '</body>'), encoding='utf-8')
    run = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path/"profile"}', f'--window-size={width},900', '--dump-dom', f'file://{tmp_path/"r.html"}']
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    title = re.search(r'<title>(\{.*?\})</title>', done.stdout)
    assert title, done.stderr[-2000:]
    saw = json.loads(title[1])
    assert saw['cuts'] == ['50%', '80%', '0%'] and saw['loaded'] and saw['focus']
    assert saw['wide'] <= saw['inner'] and saw['picture'] >= 145 and saw['columns'] >= 2
    assert 'Refused to' not in done.stderr
