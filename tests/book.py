"""`make book`: notebooks, README, results and API as one static site that needs no network, runs/book/site/index.html.

MkDocs builds it with the Material theme, mkdocs-jupyter renders the notebooks with their stored outputs, and MathJax
comes from a package. This file writes what MkDocs reads (runs/book/docs and runs/book/mkdocs.yml), and is itself the
hook that MkDocs calls for each page.
"""
import ast, json, re, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NBS = ROOT/'diffclip_da', ROOT/'nbs'
BOOK = ROOT/'runs'/'book'
PARTS = { # title of a part -> how the names of its notebooks begin
    'Start here': '00 01_try_it', 'Ground floor': '01_core 01b 01c 01d', 'Diffusion': '02 03 04 05',
    'Pictures and networks': '06 07 08', 'Words and losses': '09 10 11', 'Adapting': '12 13',
    'What it is worth': '14 15', 'How the shipped models were made': '16 17 18 19',
    'Figures': '20 21 22 23 24 25 26 27 28 29_ 35', 'Other systems of the paper': '29b 30 31 32 33 34'}
LINKED = 'LICENSE', 'RESULTS.md', 'tests/check_house.py'
MATHJAX = """const fonts = new URL('mathjax/output/chtml/fonts/woff-v2', document.currentScript.src).href;
window.MathJax = {tex: {inlineMath: [['$', '$']], displayMath: [['$$', '$$']], processEscapes: true},
  options: {enableMenu: false}, chtml: {fontURL: fonts}};"""
# Browsers start no worker from a folder of files; the search then runs in a hidden frame instead.
WORKER = """if (location.protocol === 'file:') window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement('iframe');
    frame.hidden = true; document.body.append(frame);
    const inner = frame.contentWindow;
    this.send = inner.postMessage.bind(inner);   // before the frame gets another one
    window.addEventListener('message', e => { if (e.source === inner) {
      this.dispatchEvent(new MessageEvent('message', {data: e.data})); if (this.onmessage) this.onmessage(e); } });
    this.ready = new Promise(resolve => inner.started = resolve);
    const load = `importScripts = (...urls) => Promise.all(urls.map(u => new Promise((ok, bad) => {
      const s = document.createElement('script');
      s.src = u; s.onload = ok; s.onerror = bad; document.body.append(s); })));`;
    frame.contentDocument.write(`<body><script>postMessage = m => parent.postMessage(m, '*'); ${load}</script>
      <script src="${url}"></script><script>started()</script></body>`);
    frame.contentDocument.close();
  }
  postMessage(data) { this.ready.then(() => this.send(data, '*')); }
};"""
STYLE = """.md-grid { max-width: 76rem; }
.jupyter-wrapper { --jp-content-font-size1: 16px; --jp-code-font-size: 13px; }
.jupyter-wrapper .jp-InputPrompt, .jupyter-wrapper .jp-OutputPrompt { display: none; }
.jupyter-wrapper details, .md-typeset details { border: 0; box-shadow: none; background: #f4f4f4; font-size: 1em; }
.jupyter-wrapper img { max-width: 100%; height: auto; }"""



def heading(nb: Path) -> str:
    "A notebook's title."
    return ''.join(json.loads(nb.read_text(encoding='utf-8'))['cells'][0]['source']).split('\n')[0].lstrip('# ')


def chapters() -> dict: # title of a part -> its notebooks
    "Every notebook in its part, in the order of the names."
    found = {part: [] for part in PARTS}
    for nb in sorted(NBS.glob('*.ipynb')):
        parts = [p for p, starts in PARTS.items() if nb.stem.startswith(tuple(starts.split()))]
        if len(parts) != 1:
            raise SystemExit(f'nbs/{nb.name} belongs to {len(parts)} parts of the book: see PARTS in tests/book.py')
        found[parts[0]].append(nb)
    return found


def signature(node, lines) -> str:
    "A definition up to its docstring, with the comments that say what each argument is; of a class its fields too."
    inside = node.body[1:] if ast.get_docstring(node) else node.body
    fields = [b for b in inside if isinstance(b, ast.AnnAssign)] if isinstance(node, ast.ClassDef) else []
    first = (node.decorator_list or [node])[0].lineno
    head = lines[first - 1:node.body[0].lineno - 1]
    if node.body[0].lineno == node.lineno: head = [ast.unparse(node).split(':\n')[0] + ': ...']   # all on one line
    return '\n'.join(head + [line for f in fields for line in lines[f.lineno - 1:f.end_lineno]])


def documented(node, lines, level=2, of='') -> list:
    "Heading, signature and docstring of a definition; of a class its methods with a docstring as well."
    text = re.sub(r'^Example:', '\n**Example:**', ast.get_docstring(node) or '', flags=re.M)
    found = [f'{"#" * level} `{of}{node.name}`', f'```python\n{signature(node, lines)}\n```', text]
    for m in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(m, ast.FunctionDef) and not m.name.startswith('_') and ast.get_docstring(m):
            found += documented(m, lines, level + 1, f'{node.name}.')
    return found


def modules() -> list:
    "The package's modules that notebooks export."
    return [p for p in sorted(PACKAGE.rglob('*.py'))
            if p.name != '_modidx.py' and '# AUTOGENERATED!' in p.read_text(encoding='utf-8')]


def dotted(module: Path) -> str:
    "A module's name inside the package."
    return '.'.join(module.relative_to(PACKAGE).with_suffix('').parts)


def api_page(module: Path) -> str:
    "What a module offers: each public name with its signature and docstring, as Markdown."
    source = module.read_text(encoding='utf-8')
    tree, lines = ast.parse(source), source.split('\n')
    nb = re.search(r'File to edit: \S*nbs/(\S+)\.ipynb', source)[1]
    out = [f'# diffclip_da.{dotted(module)}', ast.get_docstring(tree) or '',
           f'Written and explained in [{nb}](../nbs/{nb}.ipynb).']
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            out += documented(node, lines)
    return '\n\n'.join(out) + '\n'


def figures() -> list:
    "The pictures of all figures, by profile and number."
    return sorted((ROOT/'figures').rglob('figure*[0-9].png'), key=lambda p: (p.parent.name, int(re.sub(r'\D', '', p.stem))))


def figures_page() -> str:
    "All figures, each with the notebook that made it."
    out = ['# All figures', 'The numbers behind each picture are in the file `.json` beside it in the repository.']
    for png in figures():
        nb = next(NBS.glob(f'*_{png.stem}.ipynb'), None) or next(NBS.glob(f'{png.stem[6:]}_*.ipynb'))
        title = heading(nb)
        out += [f'## {png.parent.name}: {title}', f'![{title}]({png.relative_to(ROOT).as_posix()})',
                f'Made in [{nb.stem}](nbs/{nb.name}).']
    return '\n\n'.join(out) + '\n'


def settings() -> dict:
    "What MkDocs is told."
    parts = [{p: [{heading(n): f'nbs/{n.name}'} for n in nbs]} for p, nbs in chapters().items()]
    results = {'Results': 'RESULTS.md', 'All figures': 'figures.md', 'All numbers': 'figures/celeba64/tables.md',
               'Benchmarks': 'benchmarks/README.md'}
    nav = [{'README': 'index.md'}, *parts, {'Results': [{k: v} for k, v in results.items()]},
           {'API': [{dotted(m): f'api/{dotted(m)}.md'} for m in modules()]}]
    return dict(
        site_name='diffclip_da', docs_dir='docs', site_dir='site', nav=nav, use_directory_urls=False,
        hooks=[str(Path(__file__))], extra=dict(polyfills=['iframe-worker.js']),
        theme=dict(name='material', font=False,
                   features=['navigation.indexes', 'navigation.prune', 'navigation.footer', 'content.code.copy']),
        plugins=['search', 'offline', {'mkdocs-jupyter': dict(include=['*.ipynb'], cache=False, no_prompt=True)}],
        markdown_extensions=['tables', {'toc': dict(permalink=True)}, 'pymdownx.highlight', 'pymdownx.superfences'],
        extra_css=['jupyter.css', 'light.css', 'book.css'],
        extra_javascript=['mathjax.js', 'mathjax/tex-chtml-full.js'])


def on_page_content(html, page, **_) -> str:
    "MkDocs calls this with each page: links to notebooks lead to pages, and a notebook loses its styles and scripts."
    if page.file.src_uri.endswith('.ipynb'):   # the styles stand once in jupyter.css, the theme has a copy button
        html = re.sub(r'<(style|script|clipboard-copy)\b.*?</\1>|<div[^>]*class="clipboard-copy-txt".*?</div>', '',
                      html, flags=re.S).replace('highlight-ipynb', 'highlight')
    return re.sub(r'href="(?!https?:)([^"#]+)\.(?:ipynb|md)(#[^"]*)?"',
                  lambda m: f'href="{linked(m[1])}.html{m[2] or ""}"', html)


def linked(stem: str) -> str:
    "The page behind a link; a README is the first page of its folder."
    return re.sub(r'\bREADME$', 'index', stem)


def installed(name: str) -> Path: return Path(find_spec(name).submodule_search_locations[0])


def write_docs():
    "Everything that MkDocs reads, into runs/book."
    docs = BOOK/'docs'
    shutil.rmtree(docs, ignore_errors=True)
    for folder in ('nbs', 'benchmarks'):
        shutil.copytree(ROOT/folder, docs/folder, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__'))
    for path in [ROOT/name for name in LINKED] + figures() + sorted((ROOT/'figures').rglob('tables.md')):
        to = docs/path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True); shutil.copy(path, to)
    texts = {'index.md': (ROOT/'README.md').read_text(encoding='utf-8'), 'figures.md': figures_page(),
             'book.css': STYLE, 'mathjax.js': MATHJAX, 'iframe-worker.js': WORKER}
    texts |= {f'api/{dotted(m)}.md': api_page(m) for m in modules()}
    (docs/'api').mkdir()
    for name, text in texts.items(): (docs/name).write_text(text, encoding='utf-8')
    look = installed('mkdocs_jupyter')/'templates'/'mkdocs_html'/'assets'
    shutil.copy(look/'index.css', docs/'jupyter.css'); shutil.copy(look/'theme-light.css', docs/'light.css')
    mathjax = installed('mathjax')/'static'/'mathjax'/'es5'
    for part in ('output/chtml/fonts/woff-v2', 'a11y'): shutil.copytree(mathjax/part, docs/'mathjax'/part)
    shutil.copy(mathjax/'tex-chtml-full.js', docs/'mathjax')
    (BOOK/'mkdocs.yml').write_text(json.dumps(settings(), indent=1), encoding='utf-8')   # JSON is YAML


def main() -> int:
    write_docs()
    done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--quiet', '-f', str(BOOK/'mkdocs.yml')])
    if not done.returncode: print(f'open {(BOOK/"site"/"index.html").relative_to(ROOT)}')
    return done.returncode


if __name__ == '__main__': raise SystemExit(main())
