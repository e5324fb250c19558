"""What answers are worth, which traces are learnt from, and what of them is shown."""

from mutants.mutation import of

MUTATIONS = [
    *of(
        "scoring/scores.py",
        (
            "an answer of just the budget is too long",
            "if length <= budget:",
            "if length < budget:",
            "scoring/test_scores.py::test_lengths_within_a_budget",
        ),
    ),
    *of(
        "scoring/execution.py",
        (
            "a right answer counts whatever the exit status",
            "if type(status) is not int or status != 0:",
            "if type(status) is not int:",
            "scoring/test_execution.py::test_forged_results_score_nothing",
        ),
        (
            "results of a lost interpreter count",
            'found = interpreter.get(RESULTS) if ended.status == "ok" else None',
            "found = interpreter.get(RESULTS)",
            "scoring/test_execution.py::test_forged_results_score_nothing",
        ),
        (
            "tests without a result pass",
            'return Verdict(0.0, f"test {number}: no result")',
            "break",
            "scoring/test_execution.py::test_forged_results_score_nothing",
        ),
        (
            "true is 1",
            "return type(value) is type(expected) and value == expected",
            "return value == expected",
            "scoring/test_execution.py::test_values_are_the_same_in_type_and_size",
        ),
    ),
    *of(
        "scoring/form.py",
        (
            "marks may stand anywhere",
            "if problem := _misplaced(tokens[:-1], tokenizer, self.mode):",
            'if problem := "":',
            "scoring/test_form.py::test_what_is_malformed_is_told",
        ),
        (
            "any tool may be called",
            "if call.name not in self.names:",
            "if not call.name:",
            "scoring/test_form.py::test_what_is_malformed_is_told",
        ),
    ),
    *of(
        "agents/chats.py",
        (
            "records render to other tokens",
            "if not np.array_equal(tokens, segment.tokens):",
            "if len(tokens) == 0:",
            "agents/test_chats.py::test_what_the_template_would_write_otherwise_is_refused_and_counted",
        ),
        (
            "the longest of a group is taken",
            "return -sum(values) / len(values), trace.length, trace.id",
            "return -sum(values) / len(values), -trace.length, trace.id",
            "agents/test_chats.py::test_the_best_and_then_the_shortest_of_a_group_are_taken",
        ),
        (
            "one good reward is enough",
            "if min(values) < min_reward:",
            "if max(values) < min_reward:",
            "agents/test_chats.py::test_the_best_and_then_the_shortest_of_a_group_are_taken",
        ),
        (
            "pictures are scaled when they are read again",
            "patch=patch)[0] != (height, width):",
            "patch=patch)[0] == (0, 0):",
            "agents/test_chats.py::test_pictures_that_cannot_come_back_are_refused_by_name",
        ),
    ),
    *of(
        "agents/transcript.py",
        (
            "a turn ends where the next mark of one stands",
            "end = min(_first(tokens, tokenizer.special[END], at) + 1, len(tokens))",
            "end = next((i for i in range(at + 1, len(tokens)) if tokens[i] in kinds), len(tokens))",
            "agents/test_chats.py::test_turns_are_told_by_marks_that_nobody_sampled",
        ),
    ),
    *of(
        "vision/image.py",
        (
            "rows and columns of a patch change places",
            "cut = clip.patches.reshape(frames, rows, columns, 3, patch, patch).transpose(0, 1, 4, 2, 5, 3)",
            "cut = clip.patches.reshape(frames, rows, columns, 3, patch, patch).transpose(0, 1, 5, 2, 4, 3)",
            "agents/test_chats.py::test_patches_become_the_pixels_that_they_were_cut_from",
        ),
    ),
    *of(
        "report/trace.py",
        (
            "what a model wrote is HTML",
            "segment, shown = self._segment, escape(visible(text))",
            "segment, shown = self._segment, visible(text)",
            "report/test_trace_page.py::test_each_sampled_token_is_shown_with_what_is_known_of_it",
        ),
        (
            "marks of direction stay",
            'frozenset("Cc Cf Co Cs Cn Zl Zp".split())',
            'frozenset("Cc Co Cs Cn Zl Zp".split())',
            "report/test_trace_page.py::test_nothing_that_was_said_can_do_anything",
        ),
        (
            "the advantage is the reward",
            "return composed(trace.rewards, weights) - sum(scored) / len(scored)",
            "return composed(trace.rewards, weights)",
            "report/test_trace_page.py::test_advantages_are_those_of_the_group",
        ),
    ),
    *of(
        "report/rl.py",
        (
            "what failed through no fault of the model's is shown",
            "for trace in ledger.group(name) or () if trace.valid):",
            "for trace in ledger.group(name) or ()):",
            "report/test_rl_report.py::test_a_run_is_shown_from_beginning_to_end",
        ),
    ),
]
