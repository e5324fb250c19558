"""The engine, and weights in files."""

from mutants.mutation import of

MUTATIONS = [
    *of(
        "sampling/engine.py",
        (
            "a token in flight gets the version of the day it is read",
            "logprobs_N[n], version, alternatives)",
            "logprobs_N[n], self._version, alternatives)",
            "sampling/test_versions_and_epochs.py::test_a_token_carries_the_version_that_drew_it_also_when_it_is_read_later",
        ),
        (
            "pages of old weights are kept for others",
            "if sequence.epoch == self._epoch:",
            "if True:",
            "sampling/test_versions_and_epochs.py::test_pages_that_old_weights_have_filled_in_part_are_found_by_nobody",
        ),
        (
            "new weights forget no page",
            "            home.pages.forget()\n",
            "            pass\n",
            "sampling/test_versions_and_epochs.py::test_nothing_that_was_kept_outlives_the_weights",
        ),
    ),
    *of(
        "sampling/paged_cache.py",
        (
            "pages do not tell images apart",
            "np.int64(first - start).tobytes() + digest",
            "np.int64(first - start).tobytes()",
            "sampling/test_paged_cache.py::test_keys_tell_images_apart_by_what_they_show_and_where_they_stand",
        ),
        (
            "a page's key is that of its own tokens",
            'hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)',
            'hashlib.blake2b(b"", digest_size=16)',
            "sampling/test_paged_cache.py::test_keys_stand_for_all_that_came_before",
        ),
    ),
    *of(
        "checkpoint/quantised.py",
        (
            "the largest of a group becomes 8",
            ".max(axis=2) / 7)",
            ".max(axis=2) / 8)",
            "checkpoint/test_quantised.py::test_int4_error_is_half_a_step_and_packing_again_is_exact",
        ),
        (
            "nibbles swapped",
            "nibbles[:, 0::2] | nibbles[:, 1::2] << 4",
            "nibbles[:, 1::2] | nibbles[:, 0::2] << 4",
            "checkpoint/test_quantised.py::test_compressed_tensors_unpacks_what_we_pack",
        ),
    ),
]
