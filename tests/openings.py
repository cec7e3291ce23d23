"""The Colab line of each notebook's opening. Its address is made from `git_url` of settings.ini, which is a placeholder until the repository has
a public home. After a change there: `python tests/openings.py` writes the line into every notebook that has an opening."""
import configparser, json, re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NBS = ROOT/'nbs'
OPENING = '**After this notebook you can**'


def git_url() -> str:
    settings = configparser.ConfigParser()
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    return settings['DEFAULT']['git_url']


def colab_line(name: str, url: str) -> str: # a notebook's stem; the repository's address
    "What the opening says about Colab: a link, and the command that installs the package there."
    return (f"[Open in Colab](https://colab.research.google.com/github/{url.split('/', 3)[3]}/blob/main/nbs/{name}.ipynb); "
            f"there, run `%pip install -q git+{url}` first.")


def opening_of(nb) -> dict|None: # the cell
    "The opening: a markdown cell right after the title."
    cell = nb['cells'][1]
    return cell if cell['cell_type'] == 'markdown' and ''.join(cell['source']).startswith(OPENING) else None


def with_colab(text: str, name: str, url: str) -> str:
    "The opening's text with the Colab line as its last paragraph."
    kept = re.split(r'\n\n\[Open in Colab\]', text)[0]
    return f'{kept}\n\n{colab_line(name, url)}'


def main():
    url = git_url()
    for path in sorted(NBS.glob('*.ipynb')):
        nb = json.loads(path.read_text(encoding='utf-8'))
        if not (cell := opening_of(nb)): continue
        old = ''.join(cell['source'])
        if (new := with_colab(old, path.stem, url)) == old: continue
        cell['source'] = new.splitlines(keepends=True)
        path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
