"""Kernels, losses and the optimizer."""

from mutants.mutation import of

BFLOAT16 = "numerics/test_bfloat16_path.py"
TYPES = "numerics/test_accumulator_types.py::test_a_bfloat16_step_scores_and_adds_up_in_float32"
MUTATIONS = [
    *of(
        "kernels/attention.py",
        (
            "a query does not see its own place",
            "place_L[:, None] >= jnp.arange(keys)[None, :]",
            "place_L[:, None] > jnp.arange(keys)[None, :]",
            "kernels/test_attention.py::test_a_later_or_foreign_key_has_no_gradient",
        ),
        (
            "documents of a row see each other",
            "axis=1)[:, :, None] == segments_BS[:, None, :keys]",
            "axis=1)[:, :, None] >= segments_BS[:, None, :keys]",
            "kernels/test_attention.py::test_a_later_or_foreign_key_has_no_gradient",
        ),
        (
            "the shift in attention's backward in bfloat16",
            "jnp.sum(dout_BHLK.astype(jnp.float32) * out_BHLK, axis=-1, keepdims=True)",
            "jnp.sum(dout_BHLK * out_BHLK, axis=-1, keepdims=True)",
            f"{BFLOAT16}::test_the_backward_pass_of_attention_tells_values_that_differ_by_half_of_a_hundred",
        ),
        (
            "scores of attention in bfloat16",
            'scores = jnp.einsum("bhlk,bhsk->bhls", q_BHLK, k_BHSK, preferred_element_type=jnp.float32) * scale',
            'scores = jnp.einsum("bhlk,bhsk->bhls", q_BHLK, k_BHSK).astype(jnp.float32) * scale',
            f"{BFLOAT16}::test_attention_at_logits_of_a_hundred_is_that_of_float32",
        ),
        (
            "gradients of attention's weights in bfloat16",
            'jnp.einsum("bhlk,bhsk->bhls", dout, v, preferred_element_type=jnp.float32)',
            'jnp.einsum("bhlk,bhsk->bhls", dout, v).astype(jnp.float32)',
            f"{BFLOAT16}::test_the_backward_pass_of_attention_tells_values_that_differ_by_half_of_a_hundred",
        ),
        (
            "gradients of keys added up in bfloat16",
            '"bhkl,bhls->bhks", preferred_element_type=jnp.float32)',
            '"bhkl,bhls->bhks")',
            f"{BFLOAT16}::test_gradients_of_keys_are_not_rounded_from_block_to_block",
        ),
        (
            "padding's logits among the largest",
            "[..., None] > 0, top, MASKED)",
            "[..., None] >= 0, top, MASKED)",
            "kernels/test_attention.py::test_blocks_give_the_reference_and_its_gradients",
        ),
        (
            "a score's gradient without its scale",
            "(weights * (dweights - shift) * scale)",
            "(weights * (dweights - shift))",
            "kernels/test_attention.py::test_blocks_give_the_reference_and_its_gradients",
        ),
    ),
    *of(
        "kernels/grouped_matmul.py",
        (
            "SiLU's gradient is its sigmoid",
            "(sigmoid_BF + hidden_BF * (1 - sigmoid_BF))",
            "sigmoid_BF",
            "kernels/test_grouped_matmul.py::test_gradients_equal_those_of_the_reference",
        ),
        (
            "an expert's matrices have gradients added up in bfloat16",
            "zeros = [jnp.zeros(w.shape, jnp.float32) for w in weights]",
            "zeros = [jnp.zeros(w.shape, w.dtype) for w in weights]",
            TYPES,
        ),
        (
            "rows of other experts in a matrix's gradient",
            "dup_BF = jnp.where(mine_B1, dhidden_BF * hidden_BF, 0)",
            "dup_BF = dhidden_BF * hidden_BF",
            "kernels/test_grouped_matmul.py::test_gradients_equal_those_of_the_reference",
        ),
    ),
    *of(
        "kernels/paged_attention.py",
        (
            "a new token does not see itself",
            "place_S <= position_BN1",
            "place_S < position_BN1",
            "kernels/test_paged_attention.py::test_pages_in_any_order_are_one_sequence",
        ),
        (
            "scores of sampling in bfloat16",
            'scores = _product("bnr,bsr->bns", q_BNR, c_BSR) + _product("bnk,bsk->bns", q_BNK, r_BSK)',
            'scores = jnp.einsum("bnr,bsr->bns", q_BNR, c_BSR) + jnp.einsum("bnk,bsk->bns", q_BNK, r_BSK)',
            "kernels/test_paged_attention.py::test_in_bfloat16_logits_of_a_hundred_are_exact_enough",
        ),
        (
            "the sum of weights keeps an old maximum",
            "total_BN1 * shrunk_BN1 + weights",
            "total_BN1 + weights",
            "kernels/test_paged_attention.py::test_pages_in_any_order_are_one_sequence",
        ),
    ),
    *of(
        "losses/lm.py",
        (
            "a part's loss over its own weight",
            "if whole is None else whole",
            "if whole is None else (weights_BL.sum(), (weights_BL > 0).sum())",
            "numerics/test_sums_of_parts.py::test_losses_of_parts_add_up_to_that_of_the_whole",
        ),
        (
            "logits of the vocabulary in bfloat16",
            "jnp.dot(x_BLD, head_DC, preferred_element_type=jnp.float32)",
            "jnp.dot(x_BLD, head_DC).astype(jnp.float32)",
            f"{BFLOAT16}::test_scores_of_the_vocabulary_are_not_rounded",
        ),
        (
            "columns that pad the vocabulary count",
            "scores_BLC, LOWEST)",
            "scores_BLC, 0.0)",
            "losses/test_lm.py::test_equals_torch_with_weights",
        ),
        (
            "the loss divided by places, not by weights",
            "(nll_BL * weights_BL).sum() / jnp.maximum(total, 1.0)",
            "(nll_BL * weights_BL).sum() / jnp.maximum(places, 1.0)",
            "losses/test_lm.py::test_equals_torch_with_weights",
        ),
    ),
    *of(
        "losses/siglip.py",
        (
            "pairs repel",
            "jax.nn.softplus(-sign_ST * logits_BST)",
            "jax.nn.softplus(sign_ST * logits_BST)",
            "losses/test_siglip.py::test_pairs_of_each_row_without_those_that_are_not_there",
        ),
    ),
    *of(
        "optim/muonclip.py",
        (
            "norms decay",
            '"norm" in name or "bias" in name',
            '"bias" in name',
            "optim/test_muonclip.py::test_matrices_decay_and_nothing_else",
        ),
        (
            "Muon without Nesterov's look ahead",
            "b * m / (1 - b ** (taken + 1)) + (1 - b) * g / (1 - b**taken)",
            "m / (1 - b**taken)",
            "optim/test_muonclip.py::test_muon_equals_optax",
        ),
        (
            "updates scaled by the shorter side",
            "math.sqrt(max(rows, columns))",
            "math.sqrt(min(rows, columns))",
            "optim/test_muonclip.py::test_muon_equals_optax",
        ),
        (
            "gradients not clipped",
            "m = mean(m, g * clip,",
            "m = mean(m, g,",
            "optim/test_muonclip.py::test_the_update_is_clipped_adamw_by_hand",
        ),
        (
            "means of squares not corrected",
            "1 / (1 - config.b1**taken), 1 / (1 - config.b2**taken)",
            "1 / (1 - config.b1**taken), 1.0",
            "optim/test_muonclip.py::test_the_update_is_clipped_adamw_by_hand",
        ),
        (
            "a bad step moves the means",
            "jnp.where(finite, decay * old + (1 - decay) * new, old)",
            "decay * old + (1 - decay) * new",
            "optim/test_muonclip.py::test_a_step_that_is_not_finite_changes_no_bit",
        ),
        (
            "a stacked sharding that replicates",
            'PartitionSpec(*(entries[group.strip("()").split()[0]] for group in groups))',
            "PartitionSpec(*(None for group in groups))",
            "sharding/test_layout_of_means.py::test_a_stack_of_matrices_is_split_as_the_weight_is",
        ),
        (
            "the rotary query clipped by the root",
            "jnp.where(without_rotation, jnp.sqrt(gamma_YRHK), gamma_YRHK)",
            "jnp.where(without_rotation, jnp.sqrt(gamma_YRHK), jnp.sqrt(gamma_YRHK))",
            "optim/test_muonclip.py::test_qk_clip_scales_every_logit_of_a_head_by_gamma",
        ),
        (
            "MoE layers clipped by the logits of dense ones",
            "            first += layers\n",
            "",
            "optim/test_muonclip.py::test_qk_clip_scales_every_logit_of_a_head_by_gamma",
        ),
    ),
    *of(
        "optim/newton_schulz.py",
        (
            "Newton-Schulz's norm in bfloat16",
            "x = stack_NRC.astype(jnp.float32)",
            "x = stack_NRC.astype(dtype)",
            f"{BFLOAT16}::test_newton_schulz_does_not_feel_how_large_a_matrix_is",
        ),
        (
            "devices with copies all take the same matrices",
            "index = first + turn * copied",
            "index = turn * copied",
            "optim/test_newton_schulz.py",
        ),
        (
            "another quintic",
            "3.4445, -4.7750, 2.0315",
            "3.4445, -4.7750, 2.3015",
            "optim/test_muonclip.py::test_muon_equals_optax",
        ),
    ),
    *of(
        "optim/schedules.py",
        (
            "the first step has no rate",
            "(step + 1) / max(config.warmup_steps, 1)",
            "step / max(config.warmup_steps, 1)",
            "optim/test_schedules.py::test_warm_up_constant_decay",
        ),
        (
            "the decay begins a length too late",
            "start_decay = steps - config.decay_steps",
            "start_decay = steps",
            "optim/test_schedules.py::test_warm_up_constant_decay",
        ),
    ),
]
