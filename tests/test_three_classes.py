"Three classes, a folder for each, by the README's five lines: adapt, train, and score on a target whose classes lie in another order."
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import diffclip_da as da
from diffclip_da.adaptation.finetune import CAREFUL
from diffclip_da.models.unet import save_unet, tiny_unet
from diffclip_da.study.classify import predict, score, train_classifier
from test_finetune import clip_folder

COLOURS = dict(red=(200, 60, 50), green=(60, 180, 70), blue=(50, 70, 210))


def colour_folder(root, names, n, seed):
    "`n` pictures of each colour, a folder per class under the names given: name on disk -> colour."
    rng = np.random.default_rng(seed)
    for name, colour in names.items():
        (root/name).mkdir(parents=True)
        for k in range(n):
            a = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 20, (20, 20, 3)) + rng.normal(0, 10), 0, 255)
            Image.fromarray(a.astype(np.uint8)).save(root/name/f'{k}.png')
    return root


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp('networks')
    save_unet(tiny_unet(16), root/'unet')
    return str(root/'unet'), str(clip_folder(root/'clip'))


def test_three_classes_from_folder_to_score(tmp_path, networks):
    own = {c: c for c in COLOURS}
    photos = da.image_folder(colour_folder(tmp_path/'photos', own, 8, 0), labels='folders', classes=['red', 'green', 'blue'])
    assert photos.classes == ['red', 'green', 'blue'] and photos.captions == ['a red', 'a green', 'a blue']
    adapter = da.Adapter.from_pretrained(networks[0], networks[1], None, walk=da.Walk(t0=150, n=2), device='cpu')
    adapter.fit(photos, target='sketch', recipe=replace(CAREFUL, n_images=4, passes=1, n_crops=1))
    sketches = adapter.transform(photos, out=tmp_path/'sketches')
    assert sketches.ids == photos.ids and sketches.labels == photos.labels and sketches.classes == photos.classes

    # on disk (alphabetically) the target's classes come as blue, green, red
    root = colour_folder(tmp_path/'target', own, 5, 1)
    target, as_on_disk = da.image_folder(root, labels='folders', classes=photos.classes), da.image_folder(root, labels='folders')
    assert target.classes == photos.classes and as_on_disk.classes == ['blue', 'green', 'red']
    model, history = train_classifier((sketches.tensor(size=16), sketches.labels_of()), {}, epochs=6, batch_size=6, measured=('train',))
    assert model(target.tensor(size=16)[:2]).shape == (2, 3)
    p = predict(model, target.tensor(target.ids, 16))
    assert p.shape == (15, 3) and torch.allclose(p.sum(1), torch.ones(15), atol=1e-5)
    right, wrong = (score(s.labels_of(target.ids), p) for s in (target, as_on_disk))
    assert right['balanced_accuracy'] > .8 and right['auroc'] > .9
    assert wrong['balanced_accuracy'] < .5    # the same answers against the order on disk: nearly all wrong


def test_a_target_with_a_class_that_the_source_does_not_know_is_refused(tmp_path):
    root = colour_folder(tmp_path/'target', dict(red='red', violet='blue'), 2, 0)
    with pytest.raises(da.core.UserError, match='violet'): da.image_folder(root, labels='folders', classes=['red', 'green', 'blue'])
