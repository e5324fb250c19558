"""The page of one trace: all of it is there, nothing of it can do anything, and it needs nothing else."""

import dataclasses
import re

import numpy as np
import pytest

from episodes import END, TOKENIZER, asked, call, picture, returned, segment, trace
from k25_jax.agents.trace import TraceError, save
from k25_jax.report.trace import SHADES, advantage, choose, locate, trace_page, visible
from pages import Page, needs_nothing_else

NASTY = "<script>alert(\"1\")</script><img src=x onerror='y'> &lt; </span></div> ]]>"
NASTY += "\x00\x1b[31m\r\x7f \u202egnp \u200b\ufeff \x85"
CALLS = "easy\nso</think>" + call('{"a": 2, "b": "x\\ny"}') + END
SUM = [asked("what is 2+3?", picture()), CALLS, returned("5"), "é</think>5" + END]


def page_of(one, group=(), weights=(("outcome", 1.0),)) -> str:
    return trace_page(one, TOKENIZER, group, weights)


def spans(text: str) -> list[tuple[str, str, str]]:
    """(classes, title, text) of what was sampled."""
    return re.findall(r'<span class="(t [^"]*)" title="([^"]*)">([^<]*)</span>', text)


def test_everything_of_a_trace_is_on_its_page():
    one = trace(SUM, "the one", versions=(3, 4), rewards={"outcome": 0.75, "form": 1.0})
    text = page_of(one)
    page = Page(text)
    for part in (
        "the one",
        "answer",
        "0.75",
        "reward: form",
        "3 to 4",
        "tool_declare",
        "what is 2+3?",
        "functions.add:0",
    ):
        assert part in page.text, part
    assert "x\ny" in page.text and "## Return of functions.add:0" in page.text  # the call in lines, what it gave back
    assert page.tags.count("img") == 1 and len(one.clips) == 1
    assert needs_nothing_else(text) and "://" not in text
    assert page.tags.count("input") == 3  # no advantage is known
    assert len(text) < 200_000


def test_each_sampled_token_is_shown_with_what_is_known_of_it():
    one = trace([asked("hi"), "ab</think>" + END], tools=(), versions=(7, 8))
    found, part = spans(page_of(one)), one.segments[0]
    at = np.flatnonzero(part.sampled)
    assert [text for _, _, text in found] == ["a", "b", "&lt;/think&gt;", "&lt;|im_end|&gt;"]
    for (classes, title, _), place in zip(found, at, strict=True):
        logprob = part.logprobs[place]
        assert f"l{min(SHADES - 1, round(-float(logprob) / 5 * (SHADES - 1)))}" in classes.split()
        assert title == f"token {part.tokens[place]}: {logprob.round(3)!s}, version {part.versions[place]}"
    assert ["odd" in classes for classes, _, _ in found] == [False, False, True, True]


def test_a_character_of_several_tokens_is_one_span():
    one = trace([asked("hi"), [0xF0, 0x9F, 0x99, 0x82, 0xC3, TOKENIZER.special[END]]], mode="plain", tools=())
    found = spans(page_of(one))
    assert [text for _, _, text in found] == ["🙂", "\ufffd", "&lt;|im_end|&gt;"]
    assert found[0][1].startswith("token 240 159 153 130: ")


def test_nothing_that_was_said_can_do_anything():
    one = trace(
        [asked(NASTY), f"{NASTY}</think>{NASTY}" + call('{"a": "</pre><script>x</script>"}', f"functions.add:0{NASTY}") + END,
         returned(NASTY), [*TOKENIZER.encode(NASTY), TOKENIZER.special[END]]],
        id_=NASTY, problem=NASTY, rewards={NASTY: 1.0}, more=[segment([asked("x"), "y" + END], agent=NASTY, reason=NASTY)],
    )  # fmt: skip
    plain = trace(
        [asked("q"), "a</think>b" + call('{"a": "c"}') + END, returned("r"), "s" + END], problem="p", rewards={"w": 1.0},
        more=[segment([asked("x"), "y" + END])],
    )  # fmt: skip
    text = page_of(one, [one, one], ((NASTY, 1.0),))
    assert needs_nothing_else(text)
    tags = set(Page(text).tags)
    assert tags - set(Page(page_of(plain, [plain, plain], (("w", 1.0),))).tags) == set() and "script" not in tags
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]", text)
    text.encode()


def test_hidden_characters_have_names():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x00\x1b\r\x7f") == "␀␛␍␡"
    assert visible("\u202e\u200d\u2028\ud800\x85\ufeff") == "⟨U+202E⟩⟨U+200D⟩⟨U+2028⟩⟨U+D800⟩⟨U+0085⟩⟨U+FEFF⟩"
    assert visible("é中🙂\u0301") == "é中🙂\u0301"


def test_random_tokens_are_all_shown():
    generator = np.random.default_rng(0)
    for _ in range(40):
        said = generator.integers(0, 277, 60).tolist()
        said = [t for t in said if t not in (TOKENIZER.special[END], TOKENIZER.special["<|media_pad|>"])]
        one = trace([asked("go"), said], mode=("plain", "thinking", "instant")[_ % 3])
        shown = [int(number) for _, title, _ in spans(page_of(one)) for number in title[6:].partition(":")[0].split()]
        assert shown == said


# ------------------------------------------------------------------------------------------------------------- advantages
def test_advantages_are_those_of_the_group():
    good, bad, lost = (
        trace(SUM, name, rewards={"outcome": r, "form": 1.0}) for name, r in (("a", 1.0), ("b", 0.0), ("c", 0.5))
    )
    weights = (("outcome", 1.0), ("form", 0.0))
    assert advantage(good, [good, bad], weights) == 0.5 and advantage(bad, [good, bad], weights) == -0.5
    assert advantage(good, [good], weights) is None
    assert advantage(dataclasses.replace(lost, rewards={}), [good, bad], weights) is None
    up, down = (page_of(one, [good, bad], weights) for one in (good, bad))
    assert 'class="segment up a5"' in up and 'class="segment down a5"' in down and "+0.500" in up
    assert Page(up).tags.count("input") == 4
    helper = segment([asked("x"), "y" + END], agent="helper", parent=0, stage=0, trainable=False)
    swarm = trace(SUM, "s", rewards={"outcome": 1.0, "form": 1.0}, more=[helper])
    assert 'class="segment a0"' in page_of(swarm, [swarm, bad], weights)  # what is not trained has none


def test_agents_are_nested_where_they_were_started():
    first = segment([asked("task one"), "</think>one" + END], agent="ada", parent=0, stage=0)
    second = segment([asked("task two"), "</think>two" + END], agent="bob", parent=0, stage=1)
    below = segment([asked("task three"), "</think>three" + END], agent="cy", parent=1, stage=0)
    odd = segment([asked("task four"), "</think>four" + END], agent="dan", parent=0, stage=9)
    text = page_of(trace(SUM, more=[first, second, below, odd]))
    order = [
        "what is 2+3?",
        "ada: ",
        "task one",
        "cy: ",
        "task three",
        "Return of",
        "bob: ",
        "task two",
        "dan: ",
        "task four",
    ]
    said = text[text.index('<div class="trace">') :]
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    assert Page(text).tags.count("details") == 5 and "started by" in Page(text).text


# ----------------------------------------------------------------------------------------------------------- the command
def test_the_command_finds_a_trace_by_name_or_place(k25, tmp_path):
    traces = [trace(SUM, "sums:3:0"), trace(SUM, "sums:3:1", rewards={"outcome": 0.0})]
    save(tmp_path, "t", traces)
    for which, name in (("", "sums:3:0"), (":1", "sums:3:1"), (":-1", "sums:3:1"), (":sums:3:1", "sums:3:1")):
        status, out, err = k25("report", f"--trace={tmp_path}/t.jsonl{which}", f"--output={tmp_path}/p.html")
        assert (status, out) == (0, f"wrote {tmp_path}/p.html\n"), err
        page = Page((tmp_path / "p.html").read_text())
        assert f"Trace {name}" in page.text and "advantage in its group of 2" in page.text
    for flags, words in (
        ((f"--trace={tmp_path}/t.jsonl:7",), "no trace '7'; of its 2 the first are sums:3:0, sums:3:1"),
        ((f"--trace={tmp_path}/u.jsonl",), "there is no such file"),
        ((f"--trace={tmp_path}/t.jsonl", f"--workdir={tmp_path}"), "not allowed with"),
        ((f"--workdir={tmp_path}", "--output=x.html"), "--output goes with --trace"),
        ((), "one of the arguments"),
    ):
        status, _, err = k25("report", *flags)
        assert status == 2 and words in err and len(err.splitlines()) == 1, err


def test_names_with_colons(tmp_path):
    (tmp_path / "a:b.jsonl").write_text("")
    assert locate(f"{tmp_path}/a:b.jsonl") == (tmp_path / "a:b.jsonl", "")
    assert locate(f"{tmp_path}/a:b.jsonl:c:d") == (tmp_path / "a:b.jsonl", "c:d")
    with pytest.raises(TraceError, match="no trace ''; of its 0 the first are none"):
        choose([], "", tmp_path / "a:b.jsonl")
