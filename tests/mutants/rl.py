"""The policy loss, and samples in batches."""

from mutants.mutation import of

LOSS, STAGE = "losses/test_policy_forms.py", "rl/test_policy_loss.py"
MUTATIONS = [
    *of(
        "losses/policy.py",
        (
            "the policy gradient outside of the bounds",
            "inside_BL = (low < log_ratio_BL) & (log_ratio_BL < high)",
            "inside_BL = (log_ratio_BL < low) | (high < log_ratio_BL)",
            f"{LOSS}::test_loss_and_gradient_are_the_masked_sum_by_hand",
        ),
        (
            "the ratio's exponential before its mask",
            "jnp.exp(jnp.where(inside_BL, log_ratio_BL, 0)) * advantages_BL",
            "jnp.exp(log_ratio_BL) * advantages_BL",
            f"{LOSS}::test_log_ratios_of_hundreds_have_finite_gradients",
        ),
        (
            "tokens that were not sampled have a ratio",
            "jnp.where(sampled_BL, logprobs_BL - old_BL, 0)",
            "logprobs_BL - old_BL",
            f"{LOSS}::test_what_was_not_sampled_changes_no_bit",
        ),
        (
            "tokens that were not sampled have an advantage",
            "advantages_BL = jnp.where(sampled_BL, advantages_BL, 0)",
            "advantages_BL = advantages_BL * 1",
            f"{LOSS}::test_what_was_not_sampled_changes_no_bit",
        ),
        (
            "tau inside of the bounds alone",
            "config.tau * log_ratio_BL**2",
            "config.tau * jnp.where((low < log_ratio_BL) & (log_ratio_BL < high), log_ratio_BL, 0) ** 2",
            f"{LOSS}::test_outside_of_the_bounds_a_token_has_the_gradient_of_tau_alone",
        ),
        (
            "worse answers are made likelier",
            "log_ratio_BL**2 - policy_BL)",
            "log_ratio_BL**2 + policy_BL)",
            f"{LOSS}::test_loss_and_gradient_are_the_masked_sum_by_hand",
        ),
        (
            "a part's policy loss over its own tokens",
            "totals(weights_BL) if whole is None else whole",
            "totals(weights_BL)",
            f"{STAGE}::test_parts_rows_and_order_change_nothing",
        ),
        (
            "N without the tokens of advantage zero",
            "* weights_BL).sum() / jnp.maximum(total, 1)",
            "* weights_BL).sum() / jnp.maximum((advantages_BL != 0).sum(), 1)",
            f"{LOSS}::test_loss_and_gradient_are_the_masked_sum_by_hand",
        ),
        (
            "PPO clips good tokens that became unlikely",
            "jnp.where(advantages_BL > 0, log_ratio_BL > high,",
            "jnp.where(advantages_BL > 0, (log_ratio_BL > high) | (log_ratio_BL < low),",
            f"{LOSS}::test_the_other_forms_by_hand",
        ),
        (
            "GRPO takes a row for an answer",
            "counts_S[segments_L], 1)",
            "counts_S.sum(), 1)",
            f"{LOSS}::test_the_other_forms_by_hand",
        ),
        (
            "the sampler's factor the wrong way round",
            "jnp.where(sampled_BL, trainer_BL - engine_BL, 0)",
            "jnp.where(sampled_BL, engine_BL - trainer_BL, 0)",
            f"{LOSS}::test_the_factor_for_a_sampler_that_computes_otherwise",
        ),
    ),
    *of(
        "losses/lm.py",
        (
            "the entropy keeps an old maximum",
            "(spread_BL + sum_BL * fallen_BL)",
            "spread_BL",
            "losses/test_lm.py::test_the_entropy_is_that_of_the_distribution_and_changes_nothing_else",
        ),
    ),
    *of(
        "data/packing.py",
        (
            "log-probabilities lie on their tokens, not before them",
            "batch.old_logprobs_BL[before] = example.old_logprobs[1:]",
            "batch.old_logprobs_BL[before] = example.old_logprobs[:-1]",
            f"{STAGE}::test_the_weights_that_sampled_have_a_ratio_of_one_at_every_token",
        ),
        (
            "a media_pad that was sampled is a picture",
            "        is_media &= example.loss_weights == 0\n",
            "        is_media &= True\n",
            f"{STAGE}::test_a_media_pad_that_was_sampled_is_a_target_and_no_picture",
        ),
        (
            "advantages on their tokens, not before them",
            "batch.advantages_BL[before] = example.advantages[1:]",
            "batch.advantages_BL[place] = example.advantages",
            f"{STAGE}::test_a_sample_lies_in_its_row_one_place_before_its_tokens",
        ),
    ),
    *of(
        "train/pretrain.py",
        (
            "the largest of each part added up",
            'value.max() if name.endswith("_max") else value.sum()',
            "value.sum()",
            f"{STAGE}::test_parts_rows_and_order_change_nothing",
        ),
    ),
    *of(
        "train/accumulate.py",
        (
            "rows of parts put together part by part",
            '"a (d b) l -> (d a b) l"',
            '"a (d b) l -> (a d b) l"',
            "rl/test_policy_loss_devices.py",
        ),
    ),
]
