"""Which walk: return step, number of steps, grid and inversion, measured on CelebA's validation photos and nowhere else.

    python benchmarks/walks.py --celeba FOLDER                        # walks.csv: reconstruction, minutes
    python benchmarks/walks.py --celeba FOLDER --tune --judge-clip FOLDER --judge-face mobilefacenet.pt   # walks_tuned.csv: hours

`walks.csv`, one row per walk, 8 photos through the shipped network: evaluations (inversion, generation), reconstruction (mean absolute
error, 0-1 range) and flow (distance of the generated pictures to what 100 steps make of the same latents: how well the sampler follows).

`walks_tuned.csv`, one row per walk that was fine-tuned on, `--views` views, 200 training photos:
reconstruction         as above, on 200 validation photos
direction_guide/judge  mean cosine of image and text direction, in the guide and (where given) in a CLIP that did not steer
look                   mean probability of "drawing" by a CNN that never saw an adapted picture: photos against the four filters' drawings
identity_judge         mean cosine of the faces before and after in MobileFaceNet, which is no part of the loss
gender_agreement       share of pictures whose zero-shot gender in the judge stays what it was on the photo
pencil ... colour_pencil   balanced accuracy of the paper's CNN (three seeds), trained on the adapted photos, on 300 validation photos' drawings
seconds_finetune/adapt on one thread of the machine at hand
"""
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from diffclip_da.adaptation.losses import text_direction
from diffclip_da.core import UserError, command, friendly_exit, image_grid, to_pil
from diffclip_da.data import celeba as celeba_set, find_celeba
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.diffusion.walk import Walk
from diffclip_da.models.clip import zero_shot
from diffclip_da.models.identity import load_teacher
from diffclip_da.models.load import load_guide, load_unet
from diffclip_da.store import atomic_write
from diffclip_da.study.baselines import Task, cnn
from diffclip_da.study.classify import Training, predict, score, train_classifier
from diffclip_da.study.evaluate import draw_set
from diffclip_da.study.experiment import Experiment
from diffclip_da.study.profile import get_profile

HERE = Path(__file__).parent
ROUNDS = (('ddim', 1), ('fixed_point', 1), ('fixed_point', 2), ('average', 2), ('anderson', 2))
STEPS, RETURN = (3, 4, 5, 6, 8, 12, 20), (400, 300, 500, 600)
STYLES = 'pencil', 'line_art', 'charcoal', 'colour_pencil'
LINEAR = dict(t0=400, n=6, grid='linear', inversion='anderson', n_iter=2)
TUNED = {'linear 12 + 6': LINEAR} | {
    f'{t0}: {n} x {k} + {n}': dict(t0=t0, n=n, grid='logsnr', inversion='anderson' if k > 1 else 'fixed_point', n_iter=k)
    for t0, n, k in ((400, 4, 1), (400, 6, 1), (400, 3, 2), (500, 4, 1), (300, 4, 1), (400, 4, 2), (500, 6, 1), (400, 8, 1), (600, 6, 1))}


def error(a, b): return (a - b).abs().mean().item() / 2


@torch.no_grad()
def reconstructions(unet, x0, schedule):
    "One row per walk."
    for t0 in RETURN:
        fine = Walk(t0, n=100, grid='logsnr', inversion='fixed_point', n_iter=1)
        latent = fine.invert(unet, x0, schedule)
        truth = fine.generate(unet, latent, schedule)
        for grid in ('linear', 'logsnr') if t0 == 400 else ('logsnr',):
            for n in STEPS if t0 == 400 else STEPS[:5]:
                flow = error(Walk(t0, n=n, grid=grid).generate(unet, latent, schedule), truth)
                for inversion, k in ROUNDS:
                    walk = Walk(t0, n=n, grid=grid, inversion=inversion, n_iter=k)
                    back = walk.generate(unet, walk.invert(unet, x0, schedule), schedule)
                    yield dict(t0=t0, n=n, grid=grid, inversion=inversion, n_iter=k, evaluations=sum(walk.evaluations),
                               reconstruction=round(error(back, x0), 5), flow=round(flow, 5))
    published = Walk(400, 40, 6, 'linear', 'ddim', 1)
    back = published.generate(unet, published.invert(unet, x0, schedule), schedule)
    yield dict(t0=400, n=40, grid='linear, 6 to generate', inversion='ddim', n_iter=1, evaluations=46, reconstruction=round(error(back, x0), 5), flow=None)


@torch.no_grad()
def tuned(name, fields, o, tests, look, judge_clip, judge_face):
    "Fine-tune on one walk, adapt, measure."
    n = fields['n']
    walk = {k: v for k, v in fields.items() if k != 'n'} | dict(n_inv=n, n_gen=n)
    p = get_profile('celeba64', n_train=200, n_valid=200, views=o.views, **walk)
    exp = Experiment(p, root='runs/walks', folder=o.celeba)
    with torch.enable_grad(): (before, y), (after, _) = exp.tensors('valid', 'original'), exp.tensors('valid', 'adapted')
    unet, guide, _ = exp.models
    schedule = linear_schedule()
    back = torch.cat([p.walk.generate(unet, p.walk.invert(unet, x, schedule), schedule) for x in before.split(16)])
    def direction(clip): return torch.cosine_similarity(clip.encode_image(after) - clip.encode_image(before), text_direction(clip, p.source, p.target)).mean().item()
    sexes = [zero_shot(judge_clip or guide, x, [['a woman'], ['a man']]).argmax(1) for x in (before, after)]
    task = Task(exp.tensors('train', 'adapted'), (after, y), training=p.training)
    with torch.enable_grad(): models = [cnn(task, exp.tensors('train', 'adapted'), seed)[0] for seed in range(3)]
    row = dict(walk=name, evaluations=sum(p.walk.evaluations), reconstruction=error(back, before), direction_guide=direction(guide), direction_judge=judge_clip and direction(judge_clip), look=predict(look, after)[:, 1].mean().item(),
               identity_judge=judge_face and (judge_face.embed(before) * judge_face.embed(after)).sum(1).mean().item(),
               gender_agreement=(sexes[0] == sexes[1]).float().mean().item(),
               **{k: sum(score(t, f(x))['balanced_accuracy'] for f in models) / len(models) for k, (x, t) in tests.items()})
    show = [int(v) for c in (0, 1) for v in (y == c).nonzero().flatten()[:6]]
    to_pil(image_grid(torch.cat([before[show], after[show]]), 12)).resize((12 * 132, 2 * 132)).save(f'runs/walks/{name.replace(": ", "-").replace(" ", "")}.png')
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} | dict(
        seconds_finetune=round(exp.seconds.get('finetune', 0)), seconds_adapt=round(exp.seconds.get('adapt valid', 0)), views=o.views)


def drawn(images, style):
    d = draw_set(images, style, Path('runs/walks')/f'{style}-{len(images)}')
    return d.tensor(d.ids, 64), d.labels_of(d.ids)


def put(row, out): # replaces the row of the same walk, keeps the others'; seconds of a cached stage are not news
    old = pd.read_csv(out) if Path(out).exists() else pd.DataFrame(columns=list(row))
    mine = old[old.walk == row['walk']]
    for k in ('seconds_finetune', 'seconds_adapt'):
        if len(mine) and row[k] == 0: row[k] = mine[k].item()
    with atomic_write(out, 'w') as f: pd.concat([old[old.walk != row['walk']], pd.DataFrame([row])]).to_csv(f, index=False, lineterminator='\n')


@dataclass
class Options:
    "Which walk."
    celeba: str = ''               # CelebA's folder
    tune: bool = False             # fine-tune on the walks of `--only` as well
    views: int = 800               # of each fine-tuning
    judge_clip: str | None = None  # a CLIP that did not steer
    judge_face: str | None = None  # MobileFaceNet weights
    only: tuple[str, ...] = tuple(TUNED)


@friendly_exit
def main(argv=None):
    o = command(Options, argv, prog='python benchmarks/walks.py')
    if unknown := set(o.only) - set(TUNED): raise UserError(f'no walk {unknown.pop()!r}; there are: {", ".join(TUNED)}')
    whole = celeba_set(find_celeba(o.celeba), 'valid', 'Male')
    Path('runs/walks').mkdir(parents=True, exist_ok=True)
    if not o.tune:
        table = pd.DataFrame(reconstructions(load_unet('shipped').requires_grad_(False), whole.tensor(whole.ids[:8], 64), linear_schedule()))
        with atomic_write(HERE / 'walks.csv', 'w') as f: table.to_csv(f, index=False, lineterminator='\n')
        print(table.to_string())
        return 0
    valid = whole.subset(whole.ids[300:600])
    tests = {s: drawn(valid, s) for s in STYLES}
    photos = valid.tensor(valid.ids, 64)
    x, y = torch.cat([photos, *(t for t, _ in tests.values())]), torch.tensor([0] * len(photos) + [1] * (len(STYLES) * len(photos)))
    look = train_classifier((x, y), {}, None, Training('small', epochs=6), desc='judge of looks')[0]
    clip, face = o.judge_clip and load_guide(o.judge_clip), o.judge_face and load_teacher(o.judge_face)
    for name in o.only:
        tic = time.perf_counter()
        row = tuned(name, TUNED[name], o, tests, look, clip, face)
        put(row, HERE / 'walks_tuned.csv')
        print(pd.Series(row).to_string(), f'\n{time.perf_counter() - tic:.0f} s in all', flush=True)
    return 0


if __name__ == '__main__': raise SystemExit(main())
