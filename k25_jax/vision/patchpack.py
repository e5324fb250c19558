"""Vision packs: clips of any size laid one after another in fixed-size rows of patches (K2.5 §3.2, §3.8).

The sequence packer (data/packing.py) plans which clips share a pack. When the batch is whole, `balance` spreads its clips
anew so that every device has about the same to compute. Where that finds no room the packs keep what was planned.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import flax.struct
import numpy as np

from k25_jax.config import VisionConfig


class PackError(ValueError):
    """Clips that cannot be packed; the message names the clip, the sizes and the remedy."""


@flax.struct.dataclass
class VisionPack:
    """P packs of N patch slots: numpy on the host, a pytree for jit (K2.5 §3.2).

    Padding has segment 0, slot N, weight 0, and the coordinates of a 1x1 grid, so that dividing by a grid is safe.
    """

    patches_PNC: np.ndarray  # uint8 pixels, normalised on the device; or float32, normalised already
    segments_PN: np.ndarray  # int32: 1, 2, .. number of the clip inside its pack; 0 on padding
    coords_PN5: (
        np.ndarray
    )  # int32: frame, row, column, grid height, grid width. Frame is 0 for a clip of one, else from 1
    slots_PN: np.ndarray  # int32: token inside the pack * group + place inside the token's group; N on padding
    weights_PN: np.ndarray  # float32: 1 / frames of the clip


@dataclass(frozen=True, eq=False)
class Clip:
    """An image, or up to four consecutive frames of one size, cut into patches.

    `patches` is [t*h*w, C] in raster order frame by frame, `grid` is (t, h, w) in patches, `source` names the clip in
    errors. The frames are pooled, so a clip is h*w / (merge rows * merge columns) tokens whatever t is. Raises
    PackError.
    """

    patches: np.ndarray
    grid: tuple[int, int, int]
    source: str = ""
    merge: tuple[int, int] = (2, 2)

    def __post_init__(self):
        frames, rows, columns = self.grid
        if min(self.grid) < 1 or rows % self.merge[0] or columns % self.merge[1]:
            raise PackError(
                f"{self.source}: a grid (t, h, w) of {self.grid} does not split into groups of {self.merge} patches; "
                "pad the image to whole groups"
            )
        if self.patches.ndim != 2 or len(self.patches) != frames * rows * columns:
            raise PackError(
                f"{self.source}: patches {self.patches.shape} do not match the grid {self.grid}; "
                f"give an array of [{frames * rows * columns}, C]"
            )

    @property
    def tokens(self) -> int:
        return self.grid[1] * self.grid[2] // (self.merge[0] * self.merge[1])


def first_fit(sizes: Sequence[int], packs: int, pack_patches: int) -> list[int]:
    """The pack of each clip when each goes to the first with room; ends before the first clip that finds none."""
    used, placement = [0] * packs, []
    for size in sizes:
        pack = _first_fit(used, size, pack_patches)
        if pack is None:
            break
        placement.append(pack)
    return placement


def _first_fit(used: list[int], size: int, pack_patches: int) -> int | None:
    for index, count in enumerate(used):
        if count + size <= pack_patches:
            used[index] += size
            return index
    return None


def clip_flops(patches, config: VisionConfig):
    """FLOPs of the encoder's forward pass over a clip of so many patches; an integer or an array of them (K2.5 §3.8)."""
    linear = 2 * config.width * (4 * config.width + 2 * config.mlp_dim)
    return config.layers * patches * (linear + 4 * config.width * patches)


def pack_flops(pack: VisionPack, config: VisionConfig) -> np.ndarray:
    """`clip_flops` of the clips of each pack, added up: [P]."""
    packs, clips = len(pack.segments_PN), int(pack.segments_PN.max(initial=0)) + 1
    number_PN = pack.segments_PN + clips * np.arange(packs)[:, None]
    patches = np.bincount(number_PN.reshape(-1), minlength=packs * clips).reshape(packs, clips)
    return clip_flops(patches[:, 1:], config).sum(axis=1)


def balance(
    sizes: Sequence[int],
    packs: int,
    pack_patches: int,
    config: VisionConfig,
    planned: Sequence[int] | None = None,
) -> list[int]:
    """The pack of each clip such that every device has about the same to compute (K2.5 §3.8).

    Clips go longest first to the pack that has least to compute and has room. Packs are then ordered so that aligned
    runs of 2, 4, 8, .. have about the same together: a device that holds so many is balanced better than a pack is.
    Knows no mesh, and the same sizes always give the same. Where a clip finds no room, as in packs that are full, the
    packs keep what `planned` (else `first_fit`) has put together, and are only ordered.
    """
    placement = _longest_first(sizes, packs, pack_patches, config)
    if placement is None:
        placement = first_fit(sizes, packs, pack_patches) if planned is None else list(planned)
        if len(placement) < len(sizes):
            return placement
    loads_P = np.bincount(placement, clip_flops(np.asarray(sizes, np.float64), config), minlength=packs)
    rank_P = np.empty(packs, np.int64)
    rank_P[_evened(loads_P)] = np.arange(packs)
    return rank_P[placement].tolist()


def _longest_first(sizes: Sequence[int], packs: int, pack_patches: int, config: VisionConfig) -> list[int] | None:
    placement, room = [0] * len(sizes), [pack_patches] * packs
    order = np.argsort(-np.asarray(sizes, np.int64), kind="stable")
    costs = clip_flops(np.asarray(sizes, np.int64)[order], config) * packs
    heap = list(range(packs))  # FLOPs so far * packs + number of the pack: one integer compares faster than a pair
    parked = []  # (-room, entry) of packs that had no room for a clip; clips only get smaller
    for clip, cost in zip(order.tolist(), costs.tolist(), strict=True):
        size = sizes[clip]
        while parked and -parked[0][0] >= size:
            heapq.heappush(heap, heapq.heappop(parked)[1])
        while heap and room[heap[0] % packs] < size:
            entry = heapq.heappop(heap)
            heapq.heappush(parked, (-room[entry % packs], entry))
        if not heap:
            return None
        pack = heap[0] % packs
        heapq.heapreplace(heap, heap[0] + cost)
        placement[clip] = pack
        room[pack] -= size
    return placement


def _evened(loads_P: np.ndarray) -> np.ndarray:
    """An order of the packs: the heaviest beside the lightest, such pairs beside such pairs, as long as they pair up."""
    groups = np.arange(len(loads_P))[:, None]
    while len(groups) and len(groups) % 2 == 0:
        order = np.argsort(loads_P[groups].sum(axis=1), kind="stable")
        light, heavy = order[: len(order) // 2], order[: len(order) // 2 - 1 : -1]
        groups = np.concatenate([groups[heavy], groups[light]], axis=1)
    return groups.reshape(-1)


def blank_pack(packs: int, pack_patches: int, patch_dim: int, dtype) -> VisionPack:
    """Packs that hold padding only, of patches of `patch_dim` values."""
    coords = np.zeros((packs, pack_patches, 5), np.int32)
    coords[..., 3:] = 1
    return VisionPack(
        patches_PNC=np.zeros((packs, pack_patches, patch_dim), dtype),
        segments_PN=np.zeros((packs, pack_patches), np.int32),
        coords_PN5=coords,
        slots_PN=np.full((packs, pack_patches), pack_patches, np.int32),
        weights_PN=np.zeros((packs, pack_patches), np.float32),
    )


def empty_pack(packs: int, pack_patches: int, config: VisionConfig) -> VisionPack:
    """Packs that hold padding only; `packs=0` for text-only batches."""
    return blank_pack(packs, pack_patches, config.patch_dim, np.uint8)


def waste(pack: VisionPack) -> float:
    """Fraction of the patch slots that is padding; 0 when there are no packs."""
    return float(np.mean(pack.segments_PN == 0)) if pack.segments_PN.size else 0.0


def pack_clips(
    clips: Sequence[Clip],
    packs: int,
    pack_patches: int,
    merge: tuple[int, int] = (2, 2),
    patch_dim: int = 588,
    place=first_fit,
) -> tuple[VisionPack, np.ndarray]:
    """Lay the clips into the packs that `place(sizes, packs, pack_patches)` chooses, in the order given (K2.5 §3.2).

    Returns the pack and `starts` int32: `starts[i]` is the index of clip i's first token in the features flattened to
    [P * M], M = pack_patches / group. The tokens of a clip are contiguous there, in raster order of the merged grid.
    Raises PackError when a clip is larger than a pack, when the packs are too few, or when a clip has other patches.
    """
    group = merge[0] * merge[1]
    if pack_patches % group:
        raise PackError(f"data.pack_patches={pack_patches} must be a multiple of the {group} patches of a token")
    dtype = clips[0].patches.dtype if clips else np.uint8
    for clip in clips:
        _check(clip, pack_patches, merge, patch_dim, dtype)
    pack = blank_pack(packs, pack_patches, patch_dim, dtype)
    used, tokens, count = [0] * packs, [0] * packs, [0] * packs
    starts = np.zeros(len(clips), np.int32)
    placement = place([len(clip.patches) for clip in clips], packs, pack_patches)
    if len(placement) < len(clips):
        raise PackError(_too_few(clips, len(placement), packs, pack_patches))
    for i, (clip, index) in enumerate(zip(clips, placement, strict=True)):
        count[index] += 1
        pack.patches_PNC[index, used[index] : used[index] + len(clip.patches)] = clip.patches
        write_grid(pack, index, used[index], count[index], tokens[index], clip.grid, clip.merge)
        used[index] += len(clip.patches)
        starts[i] = index * (pack_patches // group) + tokens[index]
        tokens[index] += clip.tokens
    return pack, starts


def _check(clip: Clip, pack_patches: int, merge: tuple[int, int], patch_dim: int, dtype):
    size = len(clip.patches)
    if size > pack_patches:
        raise PackError(
            f"{clip.source}: its {size} patches (t, h, w = {clip.grid}) exceed a pack of {pack_patches}; raise "
            "data.pack_patches, or lower data.max_image_patches (data.max_frame_patches for video)"
        )
    if clip.patches.shape[1] != patch_dim or clip.patches.dtype != dtype or tuple(clip.merge) != tuple(merge):
        raise PackError(
            f"{clip.source}: patches of {clip.patches.shape[1]} {clip.patches.dtype} values merged by {clip.merge} do "
            f"not go with a pack of {patch_dim} {dtype} values merged by {merge}; prepare all with one VisionConfig"
        )


def _too_few(clips: Sequence[Clip], index: int, packs: int, pack_patches: int) -> str:
    total = sum(len(clip.patches) for clip in clips)
    return (
        f"{clips[index].source}: no room for its {len(clips[index].patches)} patches; {len(clips)} clips of {total} "
        f"patches in all do not fit {packs} packs of {pack_patches} ({packs * pack_patches} slots); raise data.packs "
        "or data.pack_patches, or give fewer clips"
    )


def write_grid(pack: VisionPack, index: int, start: int, segment: int, first_token: int, grid, merge):
    """Fill all but the pixels of one clip's slots in place, from slot `start` of pack `index` on."""
    (frames, rows, columns), (merge_rows, merge_columns) = grid, merge
    where = (index, slice(start, start + frames * rows * columns))
    frame, row, column = np.ogrid[:frames, :rows, :columns]
    coords = pack.coords_PN5[where].reshape(frames, rows, columns, 5)
    coords[..., 0] = frame + 1 if frames > 1 else 0
    coords[..., 1], coords[..., 2], coords[..., 3], coords[..., 4] = row, column, rows, columns
    token = first_token + (row // merge_rows) * (columns // merge_columns) + column // merge_columns
    place = (row % merge_rows) * merge_columns + column % merge_columns
    slots = token * (merge_rows * merge_columns) + place
    pack.segments_PN[where] = segment
    pack.slots_PN[where] = np.broadcast_to(slots, grid).reshape(-1)
    pack.weights_PN[where] = 1.0 / frames
