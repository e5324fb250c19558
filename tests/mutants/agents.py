"""Episodes: what the model is given and what of it is kept, limits, whom a failure is put down to."""

from mutants.mutation import of

LIMIT = "agents/test_rollout.py::test_each_limit_has_its_ending"

MUTATIONS = [
    *of(
        "agents/rollout.py",
        (
            "all turns of an episode draw from one seed",
            'f"{seed} {turn}".encode()',
            'f"{seed}".encode()',
            "agents/test_rollout.py::test_tokens_have_the_log_probabilities_and_versions_of_the_engine",
        ),
        (
            "sampling goes on behind a media_pad",
            "*config.eos_ids, self._pad)",
            "*config.eos_ids)",
            LIMIT,
        ),
        (
            "a turn cut by the limit of all turns counts as one cut by its own",
            "raise _Over(cut)",
            'raise _Over("length")',
            LIMIT,
        ),
        (
            "the limit of tokens is that of each turn",
            "left = self._limits.tokens - self._context.sampled",
            "left = self._limits.tokens",
            "agents/test_rollout.py::test_limits_of_all_turns_cut_inside_a_turn",
        ),
        (
            "calls beyond the limit are made",
            "calls = said.calls[: self._limits.calls - self._calls]",
            "calls = said.calls",
            "agents/test_rollout.py::test_limits_of_all_turns_cut_inside_a_turn",
        ),
        (
            "what was drawn before a halt is lost",
            "        self._context.take(prompt, completion)\n",
            '        if completion.reason != "abort":\n            self._context.take(prompt, completion)\n',
            "agents/test_rollout.py::test_an_episode_that_is_stopped_keeps_what_was_drawn",
        ),
        (
            "a failure of the machine is not tried again",
            "if tries >= retries or stop.is_set():",
            "if True:",
            "agents/test_rollout.py::test_a_failure_of_the_machinery_is_tried_again_and_then_not_the_models",
        ),
        (
            "every exception is a failure of the machine",
            "        except InfrastructureError as problem:\n            if tries",
            "        except Exception as problem:\n            if tries",
            "agents/test_rollout.py::test_a_mistake_of_ours_is_raised_and_everything_given_back",
        ),
        (
            "a tool that hangs is called again",
            "if id(tool) in self._hanging:",
            "if False:",
            "agents/test_rollout.py::test_a_call_that_hangs_is_an_observation_and_the_tool_is_not_called_again",
        ),
    ),
    *of(
        "agents/context.py",
        (
            "log-probabilities stand a token late",
            "sampled[place], logprobs[place], versions[place] = True, completion.logprobs, completion.versions",
            "sampled[place], versions[place] = True, completion.versions\n"
            "            logprobs[place] = [completion.logprobs[0], *completion.logprobs[:-1]]",
            "agents/test_rollout.py::test_tokens_have_the_log_probabilities_and_versions_of_the_engine",
        ),
    ),
    *of(
        "agents/policy.py",
        (
            "a request that nobody waits for goes on",
            "            if not ended.is_set():\n                self._abort(stream)\n        return completion",
            "            pass\n        return completion",
            "agents/test_rollout.py::test_a_task_that_is_cancelled_leaves_nothing_behind",
        ),
        (
            "a full queue is an error",
            "            except Overloaded:\n",
            "            except ZeroDivisionError:\n",
            "agents/test_rollout.py::test_many_episodes_wait_for_a_queue_with_room_for_two",
        ),
        (
            "a server draws from no seed",
            "            seed=sampling.seed,\n",
            "",
            "agents/test_policy.py::test_a_server_gives_the_traces_that_the_engine_gives",
        ),
        (
            "versions of a server are not read",
            'runs = choice.get("policy_versions", [[self._version, len(tokens)]])',
            "runs = [[self._version, len(tokens)]]",
            "agents/test_policy.py::test_a_server_gives_the_traces_that_the_engine_gives",
        ),
    ),
    *of(
        "agents/replay.py",
        (
            "other pictures are played again",
            "                self._check_clips(clips, segment)\n",
            "",
            "agents/test_policy.py::test_what_cannot_be_played_again_says_why",
        ),
    ),
    *of(
        "agents/threads.py",
        (
            "a call that hangs holds up the end of the program",
            "daemon=True",
            "daemon=False",
            "agents/test_threads.py::test_the_program_ends_while_a_call_hangs",
        ),
    ),
    *of(
        "agents/trace.py",
        (
            "any name of a clip is opened",
            "if not isinstance(key, str) or not KEY.fullmatch(key):",
            "if not isinstance(key, str):",
            "agents/test_trace.py::test_a_name_of_a_clip_that_leaves_the_folder_is_not_opened",
        ),
        (
            "a clip may be another than its name says",
            "if clip_key(clip) != key:",
            "if False:",
            "agents/test_trace.py::test_a_clip_that_is_gone_or_another_is_named",
        ),
        (
            "log-probabilities are written with five digits",
            'kept |= {name: getattr(segment, name)[at].tolist()',
            'kept |= {name: [round(value, 5) for value in getattr(segment, name)[at].tolist()]',
            "agents/test_trace.py::test_a_tree_of_segments_comes_back_bit_by_bit",
        ),
    ),
    *of(
        "agents/tasks.py",
        (
            "blank pictures are shown",
            "part = part | {kind: np.full_like(part[kind], 255)}",
            "pass",
            "agents/test_task_env.py::test_pictures_are_shown_hidden_or_blank",
        ),
        (
            "what was cut off is scored",
            'self._task.score(answer, self._index) if trace.ending == "answer" else 0.0',
            "self._task.score(answer, self._index)",
            "agents/test_task_env.py::test_without_an_answer_there_is_no_reward_whatever_the_task_says",
        ),
    ),
    *of(
        "sampling/async_engine.py",
        (
            "a request that was cancelled before it was taken stops the engine",
            "            if not future.set_running_or_notify_cancel():\n                continue\n",
            "",
            "sampling/test_async_engine.py::test_what_is_cancelled_before_the_engine_takes_it_is_not_done",
        ),
    ),
]  # fmt: skip
