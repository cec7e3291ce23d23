"""How many views of a picture the regression on the guide's features should read: validation drawings by four filters, as they are and moved a little.

    python benchmarks/features.py --celeba FOLDER

Training pictures are those of the profile `celeba64` (photos, adapted photos, the pencil filter's drawings). Tested on drawings of other photos, which no network or classifier was trained on:
half of them lend 16 or all of their pictures without labels, with other shares of the classes, the other half are classified. One row of `features.csv` for each number of views, training set
and number of unlabelled pictures m: mean balanced accuracy and AUROC over four filters, moved or not. No test picture is read, neither CelebA's nor of hand-drawn sketches.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import interpolate

from diffclip_da.core import command, fold_seed, friendly_exit
from diffclip_da.store import atomic_write
from diffclip_da.study.baselines import reframed
from diffclip_da.study.classify import score
from diffclip_da.study.evaluate import draw_set, open_evaluation
from diffclip_da.study.features import choose_strength, fit_regression, target_scale, views_of
from diffclip_da.study.gallery import unused_photos

FILTERS = 'pencil', 'line_art', 'charcoal', 'colour_pencil'
SHARE, DRAWS = .6, 6   # of class 1 among the unlabelled pictures; sets of 16 of them


def corners(x): # [b, 3, h, w] -> 4 x [b, 3, h, w]
    n = x.shape[-1]
    k, e = n - n // 8, n // 8
    return [interpolate(x[..., i:i + k, j:j + k], (n, n), mode='bilinear', antialias=True) for i in (0, e) for j in (0, e)]


@torch.no_grad()
def all_views(clip, x): # [n, 3, h, w] -> {number of views: features [n, d]}
    parts = []
    for b in x.split(128):
        six, four = views_of(b), corners(b)
        z = torch.stack([clip.encode_image(v) for v in (six[0], six[3], *six[1:3], *six[4:], *four, *(v.flip(-1) for v in four))])
        parts.append(torch.stack([z[:k].mean(0) for k in (1, 2, 6, 14)]))
    return dict(zip((1, 2, 6, 14), torch.cat(parts, 1).double().numpy()))


def unlabelled(y, rng): # -> indices, SHARE of them of class 1
    one, other = (rng.permutation(np.flatnonzero(y == c)) for c in (1, 0))
    n = int(min(len(one) / SHARE, len(other) / (1 - SHARE)))
    return rng.permutation(np.concatenate([one[:round(n * SHARE)], other[:n - round(n * SHARE)]]))


def judged(z, y, test, views): # training features and labels; (all_views, labels) of drawings -> {m: (balanced accuracy, AUROC)}
    (found, labels), half = test, len(test[1]) // 2
    there, y_there = found[views][half:], labels[half:]
    pool = found[views][unlabelled(labels[:half], np.random.default_rng(0))]
    probe, rows = fit_regression([(z, y)], strength=choose_strength([(z, y)], pool)[0]), {}
    for m in (16, None):
        some = [np.random.default_rng(fold_seed(0, k)).permutation(len(pool))[:m] for k in range(DRAWS if m else 1)]
        said = [score(y_there, torch.from_numpy(probe.logits(there, target_scale(probe, pool[i]))).softmax(1)) for i in some]
        rows['all' if m is None else m] = tuple(np.mean([s[k] for s in said]) for k in ('balanced_accuracy', 'auroc'))
    return rows


@dataclass(frozen=True)
class Features:
    "Views of a picture and what they are worth."
    celeba: str = ''         # folder of CelebA; '': the environment variable CELEBA
    n: int = 300             # other photos to draw
    out: str = 'benchmarks/features.csv'


@friendly_exit
def main(argv=None):
    a = command(Features, argv)
    ev = open_evaluation('celeba64', a.celeba)
    exp, clip, rest = ev.exp, ev.part('clip'), unused_photos(ev.exp)
    other = rest.subset(rest.ids[:a.n])
    sets = dict(photos=exp.tensors('train', 'original'), adapted=exp.tensors('train', 'adapted'), filter=ev.tensors_of(ev.drawn('train')))
    sets = {k: (all_views(clip, x), np.asarray(y)) for k, (x, y) in sets.items()}
    tests = {}
    for f in FILTERS:
        x, y = ev.tensors_of(draw_set(other, f, Path('runs')/f'features-{f}-{a.n}'))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            moved = reframed(x)
        tests[f], tests[f'{f}, moved'] = ((all_views(clip, v), np.asarray(y)) for v in (x, moved))
        print('seen', f, flush=True)
    rows = []
    for views in (1, 2, 6, 14):
        for name, (z, y) in sets.items():
            found = {t: judged(z[views], y, test, views) for t, test in tests.items()}
            for m in (16, 'all'):
                for how, on in (('as they are', lambda t: 'moved' not in t), ('moved', lambda t: 'moved' in t)):
                    b, auroc = np.mean([r[m] for t, r in found.items() if on(t)], axis=0)
                    rows.append(dict(views=views, trained_on=name, m=m, drawings=how, balanced_accuracy=round(b, 4), auroc=round(auroc, 4)))
            print(pd.DataFrame(rows[-4:]).to_string(index=False, header=False), flush=True)
    with atomic_write(a.out, 'w') as f: pd.DataFrame(rows).to_csv(f, index=False, lineterminator='\n')


if __name__ == '__main__': main()
