"""The model: its router, its masks, its positions, its norms, and the types in which it adds up."""

from mutants.mutation import of

BFLOAT16 = "numerics/test_bfloat16_path.py"
TYPES = "numerics/test_accumulator_types.py::test_a_bfloat16_step_scores_and_adds_up_in_float32"
MUTATIONS = [
    *of(
        "models/moe.py",
        (
            "router scores in bfloat16",
            'jnp.dot(x_TD.astype(jnp.float32), router_DE.astype(jnp.float32), precision="highest")',
            "jnp.dot(x_TD, router_DE.astype(x_TD.dtype))",
            f"{BFLOAT16}::test_the_router_tells_experts_whose_scores_differ_by_a_thousandth",
        ),
        (
            "router weights cast with the rest",
            'route(p["router"], p["router_bias"]',
            'route(p["router"].astype(x_BLD.dtype), p["router_bias"]',
            f"{BFLOAT16}::test_a_bfloat16_step_chooses_the_experts_of_a_float32_step",
        ),
        (
            "the bias weighs experts",
            "jnp.take_along_axis(scores_TE, experts_TK",
            "jnp.take_along_axis(choice_TE, experts_TK",
            "models/test_moe.py::test_the_bias_chooses_but_never_weighs",
        ),
        (
            "the sign rule the wrong way round",
            "bias_YE + rate * jnp.sign(",
            "bias_YE - rate * jnp.sign(",
            "models/test_moe.py::test_the_sign_rule_raises_idle_experts_and_lowers_busy_ones",
        ),
        (
            "padding goes to experts",
            "experts_BLK = jnp.where(valid_BL[..., None], experts_BLK, config.experts)",
            "experts_BLK = jnp.where(valid_BL[..., None], experts_BLK, experts_BLK)",
            "models/test_moe.py::test_padding_is_neither_computed_nor_counted",
        ),
        (
            "a group's worth is its best expert's",
            "jax.lax.top_k(grouped_TGE, 2)",
            "jax.lax.top_k(grouped_TGE, 1)",
            "models/test_moe.py::test_router_and_experts_are_those_of_brute_force",
        ),
        (
            "router weights without their scale",
            "return weights_TK * config.scale,",
            "return weights_TK,",
            "models/test_moe.py::test_router_and_experts_are_those_of_brute_force",
        ),
    ),
    *of(
        "models/decoder.py",
        (
            "padding sent to the experts",
            "segments_BL > 0, config)",
            "segments_BL >= 0, config)",
            f"{BFLOAT16}::test_padding_reaches_no_expert",
        ),
        (
            "a decoded token does not see itself",
            "jnp.arange(slots)[None, :] <= positions_B[:, None]",
            "jnp.arange(slots)[None, :] < positions_B[:, None]",
            "models/test_mla.py::test_prefill_and_steps_give_the_states_of_the_whole_pass",
        ),
        (
            "logits of the vocabulary in bfloat16 when sampling",
            "jnp.dot(x_BLD, head(params).astype(x_BLD.dtype), preferred_element_type=jnp.float32)",
            "(x_BLD @ head(params).astype(x_BLD.dtype)).astype(jnp.float32)",
            f"{BFLOAT16}::test_scores_of_the_vocabulary_are_not_rounded",
        ),
    ),
    *of(
        "models/rope.py",
        (
            "YaRN stretches fast pairs",
            "stretched * (1 - fast) + plain * fast",
            "stretched * fast + plain * (1 - fast)",
            "models/test_rope.py::test_yarn_keeps_fast_pairs_and_stretches_slow_ones",
        ),
        (
            "YaRN's temperature not squared",
            "yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2",
            "yarn_mscale(config.rope.factor, config.rope.mscale_all_dim)",
            "models/test_rope.py::test_softmax_scale",
        ),
        (
            "rotation the other way",
            "[even * cos - odd * sin, odd * cos + even * sin]",
            "[even * cos + odd * sin, odd * cos - even * sin]",
            "models/test_rope.py::test_rotation_turns_interleaved_pairs",
        ),
        (
            "rows and columns of patches swapped",
            "jnp.stack([columns_N, rows_N], axis=-1)",
            "jnp.stack([rows_N, columns_N], axis=-1)",
            "models/test_rope.py::test_axial_pairs_alternate_between_column_and_row",
        ),
    ),
    *of(
        "models/mla.py",
        (
            "the largest logit of one device's rows",
            "jax.lax.pmax(jax.lax.stop_gradient(max_logit_H), axes)",
            "jax.lax.stop_gradient(max_logit_H)",
            "numerics/test_reductions_over_devices.py",
        ),
        (
            "the rotary key is not turned",
            "rotate(r_BLK, *rope)",
            "r_BLK",
            "models/test_parity.py::test_each_decoder_layer",
        ),
    ),
    *of(
        "models/context.py",
        (
            "the largest logit of one stripe's rows",
            '("context", *rows))\n        return',
            '("context",))\n        return',
            "numerics/test_reductions_over_devices.py",
        ),
        (
            "the largest logit of one stripe",
            '("context", *rows))\n        return',
            "rows)\n        return",
            "numerics/test_reductions_over_devices.py",
        ),
    ),
    *of(
        "models/experts.py",
        (
            "a later chunk has the experts of the first",
            "jnp.clip(ends_E - i * rows, 0, rows)",
            "jnp.clip(ends_E, 0, rows)",
            "models/test_experts.py::test_chunks_equal_one_piece_however_many_there_are",
        ),
        (
            "what other devices' experts made is not added up",
            'jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)',
            'jax.lax.dynamic_slice_in_dim(y_TD, jax.lax.axis_index("expert"), y_TD.shape[0] // jax.lax.axis_size("expert"))',
            "models/test_dispatch.py::test_both_forms_equal_the_definition_however_tokens_choose",
        ),
    ),
    *of(
        "models/dispatch.py",
        (
            "of a token's copies in a round one has a gradient",
            "dx_TD.at[token_N].add(dx_ND)",
            "dx_TD.at[token_N].set(dx_ND)",
            "models/test_experts.py::test_chunks_equal_one_piece_however_many_there_are",
        ),
    ),
    *of(
        "models/layers.py",
        (
            "statistics of norms in bfloat16",
            "    x = x.astype(jnp.float32)\n    return x - jnp.mean",
            "    return x - jnp.mean",
            f"{BFLOAT16}::test_a_norm_is_off_by_one_rounding_alone_however_long_its_rows",
        ),
        (
            "a LayerNorm's gradient keeps its mean",
            "        dx -= _mean_product(dunit, jnp.ones_like(dunit))",
            "        dx -= 0",
            f"{BFLOAT16}::test_the_written_gradient_of_a_norm_is_the_derived_one",
        ),
        (
            "a norm's gradient ignores its length",
            "dunit - unit * _mean_product(dunit, unit)",
            "dunit",
            f"{BFLOAT16}::test_the_written_gradient_of_a_norm_is_the_derived_one",
        ),
    ),
    *of(
        "models/k25.py",
        (
            "router weights cast with the rest when sampling",
            'KEPT = "router", "norm"',
            'KEPT = "no router", "norm"',
            f"{BFLOAT16}::test_weights_that_are_cast_for_sampling_keep_the_router",
        ),
        (
            "the first feature of a batch is lost",
            "jnp.where(media_BL[..., None] >= 0, vision_BLD",
            "jnp.where(media_BL[..., None] > 0, vision_BLD",
            "models/test_parity.py::test_logits",
        ),
    ),
    *of(
        "models/embedding.py",
        (
            "gradients of embedding rows added up in bfloat16",
            "jnp.zeros(like_0VD.shape[1:], jnp.float32).at[index].add(dy.astype(jnp.float32))",
            "jnp.zeros(like_0VD.shape[1:], dy.dtype).at[index].add(dy)",
            TYPES,
        ),
        (
            "of a token's occurrences one has a gradient",
            ".at[index].add(dy.astype(jnp.float32))",
            ".at[index].set(dy.astype(jnp.float32))",
            "numerics/test_sums_of_parts.py::test_a_batch_in_parts_has_the_gradients_of_the_whole",
        ),
    ),
    *of(
        "models/masters.py",
        (
            "gradients of weights leave their product in bfloat16",
            'f"{of_x},{out}->{of_w}", x, dy, preferred_element_type=jnp.float32)',
            'f"{of_x},{out}->{of_w}", x, dy)',
            TYPES,
        ),
        (
            "gradients of biases added up in bfloat16",
            "(y + bias.astype(jnp.float32)).astype(y.dtype)",
            "y + bias.astype(y.dtype)",
            TYPES,
        ),
        (
            "the gradient of a gathered matrix is not a sum over devices",
            "jax.lax.psum_scatter(dw.astype(reduce_dtype), axes, scatter_dimension=axis, tiled=True)",
            "jax.lax.psum_scatter(dw.astype(reduce_dtype), axes, scatter_dimension=axis, tiled=True) / 2",
            "models/test_dispatch.py::test_both_forms_equal_the_definition_however_tokens_choose",
        ),
    ),
    *of(
        "models/moonvit3d.py",
        (
            "pixels not normalised about zero",
            "(patches.astype(jnp.float32) / 255.0 - 0.5) / 0.5",
            "patches.astype(jnp.float32) / 255.0",
            "models/test_parity.py::test_vision_tower_and_projector",
        ),
        (
            "a clip's frames added up, not averaged",
            "segment_sum(x_NW * weights_N[:, None], slots_N",
            "segment_sum(x_NW, slots_N",
            f"{BFLOAT16}::test_the_frames_of_a_clip_are_averaged_in_float32",
        ),
        (
            "frames numbered one too low",
            "time_table(config)[frames]",
            "time_table(config)[jnp.maximum(frames - 1, 0)]",
            "models/test_parity.py::test_vision_tower_and_projector",
        ),
        (
            "another bicubic",
            "    a = -0.75\n",
            "    a = -0.5\n",
            "models/test_rope.py::test_cubic_taps_are_those_of_bicubic_interpolation",
        ),
        (
            "patches see those of other clips",
            "segments_N[None]",
            "(segments_N > 0)[None].astype(int)",
            "models/test_packing_leaks.py",
        ),
    ),
]
