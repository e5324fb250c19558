"""The list of small faults for tests/mutations.py: what stands in the package, what it becomes, which tests are to notice.

Of each numerical module those that would train, or answer, and be wrong: a mask, an axis, a sign, a factor, a dtype, a sum
that is not taken over all devices. Tests are named as narrowly as can be, since each entry costs their time.
"""

from mutations import Mutation

MUTATIONS: list[Mutation] = []
BFLOAT16 = "numerics/test_bfloat16_path.py"


def of(file: str, *entries: tuple[str, str, str, str]) -> None:
    """Mutations of k25_jax/`file`: (name, old text, new text, tests below tests/, with spaces between them)."""
    for name, old, new, tests in entries:
        paths = tuple(f"tests/{test}" for test in tests.split())
        MUTATIONS.append(Mutation(name, f"k25_jax/{file}", old, new, paths))


# ------------------------------------------------------------------------------------------------------------- the model
of(
    "models/moe.py",
    (
        "router scores in bfloat16",
        'jnp.dot(x_TD.astype(jnp.float32), router_DE.astype(jnp.float32), precision="highest")',
        "jnp.dot(x_TD, router_DE.astype(x_TD.dtype))",
        f"{BFLOAT16}::test_the_router_tells_experts_whose_scores_differ_by_a_thousandth",
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
)
of(
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
        "(x_BLD @ head(params)).astype(jnp.float32)",
        "(x_BLD @ head(params))",
        f"{BFLOAT16}::test_scores_of_the_vocabulary_are_not_rounded",
    ),
)
of(
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
)
of(
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
)
of(
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
)
of(
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
)
of(
    "models/dispatch.py",
    (
        "of a token's copies in a round one has a gradient",
        "dx_TD.at[token_N].add(dx_ND)",
        "dx_TD.at[token_N].set(dx_ND)",
        "models/test_experts.py::test_chunks_equal_one_piece_however_many_there_are",
    ),
)
of(
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
)
of(
    "models/k25.py",
    (
        "router weights cast with the rest",
        'a if any("router" in str(key) for key in path) else a.astype(dtype)',
        "a.astype(dtype)",
        f"{BFLOAT16}::test_a_bfloat16_step_chooses_the_experts_of_a_float32_step",
    ),
    (
        "the first feature of a batch is lost",
        "jnp.where(media_BL[..., None] >= 0, vision_BLD",
        "jnp.where(media_BL[..., None] > 0, vision_BLD",
        "models/test_parity.py::test_logits",
    ),
)
of(
    "models/moonvit3d.py",
    (
        "pixels not normalised about zero",
        "(patches.astype(jnp.float32) / 255.0 - 0.5) / 0.5",
        "patches.astype(jnp.float32) / 255.0",
        "models/test_parity.py::test_vision_tower_and_projector",
    ),
    (
        "a clip's frames added up, not averaged",
        "x_NW * weights_N[:, None].astype(x_NW.dtype)",
        "x_NW",
        "models/test_packing_leaks.py vision/test_patchpack.py::test_pooling_by_slots_gives_the_mean_of_each_token",
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
)

# ----------------------------------------------------------------------------------------------------- kernels and losses
of(
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
)
of(
    "kernels/grouped_matmul.py",
    (
        "SiLU's gradient is its sigmoid",
        "(sigmoid_BF + hidden_BF * (1 - sigmoid_BF))",
        "sigmoid_BF",
        "kernels/test_grouped_matmul.py::test_gradients_equal_those_of_the_reference",
    ),
    (
        "rows of other experts in a matrix's gradient",
        "dup_BF = jnp.where(mine_B1, dhidden_BF * hidden_BF, 0)",
        "dup_BF = dhidden_BF * hidden_BF",
        "kernels/test_grouped_matmul.py::test_gradients_equal_those_of_the_reference",
    ),
)
of(
    "kernels/paged_attention.py",
    (
        "a new token does not see itself",
        "place_S <= position_BN1",
        "place_S < position_BN1",
        "kernels/test_paged_attention.py::test_pages_in_any_order_are_one_sequence",
    ),
    (
        "the sum of weights keeps an old maximum",
        "total_BN1 * shrunk_BN1 + weights",
        "total_BN1 + weights",
        "kernels/test_paged_attention.py::test_pages_in_any_order_are_one_sequence",
    ),
)
of(
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
)
of(
    "losses/siglip.py",
    (
        "pairs repel",
        "jax.nn.softplus(-sign_ST * logits_BST)",
        "jax.nn.softplus(sign_ST * logits_BST)",
        "losses/test_siglip.py::test_pairs_of_each_row_without_those_that_are_not_there",
    ),
)

# ---------------------------------------------------------------------------------------------------------- the optimizer
of(
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
)
of(
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
)
of(
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
)

# --------------------------------------------------------------------------------------------------- training and layouts
of(
    "train/step.py",
    (
        "QK-Clip applied in a bad step",
        "jnp.where(finite, stats.max_logit_YH, 0)",
        "stats.max_logit_YH",
        "train/test_guards.py::test_qk_clip_leaves_a_bad_step_alone",
    ),
    (
        "the router's bias moves in a bad step",
        "jnp.where(finite, stats.load_YE, 0)",
        "stats.load_YE",
        "train/test_step.py::test_a_bad_step_changes_nothing_but_its_number",
    ),
    (
        "a frozen router's bias moves",
        "        params = merged(params, frozen)\n",
        "",
        "train/test_trainable.py::test_only_what_is_trained_moves_and_has_means",
    ),
)
of(
    "train/state.py",
    (
        "a layout in which means follow the parameters",
        "for rules in (RULES, MEANS))",
        "for rules in (RULES, RULES))",
        "sharding/test_layout_of_means.py::test_means_are_shared_out_where_parameters_are_copies",
    ),
    (
        "the seed of a run dropped",
        "jax.random.key(experiment.train.seed)",
        "jax.random.key(0)",
        "train/test_guards.py::test_the_seed_of_a_run_decides_its_weights",
    ),
)
of(
    "train/accumulate.py",
    (
        "the gradient of the last part alone",
        "return jax.tree.map(jnp.add, carry, (loss, dparams)), (seen, dx_BLD)",
        "return (carry[0] + loss, dparams), (seen, dx_BLD)",
        "numerics/test_sums_of_parts.py::test_a_batch_in_parts_has_the_gradients_of_the_whole",
    ),
    (
        "gradients without the factor of what follows",
        "lambda a: a * dtotal.astype(a.dtype), saved",
        "lambda a: a, saved",
        "numerics/test_sums_of_parts.py::test_a_batch_in_parts_has_the_gradients_of_the_whole",
    ),
)
of(
    "train/pretrain.py",
    (
        "the encoder's remat swapped between frozen and trained",
        'remat = "none" if frozen else config.remat',
        'remat = config.remat if frozen else "none"',
        "train/test_guards.py::test_the_encoder_is_computed_again_where_it_is_trained_and_only_there",
    ),
    (
        "the largest logit of the last part",
        "stats.max_logit_YH.max(axis=0)",
        "stats.max_logit_YH[-1]",
        "numerics/test_sums_of_parts.py::test_a_batch_in_parts_has_the_gradients_of_the_whole",
    ),
    (
        "loads of the last part",
        "stats.load_YE.sum(axis=0)",
        "stats.load_YE[-1]",
        "numerics/test_sums_of_parts.py::test_a_batch_in_parts_has_the_gradients_of_the_whole",
    ),
)
of(
    "train/vit.py",
    (
        "the first caption token is not learnt",
        "positions_L >= first_S[segments_L]",
        "positions_L > first_S[segments_L]",
        "train/test_vit.py::test_tokens_after_an_image_of_their_document_count_and_no_others",
    ),
)
of(
    "parallel/pipeline.py",
    (
        "a stage with nothing to do computes",
        "jnp.where(active, segments_SJBL[member, group], 0)",
        "segments_SJBL[member, group]",
        "parallel/test_parallel_pipeline.py::test_gradients_statistics_and_steps_equal_those_of_one_device",
    ),
    (
        "a stage keeps its own blocks in another order",
        "kept_SR[target, repeat] = source * capacity + used_SS[source, target]",
        "kept_SR[target, repeat] = source * capacity",
        "parallel/test_parallel_pipeline.py::test_every_block_reaches_the_stage_that_runs_it",
    ),
)
of(
    "sharding/rules.py",
    (
        "a mesh axis is used twice for one array",
        "> 1 and n not in taken)",
        "> 1)",
        "sharding/test_rules.py",
    ),
)

# --------------------------------------------------------------------------------------------------------------- the data
of(
    "data/packing.py",
    (
        "positions go on from document to document",
        "batch.positions_BL[place] = np.arange(length)",
        "batch.positions_BL[place] = column + np.arange(length)",
        "data/test_packing.py::test_small_batch_by_hand",
    ),
    (
        "media are targets",
        "np.where(example.tokens[1:] == model.media_pad_id, 0.0, example.loss_weights[1:])",
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
        "a piece is one token short",
        "example.loss_weights[start : start + length])",
        "example.loss_weights[start + 1 : start + 1 + length])",
        "data/test_packing.py::test_pieces_of_a_text_predict_every_token_once data/test_packing.py::test_batch_against_brute_force",
    ),
    (
        "the balance does not begin with what was planned",
        "functools.partial(balance, config=vision, planned=planned)",
        "functools.partial(balance, config=vision)",
        "data/test_planned_packs.py",
    ),
)
of(
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
)
of(
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
)
of(
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
)
of(
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
)
of(
    "vision/image.py",
    (
        "values of a patch by row, channel, column",
        "transpose(0, 2, 4, 1, 3)",
        "transpose(0, 2, 1, 4, 3)",
        "vision/test_image.py::test_patchify_against_a_loop",
    ),
)

# ------------------------------------------------------------------------------------------------ sampling and checkpoints
of(
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
        "        self._pages.forget()\n",
        "",
        "sampling/test_versions_and_epochs.py::test_nothing_that_was_kept_outlives_the_weights",
    ),
)
of(
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
)
of(
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
)
