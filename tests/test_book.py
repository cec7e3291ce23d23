"The book names every notebook, module and figure, and fetches nothing. These tests need no tool that builds it."
import ast
import json
import re
from types import SimpleNamespace

import book
import pytest
from openings import NBS


def leaves(nav) -> list:
    "The pages that a navigation names."
    if isinstance(nav, str): return [nav]
    return [leaf for entry in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(entry)]


def test_every_notebook_and_module_is_named_once():
    pages = leaves(book.settings()['nav'])
    assert sorted(p for p in pages if p.endswith('.ipynb')) == sorted(f'nbs/{p.name}' for p in NBS.glob('*.ipynb'))
    assert [p for p in pages if p.startswith('api/')] == [f'api/{book.dotted(m)}.md' for m in book.modules()]
    assert len(book.modules()) > 40 and len(pages) == len(set(pages))


def test_a_notebook_of_no_part_is_refused(monkeypatch):
    monkeypatch.setitem(book.PARTS, 'Diffusion', '02 03 04')
    with pytest.raises(SystemExit, match='05_ddim.ipynb belongs to 0 parts'): book.chapters()


def test_nothing_is_fetched():
    settings = book.settings()
    assert settings['theme']['font'] is False and not settings['use_directory_urls']
    assert not re.search('https?:', json.dumps([settings, book.MATHJAX, book.STYLE, book.WORKER]))
    assert settings['extra']['polyfills'] == ['iframe-worker.js']   # the plugin would take one from a network


@pytest.mark.parametrize('module', book.modules(), ids=lambda m: m.stem)
def test_the_api_shows_what_a_module_defines(module):
    page, tree = book.api_page(module), ast.parse(module.read_text(encoding='utf-8'))
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'): continue
        assert f'## `{node.name}`' in page
        for line in (ast.get_docstring(node) or '').split('\n')[:1]: assert line in page
    for code in re.findall(r'^```python\n(.*?)\n```$', page, re.S | re.M):
        assert re.match(r' *(def |class |@)', code), code


def test_a_signature_keeps_the_words_about_its_arguments():
    for module, line in (('diffusion/ddim.py', 't,       # int or integer tensor [b]: where the step starts'),
                         ('adaptation/finetune.py', 'n_images: int = 200         # images to tune on, at most')):
        assert line in book.api_page(book.PACKAGE/module)


def test_the_page_of_figures_shows_all_of_them():
    shown = re.findall(r'\]\((figures/\S+\.png)\)', book.figures_page())
    assert shown == [p.relative_to(book.ROOT).as_posix() for p in book.figures()]


def test_links_lead_to_pages_and_a_notebooks_scripts_are_left_out():
    page = SimpleNamespace(file=SimpleNamespace(src_uri='nbs/05_ddim.ipynb'))
    html = ('<style>a {}</style><a href="04_reverse.ipynb#way">x</a><a href="../README.md">y</a>'
            '<a href="https://a.b/c.ipynb">z</a><script>1</script>')
    assert book.on_page_content(html, page) == ('<a href="04_reverse.html#way">x</a><a href="../index.html">y</a>'
                                                '<a href="https://a.b/c.ipynb">z</a>')
