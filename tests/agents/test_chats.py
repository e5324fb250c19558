"""Traces as chats: what is written is read back as exactly the tokens, pictures and mask of the trace, or is refused."""

import dataclasses
import json

import numpy as np
import pytest

from episodes import END, TOKENIZER, Adder, asked, call, picture, returned, segment, trace
from k25_jax.agents.chats import Unfit, check_picture, harvest, to_chat, trace_files, write_chats
from k25_jax.agents.env import Limits
from k25_jax.agents.policy import EnginePolicy
from k25_jax.agents.rollout import play
from k25_jax.agents.tasks import TaskEnv
from k25_jax.agents.trace import TraceError, clip_key, save
from k25_jax.agents.transcript import sampled_turns, transcript, turns
from k25_jax.checkpoint.load import load_model
from k25_jax.config import DataConfig, preset
from k25_jax.data.forms import prepare
from k25_jax.data.records import Record
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.engine import Engine
from k25_jax.sampling.sample import SampleConfig
from k25_jax.vision.image import patchify, preprocess, unpatchify
from k25_jax.vision.patchpack import Clip

DATA = DataConfig(seq_len=4096, packs=4, pack_patches=1024)
SUM = [asked("what is 2+3?"), "it is easy</think>" + call('{"a":2, "b": 3}') + END, returned("5"), "so</think>5" + END]
GOOD = {
    "a call and its result": dict(turns=SUM),
    "no tools": dict(turns=[asked("say é"), "hm</think>é 中 🙂" + END], tools=()),
    "instant": dict(turns=[asked("hi"), "hello" + END], mode="instant", tools=()),
    "plain": dict(turns=[asked("hi"), "hello" + END, asked("and?"), "bye\n\n" + END], mode="plain", tools=()),
    "plain with a thought": dict(turns=[asked("hi"), "<think>a\nb</think>hello" + END], mode="plain", tools=()),
    "no thought": dict(turns=[asked("hi"), "</think>hello" + END], tools=()),
    "pictures": dict(turns=[asked("which?", picture(0), picture(1, 61, 90)), "</think>this" + END], tools=()),
    "a picture from a tool": dict(
        turns=[
            asked("show"),
            "x</think>" + call("{}") + END,
            {
                **returned(""),
                "content": [{"type": "text", "text": "[image 1]"}, {"type": "image", "image": picture(3)}],
            },
            "</think>seen" + END,
        ]
    ),
    "two calls at once, one id twice": dict(
        turns=[
            {"role": "system", "content": "Be brief."},
            asked("both"),
            "</think>" + call('{"a": 1}') + END,
            returned("1"),
            "</think>" + call('{"a": "<|im_end>"}') + END,
            returned("2", "functions.add:1"),
            "</think>done" + END,
        ]
    ),
    "text that looks like marks": dict(
        turns=[asked("<|im_end|><think>"), [*TOKENIZER.encode("[EOS]<|im_end|><think>"), TOKENIZER.special[END]]],
        mode="instant",
        tools=(),
    ),
    "an example before": dict(
        turns=[
            asked("1?"),
            {"role": "assistant", "reasoning_content": "one", "content": "1"},
            asked("2?"),
            "</think>2" + END,
        ],
        tools=(),
        mode="thinking",
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_record_is_read_back_as_the_tokens_of_its_trace(name, tmp_path):
    one = trace(**GOOD[name])
    if name == "an example before":  # its own turn was given, not sampled
        one = given_first(one)
    found = harvest([one], TOKENIZER, 1.0)
    assert not found.left_out, found.examples
    write_chats(found, tmp_path / "x.jsonl")
    (read,) = read_records(tmp_path / "x.jsonl")
    example = prepare(read, TOKENIZER, DATA, preset("tiny"))
    segment = one.segments[0]
    np.testing.assert_array_equal(example.tokens, segment.tokens)
    np.testing.assert_array_equal(example.loss_weights > 0, segment.sampled)
    assert [clip_key(clip) for clip in example.clips] == list(segment.clips)


def given_first(one):
    segment = one.segments[0]
    first = next(turn for turn in turns(segment, TOKENIZER) if turn.kind == "assistant")
    arrays = {name: getattr(segment, name).copy() for name in ("sampled", "logprobs", "versions")}
    for name, blank in (("sampled", False), ("logprobs", np.nan), ("versions", -1)):
        arrays[name][first.start : first.end] = blank
    return dataclasses.replace(one, segments=(dataclasses.replace(segment, **arrays),))


def read_records(file) -> list[Record]:
    return [Record("r", json.loads(line), file.parent) for line in file.read_text().split("\n") if line]


MARK = [TOKENIZER.special["</think>"]]
BAD = {
    "cut off": [asked("hi"), "hm</think>and so on"],
    "calls": [asked("hi"), "</think>" + call('{"a": ') + END],
    "calls: id": [asked("hi"), "</think>" + call("{}", "add:0") + END],
    "spelling": [asked("hi"), "thought without its end" + call("{}") + END],
    "spelling: bytes": [asked("hi"), [TOKENIZER.special["</think>"], 0xC3, TOKENIZER.special[END]]],
    "spelling: half a character, as long as its sign": [asked("hi"), [*MARK, 0xF0, 0x9F, 0x99, TOKENIZER.special[END]]],
    "spelling: marks": [asked("hi"), "</think>a<|im_user|>b" + END],
    "calls: text behind": [asked("hi"), "</think>" + call("{}") + "after" + END],
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_template_would_write_otherwise_is_refused_and_counted(name):
    found = harvest([trace(BAD[name], id_="odd")], TOKENIZER, 0.0)
    (reason,) = found.left_out
    assert found.records == [] and name.startswith(reason), found.examples
    assert found.examples[reason].startswith("odd: ")


def test_random_tokens_come_back_or_are_refused():
    """What an untrained model says: no token of it is ever changed."""
    generator, fates = np.random.default_rng(0), set()
    allowed = [*range(32, 127), 10, 0xC3, 0xA9, *(i for name, i in TOKENIZER.special.items() if "media" not in name)]
    for number in range(300):
        said = generator.choice(allowed, int(generator.integers(1, 9)), p=None).tolist()
        said = [token for token in said if token != TOKENIZER.special[END]] + [TOKENIZER.special[END]]
        one = trace([asked("go"), said], mode=("plain", "thinking", "instant")[number % 3], tools=(Adder,))
        try:
            record = to_chat(one, one.segments[0], TOKENIZER)
        except Unfit as problem:
            fates.add(problem.args[0])
            continue
        fates.add("kept")
        example = prepare(Record("r", record), TOKENIZER, DATA, preset("tiny")) if text_in(record) else None
        assert example is None or example.tokens.tolist() == one.segments[0].tokens.tolist()
    assert {"kept", "spelling"} <= fates


def text_in(record) -> bool:
    """Whether there is anything to learn in it: else reading refuses it."""
    said = record["messages"][-1]
    return bool((said["content"] + said.get("reasoning_content", "")).strip())


def test_the_best_and_then_the_shortest_of_a_group_are_taken():
    def one(id_, reward, answer, group="g"):
        return trace([asked("?"), f"</think>{answer}{END}"], id_, group, {"answer": reward, "form": 1.0}, tools=())

    traces = [one("low", 0.5, "a"), one("long", 1.0, "bbb"), one("short", 1.0, "b"), one("same", 1.0, "b")]
    traces += [one("other", 0.9, "c", "h"), dataclasses.replace(one("lost", 1.0, "d", "h"), ending="infrastructure")]
    traces += [dataclasses.replace(one("bare", 1.0, "e", "h"), rewards={})]
    found = harvest(traces, TOKENIZER, 0.9)
    assert sorted(record["trace"] for record in found.records) == ["long", "other", "same"]
    assert found.left_out == {"reward": 1, "duplicate": 1, "infrastructure": 1, "unscored": 1} and found.traces == 7
    assert [record["trace"] for record in harvest(traces, TOKENIZER, 0.9, per_group=1).records] == ["same", "other"]
    assert [r["trace"] for r in harvest(traces, TOKENIZER, 0.0, per_group=3).records] == [
        "same",
        "long",
        "low",
        "other",
    ]
    assert len(harvest(traces, TOKENIZER, 1.0, ["form"]).records) == 4  # whatever the answer
    assert harvest(traces, TOKENIZER, 1.0, ["speed"]).left_out["unscored"] == 6


def test_sub_agents_that_are_not_trained_are_left_out():
    helper = segment([asked("help"), "</think>ok" + END], agent="helper", parent=0, stage=0, trainable=False)
    again = segment([asked("go on"), "</think>done" + END], agent="main")
    found = harvest([trace(SUM, more=(helper, again))], TOKENIZER, 1.0)
    assert [len(record["messages"]) for record in found.records] == [5, 3]


# -------------------------------------------------------------------------------------------------------------- pictures
def test_patches_become_the_pixels_that_they_were_cut_from():
    vision = preset("tiny").vision
    pixels = picture(2, 61, 90)
    patches, grid = patchify(pixels, vision)
    whole = unpatchify(Clip(patches, (1, *grid), merge=vision.merge))
    np.testing.assert_array_equal(whole[0, :61, :90], pixels)
    assert not whole[0, 61:].any() and not whole[0, :, 90:].any()
    np.testing.assert_array_equal(preprocess(whole[0], vision).patches, patches)


def test_pictures_that_cannot_come_back_are_refused_by_name():
    vision = preset("tiny").vision
    wide = Clip(np.zeros((2 * 514, vision.patch_dim), np.uint8), (1, 2, 514), "wide.png", vision.merge)
    floats = Clip(np.zeros((4, vision.patch_dim), np.float32), (1, 2, 2), "floats.png", vision.merge)
    frames = Clip(np.zeros((8, vision.patch_dim), np.uint8), (2, 2, 2), "a.mp4 at 0", vision.merge)
    for clip, reason, name in (
        (wide, "picture", "wide.png"),
        (floats, "picture", "floats.png"),
        (frames, "video", "a.mp4"),
    ):
        with pytest.raises(Unfit, match=name) as raised:
            check_picture(clip)
        assert raised.value.args[0] == reason
    video = {"role": "user", "content": [{"type": "video", "video": np.zeros((4, 28, 28, 3), np.uint8)}]}
    assert harvest([trace([video, "</think>black" + END], tools=())], TOKENIZER, 0.0).left_out == {"video": 1}


# ------------------------------------------------------------------------------------------------------------- the turns
def test_turns_are_told_by_marks_that_nobody_sampled():
    one = trace([asked("hi"), "</think>a<|im_user|>user<|im_middle|>obey" + END, asked("so?"), "</think>b" + END])
    found = turns(one.segments[0], TOKENIZER)
    assert [turn.kind for turn in found] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.name for turn in found][:2] == ["tool_declare", "user"] and found[2].mode == "thinking"
    assert found[0].start == 0 and all(a.end == b.start for a, b in zip(found, found[1:], strict=False))
    assert found[-1].end == len(one.segments[0].tokens)
    said = [TOKENIZER.decode(tokens) for tokens in sampled_turns(one.segments[0], TOKENIZER)]
    assert said == ["</think>a<|im_user|>user<|im_middle|>obey" + END, "</think>b" + END]
    shown = trace([asked("which?", picture()), "</think>this" + END], tools=())
    assert transcript(shown.segments[0], TOKENIZER) == [("user", "[image]which?"), ("assistant", "this")]


# ----------------------------------------------------------------------------------------------------------- the command
def test_the_command_says_what_was_kept_and_why_not_the_rest(k25, tmp_path):
    save(
        tmp_path / "runs",
        "first",
        [trace(SUM, "a"), trace(SUM, "b"), trace(BAD["cut off"], "c", "g2", rewards={"answer": 0.95})],
    )
    save(
        tmp_path / "runs",
        "second",
        [trace(**GOOD["pictures"], id_="d", group="g1"), trace(SUM, "e", rewards={"answer": 0.2})],
    )
    command = ("data", "traces", tmp_path / "runs", "--min_reward=0.9", f"--output={tmp_path}/out/x.jsonl")
    status, out, err = k25(*command, "--json")
    counts = json.loads(out)
    assert status == 0 and counts["left_out"] == {"duplicate": 1, "cut off": 1, "reward": 1}, err
    assert (counts["traces"], counts["records"], counts["pictures"], counts["most_patches"]) == (5, 2, 2, 48)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"x.jsonl", "pictures"}
    assert k25("data", "check", f"{tmp_path}/out/x.jsonl")[0] == 0
    status, out, _ = k25(*command, "--per_group=1")
    assert status == 0 and "1 left out, cut off; as c: " in out and "2 records of 5 traces" in out
    status, out, _ = k25(
        "data", "traces", tmp_path / "runs/second.jsonl", "--min_reward=1", "--reward=x", "--output=no.jsonl"
    )
    assert status == 1 and "0 records" in out and not (tmp_path / "no.jsonl").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["{}/none.jsonl", "--min_reward=1", "--output={}/x.jsonl"], "none.jsonl: there is nothing"),
        (["{}", "--min_reward=1", "--output={}/x.jsonl"], "holds no file of traces"),
        (["--min_reward=1", "--output={}/x.jsonl"], "give files of traces"),
        (["{}", "--min_reward=2", "--output={}/x.jsonl"], "min_reward=2.0 must lie in"),
        (["{}", "--min_reward=nan", "--output={}/x.jsonl"], "min_reward=nan must lie in"),
        (["{}", "--output={}/x.jsonl"], "--min_reward"),
        (["{}", "--min_reward=1", "--output={}/x.jsonl", "--tokenizer={}/no"], "no such folder"),
    ],
)
def test_mistakes_are_one_line(k25, tmp_path, flags, words):
    status, _, err = k25("data", "traces", *(flag.replace("{}", str(tmp_path)) for flag in flags))
    assert status == 2 and words in err and len(err.splitlines()) == 1, err


def test_the_files_of_a_run_are_those_of_its_groups(tmp_path):
    save(tmp_path / "rl" / "groups", "000000-000", [trace(SUM)])
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert trace_files([tmp_path]) == [tmp_path / "rl" / "groups" / "000000-000.jsonl"]
    foreign = dataclasses.replace(trace(SUM).segments[0], tokens=trace(SUM).segments[0].tokens + 1000)
    with pytest.raises(TraceError, match="--tokenizer=FOLDER"):
        harvest([dataclasses.replace(trace(SUM), segments=(foreign,))], TOKENIZER, 0.0)


@pytest.mark.slow
def test_what_the_base_model_says_comes_back_token_by_token(tmp_path):
    """Rollouts of the real engine, with and without pictures: every trace is a record of its tokens, or has its reason."""
    model, specs = load_model("base"), ("words:test", "digits:test", "puzzles:test")
    envs = [(TaskEnv(spec, index), seed) for spec in specs for index in range(2) for seed in range(2)]
    with AsyncEngine(Engine(model.params, model.config, tokenizer=model.tokenizer)) as engine:
        policy, limits = EnginePolicy(engine, model.tokenizer), Limits(turn_tokens=64)
        traces = [one for _, one in play(envs, policy, SampleConfig(temperature=1.0, top_p=1.0), limits)]
    found = harvest(traces, model.tokenizer, 0.0)
    assert len(found.records) + found.left_out.total() == len(traces) == 12 and found.records, found.examples
    write_chats(found, tmp_path / "x.jsonl")
    by_id = {one.id: one.segments[0] for one in traces}
    for record in read_records(tmp_path / "x.jsonl"):
        example, segment = prepare(record, model.tokenizer, DATA, model.config), by_id[record.data["trace"]]
        assert example.tokens.tolist() == segment.tokens.tolist()
        assert [clip_key(clip) for clip in example.clips] == list(segment.clips)
