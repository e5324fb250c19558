"""The real server on loopback, asked by OpenAI's own client: what it answers, refuses and survives."""

import base64
import contextlib
import dataclasses
import io
import json
import logging
import re
import socket
import threading
import time
import types
import urllib.request

import jax
import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import runs
from benchmarks.serving import (
    CHAT,
    CONFIG,
    LIMITS,
    minute_engine,
    minute_model,
    random_weights,
    run,
    serving,
    until_idle,
)
from k25_jax.checkpoint.huggingface import save_params
from k25_jax.data.packing import Batch
from k25_jax.models.k25 import forward
from k25_jax.sampling.async_engine import AsyncEngine
from k25_jax.sampling.prompt import from_messages
from k25_jax.sampling.sample import lay_out
from k25_jax.serving.limits import ServerConfig, ServerError
from k25_jax.serving.server import Server
from k25_jax.text.tokenizer import BYTE_SPECIAL, load_tokenizer
from k25_jax.vision.patchpack import pack_clips

PARAMS, OTHERS = random_weights(1), random_weights(2)
TOKENIZER, FORWARD = load_tokenizer(), jax.jit(forward, static_argnames="config")
HI = [{"role": "user", "content": "hi"}]
GREEDY = {
    "model": "minute",
    "messages": HI,
    "temperature": 0,
    "max_tokens": 12,
    "extra_body": {"return_token_ids": True},
}
LONG = {
    "model": "minute",
    "messages": HI,
    "max_tokens": 300,
    "n": 8,
    "stream": True,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def loop():
    with AsyncEngine(minute_engine(PARAMS)) as loop:
        yield loop


@pytest.fixture(scope="module")
def world(loop, tmp_path_factory):
    """A server with media under `root`; `client` is OpenAI's."""
    root = tmp_path_factory.mktemp("media") / "root"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root / "a.png")
    Image.fromarray(pixels).save(root.parent / "secret.png")
    (root / "link.png").symlink_to(root.parent / "secret.png")
    frames = [Image.fromarray(np.roll(pixels, 9 * i, 0)) for i in range(3)]
    frames[0].save(root / "v.gif", save_all=True, append_images=frames[1:], duration=500)
    served = minute_model(root)
    with serving(loop, served) as (server, url):
        yield types.SimpleNamespace(server=server, url=url, client=client_of(url), served=served, root=root, loop=loop)


@pytest.fixture
def idle(world):
    """The server, which must be left with nothing to do and the first weights."""
    yield world
    stats = until_idle(world.loop)
    assert stats["running"] == stats["waiting"] == stats["pages_used"] == 0
    world.server.update_weights(PARAMS, stats["version"] + 1)


def client_of(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=300)


def logprobs_of(tokens, clips=()):
    """[L, V] by the plain forward pass."""
    vision = CONFIG.vision
    pack, starts = pack_clips(list(clips), 1, 64, vision.merge, vision.patch_dim)
    tokens_BL, media_BL = lay_out([tokens], [list(clips)], starts, CONFIG.media_pad_id)
    positions_BL = np.arange(tokens_BL.shape[1], dtype=np.int32)[None]
    segments_BL = (positions_BL < len(tokens)).astype(np.int32)
    batch = Batch(tokens_BL, tokens_BL, segments_BL, segments_BL, positions_BL, media_BL, pack)
    return np.asarray(jax.nn.log_softmax(FORWARD(PARAMS, batch, CONFIG)))[0]


def image_part(url):
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]}
    ]


def data_url(file, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def post(url, body, path=CHAT, **headers):
    """(status, headers, body) without a client's help."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(url + path, data, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(asked, timeout=300) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)


def metric(url, name, **labels):
    with urllib.request.urlopen(f"{url}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    found = [s for family in families for s in family.samples if s.name == name]
    return sum(s.value for s in found if all(s.labels[key] == value for key, value in labels.items()))


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("shows", [False, True])
def test_log_probabilities_are_those_of_the_plain_forward_pass(idle, shows):
    messages = image_part(data_url(idle.root / "a.png")) if shows else HI
    answer = idle.client.chat.completions.create(**GREEDY | {"messages": messages}, logprobs=True, top_logprobs=5)
    choice, start = answer.choices[0], answer.usage.prompt_tokens - 1
    own = [{"role": "user", "content": [{"image": str(idle.root / "a.png")}, {"text": "?"}]}] if shows else HI
    prompt = from_messages(own, TOKENIZER, idle.served.reader)
    assert answer.prompt_token_ids == prompt.tokens and len(prompt.clips) == shows
    found = logprobs_of(prompt.tokens + choice.token_ids, prompt.clips)
    for place, (token, said) in enumerate(zip(choice.token_ids, choice.logprobs.content, strict=True), start):
        assert token == found[place].argmax() and abs(said.logprob - found[place, token]) < 1e-4
        top = np.sort(found[place])[::-1][:5]
        np.testing.assert_allclose([one.logprob for one in said.top_logprobs], top, atol=1e-4)
        assert bytes(said.bytes) == TOKENIZER.bytes_of(token)
    assert choice.message.content == TOKENIZER.decode(choice.token_ids, skip_special=True)
    assert choice.finish_reason in ("length", "stop")
    assert choice.policy_versions == [[idle.loop.stats()["version"], len(choice.token_ids)]]
    assert answer.usage.prompt_tokens == len(prompt.tokens) and answer.usage.completion_tokens == len(choice.token_ids)


def test_a_stream_is_the_whole_answer_in_pieces(idle):
    ask = GREEDY | {"n": 2, "temperature": 1, "seed": 5, "logprobs": True}
    whole = idle.client.chat.completions.create(**ask)
    chunks = list(idle.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and all(c.usage is None for c in chunks[:-1])
    for choice in whole.choices:
        mine = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        assert [token for piece in mine for token in getattr(piece, "token_ids", [])] == choice.token_ids
        told = [one.logprob for piece in mine if piece.logprobs for one in piece.logprobs.content]
        np.testing.assert_allclose(told, [one.logprob for one in choice.logprobs.content], atol=1e-4)
        assert [piece.finish_reason for piece in mine if piece.finish_reason] == [choice.finish_reason]
    assert whole.choices[0].token_ids != whole.choices[1].token_ids
    usual = list(idle.client.chat.completions.create(**ask, stream=True))
    assert usual[-1].choices and all(chunk.usage is None for chunk in usual)


def test_completions_of_several_prompts(idle):
    how = {"model": "minute", "max_tokens": 6, "temperature": 1, "seed": 3, "logprobs": 2, "n": 2}
    ids = {"extra_body": {"return_token_ids": True}}
    together = idle.client.completions.create(prompt=["one", "two"], **how, **ids)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    for number, prompt in enumerate(("one", TOKENIZER.encode("two"))):
        alone = idle.client.completions.create(prompt=prompt, **how, **ids)
        for sample in (0, 1):
            one, other = together.choices[2 * number + sample], alone.choices[sample]
            assert (one.text, one.token_ids) == (other.text, other.token_ids)
            found = logprobs_of(TOKENIZER.encode(["one", "two"][number]) + one.token_ids)[2:]
            due = [found[place, token] for place, token in enumerate(one.token_ids)]
            np.testing.assert_allclose(one.logprobs.token_logprobs, due, atol=1e-4)
            assert len(one.logprobs.top_logprobs[0]) == 2 and one.logprobs.text_offset[0] == 0
    streamed = ""
    for chunk in idle.client.completions.create(prompt="one", **how | {"n": 1}, stream=True):
        streamed += chunk.choices[0].text
    assert streamed == together.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_may_cross_tokens(idle, stream):
    ask = GREEDY | {"max_tokens": 60, "extra_body": {"return_token_ids": True, "ignore_eos": True}}
    text = idle.client.chat.completions.create(**ask).choices[0].message.content
    stop = next(
        text[i : i + 3] for i in range(3, 40) if text.find(text[i : i + 3]) == i
    )  # a token is one letter at most
    got = idle.client.chat.completions.create(**ask, stop=["never there", stop], stream=stream)
    if stream:
        chunks = list(got)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        said, choice = got.choices[0].message.content, got.choices[0]
        assert choice.finish_reason == "stop" and len(choice.token_ids) < 60
    assert said == text[: text.index(stop)]


def test_images_and_videos_from_addresses_and_files(idle):
    root = idle.root
    answers = [
        idle.client.chat.completions.create(**GREEDY | {"messages": image_part(url)})
        for url in (data_url(root / "a.png"), "a.png", str(root / "a.png"), f"file://{root}/a.png")
    ]
    assert len({tuple(answer.choices[0].token_ids) for answer in answers}) == 1
    assert answers[0].prompt_token_ids.count(CONFIG.media_pad_id) == 4
    for url in (data_url(root / "v.gif", "image/gif"), "v.gif"):
        video = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]
        answer = idle.client.chat.completions.create(**GREEDY | {"messages": video})
        shown = from_messages(
            [{"role": "user", "content": [{"video": str(root / "v.gif")}]}], TOKENIZER, idle.served.reader
        )
        assert answer.prompt_token_ids == shown.tokens and shown.clips


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/a.png", "../secret.png", "link.png", "/etc/passwd", "{root}/../secret.png"]
)
def test_no_address_leads_out_of_the_root(idle, url):
    with pytest.raises(openai.BadRequestError) as found:
        idle.client.chat.completions.create(**GREEDY | {"messages": image_part(url.format(root=idle.root))})
    assert found.value.param == "messages[0].content[0].image_url.url" and found.value.code == "invalid_media"


def test_an_image_of_too_many_pixels_is_refused(idle):
    file = io.BytesIO()
    Image.new("RGB", (300, 300)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    with pytest.raises(openai.BadRequestError, match="300 x 300 pixels exceed the limit"):
        idle.client.chat.completions.create(**GREEDY | {"messages": image_part(url)})


def test_thinking_is_told_apart(idle):
    for extra, end in (
        ({"thinking": {"type": "enabled"}}, "<think>"),
        ({"chat_template_kwargs": {"thinking": False}}, "</think>"),
    ):
        answer = idle.client.chat.completions.create(**GREEDY | {"extra_body": extra | {"return_token_ids": True}})
        message, tokens = answer.choices[0].message, answer.choices[0].token_ids
        assert answer.prompt_token_ids[-1] == BYTE_SPECIAL[end]
        assert BYTE_SPECIAL["</think>"] not in tokens  # the random model never stops to think
        said = TOKENIZER.decode(tokens, skip_special=True)
        thought = getattr(message, "reasoning_content", "")
        assert (thought, message.content) == ((said, "") if end == "<think>" else ("", said))
        assert answer.usage.completion_tokens_details.reasoning_tokens == (len(tokens) if end == "<think>" else 0)


def test_a_named_tool_is_called_and_its_result_goes_back(idle):
    tool = {"type": "function", "function": {"name": "find"}}
    choose = {"type": "function", "function": {"name": "find"}}
    how = GREEDY | {"tools": [tool], "tool_choice": choose, "max_tokens": 6}
    choice = idle.client.chat.completions.create(**how).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.id, call.function.name) == ("functions.find:0", "find") and choice.message.content is None
    assert call.function.arguments == TOKENIZER.decode(choice.token_ids, skip_special=True)
    messages = [*HI, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "seen"}]
    answer = idle.client.chat.completions.create(**how | {"messages": messages, "tool_choice": "auto"})
    said = TOKENIZER.decode(answer.prompt_token_ids)
    assert f"<|tool_call_argument_begin|>{call.function.arguments}<|tool_call_end|>" in said
    assert "## Return of functions.find:0\nseen<|im_end|>" in said and "type find = (_: {}) => any;" in said


# -------------------------------------------------------------------------------------------------------------- errors
BODY = {"model": "minute", "messages": HI, "max_tokens": 2}


@pytest.mark.parametrize(
    "path, body, headers, status, param",
    [
        (CHAT, b"{", {}, 400, None),
        (CHAT, BODY | {"temperature": "hot"}, {}, 400, "temperature"),
        (CHAT, BODY | {"model": "other"}, {}, 404, "model"),
        (CHAT, BODY | {"messages": HI * 200}, {}, 400, "messages"),
        ("/v1/completions", {"model": "minute", "prompt": [300]}, {}, 400, "prompt"),  # beyond the vocabulary
        (CHAT, BODY, {"Content-Type": "text/plain"}, 415, None),
        (CHAT, BODY, {"Host": "evil.example:80"}, 403, None),
        (CHAT, BODY, {"Host": "[::1"}, 403, None),
        (CHAT, b" " * (LIMITS.body_bytes + 1), {}, 413, None),
        ("/v1/engines", BODY, {}, 404, None),
        ("/v1/models", BODY, {}, 405, None),
    ],
)
def test_errors_have_openais_form(idle, path, body, headers, status, param):
    found, _, answer = post(idle.url, body, path, **headers)
    assert found == status and set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["param"] == param


def test_a_mistake_of_ours_is_logged_and_not_told(idle, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("inner secret")

    monkeypatch.setattr("k25_jax.serving.server.chat_ask", fails)
    status, _, answer = post(idle.url, BODY)
    assert status == 500 and answer["error"]["type"] == "server_error" and "secret" not in answer["error"]["message"]
    assert "inner secret" in caplog.text


# ------------------------------------------------------------------------------------------------------ keys and limits
def test_a_key_is_needed_and_never_logged(loop, caplog):
    key = "key-7f3e5"
    caplog.set_level(logging.DEBUG)
    with serving(loop, minute_model(), LIMITS, key) as (server, url):
        assert client_of(url, key).models.list().data[0].id == "minute"
        for wrong in ("other", key + "x", key[:-1], "é"):
            status, _, answer = post(url, BODY, Authorization=f"Bearer {wrong}")
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert post(url, BODY)[0] == post(url, BODY, Authorization=f"Basic {key}")[0] == 401
        assert post(url, BODY, Authorization=f"Bearer {key}", Host="name.example")[0] == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/metrics")
        assert urllib.request.urlopen(f"{url}/health").status == 200
        assert key not in repr(vars(server))
    assert key not in caplog.text


def test_other_machines_need_a_key(loop):
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.com"):
        with pytest.raises(ServerError, match="needs an API key"):
            Server(loop, minute_model(), dataclasses.replace(LIMITS, host=host))
    with pytest.raises(ServerError, match="concurrency=0"):
        ServerConfig(concurrency=0)


def half_a_request(url, length=100):
    """A connection on which a body has been announced and does not come."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + b"{")
    return connection


def test_too_many_requests_are_put_off_and_a_body_must_come(loop):
    config = dataclasses.replace(LIMITS, concurrency=1, body_seconds=1.0)
    with serving(loop, minute_model(), config) as (_, url), half_a_request(url) as connection:
        wait_until(lambda: metric(url, "k25_requests_open") == 1)
        status, headers, answer = post(url, BODY)
        assert status == 429 and headers["Retry-After"] == "1" and answer["error"]["type"] == "rate_limit_error"
        assert b"408" in connection.recv(1000).split(b"\r\n")[0]
        wait_until(lambda: post(url, BODY)[0] == 200)


def test_large_bodies_are_not_held_by_the_hundred(loop):
    config = dataclasses.replace(LIMITS, held_bytes=1000, small_bytes=20)
    with serving(loop, minute_model(), config) as (_, url), half_a_request(url, 950) as connection:
        wait_until(lambda: metric(url, "k25_requests_open") == 1)
        status, _, answer = post(url, BODY)
        assert status == 429 and "large bodies" in answer["error"]["message"]
        connection.close()
        wait_until(lambda: post(url, BODY | {"user": "x" * 2000})[0] == 200)


def test_a_full_queue_of_the_engine_is_429(idle, monkeypatch):
    """And those prompts of the request that had found room are given up."""
    streams = [idle.client.chat.completions.create(**LONG) for _ in range(2)]  # all 16 slots
    monkeypatch.setattr(idle.loop._engine, "settings", dataclasses.replace(idle.loop._engine.settings, queue=2))
    status, headers, answer = post(idle.url, {"model": "minute", "prompt": ["a", "b", "c"]}, "/v1/completions")
    assert status == 429 and headers["Retry-After"] and "queue" in answer["error"]["message"]
    for stream in streams:
        stream.close()


# ----------------------------------------------------------------------------------------------------- bad conversation
def test_a_client_that_leaves_ends_its_request(idle):
    before, left = idle.loop.stats()["drawn"], metric(idle.url, "k25_clients_left_total")
    stream = idle.client.chat.completions.create(**LONG)
    next(iter(stream))
    stream.close()
    until_idle(idle.loop)
    wait_until(lambda: metric(idle.url, "k25_clients_left_total") > left)
    assert idle.loop.stats()["drawn"] - before < LONG["n"] * LONG["max_tokens"]
    assert metric(idle.url, "k25_requests_open") == 0


def test_who_reads_nothing_holds_up_nobody_and_is_cut_off(idle):
    much = {"ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps({name: value for name, value in LONG.items() if name != "extra_body"} | much)
    left = metric(idle.url, "k25_clients_left_total")
    with half_a_request(idle.url, len(body)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(body[1:].encode())
        wait_until(lambda: idle.loop.stats()["running"] > 0)
        assert idle.client.chat.completions.create(**GREEDY).choices[0].finish_reason in ("stop", "length")
        wait_until(lambda: metric(idle.url, "k25_clients_left_total") > left)
    wait_until(lambda: metric(idle.url, "k25_requests_open") == 0)


def test_a_storm_of_requests_loses_nothing_and_leaves_nothing(idle):
    found = run(idle.loop, (PARAMS, OTHERS), requests=60, sockets=20, rounds=1, different=10)
    (round_,) = found["rounds"]
    assert round_["wrong"] == [] and round_["answered"] == sum(round_["kinds"].values()) == 60 and round_["across"]
    assert not any(round_["left"].values()) and found["threads_left"] == 0
    assert all(round_["kinds"][kind] for kind in ("whole", "stream", "leaves", "malformed"))


# ------------------------------------------------------------------------------------------------------------- the rest
def test_new_weights_are_told_and_answers_under_way_go_on(idle):
    version = idle.loop.stats()["version"]
    stream = iter(idle.client.chat.completions.create(**LONG | {"n": 1}))
    chunks = [next(stream), next(stream)]
    idle.server.update_weights(OTHERS, version + 5)
    chunks += list(stream)
    told = [run for chunk in chunks for piece in chunk.choices for run in getattr(piece, "policy_versions", [])]
    assert sum(count for _, count in told) == LONG["max_tokens"]
    assert {one for one, _ in told} <= {version, version + 5} and [one for one, _ in told] == sorted(
        one for one, _ in told
    )
    assert chunks[-1].choices[0].finish_reason == "length"
    assert idle.client.models.retrieve("minute").policy_version == version + 5
    after = idle.client.chat.completions.create(**GREEDY).choices[0]
    assert after.policy_versions == [[version + 5, len(after.token_ids)]]


def test_models_health_and_metrics(idle):
    (model,) = idle.client.models.list().data
    assert model.id == "minute" and model.object == "model" and model.max_model_len == CONFIG.text.max_length
    with pytest.raises(openai.NotFoundError):
        idle.client.models.retrieve("other")
    assert json.load(urllib.request.urlopen(f"{idle.url}/health")) == {"status": "ok"}
    names = {"k25_requests_total": {"route": CHAT, "status": "200"}, "k25_tokens_total": {"kind": "drawn"}}
    before = [metric(idle.url, name, **labels) for name, labels in names.items()]
    drawn = len(idle.client.chat.completions.create(**GREEDY).choices[0].token_ids)
    after = [metric(idle.url, name, **labels) for name, labels in names.items()]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, drawn]
    assert metric(idle.url, "k25_engine_pages") == 320 and metric(idle.url, "k25_first_token_seconds_count") > 0


def test_a_server_that_stops_lets_requests_end_and_takes_no_more(loop):
    with contextlib.ExitStack() as stack:
        _, url = stack.enter_context(serving(loop, minute_model(), dataclasses.replace(LIMITS, grace_seconds=300.0)))
        connection = half_a_request(url, len(json.dumps(BODY)))
        stream = iter(client_of(url).chat.completions.create(**LONG | {"n": 1}))
        next(stream)
        closing = threading.Thread(target=stack.pop_all().close)
        closing.start()
    with connection:
        wait_until(lambda: post(url, BODY)[0] == 503)
        connection.sendall(json.dumps(BODY)[1:].encode())
        assert b"200" in connection.recv(1000).split(b"\r\n")[0]
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    closing.join()


def test_what_does_not_end_in_time_ends_with_an_error(loop):
    with serving(loop, minute_model(), dataclasses.replace(LIMITS, grace_seconds=0.0)) as (_, url):
        stream = iter(client_of(url).chat.completions.create(**LONG | {"max_tokens": 350}))
        next(stream)
    with pytest.raises((openai.APIError, openai.APIConnectionError)):
        list(stream)
    assert until_idle(loop)["running"] == 0


def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
    save_params(PARAMS, CONFIG, tmp_path / "minute", "float32")
    flags = ("--port=0", "--slots=1", "--max_image_patches=16", "--max_frame_patches=4", "--pages=64")
    process = runs.start("serve", f"--checkpoint={tmp_path}/minute", "--mode=plain", *flags)
    try:
        first = process.stdout.readline()
        url = re.fullmatch(r"serving minute at (http://127\.0\.0\.1:\d+)/v1\n", first)[1]
        assert process.stdout.readline().startswith(f"curl {url}/v1/chat/completions ")
        answer = client_of(url).chat.completions.create(**GREEDY)
        found = logprobs_of(answer.prompt_token_ids + answer.choices[0].token_ids)
        assert found[len(answer.prompt_token_ids) - 1].argmax() == answer.choices[0].token_ids[0]
        process.terminate()
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in said
    finally:
        process.kill()
