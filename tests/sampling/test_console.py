"""One answer and a conversation, of a model that was really trained, with what is typed and what is printed."""

import argparse
import copy
import dataclasses
import io

import numpy as np
import pytest

from k25_jax.cli import build_parser
from k25_jax.sampling.console import Console, chat, generate, reply
from k25_jax.sampling.prompt import default_mode, from_messages
from k25_jax.sampling.requests import TokenEvent
from k25_jax.sampling.sample import PromptError, SampleConfig, Sampler
from k25_jax.text.tokenizer import PUBLIC_SPECIAL, Tokenizer


def arguments(finished, command: str, *more: str) -> argparse.Namespace:
    """The flags of a command on the finished run, greedy."""
    flags = [f"--checkpoint={finished.run}", "--temperature=0", "--max_tokens=16"]
    return build_parser().parse_args([command, *flags, *more])


def picture(finished, number: int = 0) -> str:
    return str(finished.file.parent / "data" / f"{number}.png")


@pytest.fixture(scope="module")
def loaded(finished) -> Console:
    """The model in memory; `flagged` gives it other flags."""
    return Console(arguments(finished, "generate"))


@pytest.fixture
def flagged(finished, loaded):
    """A console with these flags of `k25 generate`."""

    def console(*more: str) -> Console:
        other = copy.copy(loaded)
        other.args = arguments(finished, "generate", *more)
        return other

    return console


@pytest.fixture
def ask(finished, flagged):
    """Asks about a picture: the answer, and the pieces in which it was shown."""

    def question(*more: str) -> tuple[dict, list[str]]:
        console, shown = flagged(f"--image={picture(finished)}", "--prompt=which?", *more), []
        return console.answer(console.prompt(), console.ends(templated=True), shown.append), shown

    return question


@pytest.fixture
def conversation(finished, monkeypatch, capsys):
    """Types lines into `k25 chat`; gives what it printed behind each prompt."""

    def talk(lines: list[str], *more: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert chat(arguments(finished, "chat", *more)) == 0
        return capsys.readouterr().out.split("> ")

    return talk


# --------------------------------------------------------------------------------------------------------- one answer
def test_an_answer_is_what_the_sampler_draws(finished, flagged, ask):
    """Up to the end of the turn, which is a token of the answer but not of its text."""
    answer, shown = ask()
    console = flagged(f"--image={picture(finished)}", "--prompt=which?")
    prompt, end = console.prompt(), console.model.tokenizer.special["<|im_end|>"]
    sampler = Sampler(console.model.params, console.model.config)
    drawn = [row for (row,) in sampler.generate([prompt.tokens], [prompt.clips], SampleConfig(16, 0.0))]
    length = [token for token, _ in drawn].index(end) + 1
    assert answer["tokens"] == [token for token, _ in drawn[:length]]
    np.testing.assert_allclose(answer["logprobs"], [logprob for _, logprob in drawn[:length]], atol=1e-4)
    assert answer["text"] == console.model.tokenizer.decode(answer["tokens"][:-1]) == "".join(shown)
    assert answer["text"].startswith("no. ")  # it has learned the form
    assert len([piece for piece in shown if piece]) > 1  # piece by piece


def test_without_end_the_answer_is_as_long_as_allowed(ask):
    answer, shown = ask("--ignore_eos")
    assert len(answer["tokens"]) == len(answer["logprobs"]) == 16
    assert answer["text"] == "".join(shown) and len(answer["text"]) < 16  # special tokens are no text


@pytest.mark.parametrize("stops, left", [(["."], "no"), (["o. "], "n"), (["zzz", ". ", "."], "no"), (["none"], None)])
def test_an_answer_ends_before_a_stop_text_and_none_of_it_is_shown(ask, stops, left):
    whole, _ = ask()
    answer, shown = ask(*[f"--stop={stop}" for stop in stops])
    assert answer["text"] == "".join(shown) == (whole["text"] if left is None else left)
    assert answer["tokens"] == whole["tokens"][: len(answer["tokens"])]
    assert len(answer["tokens"]) == len(answer["logprobs"])


def test_an_empty_stop_text_and_impossible_sampling_are_refused(ask):
    for flag, message in (("--stop=", "--stop is empty"), ("--top_p=0", "top_p=0"), ("--max_tokens=0", "max_tokens=0")):
        with pytest.raises(PromptError, match=message):
            ask(flag)


def test_the_end_of_a_turn_ends_only_answers_behind_the_chat_template(flagged):
    console = flagged()
    turn, ends = console.model.tokenizer.special["<|im_end|>"], console.model.config.eos_ids
    assert set(console.ends(templated=True)) == {turn, *ends} and console.ends(templated=False) == ends
    assert flagged("--ignore_eos").ends(templated=True) == ()


def test_the_prompt_from_standard_input_raw_text_or_ids(finished, flagged, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("which?"))
    typed = flagged("--system=brief").prompt()
    given = flagged("--system=brief", "--prompt=which?").prompt()
    assert typed.tokens == given.tokens and b"brief" in bytes(token for token in typed.tokens if token < 256)
    raw = flagged("--raw", "--prompt=a <|im_end|>").prompt()
    assert raw.tokens == [97, 32, 258]
    image = f"--image={picture(finished)}"
    ids = flagged("--prompt_ids=7, 264,9", image).prompt()
    assert ids.tokens == [7, *[264] * ids.clips[0].tokens, 9]
    with pytest.raises(PromptError, match="--prompt_ids='1,x' must be integers"):
        flagged("--prompt_ids=1,x").prompt()


def test_generate_prints_the_answer_as_it_comes(finished, ask, capsys):
    answer, _ = ask()
    assert generate(arguments(finished, "generate", f"--image={picture(finished)}", "--prompt=which?")) == 0
    assert capsys.readouterr().out == answer["text"] + "\n"


# ------------------------------------------------------------------------------------------------------- conversation
def test_a_picture_is_attached_to_the_next_message(finished, ask, conversation):
    answer, _ = ask()
    out = conversation([f"/image {picture(finished)}", "which?", "/quit", "not read"])
    assert [piece.strip() for piece in out[1:]] == ["", answer["text"], ""]


def test_a_conversation_is_remembered_until_reset(finished, flagged, conversation):
    lines = [f"/image {picture(finished)}", "which?", "which?", "/reset", f"/image {picture(finished)}", "which?"]
    first, second, again = (conversation(lines)[place].strip() for place in (2, 3, 6))
    console = flagged()
    question = {"role": "user", "content": "which?"}
    shown = {"role": "user", "content": [{"image": picture(finished)}, {"text": "which?"}]}
    for messages, text in (
        ([shown], first),
        ([shown, {"role": "assistant", "content": first}, question], second),
        ([shown], again),
    ):
        prompt = from_messages(messages, console.model.tokenizer, console.reader)
        assert console.answer(prompt, console.ends(True), lambda _: None)["text"].strip() == text


def test_a_conversation_keeps_the_tokens_that_were_sampled(flagged):
    """An answer that is cut off in mid-character, which text could not give back, stays as it is."""
    console, end = flagged("--mode=instant"), 258
    first = {"role": "user", "content": "which?"}
    sampled = [0xC3, 120, 0xE2]
    tokens = console.conversation([first, sampled, first]).prompt()
    assert console.model.tokenizer.special["<|im_end|>"] == end
    begun = console.conversation([first]).prompt()
    assert tokens[: len(begun) + 4] == [*begun, *sampled, end]
    assert reply(console, console.conversation([first, sampled]), first)


@pytest.mark.parametrize(
    "mode, ending", [("plain", []), ("thinking", ["<think>"]), ("instant", ["<think>", "</think>"])]
)
def test_the_mode_begins_the_answer(flagged, mode, ending):
    console = flagged(f"--mode={mode}", "--prompt=which?")
    special = console.model.tokenizer.special
    for tokens in (console.prompt().tokens, console.conversation([{"role": "user", "content": "which?"}]).prompt()):
        begun = [*map(special.get, ("<|im_middle|>", *ending))]
        assert tokens[-len(begun) :] == begun


def test_thinking_is_shown_between_its_marks(flagged, monkeypatch):
    console = flagged("--prompt=x")
    special = console.model.tokenizer.special
    drawn = [104, 109, special["</think>"], 53, special["<|im_end|>"]]
    events = [TokenEvent(0, 0, token, -1.0, 0) for token in drawn]
    monkeypatch.setattr(Console, "events", lambda self, request: iter(events))
    assert console.answer(console.prompt(), console.ends(True), lambda _: None)["text"] == "hm</think>5"


def test_public_weights_think_first(loaded):
    """Those with Kimi's vocabulary; a run of ours answers the same in the public format."""
    assert loaded.mode == "plain" == default_mode(dataclasses.replace(loaded.model, experiment=None))
    kimi = Tokenizer(PUBLIC_SPECIAL, {byte: bytes([byte]) for byte in range(256)}, list, "kimi")
    assert default_mode(dataclasses.replace(loaded.model, experiment=None, tokenizer=kimi)) == "thinking"
    assert default_mode(dataclasses.replace(loaded.model, tokenizer=kimi)) == "plain"


def test_a_later_turn_reads_only_what_is_new(flagged):
    """The pages of the turns before are found again, their picture is not encoded again, and nothing is compiled."""
    console = flagged("--max_tokens=8", "--ignore_eos")
    question = {"role": "user", "content": "which one of them?"}

    def ask(messages):
        prompt = from_messages(messages, console.model.tokenizer, console.reader)
        return console.answer(prompt, (), lambda _: None), len(prompt.tokens)

    first, length = ask([question])
    before = console.engine.stats()
    messages = [question, {"role": "assistant", "content": first["text"]}, {"role": "user", "content": "b"}]
    second, longer = ask(messages)
    after = console.engine.stats()
    size = console.engine.settings.page_size
    assert after["reused"] - before["reused"] >= length // size * size > 0
    assert after["read"] - before["read"] == longer - (after["reused"] - before["reused"])
    assert after["compilations"] == before["compilations"] == 2
    console.engine = None
    assert ask(messages)[0]["tokens"] == second["tokens"]


def test_an_answer_that_is_broken_off_leaves_the_engine_free(flagged, ask):
    console = flagged("--prompt=which?", "--ignore_eos", "--max_tokens=60")
    prompt = console.prompt()

    def interrupt(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        console.answer(prompt, (), interrupt)
    assert not console.engine.busy
    assert len(console.answer(prompt, (), lambda _: None)["tokens"]) == 60


def test_an_engine_is_built_for_what_is_asked(flagged, monkeypatch):
    """One for all of a small model; of a larger one for a part, and again when a conversation outgrows it."""
    console = flagged()
    assert console.engine_for(5).max_length == console.engine_for(500).max_length == 128
    monkeypatch.setattr("k25_jax.sampling.console.LEAST_ROOM", 32)
    console.engine = console.engine_for(20)
    assert console.engine.max_length == 32 and console.engine_for(30) is console.engine
    assert console.engine_for(33).max_length == 64


def test_mistakes_do_not_end_the_conversation(finished, ask, conversation):
    answer, _ = ask()
    lines = ["/image no-such.png", "which?", "/what", "", "x" * 200, f"/image {picture(finished)}", "which?"]
    out = conversation(lines)
    assert "error: no-such.png: there is no such file" in out[2]
    assert "/image FILE" in out[3] and out[4] == ""
    assert "error: " in out[5] and "context of 128" in out[5]
    assert out[7].strip() == answer["text"]  # neither mistake is part of the conversation
