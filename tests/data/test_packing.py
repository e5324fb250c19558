import dataclasses

import jax
import numpy as np
import pytest

from k25_jax.config import DataConfig, VisionConfig, preset
from k25_jax.data.packing import (
    Example,
    Filling,
    PackingError,
    batch_stats,
    build,
    expand_media,
    make_example,
    pack_examples,
    piece,
    truncate,
)
from k25_jax.vision.patchpack import Clip

MODEL = dataclasses.replace(preset("tiny"), vision=VisionConfig(layers=2, width=64, heads=4, mlp_dim=128, patch_size=2))
PAD, BEGIN, END = MODEL.media_pad_id, MODEL.media_begin_id, MODEL.media_end_id
DATA = DataConfig(batch_size=4, seq_len=32, packs=2, pack_patches=48)


def random_clip(generator):
    frames, rows, columns = generator.integers(1, 4), 2 * generator.integers(1, 3), 2 * generator.integers(1, 4)
    patches = generator.integers(0, 256, (frames * rows * columns, MODEL.vision.patch_dim), dtype=np.uint8)
    return Clip(patches, (int(frames), int(rows), int(columns)), "random")


def random_example(generator, clips):
    """Text with media blocks in it, and random weights."""
    tokens = list(generator.integers(0, 256, generator.integers(2, 8)))
    clips = [random_clip(generator) for _ in range(clips)]
    for _ in clips:
        tokens += [BEGIN, PAD, END, *generator.integers(0, 256, generator.integers(1, 4))]
    weights = generator.integers(0, 3, len(tokens)).astype(float)
    return make_example(tokens, weights, clips, PAD)


def text(length, first=0):
    return Example((first + np.arange(length, dtype=np.int32)) % 256, np.ones(length, np.float32))


# ------------------------------------------------------------------------------------------------------------- examples
def test_expand_media():
    assert expand_media([1, PAD, 2, PAD, 3], [3, 1], PAD).tolist() == [1, PAD, PAD, PAD, 2, PAD, 3]
    assert expand_media([1, 2], [], PAD).dtype == np.int32
    assert expand_media([PAD], [0], PAD).tolist() == []
    for counts in ([], [1, 2]):
        with pytest.raises(PackingError, match=f"1 media_pad tokens .* for {len(counts)} clips"):
            expand_media([1, PAD], counts, PAD)


def test_make_example_gives_media_no_weight():
    clip = random_clip(np.random.default_rng(0))
    example = make_example([7, PAD, 8], [1.0, 1.0, 0.5], [clip], PAD)
    assert example.tokens.tolist() == [7, *[PAD] * clip.tokens, 8]
    assert example.loss_weights.tolist() == [1.0, *[0.0] * clip.tokens, 0.5]
    assert example.clips == [clip] and not example.truncated


def test_pieces_of_a_text_predict_every_token_once():
    for length in range(2, 80):
        for seq_len in (2, 3, 10):
            starts = range(0, length - 1, seq_len - 1)
            pieces = [piece(text(length), start, min(seq_len, length - start)) for start in starts]
            assert all(2 <= len(one) <= seq_len for one in pieces)
            predicted = np.concatenate([one.tokens[1:] for one in pieces])
            assert predicted.tolist() == text(length).tokens[1:].tolist()


def test_long_document_with_media_is_truncated_between_blocks():
    generator = np.random.default_rng(1)
    for _ in range(100):
        example = random_example(generator, clips=3)
        for seq_len in range(2, len(example) + 2):
            piece = truncate(example, seq_len, MODEL)
            assert piece.truncated == (seq_len < len(example))
            assert len(piece) <= seq_len
            assert piece.tokens.tolist() == example.tokens[: len(piece)].tolist()
            assert piece.loss_weights.tolist() == example.loss_weights[: len(piece)].tolist()
            assert sum(clip.tokens for clip in piece.clips) == np.sum(piece.tokens == PAD)
            assert np.sum(piece.tokens == BEGIN) == np.sum(piece.tokens == END) == len(piece.clips)
            assert all(a is b for a, b in zip(piece.clips, example.clips, strict=False))
            if len(piece) < min(seq_len, len(example)):  # cut short of the limit: a media block begins here
                assert example.tokens[len(piece)] == BEGIN


# -------------------------------------------------------------------------------------------------------------- batches
def token_patches(clip, token):
    """The patches that one token of a clip is made of, by definition: [frames, 2 * 2, C]."""
    frames, rows, columns = clip.grid
    grid = clip.patches.reshape(frames, rows, columns, -1)
    row, column = divmod(token, columns // 2)
    return grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(frames, 4, -1)


def packed_patches(vision, feature):
    """What the vision pack says feature `feature` of [P * M] is made of: [frames, 4, C]."""
    pack, token = divmod(int(feature), vision.slots_PN.shape[1] // 4)
    places = np.flatnonzero(vision.slots_PN[pack] // 4 == token)
    frames = vision.coords_PN5[pack, places, 0]
    order = np.lexsort((vision.slots_PN[pack, places], frames))
    return vision.patches_PNC[pack, places[order]].reshape(len(set(frames.tolist())), 4, -1)


def check_document(batch, row, columns, example):
    """One document in a batch against its example, position by position."""
    vision_tokens = iter([(clip, token) for clip in example.clips for token in range(clip.tokens)])
    for i, column in enumerate(columns):
        assert batch.tokens_BL[row, column] == example.tokens[i]
        assert batch.positions_BL[row, column] == i
        if i + 1 < len(example):
            following = example.tokens[i + 1]
            assert batch.targets_BL[row, column] == following
            weight = 0.0 if following == PAD else example.loss_weights[i + 1]
        else:
            assert batch.targets_BL[row, column] == MODEL.pad_id
            weight = 0.0
        assert batch.loss_weights_BL[row, column] == weight
        if example.tokens[i] == PAD:
            wanted = token_patches(*next(vision_tokens))
            assert np.array_equal(packed_patches(batch.vision, batch.media_BL[row, column]), wanted)
        else:
            assert batch.media_BL[row, column] == -1
    assert next(vision_tokens, None) is None


def best_fit_rows(examples, data):
    """Rows by the rule: the one with room that leaves the least, the first of several."""
    used, rows = [0] * data.batch_size, []
    for example in examples:
        fitting = [row for row in range(data.batch_size) if used[row] + len(example) <= data.seq_len]
        rows.append(max(fitting, key=lambda row: (used[row], -row)))
        used[rows[-1]] += len(example)
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_batch_against_brute_force(seed):
    generator = np.random.default_rng(seed)
    filling, placed = Filling(DATA), []
    for _ in range(30):
        example = random_example(generator, clips=int(generator.integers(0, 3)))
        if filling.add(example):
            placed.append(example)
    batch = build([filling.placed], DATA, MODEL)
    assert any(example.clips for example in placed) and len(placed) > 4
    seen = np.zeros((DATA.batch_size, DATA.seq_len), bool)
    documents = [0] * DATA.batch_size
    for example, row in zip(placed, best_fit_rows(placed, DATA), strict=True):
        documents[row] += 1
        columns = np.flatnonzero(batch.segments_BL[row] == documents[row])
        assert columns.tolist() == list(range(columns[0], columns[0] + len(example)))
        check_document(batch, row, columns, example)
        seen[row, columns] = True
    empty = ~seen
    assert not batch.segments_BL[empty].any() and not batch.loss_weights_BL[empty].any()
    assert not batch.positions_BL[empty].any() and (batch.media_BL[empty] == -1).all()
    assert (batch.tokens_BL[empty] == MODEL.pad_id).all() and (batch.targets_BL[empty] == MODEL.pad_id).all()
    used = batch.media_BL[batch.media_BL >= 0]
    assert len(set(used.tolist())) == len(used) == sum(clip.tokens for example in placed for clip in example.clips)


def test_a_piece_has_the_weights_of_its_tokens():
    whole = Example(np.arange(10, dtype=np.int32), np.arange(10, dtype=np.float32) / 2)
    for start, length in ((0, 10), (0, 4), (3, 4), (9, 1)):
        part = piece(whole, start, length)
        assert part.tokens.tolist() == list(range(start, start + length))
        assert part.loss_weights.tolist() == [token / 2 for token in range(start, start + length)] and not part.clips


def test_small_batch_by_hand():
    data = DataConfig(batch_size=2, seq_len=6, packs=0, pack_patches=4)
    first = Example(np.array([1, 2, 3, 4], np.int32), np.array([1, 0, 2, 1], np.float32))
    second = Example(np.array([5, 6, 7], np.int32), np.array([9, 1, 1], np.float32))
    third = Example(np.array([8, 9], np.int32), np.array([9, 3], np.float32))
    batch = pack_examples([first, second, third], data, MODEL)
    pad = MODEL.pad_id
    assert batch.tokens_BL.tolist() == [[1, 2, 3, 4, 8, 9], [5, 6, 7, pad, pad, pad]]
    assert batch.targets_BL.tolist() == [[2, 3, 4, pad, 9, pad], [6, 7, pad, pad, pad, pad]]
    assert batch.loss_weights_BL.tolist() == [[0, 2, 1, 0, 3, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.segments_BL.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch.positions_BL.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert (batch.media_BL == -1).all() and batch.vision.patches_PNC.shape == (0, 4, MODEL.vision.patch_dim)
    stats = batch_stats(batch)
    assert stats["documents"] == 3 and stats["tokens"] == 9 and stats["loss_tokens"] == 5 and stats["clips"] == 0
    assert stats["waste_tokens"] == pytest.approx(0.25) and stats["waste_patches"] == 0.0


def test_media_pad_is_never_a_target():
    clip = Clip(np.zeros((8, MODEL.vision.patch_dim), np.uint8), (1, 2, 4))
    example = Example(np.array([1, PAD, PAD, 2, 3], np.int32), np.ones(5, np.float32), [clip])
    batch = pack_examples([example], DATA, MODEL)
    assert batch.loss_weights_BL[0, :6].tolist() == [0, 0, 1, 1, 0, 0]
    assert batch.media_BL[0, :6].tolist() == [-1, 0, 1, -1, -1, -1]


def test_statistics_of_media():
    clips = [Clip(np.zeros((4, MODEL.vision.patch_dim), np.uint8), (1, 2, 2)) for _ in range(3)]
    batch = pack_examples([make_example([1, PAD, PAD, PAD, 2], [1] * 5, clips, PAD)], DATA, MODEL)
    stats = batch_stats(batch)
    assert stats["media_tokens"] == stats["clips"] == 3
    assert stats["waste_patches"] == pytest.approx(1 - 12 / 96)
    assert stats["waste_tokens"] == pytest.approx(1 - 5 / 128)


def test_a_filling_says_no_and_stays_as_it_was():
    data = DataConfig(batch_size=1, seq_len=8, packs=1, pack_patches=8)
    filling = Filling(data)
    big = make_example([1, PAD, 2], [1] * 3, [Clip(np.zeros((12, 12), np.uint8), (1, 2, 6))], PAD)
    small = make_example([1, PAD, 2], [1] * 3, [Clip(np.ones((8, 12), np.uint8), (2, 2, 2))], PAD)
    assert not filling.add(text(9)) and not filling.add(big)
    assert filling.add(small)
    other = filling.copy()
    assert not filling.add(small)  # the pack is full
    assert filling.add(text(4)) and filling.rows.largest == 1 and other.rows.largest == 5
    batch = build([filling.placed], data, MODEL)
    assert batch.segments_BL.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0]]


def test_the_fillings_of_lanes_lie_one_below_the_other():
    data, generator = dataclasses.replace(DATA, batch_size=8, packs=4, lanes=2), np.random.default_rng(5)
    fillings = [Filling(DATA), Filling(DATA)]
    placed = [[one for one in (random_example(generator, 1) for _ in range(9)) if each.add(one)] for each in fillings]
    batch = build([each.placed for each in fillings], data, MODEL)
    alone = [build([each.placed], DATA, MODEL) for each in fillings]
    for name in ("tokens_BL", "targets_BL", "segments_BL", "positions_BL", "loss_weights_BL"):
        assert np.array_equal(getattr(batch, name), np.concatenate([getattr(one, name) for one in alone]))
    for number, examples in enumerate(placed):
        for example, row, segment in zip(examples, best_fit_rows(examples, DATA), _numbers(examples), strict=True):
            columns = np.flatnonzero(batch.segments_BL[4 * number + row] == segment)
            check_document(batch, 4 * number + row, columns, example)


def _numbers(examples):
    """The number of each example in its row."""
    rows = best_fit_rows(examples, DATA)
    return [rows[: i + 1].count(row) for i, row in enumerate(rows)]


def test_what_does_not_fit_is_named():
    with pytest.raises(PackingError, match=r"examples\[4\] \(32 tokens, 0 patches\)"):
        pack_examples([text(32)] * 5, DATA, MODEL)


def test_batch_is_a_pytree():
    batch = pack_examples([text(5)], DATA, MODEL)
    assert len(jax.tree.leaves(batch)) == 11
    total = jax.jit(lambda batch: batch.tokens_BL.sum() + batch.vision.weights_PN.sum())(batch)
    assert total == batch.tokens_BL.sum()


def test_a_batch_without_a_clip_has_no_packs():
    batch = pack_examples([text(5)], DATA, MODEL)
    assert batch.vision.patches_PNC.shape == (0, 48, MODEL.vision.patch_dim) and batch.routes is None
