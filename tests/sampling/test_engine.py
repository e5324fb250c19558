"""The engine gives what the plain forward pass gives, whatever else it does at the same time."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from engines import CONFIG, PAD, PARAMS, SETTINGS, TEXT, clip, drain, greedy, logprobs, prompts
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.latent_cache import cache_bytes
from k25_jax.sampling.requests import Completion, EngineConfig, EngineError, Overloaded, Request
from k25_jax.sampling.sample import PromptError, SampleConfig
from k25_jax.text.tokenizer import load_tokenizer

SCHEDULES, LONGEST = 200, 10
PROMPTS = prompts()
SEEDS = (0, 7, 2**32 - 1)
COMPILATIONS = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILATIONS.append(name) if name.endswith("backend_compile_duration") else None
)


@pytest.fixture(scope="module")
def engine():
    engine = Engine(PARAMS, CONFIG, SETTINGS, load_tokenizer())
    engine.warm_up()
    return engine


@pytest.fixture
def warm(engine):
    """The engine, idle before and behind the test, which must leave nothing in use."""
    assert not engine.busy
    yield engine
    assert not engine.busy and engine.stats()["pages_used"] == 0


@pytest.fixture(scope="module")
def expected(engine):
    """{(prompt, None or seed): for each sample (tokens, log-probabilities)}: greedy ones by the plain pass alone.

    What is drawn has no other definition than the engine's own, alone; its log-probabilities are those of the plain pass.
    """
    found = {(p, None): [tokens] for p, tokens in enumerate(greedy(PROMPTS, LONGEST))}
    for seed in SEEDS:
        for p, (tokens, clips) in enumerate(PROMPTS):
            how = SampleConfig(LONGEST, 1.0, 0.9, seed)
            (samples,) = engine.generate([Request(tokens, clips, how, n=2)])
            found[p, seed] = [sample.tokens for sample in samples]
    rows = [(key, sample, tokens) for key, samples in found.items() for sample, tokens in enumerate(samples)]
    judged = logprobs([(PROMPTS[p][0] + tokens, PROMPTS[p][1]) for (p, _), _, tokens in rows])
    out = {}
    for ((p, seed), _, tokens), logprobs_LV in zip(rows, judged, strict=True):
        start = len(PROMPTS[p][0]) - 1
        out.setdefault((p, seed), []).append((tokens, logprobs_LV[np.arange(start, start + LONGEST), tokens]))
    return out


def draw_schedule(rng):
    """(step at which it comes, prompt, seed or None, samples, tokens, step at which it is given up or None), in order."""
    asked = []
    for _ in range(rng.integers(1, 9)):
        seed = None if rng.random() < 0.5 else SEEDS[rng.integers(len(SEEDS))]
        count, length = (1, 1, 2)[rng.integers(3)], int(rng.integers(1, LONGEST + 1))
        come = int(rng.integers(0, 12))
        given_up = come + int(rng.integers(0, 10)) if rng.random() < 0.1 else None
        asked.append((come, int(rng.integers(len(PROMPTS))), seed, count, length, given_up))
    return sorted(asked, key=lambda one: one[0])


def run_schedule(engine, asked, update_at):
    """[(prompt, seed, length, given up?, [Completion of each sample])]."""
    answers, numbers, waiting, step = {}, [], list(asked), 0
    while waiting or engine.busy:
        while waiting and waiting[0][0] <= step:
            _, p, seed, count, length, _ = waiting.pop(0)
            how = SampleConfig(length, 0.0, seed=5) if seed is None else SampleConfig(length, 1.0, 0.9, seed)
            numbers.append(engine.submit(Request(*PROMPTS[p], how, n=count)))
        for number, (*_, given_up) in zip(numbers, asked, strict=False):
            if given_up == step:
                engine.abort(number)
        if step == update_at:
            engine.update_weights(PARAMS, step)  # the same weights: only what is kept for others goes
        drain(engine, answers)
        step += 1
        assert step < 2000, "the engine does not come to an end"
    return [
        (p, seed, length, given_up is not None, [answers[number, sample] for sample in range(count)])
        for number, (_, p, seed, count, length, given_up) in zip(numbers, asked, strict=True)
    ]


def test_every_schedule_gives_the_same_answers(warm, expected):
    """200 random schedules: order, company, shared beginnings, images, too few pages, given up, weights loaded anew."""
    before, compiled, aborted = warm.stats(), len(COMPILATIONS), 0
    for seed in range(SCHEDULES):
        rng = np.random.default_rng([seed, 3])
        asked, update_at = draw_schedule(rng), int(rng.integers(60)) if rng.random() < 0.3 else -1
        for p, drawn, length, given_up, samples in run_schedule(warm, asked, update_at):
            for number, sample in enumerate(samples):
                tokens, want = expected[p, drawn][number if drawn is not None else 0]
                done = len(sample.tokens)
                assert sample.reason == "length" and done == length or given_up and sample.reason == "abort"
                aborted += sample.reason == "abort"
                assert sample.tokens == tokens[:done], f"schedule {seed}"
                np.testing.assert_allclose(sample.logprobs, want[:done], atol=1e-4)
        assert warm.stats()["pages_used"] == 0
    after = warm.stats()
    counts = {name: after[name] - before[name] for name in ("preempted", "reused", "encoded")}
    assert min(counts.values()) > SCHEDULES / 8 and aborted > 5, (counts, aborted)
    assert len(COMPILATIONS) == compiled and after["compilations"] == 3


def test_samples_of_one_prompt_read_it_once_and_encode_its_image_once(warm):
    tokens, clips = PROMPTS[9]  # 18 tokens: four full pages of 4, and 2 that each sample reads
    warm.update_weights(PARAMS, 0)
    before = warm.stats()
    (samples,) = warm.generate([Request(tokens, clips, SampleConfig(3, 1.0, 1.0), n=5)])
    counts = {name: warm.stats()[name] - before[name] for name in ("read", "reused", "encoded")}
    assert counts == {"read": 18 + 4 * 2, "reused": 4 * 16, "encoded": 1}
    assert len({tuple(sample.tokens) for sample in samples}) > 1
    warm.generate([Request(PROMPTS[9][0][:11], clips, SampleConfig(1, 0.0))])  # begins with the same image and words
    assert warm.stats()["encoded"] - before["encoded"] == 1


def test_draws_follow_the_distribution(warm):
    """The first token of 1600 samples, top-p 0.95, against the exact probabilities; all log-probabilities unmodified."""
    tokens, clips = PROMPTS[7]
    (logprobs_LV,) = logprobs([(tokens, clips)])
    p_V = np.exp(logprobs_LV[-1].astype(np.float64))
    order = np.argsort(-p_V)
    kept = order[: int((np.cumsum(p_V[order]) < 0.95).sum()) + 1]
    requests = [Request(tokens, clips, SampleConfig(1, 1.0, 0.95, seed), n=64) for seed in range(25)]
    drawn = [sample for samples in warm.generate(requests) for sample in samples]
    count_V = np.bincount([sample.tokens[0] for sample in drawn], minlength=TEXT.vocab_size)
    assert set(np.flatnonzero(count_V)) <= set(kept) and len(kept) < TEXT.vocab_size
    want = p_V[kept] / p_V[kept].sum() * len(drawn)
    assert want.min() >= 5
    assert chisquare(count_V[kept], want).pvalue > 1e-3
    np.testing.assert_allclose([s.logprobs[0] for s in drawn], [logprobs_LV[-1][s.tokens[0]] for s in drawn], atol=1e-4)


def test_alternatives_are_the_likeliest_tokens(warm, expected):
    (one, two), ((tokens, _),) = PROMPTS[3], expected[3, None]
    asked = [Request(one, two, SampleConfig(4, 0.0), alternatives=3), Request(one, two, SampleConfig(4, 0.0))]
    (sample,), (plain,) = warm.generate(asked)
    (judged,) = logprobs([(one + tokens[:4], two)])
    for place, alternatives in enumerate(sample.alternatives, len(one) - 1):
        best = np.argsort(-judged[place])[:3]
        assert [token for token, _ in alternatives] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in alternatives], judged[place][best], atol=1e-4)
    assert plain.alternatives == [()] * 4 and plain.tokens == sample.tokens


def test_an_answer_ends_at_a_stop_token_or_a_stop_text(warm, expected):
    ((tokens, _),) = expected[1, None]
    stop = tokens[3]
    end = tokens.index(stop)
    asked = [Request(PROMPTS[1][0], (), SampleConfig(8, 0.0, stop_ids=(stop, 58)))]
    (sample,) = warm.generate(asked)[0]
    assert (sample.tokens, sample.reason, sample.stopped_by) == (tokens[: end + 1], "stop", stop)
    text = bytes(tokens[2:5]).decode()  # the bytes of three tokens
    place = bytes(tokens).find(text.encode()) + 3
    (sample,) = warm.generate([Request(PROMPTS[1][0], (), SampleConfig(8, 0.0), stop=("never", text))])[0]
    assert (sample.tokens, sample.reason, sample.stopped_by) == (tokens[:place], "stop", text)


def test_new_weights_take_over_between_two_tokens(warm):
    """Later tokens carry the new version; a new request sees nothing of the old weights; other models are refused."""
    other = jax.tree.map(lambda a: a * np.float32(1.25), PARAMS)
    answers, (tokens, clips) = {}, PROMPTS[9]
    number = warm.submit(Request(tokens, clips, SampleConfig(8, 0.0)))
    while len(answers.get((number, 0), Completion()).tokens) < 3:
        drain(warm, answers)
    warm.update_weights(other, 41)
    later = warm.submit(Request(tokens, clips, SampleConfig(6, 0.0)))
    while warm.busy:
        drain(warm, answers)
    first, second = answers[number, 0], answers[later, 0]
    old = sum(version != 41 for version in first.versions)
    assert 3 <= old < 8 and first.versions[old:] == [41] * (8 - old) and second.versions == [41] * 6
    assert first.tokens[:old] == greedy([PROMPTS[9]], old)[0]
    assert second.tokens == greedy([PROMPTS[9]], 6, other)[0] != first.tokens[:6]
    with pytest.raises(EngineError, match="another model"):
        warm.update_weights(PARAMS | {"embed": PARAMS["embed"][:-1]}, 42)
    warm.update_weights(PARAMS, 0)
    assert warm.generate([Request(tokens, clips, SampleConfig(6, 0.0))])[0][0].tokens == greedy([PROMPTS[9]], 6)[0]


def test_a_full_queue_says_so_and_takes_more_later(warm):
    numbers = [warm.submit(Request([1, 2, 3], (), SampleConfig(1, 0.0), n=32)) for _ in range(2)]
    with pytest.raises(Overloaded, match="64 samples wait.*no room for n=1"):
        warm.submit(Request([1, 2, 3], (), SampleConfig(1, 0.0)))
    assert all(warm.abort(number) for number in numbers) and not warm.abort(numbers[0])
    answers = {}
    while warm.busy:
        drain(warm, answers)
    assert {answer.reason for answer in answers.values()} == {"abort"} and len(answers) == 64
    assert warm.generate([Request([1, 2, 3], (), SampleConfig(1, 0.0))])[0][0].reason == "length"


@pytest.mark.parametrize(
    "request_, words",
    [
        (Request([]), "empty"),
        (Request([1, 77]), "77"),
        (Request([1, PAD]), "1 media_pad"),
        (Request([1] * 40, sampling=SampleConfig(9)), "exceed the context of 48"),
        (Request([1], n=65), "queue's 64"),
        (Request([1], n=0), "n=0"),
        (Request([1], sampling=SampleConfig(1, seed=-1)), "seed=-1"),
        (Request([1], alternatives=4), "engine.alternatives=3"),
        (Request([1], stop=("",)), "must not be empty"),
        (Request([PAD] * 9, [clip(0, 6, 6)]), "36, 48.*up to 32.*engine.vision_patches"),
        (Request([PAD] * 12, [clip(0), clip(1), clip(2)], SampleConfig(1)), "engine.vision_tokens=10"),
    ],
)
def test_what_can_never_be_answered_is_refused_at_once(warm, request_, words):
    if request_.sampling.max_tokens == 256:
        request_ = dataclasses.replace(request_, sampling=SampleConfig(1))
    with pytest.raises(PromptError, match=words):
        warm.submit(request_)


def test_an_engine_with_few_pages_refuses_what_they_cannot_hold():
    small = Engine(PARAMS, CONFIG, dataclasses.replace(SETTINGS, pages=6, vision_patches=()))
    small.submit(Request([1] * 20, (), SampleConfig(4)))
    for bad, words in (
        (Request([1] * 20, (), SampleConfig(5)), "exceed the 24 that this engine takes"),
        (Request([PAD] * 4, [clip(1)], SampleConfig(5)), "takes no images"),
        (Request([1], (), SampleConfig(5), stop=("a",)), "needs a tokenizer"),
    ):
        with pytest.raises(PromptError, match=words):
            small.submit(bad)
    with pytest.raises(EngineError, match="idle"):
        small.generate([])


@pytest.mark.parametrize(
    "bad", [{"rows": ()}, {"rows": (4, 1)}, {"pieces": (0, 1)}, {"pages": 0}, {"alternatives": -1}, {"max_length": 1}]
)
def test_sizes_that_make_no_engine_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EngineConfig(**bad)


def test_broken_weights_end_a_request_with_an_error_and_harm_no_later_one(warm, expected):
    """Pages that hold no numbers are used again by others."""
    tokens, clips = PROMPTS[2]
    warm.update_weights(jax.tree.map(lambda a: a * np.float32("nan"), PARAMS), 1)
    (sample,) = warm.generate([Request(tokens, clips, SampleConfig(4, 0.0))])[0]
    assert sample.reason == "error" and "finite" in sample.error and sample.tokens == []
    warm.update_weights(PARAMS, 2)
    for p in (1, 6, 10):
        (sample,) = warm.generate([Request(*PROMPTS[p], SampleConfig(4, 0.0))])[0]
        assert sample.tokens == expected[p, None][0][0][:4]


def test_the_cache_takes_what_the_formula_says(warm):
    numbers = SETTINGS.pages * SETTINGS.page_size * TEXT.layers * (TEXT.kv_lora_rank + TEXT.qk_rope_dim)
    assert warm.stats()["cache_bytes"] == 4 * numbers == cache_bytes(TEXT, SETTINGS.pages, SETTINGS.page_size)
