"""Packs that are full: balancing finds no room, and the batch keeps the packs that its readers have planned."""

import numpy as np

from k25_jax.config import DataConfig, preset
from k25_jax.data.packing import Placed, build, make_example
from k25_jax.vision.patchpack import Clip

MODEL = preset("tiny")


def test_full_packs_stay_as_they_were_planned():
    """12, 20, 20, 16 and 12 patches in two packs of 40: 20 and 20, and the rest. In any simple order the last has no room."""
    rng, placed = np.random.default_rng(0), []
    for row, (patches, pack) in enumerate(zip((12, 20, 20, 16, 12), (1, 0, 0, 1, 1), strict=True)):
        pixels = rng.integers(0, 256, (patches, MODEL.vision.patch_dim)).astype(np.uint8)
        clip = Clip(pixels, (1, 2, patches // 2))
        example = make_example([5, MODEL.media_pad_id, 6], [1.0] * 3, [clip], MODEL.media_pad_id)
        placed.append(Placed(example, row, 0, (pack,)))
    batch = build([placed], DataConfig(batch_size=5, seq_len=16, packs=2, pack_patches=40), MODEL)
    found = [[int(n) for n in np.bincount(segments)[1:]] for segments in batch.vision.segments_PN]
    assert sorted(map(sorted, found)) == [[12, 12, 16], [20, 20]]
    for row, one in enumerate(placed):  # and every document still finds its own image
        pack, token = divmod(int(batch.media_BL[row, 1]), 40 // 4)
        first = batch.vision.slots_PN[pack] == 4 * token
        np.testing.assert_array_equal(batch.vision.patches_PNC[pack][first], one.example.clips[0].patches[:1])
