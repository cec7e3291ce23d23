"""Speed, memory and quality of adaptation, side by side in one process.

    python benchmarks/speed.py                # all parts but `figures`, some ten minutes on two cores
    python benchmarks/speed.py --parts loops  # one part
    python benchmarks/speed.py --parts figures  # `make figures` from nothing, in a clone of the last commit

Compared are (a) our adaptation; (b) the loop of published code: batch 1, model rebuilt from its file for every image, 40 + 6 evaluations,
float32; (c) a loop over diffusers' DDIMInverseScheduler and DDIMScheduler with the same network and batch. Each round times all of them one
after the other; a row holds medians over the rounds. Results go to `results.json`, its table to `README.md`. Rows in bfloat16 are made only
where the processor is fast at it.
"""
import os, platform, statistics, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, UNet2DModel

from diffclip_da.adaptation.adapter import Compute, Pipeline
from diffclip_da.core import UserError, command, default_device, friendly_exit
from diffclip_da.data import shipped_faces
from diffclip_da.diffusion.ddim import reconstruct
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.diffusion.walk import Walk
from diffclip_da.models.load import load_unet
from diffclip_da.models.loop import fast_bfloat16
from diffclip_da.models.train import TrainConfig, TrainState, train_step
from diffclip_da.models.unet import EpsUNet, small_unet
from diffclip_da.store import read_json, versions, write_json
from diffclip_da.study.classify import predict, train_classifier

HERE, T0, BATCH = Path(__file__).resolve().parent, 400, 8
SCHEDULE = linear_schedule()
BETAS = dict(num_train_timesteps=SCHEDULE.T, beta_start=1e-4, beta_end=.02, beta_schedule='linear', clip_sample=False)
# the celebahq architecture of google/ddpm-celebahq-256
CELEBAHQ = dict(sample_size=256, block_out_channels=(128, 128, 256, 256, 512, 512), layers_per_block=2, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
                norm_eps=1e-6, attention_head_dim=None, down_block_types=('DownBlock2D',) * 4 + ('AttnDownBlock2D', 'DownBlock2D'),
                up_block_types=('UpBlock2D', 'AttnUpBlock2D') + ('UpBlock2D',) * 4)
PARTS = 'loops', 'peak', 'training', 'big', 'tune', 'memory', 'figures'
PUBLISHED = Walk(T0, 40, 6, 'linear', 'ddim', 1)
LONGER = Walk(T0, 6, 6, 'logsnr', 'anderson', 2)
ARROW = {True: 'met', False: 'missed', None: ''}


def ours(model, x0, walk=Walk(T0), batch_size=BATCH, dtype='float32', compile=False):
    "(a): the library's own path from images to images."
    p = Pipeline(model, model, SCHEDULE, walk, Compute(batch_size, dtype=dtype, compile=compile))
    return lambda: p.generate(p.invert(x0))


@torch.no_grad()
def diffusers_loop(model, x0, n_inv, n_gen, batch=BATCH):
    "(c): of round(n * T / t0) evenly spaced times those up to t0, as an img2img pipeline takes them; 'trailing', so that both walks meet at t0."
    def walk(scheduler, n, x, down):
        scheduler.set_timesteps(round(n * SCHEDULE.T / T0))
        times = scheduler.timesteps[-n:] if down else scheduler.timesteps[:n]
        for t in times:
            x = scheduler.step(model(x, t.to(x.device)), t, x).prev_sample
        return x
    out = []
    for x in x0.split(batch):
        z = walk(DDIMInverseScheduler(**BETAS, timestep_spacing='trailing'), n_inv, x.to(model.unet.device), False)
        out.append(walk(DDIMScheduler(**BETAS, timestep_spacing='trailing', set_alpha_to_one=True), n_gen, z, True).cpu())
    return torch.cat(out)


@torch.no_grad()
def published_loop(x0, device):
    "(b)"
    out = []
    for x in x0:
        model = load_unet('shipped', device)
        out.append(reconstruct(model, x[None].to(device), T0, 40, 6, SCHEDULE).cpu())
    return torch.cat(out)


def timed(f):
    tic = time.perf_counter()
    out = f()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - tic, out


def compare(ways:dict, rounds:int) -> dict: # name -> callable; -> name -> (seconds of each round, result)
    for f in ways.values(): f()   # warm up
    runs = {k: [] for k in ways}
    for _ in range(rounds):
        for k, f in ways.items(): runs[k].append(timed(f))
    return {k: ([s for s, _ in v], v[-1][1]) for k, v in runs.items()}


def error(out, x0): return (out - x0).abs().mean().item() / 2


def row(name, ours, other, unit, runs, target=None, higher=True, note=''):
    ratio = None if other in (None, 0) else ours / other if higher else other / ours
    value = ratio if ratio is not None else ours
    met = None if target is None else value >= target if higher else value <= target
    return dict(name=name, device=DEVICE, ours=round(ours, 4), other=None if other is None else round(other, 4), ratio=None if ratio is None else round(ratio, 3),
                unit=unit, runs=runs, target=target, met=met, note=note)


def loops(args, device):
    "64 px, the shipped U-Net and faces."
    faces = shipped_faces('test')
    x0, model = faces.tensor(faces.ids[:args.images], 64), load_unet('shipped', device)
    plain = load_unet('shipped', device)   # not touched by our memory layout
    few = x0[:max(2, args.images // 8)]
    half = device.type == 'cuda' or fast_bfloat16(device)
    ways = dict(default=ours(model, x0), equal=ours(model, x0, PUBLISHED), longer=ours(model, x0, LONGER), b=lambda: published_loop(few, device))
    ways |= {f'c{a}+{b}': lambda a=a, b=b: diffusers_loop(plain, x0, a, b) for a, b in ((40, 6), *((n, n) for n in (4, 6, 8, 10, 12, 16)))}
    if half: ways |= dict(default_bf16=ours(model, x0, dtype='bfloat16'))
    if args.compile: ways |= dict(compiled=ours(model, x0, PUBLISHED, compile=True), fastest=ours(model, x0, compile=True, dtype='bfloat16' if half else 'float32'))
    r = compare(ways, args.rounds)
    n = dict.fromkeys(ways, len(x0)) | dict(b=len(few))
    rate = {k: n[k] / statistics.median(s) for k, (s, _) in r.items()}
    err = {k: error(out, few if k == 'b' else x0) for k, (_, out) in r.items()}
    for k in ways: print(f'{k:14} {rate[k]:7.2f} images/s, error {err[k]:.4f}', flush=True)
    k = args.rounds
    # the cheapest loop of theirs, equal numbers up and down, that errs no more than ours does
    least = min((c for c in ways if c.startswith('c') and err[c] <= err['default']), key=lambda c: n[c] / rate[c], default='c16+16')
    say = lambda a, c: f'reconstruction error {err[a]:.4f}, the other {err[c]:.4f}'
    out = [row('cpu64_vs_diffusers_equal_steps', rate['equal'], rate['c40+6'], 'images/s', k, 1.3, note=f'40 + 6, float32; {say("equal", "c40+6")}'),
           row('cpu64_vs_diffusers_equal_error', rate['default'], rate['c40+6'], 'images/s', k, 6., note=f'few steps of generation, as a fine-tuned network has: ours 4 + 4, the other 40 + 6; {say("default", "c40+6")}'),
           row('cpu64_vs_diffusers_any_steps', rate['default'], rate[least], 'images/s', k, note=f'ours 4 + 4 against the cheapest of their n + n that errs no more, {least[1:]}; {say("default", least)}'),
           row('cpu64_12_6_vs_diffusers_any_steps', rate['longer'], rate['c16+16'], 'images/s', k, note=f'12 + 6 with Anderson against 16 + 16; {say("longer", "c16+16")}'),
           row('cpu64_vs_published_loop', rate['default'], rate['b'], 'images/s', k, 9., note=f'float32; {say("default", "b")}')]
    if half:
        a, c = r['default'][1], r['default_bf16'][1]
        train, y = (lambda s: (s.tensor(s.ids[:400], 64), s.labels_of(s.ids[:400])))(shipped_faces('train'))
        cnn = train_classifier((train, y), {}, epochs=5, desc='classifier for the agreement')[0]
        agree = (predict(cnn, a).argmax(1) == predict(cnn, c).argmax(1)).float().mean().item()
        out += [row('cpu64_vs_diffusers_equal_error_bf16', rate['default_bf16'], rate['c40+6'], 'images/s', k, note=f'the same in bfloat16; {say("default_bf16", "c40+6")}'),
                row('cpu64_vs_published_loop_bf16', rate['default_bf16'], rate['b'], 'images/s', k, 13., note=f'ours in bfloat16; {say("default_bf16", "b")}'),
                row('cpu64_bf16_image_difference', error(a, c), None, 'mean absolute difference, 0-1', k, note='4 + 4, bfloat16 against float32'),
                row('cpu64_bf16_decision_agreement', agree, None, 'share of images', k, .99, note=f'{len(x0)} images, the CNN of the paper')]
    if args.compile: out += [row('cpu64_compiled_vs_published_loop', rate['fastest'], rate['b'], 'images/s', k, note=f'ours compiled, {"bfloat16" if half else "float32"}; {say("fastest", "b")}'),
                             row('cpu64_compiled_vs_diffusers_equal_steps', rate['compiled'], rate['c40+6'], 'images/s', k, 1.3, note=f'torch.compile, which takes a minute or more to begin with; {say("compiled", "c40+6")}')]
    return [dict(q, name=q['name'].replace('cpu', DEVICE_KIND, 1)) for q in out]


def peak(device):
    "Share of the measured peak, in 2 x MAC."
    model, x = load_unet('shipped', device), torch.randn(BATCH, 3, 64, 64, device=device)
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as f, torch.no_grad(): model(x, 10)
    a, im, w = torch.randn(2048, 2048, device=device), *(t.to(device, memory_format=torch.channels_last) for t in (torch.randn(8, 128, 64, 64), torch.randn(128, 128, 3, 3)))
    best = max(max(2 * 2048**3 / timed(lambda: a @ a)[0], 8 * 64**2 * 128**2 * 18 / timed(lambda: torch.conv2d(im, w, padding=1))[0]) for _ in range(12))
    step = ours(model, x.cpu().clamp(-1, 1))
    step()
    seconds = statistics.median(timed(step)[0] for _ in range(5)) / sum(Walk().evaluations)
    return [row(f'{DEVICE_KIND}64_share_of_peak', f.get_total_flops() / seconds / best, None, 'of the measured peak, the faster of a matrix product and a 3 x 3 convolution in float32', 5,
                note=f'{f.get_total_flops() / BATCH / 1e9:.2f} GFLOP an image and evaluation; peak {best / 1e9:.0f} GFLOP/s')]


def training(args, device):
    "The U-Net's training, one batch of 32 after another."
    images, rows = torch.randint(256, (256, 3, 64, 64), dtype=torch.uint8), []
    labels = torch.arange(256) % 2
    for bf16 in (False, True)[:1 + fast_bfloat16(device)]:
        state = TrainState(small_unet(v_schedule=SCHEDULE), TrainConfig(of_v=True, p2_gamma=.5, bf16=bf16), device)
        step = lambda k: train_step(state, images, labels, SCHEDULE, k).item()
        step(0)
        seconds = statistics.median(timed(lambda: step(k))[0] for k in range(1, 1 + args.rounds))
        rows.append(row('training_images_per_second' + '_bf16' * bf16, 32 / seconds, None, 'images/s', args.rounds, 50. if bf16 else None,
                        note=f'64 px, {sum(p.numel() for p in state.model.parameters()) / 1e6:.1f} M parameters, batch 32, with optimiser and average'))
    return rows


def figures(args, device):
    "`make figures` from nothing but an installed environment, in a clone of the last commit."
    root = HERE.parent
    with tempfile.TemporaryDirectory() as d:
        subprocess.run(['git', 'clone', '-q', root, f'{d}/clone'], check=True)
        clone, venv = Path(d)/'clone', Path(sys.prefix)
        seconds = timed(lambda: subprocess.run(['make', '-o', f'{venv}/.installed', 'figures', f'VENV={venv}'], cwd=clone, check=True,
                                               env=dict(os.environ, PYTHONPATH=str(clone)), stdout=subprocess.DEVNULL))[0]
        took = {k: v for n in (2, 3, 4) for k, v in read_json(clone/f'figures/embedded/figure{n}.json')['seconds'].items()}
    short = {}
    for k, v in took.items():
        name = k.rstrip('0123456789 ')
        short[name] = short.get(name, 0) + v
    return [row('make_figures_seconds', seconds, None, 'seconds', 1, 300., higher=False, note='; '.join(f'{k} {v:.0f}' for k, v in short.items()) + '; the rest is starting and drawing')]


def big(args, device):
    "256 px: one evaluation of the celebahq architecture with random weights."
    torch.manual_seed(0)
    model, x0 = EpsUNet(UNet2DModel(**CELEBAHQ)).to(device).eval().requires_grad_(False), torch.rand(args.big_images, 3, 256, 256) * 2 - 1
    n_inv, n_gen = args.big_steps
    few = Walk(T0, n_inv, n_gen)
    ways = {'(c)': lambda: diffusers_loop(model, x0, n_inv, n_gen, args.big_images), '(a)': ours(model, x0, few, args.big_images)}
    if device.type == 'cuda' or fast_bfloat16(device): ways['(a) bf16'] = ours(model, x0, few, args.big_images, 'bfloat16')
    r = compare(ways, max(2, args.rounds - 1))
    each = {k: statistics.median(s) / args.big_images / (n_inv + n_gen) for k, (s, _) in r.items()}
    k, about = len(r['(a)'][0]), f'{sum(v.numel() for v in model.parameters()) / 1e6:.2f} M parameters, random weights, batch {args.big_images}'
    rows = [row(f'{DEVICE_KIND}256_vs_diffusers_equal_steps', 1 / each['(a)'], 1 / each['(c)'], 'evaluations/s', k, note=f'{about}, float32'),
            row(f'{DEVICE_KIND}256_evaluations_per_image', 8 * each['(a)'], 46 * each['(a)'], 'seconds an image at 8 and at 46 evaluations', k, higher=False, note=f'{about}, float32; {each["(a)"]:.2f} s an evaluation, times 8 and 46')]
    if '(a) bf16' in r: rows.append(row(f'{DEVICE_KIND}256_bf16_vs_diffusers', 1 / each['(a) bf16'], 1 / each['(c)'], 'evaluations/s', k, note=f'{about}, ours in bfloat16'))
    if device.type == 'cuda':
        many = torch.rand(96, 3, 256, 256) * 2 - 1
        run = ours(model, many, Walk(601), 32, 'bfloat16'); run()
        rows.append(row('gpu256_seconds_1500', 1500 / 96 * statistics.median(timed(run)[0] for _ in range(3)), None, 'seconds', 3, note=f'{about.split(", batch")[0]}, bfloat16, batch 32, 8 evaluations an image; 96 images, times 1500 / 96'))
    return rows


GROWTH = '''
import sys, resource, torch, time
from diffclip_da.adaptation.adapter import Compute, transform
from diffclip_da.data import image_folder
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.diffusion.walk import Walk
from diffclip_da.models.unet import tiny_unet
photos, out = sys.argv[1:]
images, net = image_folder(photos), tiny_unet(64)
tic = time.perf_counter()
walk = Walk(t0=400, n=1, inversion='ddim')
transform(images, net, net, linear_schedule(), walk, Compute(batch_size=32), 64, out)
print(len(images), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter() - tic)
'''


def memory(args, device):
    "Peak memory and time of adapting 10 to 10,000 images, each in a process of its own; a tiny network, so that all but the network shows."
    faces, got = shipped_faces(None), {}
    for n in (10, 100, 1000, 10_000):
        with tempfile.TemporaryDirectory() as d:
            photos = Path(d)/'photos'
            photos.mkdir()
            pictures = [faces.pil(i) for i in faces.ids[:min(n, 200)]]
            for k in range(n): pictures[k % len(pictures)].save(photos/f'{k:05}.png')
            env = dict(os.environ, DIFFCLIP_QUIET='1')
            said = subprocess.run([sys.executable, '-c', GROWTH, photos, Path(d)/'out'], check=True, capture_output=True, text=True, env=env).stdout.split()
            got[n] = float(said[-2]) / 1024, float(said[-1])
        print(f'{n:6} images: {got[n][0]:.0f} MB, {got[n][1]:.1f} s', flush=True)
    per = {n: s / n * 1000 for n, (_, s) in got.items()}
    return [row('memory_10000_over_100', got[10_000][0] / got[100][0], None, 'ratio of peak memory', 1, 1.1, higher=False, note='; '.join(f'{n}: {m:.0f} MB' for n, (m, _) in got.items())),
            row('seconds_per_image_10000_over_100', per[10_000] / per[100], None, 'ratio', 1, note='; '.join(f'{n}: {v:.1f} ms' for n, v in per.items()))]


TUNE = """
import resource, sys, time
from dataclasses import replace
import torch, open_clip
from diffusers import UNet2DModel
sys.path.insert(0, sys.argv[1])
from speed import CELEBAHQ
from diffclip_da.models.clip import Clip
from diffclip_da.diffusion.ddim import step_pairs
from diffclip_da.adaptation.finetune import CAREFUL, FinetuneLoss, accumulate_gradients
from diffclip_da.core import new_generator
from diffclip_da.diffusion.schedule import linear_schedule
from diffclip_da.models.unet import EpsUNet
torch.manual_seed(0)
grad, steps, half = sys.argv[2], int(sys.argv[3]), sys.argv[4] == 'bfloat16'
net = EpsUNet(UNet2DModel(**CELEBAHQ)).eval()
inner = net.forward
def forward(x, t):
    with torch.autocast('cpu', torch.bfloat16, enabled=half): return inner(x, t).float()
net.forward = forward
clip = Clip(open_clip.create_model('ViT-B-16', pretrained=None), open_clip.get_tokenizer('ViT-B-16'), dict(name='random', sha256='', provenance='random'))
recipe = replace(CAREFUL, n_crops=1, grid_weight=0.)
loss, x, g = FinetuneLoss(clip, None, 'photo', 'sketch', recipe), torch.randn(1, 3, 256, 256), new_generator(0)
opt = torch.optim.Adam(net.parameters(), lr=1e-6)
tic = time.perf_counter()
accumulate_gradients(net, x, step_pairs(600, steps), linear_schedule(), lambda y: loss(y, x.clamp(-1, 1), g), grad)
opt.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter() - tic)
"""


def tune(args, device):
    "256 px: peak memory of one fine-tuning update on the CPU, a process for each way; the weights of network, gradient, Adam and ViT-B/16 are in it."
    rows = []
    for grad, steps, dtype in (('checkpoint', 2, 'float32'), ('checkpoint', 6, 'float32'), ('checkpoint', 2, 'bfloat16'), ('full', 2, 'float32')):
        said = subprocess.run([sys.executable, '-c', TUNE, HERE, grad, str(steps), dtype], check=True, capture_output=True, text=True, env=dict(os.environ, DIFFCLIP_QUIET='1')).stdout.split()
        rows.append(row(f'cpu256_finetune_peak_{grad}_{steps}_{dtype}', float(said[-2]), None, 'GiB of the whole process', 1,
                        note=f'one update, batch 1, {steps} steps, {grad} gradients, 113.67 M parameters and ViT-B/16, random weights; {float(said[-1]):.0f} s'))
        print(rows[-1], flush=True)
    return rows


def table(rows) -> str:
    head = '| row | ours | other | ratio | target | runs | unit and remark |\n|---|---|---|---|---|---|---|\n'
    show = lambda v: '' if v is None else f'{v:g}'
    return head + ''.join(f"| `{r['name']}` | {show(r['ours'])} | {show(r['other'])} | {show(r['ratio'])} | {show(r['target'])} {ARROW[r['met']]} | {r['runs']} | {r['unit']}; {r['note']} |\n" for r in rows)


# rows of the first edition whose question is asked otherwise now
GONE = ('cpu64_vs_diffusers_18_evaluations', 'cpu64_compiled_bf16_vs_published_loop', 'cpu64_vs_diffusers_equal_error_bf16', 'cpu64_vs_published_loop_bf16',
        'cpu64_bf16_image_difference', 'cpu64_bf16_decision_agreement', 'cpu256_bf16_vs_diffusers')

def save(new, path):
    old = read_json(path)['rows'] if path.exists() else []
    names = {r['name'] for r in new} | set(GONE)
    rows = sorted([r for r in old if r['name'] not in names] + new, key=lambda r: r['name'])
    write_json(path, dict(rows=rows, versions=versions()))
    readme = path.with_name('README.md')
    if not readme.exists(): return
    before, rest = readme.read_text(encoding='utf-8').split('<!-- table -->\n')
    after = rest.split('<!-- end -->\n')[1]
    readme.write_text(f'{before}<!-- table -->\n{table(rows)}<!-- end -->\n{after}', encoding='utf-8')


def cpu_name():
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return f'{names[0] if names else platform.processor() or "CPU"}, {torch.get_num_threads()} threads'


@dataclass
class Options:
    "Speed, memory and quality of adaptation, side by side in one process."
    parts: tuple[str, ...] = PARTS[:-1] # what to measure
    images: int = 64                   # at 64 px
    rounds: int = 5                    # each times all ways one after the other
    big_images: int = 1                # at 256 px
    big_steps: tuple[int, int] = (2, 1) # of inversion and generation there
    compile: bool = False              # torch.compile too
    out: str = str(HERE/'results.json')


@friendly_exit
def main(argv=None):
    global DEVICE, DEVICE_KIND
    args = command(Options, argv, prog='python benchmarks/speed.py')
    if unknown := set(args.parts) - set(PARTS): raise UserError(f'no part {unknown.pop()!r}; there are: {", ".join(PARTS)}')
    device = default_device()
    DEVICE_KIND = 'gpu' if device.type == 'cuda' else 'cpu'
    DEVICE = torch.cuda.get_device_name() if device.type == 'cuda' else cpu_name()
    parts = dict(loops=lambda: loops(args, device), peak=lambda: peak(device), training=lambda: training(args, device), figures=lambda: figures(args, device), big=lambda: big(args, device),
                 tune=lambda: tune(args, device), memory=lambda: memory(args, device))
    for p in args.parts:
        rows = parts[p]()
        save(rows, Path(args.out))
        print(table(rows), flush=True)
    return 0


if __name__ == '__main__': raise SystemExit(main())
