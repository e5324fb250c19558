"""What is read: documents in rows, images in packs, the order in which they come."""

from mutants.mutation import of

MUTATIONS = [
    *of(
        "data/packing.py",
        (
            "positions go on from document to document",
            "batch.positions_BL[place] = np.arange(length)",
            "batch.positions_BL[place] = column + np.arange(length)",
            "data/test_packing.py::test_small_batch_by_hand",
        ),
        (
            "media are targets",
            "np.where(is_media[1:], 0.0, example.loss_weights[1:])",
            "example.loss_weights[1:]",
            "data/test_packing.py::test_media_pad_is_never_a_target",
        ),
        (
            "documents of a row share a segment",
            "documents[entry.row] += 1",
            "documents[entry.row] = 1",
            "data/test_packing.py::test_small_batch_by_hand",
        ),
        (
            "a piece has the weights of the tokens after its own",
            "example.loss_weights[start : start + length])",
            "example.loss_weights[start + 1 : start + 1 + length])",
            "data/test_packing.py::test_a_piece_has_the_weights_of_its_tokens",
        ),
        (
            "the balance does not begin with what was planned",
            "functools.partial(balance, config=vision, planned=planned)",
            "functools.partial(balance, config=vision)",
            "data/test_planned_packs.py",
        ),
    ),
    *of(
        "data/lane.py",
        (
            "pieces of a text do not overlap",
            "self.start += length - 1",
            "self.start += length",
            "data/test_pipeline.py::test_long_documents_fill_rows",
        ),
        (
            "what waits begins anew after a restart",
            "Waiting(source, index, start, waits, record.example)",
            "Waiting(source, index, 0, waits, record.example)",
            "data/test_pipeline.py::test_resumed_equals_uninterrupted_at_every_batch",
        ),
    ),
    *of(
        "data/pipeline.py",
        (
            "the seed of the data dropped",
            "np.random.SeedSequence([data.seed, place])",
            "np.random.SeedSequence([place])",
            "data/test_pipeline.py::test_same_seed_same_batches_other_seed_others",
        ),
        (
            "all sources shuffled alike",
            "np.random.SeedSequence([data.seed, place])",
            "np.random.SeedSequence([data.seed])",
            "data/test_pipeline.py::test_sources_are_shuffled_independently",
        ),
    ),
    *of(
        "data/mixture.py",
        (
            "what waits does not count as given",
            "self.handed[i] + self.waiting[i] for i in own",
            "self.handed[i] for i in own",
            "data/test_mixture.py::test_the_source_that_lacks_most_is_next",
        ),
        (
            "a schedule is never entered",
            "self._targets_at(batch / self._steps)",
            "self._targets_at(0.0)",
            "data/test_mixture.py::test_vision_comes_in_at_half_of_the_run_without_catching_up",
        ),
    ),
    *of(
        "vision/patchpack.py",
        (
            "frames of a clip added up",
            "pack.weights_PN[where] = 1.0 / frames",
            "pack.weights_PN[where] = 1.0",
            "vision/test_patchpack.py::test_exact_small_pack vision/test_patchpack.py::test_against_the_slow_way",
        ),
        (
            "the first frame of a clip counts as an image",
            "frame + 1 if frames > 1 else 0",
            "frame",
            "vision/test_patchpack.py::test_against_the_slow_way",
        ),
        (
            "attention costs as much as its patches",
            "(linear + 4 * config.width * patches)",
            "(linear + 4 * config.width)",
            "vision/test_patchpack.py::test_flops_of_packs",
        ),
        (
            "a token's patches in columns",
            "(row % merge_rows) * merge_columns + column % merge_columns",
            "(column % merge_columns) * merge_rows + row % merge_rows",
            "vision/test_patchpack.py::test_against_the_slow_way",
        ),
    ),
    *of(
        "vision/image.py",
        (
            "values of a patch by row, channel, column",
            "transpose(0, 2, 4, 1, 3)",
            "transpose(0, 2, 1, 4, 3)",
            "vision/test_image.py::test_patchify_against_a_loop",
        ),
    ),
]
