"""Labelled photos and a few words become a labelled training set in another domain.

    from diffclip_da import Adapter, Walk, image_folder

    photos = image_folder("photos/", labels="labels.csv")           # or labels="folders": a folder per class
    adapter = Adapter.from_pretrained("shipped", walk=Walk(t0=400)) # a small U-Net, a CLIP, a face embedder
    adapter.fit(photos, target="sketch")                            # fine-tune the way back from noise
    sketches = adapter.transform(photos, out="sketches/")           # every photo redrawn, its label kept
    adapter.save("my-adapter/")

    more = image_folder("more/")                                    # later, without fine-tuning
    Adapter.load("my-adapter/").transform(more, out="more-sketches/")
"""
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _stop_at_once(number, frame):
    "Ctrl-C or SIGTERM while a command still imports its libraries: nothing was begun, so nothing is lost"
    os.write(2, b'interrupted; the same command resumes\n')
    os._exit(128 + number)


# Only where this package is the program. `core.friendly_exit` takes over once the imports are done.
if os.path.basename(sys.argv[0] if sys.argv else '').startswith('diffclip-') or sys.argv[:1] == ['-m']:
    try:
        for _number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(_number) != signal.SIG_IGN: signal.signal(_number, _stop_at_once)  # nohup ignores
    except ValueError: pass  # not the main thread

# Where each public name stands. A name is loaded when it is first asked for, so that `import diffclip_da` stays fast.
HOMES = {
    'diffclip_da.adaptation.adapter': ('Adapter',),
    'diffclip_da.adaptation.finetune': ('Recipe',),
    'diffclip_da.adaptation.folder': ('adapt_folder',),
    'diffclip_da.data': ('ImageSet', 'celeba', 'image_folder'),
    'diffclip_da.diffusion.ddim': ('invert', 'sample', 'step_pairs'),
    'diffclip_da.diffusion.walk': ('Walk',),
    'diffclip_da.models.load': ('load_embedder', 'load_guide', 'load_unet'),
}
__all__ = sorted(name for names in HOMES.values() for name in names)

if TYPE_CHECKING:  # the same table, as type checkers and editors read it
    from diffclip_da.adaptation.adapter import Adapter as Adapter
    from diffclip_da.adaptation.finetune import Recipe as Recipe
    from diffclip_da.adaptation.folder import adapt_folder as adapt_folder
    from diffclip_da.data import ImageSet as ImageSet, celeba as celeba, image_folder as image_folder
    from diffclip_da.diffusion.ddim import invert as invert, sample as sample, step_pairs as step_pairs
    from diffclip_da.diffusion.walk import Walk as Walk
    from diffclip_da.models.load import load_embedder as load_embedder, load_guide as load_guide, load_unet as load_unet


def __getattr__(name: str):
    "Load a public name when it is first asked for"
    for home, names in HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(home), name)
            return value
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__(): return sorted({*globals(), *__all__})
