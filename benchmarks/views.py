"""What the guide has to see: fine-tunings with other views and terms, and how well a classifier trained on their pictures reads drawings by other hands.

    python benchmarks/views.py --celeba FOLDER [--only plain colour ...]

Each trial fine-tunes once, adapts 300 labelled training photos and trains the paper's CNN on them, four seeds. What is measured, one row of `views.csv`:
photo, pencil, line_art, charcoal, colour_pencil   mean balanced accuracy on 600 validation photos and on their drawings by four fixed filters
direction, identity    mean cosine of image and text direction in the guide, and of the faces before and after in the shipped embedder
whiteness, saturation  mean brightness (0-1) and mean spread of the colour channels (0-1); paper is bright and grey
grid                   `losses.grid_loss`: contrast of patterns of period two that the source does not have
No test picture is read, neither CelebA's nor of hand-drawn sketches.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from diffclip_da.adaptation.losses import grid_loss, text_direction
from diffclip_da.core import UserError, command, friendly_exit, image_grid, to_pil
from diffclip_da.data import celeba as celeba_set, find_celeba
from diffclip_da.store import atomic_write
from diffclip_da.study.baselines import Task, cnn
from diffclip_da.study.classify import score
from diffclip_da.study.evaluate import draw_set
from diffclip_da.study.experiment import Experiment
from diffclip_da.study.profile import get_profile

PLAIN = dict(id_weight=.3, grid_weight=3., colour_weight=0., n_crops=2, augment_scale=.8, augment_blur=0.)
COLOUR = PLAIN | dict(colour_weight=3.)
BLUR = COLOUR | dict(augment_scale=.5, augment_blur=.03)
TRIALS = dict(photos=None, pencil_filter=None, plain=PLAIN, blur_without_colour=PLAIN | dict(augment_blur=.03), colour=COLOUR, blur=BLUR, id_1=BLUR | dict(id_weight=1., grid_weight=6.),
              close_id_1=BLUR | dict(n_crops=4, augment_scale=.35, id_weight=1., grid_weight=6.), profile={})
STYLES = 'pencil', 'line_art', 'charcoal', 'colour_pencil'


def drawn(images, style, root):
    d = draw_set(images, style, Path(root)/f'views-{images.name}-{style}-{len(images)}')
    return d.tensor(d.ids, 64), d.labels_of(d.ids)


@torch.no_grad()
def appearance(exp, before, after):
    _, guide, face = exp.models
    u, pairs = (after + 1) / 2, list(zip(before.split(100), after.split(100)))
    delta = text_direction(guide, exp.profile.source, exp.profile.target)
    return dict(direction=torch.cat([torch.cosine_similarity(guide.encode_image(b) - guide.encode_image(a), delta) for a, b in pairs]).mean().item(),
                identity=torch.cat([(face.embed(a) * face.embed(b)).sum(1) for a, b in pairs]).mean().item(),
                whiteness=u.mean().item(), saturation=(u.amax(1) - u.amin(1)).mean().item(), grid=float(grid_loss(after, before)))


def trial(name, fields, celeba, tests):
    tic, exp = time.perf_counter(), Experiment(get_profile('celeba64', n_train=300, **(fields or {})), root='runs', folder=celeba)
    before, y = exp.tensors('train', 'original')
    after = before if name == 'photos' else drawn(exp.splits['train'], 'pencil', 'runs')[0] if name == 'pencil_filter' else exp.tensors('train', 'adapted')[0]
    task = Task((before, y), exp.tensors('valid', 'original'), training=exp.profile.training)
    predict = [cnn(task, (after, y), seed)[0] for seed in range(4)]
    row = {k: sum(score(t, p(x))['balanced_accuracy'] for p in predict) / len(predict) for k, (x, t) in tests.items()} | appearance(exp, before, after)
    to_pil(image_grid(torch.cat([before[:12], after[:12]]), 12)).resize((12 * 132, 2 * 132)).save(f'runs/views-{name}.png')
    return dict(trial=name, **{k: round(v, 4) for k, v in row.items()}, seconds=round(time.perf_counter() - tic), changed='; '.join(f'{k}={v}' for k, v in (fields or {}).items()))


@dataclass
class Options:
    "What the guide has to see."
    celeba: str = ''                 # CelebA's folder
    only: tuple[str, ...] = tuple(TRIALS) # trials
    out: str = str(Path(__file__).with_name('views.csv'))


@friendly_exit
def main(argv=None):
    args = command(Options, argv, prog='python benchmarks/views.py')
    if unknown := set(args.only) - set(TRIALS): raise UserError(f'no trial {unknown.pop()!r}; there are: {", ".join(TRIALS)}')
    whole = celeba_set(find_celeba(args.celeba), 'valid', 'Male')
    valid = whole.subset(whole.ids[:600])
    tests = dict(photo=(valid.tensor(valid.ids, 64), valid.labels_of(valid.ids)), **{s: drawn(valid, s, 'runs') for s in STYLES})
    for name in args.only:
        row = trial(name, TRIALS[name], args.celeba, tests)
        old = pd.read_csv(args.out) if Path(args.out).exists() else pd.DataFrame(columns=list(row))
        table = pd.concat([old[old.trial != name], pd.DataFrame([row])])
        with atomic_write(args.out, 'w') as f: table.to_csv(f, index=False, lineterminator='\n')
        print(pd.Series(row).to_string(), flush=True)
    return 0


if __name__ == '__main__': raise SystemExit(main())
