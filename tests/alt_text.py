"""Alt text of the notebooks' pictures: copied from a cell's line `#| fig-alt: ...` (Quarto's cell option) into its stored outputs, where
nbconvert reads it; and progress bars, which are of no use to a reader, taken out of the stored outputs. Run it after outputs were refreshed:
`python tests/alt_text.py`."""
import json, re
from pathlib import Path

NBS = Path(__file__).parents[1]/'nbs'


def pictures(cell):
    "(output, mime type) for each picture among a code cell's outputs."
    return [(o, m) for o in cell.get('outputs', []) for m in o.get('data', {}) if m.startswith('image/')]


def said(cell) -> str|None:
    "The cell's alt text."
    found = re.search(r'^#\| fig-alt: (.+)$', ''.join(cell['source']), re.M)
    return found and found[1].strip()


def is_bar(output) -> bool:
    "Whether an output is what a progress bar left behind, as a terminal or a log shows it."
    return output.get('name') == 'stderr' and bool(re.search(r'\r|\d+/\d+, [\d:]+ left', ''.join(output['text'])))


def describe(nb) -> list:
    "Put the text beside every picture; ids of the cells that have a picture and no text."
    missing = []
    for cell in nb['cells']:
        if 'outputs' in cell: cell['outputs'] = [o for o in cell['outputs'] if not is_bar(o)]
        for output, mime in pictures(cell):
            if said(cell): output['metadata'] = {**output.get('metadata', {}), mime: dict(alt=said(cell))}
            else: missing.append(cell['id'])
    return missing


def main():
    problems = []
    for path in sorted(NBS.glob('*.ipynb')):
        nb = json.loads(path.read_text(encoding='utf-8'))
        problems += [f'{path.name}: cell {i} shows a picture but has no line "#| fig-alt: what it shows"' for i in describe(nb)]
        path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    print('\n'.join(problems))
    return 1 if problems else 0


if __name__ == '__main__': raise SystemExit(main())
