"""Search for the fine-tuning recipe of a profile, each trial one row of `recipes.csv` and one picture strip under runs/recipes/.

    python benchmarks/recipes.py --profile embedded --judge-clip FOLDER --judge-face mobilefacenet.pt
    python benchmarks/recipes.py --profile celeba64 --celeba FOLDER ... --only base t0_500

A trial changes some fields of the profile. What is measured, on the profile's validation images (never on its test images):
photo_cnn_original, photo_cnn_adapted  accuracy of the paper's CNN, trained on photos, mean over three seeds
direction_guide, direction_judge       mean cosine of image and text direction, in the guide and in a CLIP that was not the guide
identity_shipped, identity_judge       mean cosine between the faces before and after; the shipped embedder is part of the loss when id_weight > 0
gender_agreement                       share of images whose zero-shot gender in the judge CLIP (else the guide) stays the same
grid                                   `losses.grid_loss`: contrast of patterns of period two that the source does not have
whiteness, saturation                  mean brightness (0-1) and mean spread of the colour channels (0-1); paper is bright and grey
change_border, change_middle           mean absolute change in the outer eighth and in the rest (0-1): is the background drawn too?
"""
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from diffclip_da.adaptation.losses import grid_loss, text_direction
from diffclip_da.core import UserError, command, friendly_exit, image_grid, to_pil
from diffclip_da.models.clip import zero_shot
from diffclip_da.models.identity import load_teacher
from diffclip_da.models.load import load_guide
from diffclip_da.store import atomic_write
from diffclip_da.study.classify import predict, train_classifier
from diffclip_da.study.experiment import Experiment
from diffclip_da.study.profile import get_profile

# the recipe that the search began with; the profiles now hold what it ended with
BEFORE = dict(n_images=50, passes=6, recipe__lr=6e-5, l1_weight=.3)
TRIALS = dict(
    base={},
    **{name: BEFORE | fields for name, fields in dict(
        before={}, t0_500=dict(t0=500), t0_500_id_0=dict(t0=500, id_weight=0.), t0_500_id_01_l1_01=dict(t0=500, id_weight=.1, l1_weight=.1),
        t0_500_passes_10=dict(t0=500, passes=10), t0_600=dict(t0=600), passes_10=dict(passes=10), lr_1e4=dict(recipe__lr=1e-4),
        pencil_sketch=dict(target='a pencil sketch'), pencil_drawing=dict(target='a pencil drawing'), line_art=dict(target='line art'),
        charcoal=dict(target='charcoal drawing'), crops_4=dict(n_crops=4), clip_6=dict(clip_weight=6.),
        images_200=dict(n_images=200, l1_weight=.1), images_100_id_01=dict(n_images=100, passes=12, l1_weight=.03, id_weight=.1),
        images_100_lr_12e5=dict(n_images=100, passes=12, l1_weight=.03, recipe__lr=1.2e-4), images_200_clip_6=dict(n_images=200, passes=12, l1_weight=.1, clip_weight=6.)).items()},
    lr_12e5=dict(recipe__lr=1.2e-4),
    base_t0_500=dict(t0=500),
    images_400=dict(n_images=400, l1_weight=.01),
)


def direction(clip, before, after, p):
    a, b = clip.encode_image(before), clip.encode_image(after)
    return torch.cosine_similarity(b - a, text_direction(clip, p.source, p.target).to(a)).mean().item()


@torch.no_grad()
def measure(before, after, p, models, judge_clip, judge_face, cnns, y):
    _, guide, face = models
    edge = torch.ones(p.size, p.size, dtype=bool)
    k = p.size // 8
    edge[k:-k, k:-k] = False
    change, judge = (before - after).abs().mean((0, 1)) / 2, judge_clip or guide
    sexes = [zero_shot(judge, x, [['a woman'], ['a man']]).argmax(1) for x in (before, after)]
    u = (after + 1) / 2
    row = dict(photo_cnn_original=sum(predict(m, before).argmax(1).eq(y).float().mean().item() for m in cnns) / len(cnns),
               photo_cnn_adapted=sum(predict(m, after).argmax(1).eq(y).float().mean().item() for m in cnns) / len(cnns),
               direction_guide=direction(guide, before, after, p), direction_judge=judge_clip and direction(judge_clip, before, after, p),
               identity_shipped=(face.embed(before) * face.embed(after)).sum(1).mean().item(),
               identity_judge=judge_face and (judge_face.embed(before) * judge_face.embed(after)).sum(1).mean().item(),
               gender_agreement=(sexes[0] == sexes[1]).float().mean().item(), grid=float(grid_loss(after, before)),
               whiteness=u.mean().item(), saturation=(u.amax(1) - u.amin(1)).mean().item(),
               change_border=change[edge].mean().item(), change_middle=change[~edge].mean().item())
    return {k: v if v is None else round(v, 4) for k, v in row.items()}


def trial(name, fields, profile, celeba, judge_clip, judge_face, cnns):
    p = get_profile(profile, **fields)
    exp, tic = Experiment(p, root='runs/recipes', folder=celeba), time.perf_counter()
    (before, y), (after, _) = exp.tensors('valid', 'original'), exp.tensors('valid', 'adapted')
    if not cnns: cnns += [train_classifier(exp.tensors('train', 'original'), {}, None, p.training, s)[0] for s in (0, 1, 2)]
    row = measure(before, after, p, exp.models, judge_clip, judge_face, [m.eval() for m in cnns], y)
    show, weights = [int(v) for c in (0, 1) for v in (y == c).nonzero().flatten()[:6]], exp.weights
    strip = to_pil(image_grid(torch.cat([before[show], after[show]]), 12)).resize((12 * 132, 2 * 132))
    strip.save(f'runs/recipes/{profile}-{name}-{weights["clip"]["sha256"][:8]}.png')
    return dict(profile=profile, trial=name, **row, seconds=round(time.perf_counter() - tic),
                changed='; '.join(f'{k}={v}' for k, v in fields.items()),
                unet=weights['unet']['sha256'][:12], clip=weights['clip']['sha256'][:12])


@dataclass
class Options:
    "Search for the fine-tuning recipe of a profile."
    profile: str = 'embedded'        # whose fields the trials change
    celeba: str = ''                 # CelebA's folder, for celeba64
    judge_clip: str | None = None    # a CLIP that is not the guide
    judge_face: str | None = None    # MobileFaceNet weights
    only: tuple[str, ...] = tuple(TRIALS) # trials
    out: str = str(Path(__file__).with_name('recipes.csv'))


@friendly_exit
def main(argv=None):
    args = command(Options, argv, prog='python benchmarks/recipes.py')
    if unknown := set(args.only) - set(TRIALS): raise UserError(f'no trial {unknown.pop()!r}; there are: {", ".join(TRIALS)}')
    clip, face = args.judge_clip and load_guide(args.judge_clip), args.judge_face and load_teacher(args.judge_face)
    Path('runs/recipes').mkdir(parents=True, exist_ok=True)
    cnns = []
    for name in args.only:
        row = trial(name, TRIALS[name], args.profile, args.celeba, clip, face, cnns)
        old = pd.read_csv(args.out) if Path(args.out).exists() else pd.DataFrame(columns=list(row))
        table = pd.concat([old[(old.profile != row['profile']) | (old.trial != name)], pd.DataFrame([row])])
        with atomic_write(args.out, 'w') as f: table.to_csv(f, index=False, lineterminator='\n')
        print(pd.Series(row).to_string(), flush=True)
    return 0


if __name__ == '__main__': raise SystemExit(main())
