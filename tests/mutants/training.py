"""A step, the parts of a batch, layouts on a mesh."""

from mutants.mutation import of

MUTATIONS = [
    *of(
        "train/step.py",
        (
            "QK-Clip applied in a bad step",
            "jnp.where(moves, stats.max_logit_YH, 0)",
            "stats.max_logit_YH",
            "train/test_guards.py::test_qk_clip_leaves_a_bad_step_alone",
        ),
        (
            "the router's bias moves in a bad step",
            "jnp.where(moves, stats.load_YE, 0)",
            "stats.load_YE",
            "train/test_step.py::test_a_bad_step_changes_nothing_but_its_number",
        ),
        (
            "a frozen router's bias moves",
            "        params = merged(params, frozen)\n",
            "",
            "train/test_trainable.py::test_only_what_is_trained_moves_and_has_means",
        ),
    ),
    *of(
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
    ),
    *of(
        "train/accumulate.py",
        (
            "the gradient of the last part alone",
            "pull((jnp.ones_like(loss), dparams))[0]",
            "pull((jnp.ones_like(loss), jax.tree.map(jnp.zeros_like, dparams)))[0]",
            "numerics/test_sums_of_parts.py::test_a_batch_in_parts_has_the_gradients_of_the_whole",
        ),
        (
            "gradients without the factor of what follows",
            "lambda a: a * dtotal.astype(a.dtype), dparams",
            "lambda a: a, dparams",
            "numerics/test_sums_of_parts.py::test_a_batch_in_parts_has_the_gradients_of_the_whole",
        ),
    ),
    *of(
        "train/pretrain.py",
        (
            "the encoder's remat swapped between frozen and trained",
            '"none" if frozen else config.remat, dtype)',
            'config.remat if frozen else "none", dtype)',
            "train/test_guards.py::test_the_encoder_is_computed_again_where_it_is_trained_and_only_there",
        ),
        (
            "the encoder's remat swapped between frozen and trained, on a mesh",
            '"none" if frozen else "full")',
            '"full" if frozen else "none")',
            "train/test_guards.py::test_on_a_mesh_too_the_encoder_is_computed_again_where_it_is_trained",
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
    ),
    *of(
        "train/vit.py",
        (
            "the first caption token is not learnt",
            "positions_L >= first_S[segments_L]",
            "positions_L > first_S[segments_L]",
            "train/test_vit.py::test_tokens_after_an_image_of_their_document_count_and_no_others",
        ),
    ),
    *of(
        "parallel/routes.py",
        (
            "features of an image land on its first token",
            "plan.landing[run] + item",
            "plan.landing[run]",
            "parallel/test_routes.py::test_all_arrive",
        ),
        (
            "parts of a batch get each other's features",
            "group = runs.part * form.devices + runs.receiver",
            "group = runs.receiver",
            "parallel/test_routes.py::test_all_arrive",
        ),
    ),
    *of(
        "parallel/dep.py",
        (
            "stripes of a row get the features of the first",
            "(stripe - column) % stripes",
            "(0 - column) % stripes",
            "parallel/test_dep.py::test_every_token_gets_its_feature",
        ),
        (
            "of what an exchange brings back the way is forgotten",
            "moved(dout_TD, land_JXU, pick_JZU, len(nothing))",
            "moved(dout_TD, pick_JZU, land_JXU, len(nothing))",
            "parallel/test_dep.py::test_gradients_and_losses_equal_those_of_one_device",
        ),
    ),
    *of(
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
    ),
    *of(
        "sharding/rules.py",
        (
            "a mesh axis is used twice for one array",
            "> 1 and n not in taken)",
            "> 1)",
            "sharding/test_rules.py",
        ),
    ),
]
