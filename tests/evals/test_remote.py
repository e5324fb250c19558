"""A server as an answerer: a real one on the loopback, with the shapes of the API, and with everything that goes wrong."""

import base64
import http.server
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from answerers import Sums
from k25_jax.cli import main
from k25_jax.config import ConfigError
from k25_jax.evals.core import evaluate
from k25_jax.evals.protocol import AnswererError, Request, Settings
from k25_jax.evals.remote import Server, api_message, read_completion
from k25_jax.evals.summary import summarise
from k25_jax.vision.image import load_image
from k25_jax.vision.video import load_video

SECRET = "sk-very-secret"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers sums; `server.faults[question]` are what happens first, one a try."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        question = int((content if isinstance(content, str) else content[-1]["text"]).split()[0])
        with self.server.lock:
            self.server.seen.append((self.path, self.headers["Authorization"], body))
            self.server.inside += 1
            self.server.most = max(self.server.most, self.server.inside)
            faults = self.server.faults.get(question, [])
            fault = faults.pop(0) if faults else None
        time.sleep(0.02)
        status, answer, headers = 200, completion(str(question + 1)), {}
        if isinstance(fault, int):
            status, answer = fault, json.dumps({"error": {"message": f"status {fault}, key {SECRET}"}}).encode()
            headers = {"Retry-After": "0"}
        elif isinstance(fault, bytes):
            answer = fault
        elif isinstance(fault, tuple):
            status, answer = fault
        elif fault == "slow":
            self.server.over.wait(60)
        with self.server.lock:
            self.server.inside -= 1
        if fault == "hang up":
            return
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(answer), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def completion(text: str | None, finish: str = "stop", usage: dict | None = None) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8} if usage is None else usage
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that has gone is part of the test."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    here = Quiet(("127.0.0.1", 0), Handler)
    here.over = threading.Event()  # the end of the test
    here.lock, here.seen, here.faults, here.inside, here.most = threading.Lock(), [], {}, 0, 0
    thread = threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    here.url = f"http://127.0.0.1:{here.server_port}/v1"
    yield here
    here.over.set()
    here.shutdown()
    here.server_close()
    thread.join()


def asking(server, **more) -> Server:
    return Server(server.url, "tiny", **({"pause": 0.001, "retries": 3, "concurrency": 4} | more))


def test_questions_are_asked_as_the_api_has_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    results = evaluate(asking(server), Sums(12), Settings(k=2, max_tokens=77, seed=5), range(12))
    assert [result.score for result in results] == [1.0] * 24 and {result.tokens for result in results} == {3}
    path, key, body = server.seen[0]
    assert path == "/v1/chat/completions" and key == f"Bearer {SECRET}"
    asked = {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens")}
    assert asked == {"model": "tiny", "temperature": 1.0, "top_p": 0.95, "max_tokens": 77}
    assert len({body["seed"] for *_, body in server.seen}) == 24
    assert 2 <= server.most <= 4


def test_what_fails_on_the_way_is_asked_again_and_counted(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    malformed = [b"<html>", b"[]", b'{"choices": []}', completion("x").replace(b'"x"', b"7")]
    server.faults = {0: [429, 500], 1: ["hang up"], 2: malformed[:2], 3: malformed[2:], 5: [503] * 9}
    file = tmp_path / "sums.jsonl"
    results = evaluate(asking(server), Sums(8), Settings(), range(8), file)
    assert [result.retries for result in results] == [2, 1, 2, 2, 0, 3, 0, 0]
    assert [result.finish for result in results] == ["stop"] * 5 + ["error"] + ["stop"] * 2
    score = summarise(Sums(8), results)
    assert score.score == 1.0 and score.questions == 7 and score.failed == 1 and score.retries == 10
    assert "status 503, key ***" in results[5].error and SECRET not in file.read_text()
    server.faults, server.seen = {}, []
    again = evaluate(asking(server), Sums(8), Settings(), range(8), file)
    assert [result.score for result in again] == [1.0] * 8 and len(server.seen) == 1


def test_an_answer_that_takes_too_long_is_asked_for_again(server):
    server.faults = {0: ["slow"]}
    ((_, answer),) = asking(server, timeout=2, retries=50).answer([Request(Sums().prompt(0, 0), 0, Settings())])
    assert answer.text == "1" and answer.retries >= 1
    server.faults = {0: ["slow"]}
    ((_, answer),) = asking(server, timeout=0.05, retries=0).answer([Request(Sums().prompt(0, 0), 0, Settings())])
    assert answer.finish == "error" and answer.error == "no answer in 0.05 s"


def test_the_key_is_written_nowhere(server, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv("MY_KEY", SECRET)
    server.faults = {0: [500] * 9}
    with caplog.at_level("DEBUG", logger="k25_jax"):
        evaluate(asking(server, key_variable="MY_KEY"), Sums(1), Settings(), [0], tmp_path / "sums.jsonl")
    assert server.seen[0][1] == f"Bearer {SECRET}"
    assert SECRET not in (tmp_path / "sums.jsonl").read_text() + caplog.text + "".join(capsys.readouterr())
    server.faults = {0: [401]}
    with pytest.raises(AnswererError, match=r"(?s)status 401, key \*\*\*.*set the environment variable MY_KEY"):
        evaluate(asking(server, key_variable="MY_KEY"), Sums(1), Settings(), [0])


def test_a_refusal_ends_the_evaluation_and_a_long_prompt_does_not(server):
    too_long = json.dumps({"error": {"message": "This model's maximum context length is 10 tokens"}}).encode()
    server.faults = {0: [(400, too_long)]}
    (result,) = evaluate(asking(server), Sums(1), Settings(), [0])
    assert (result.finish, result.score, result.retries) == ("overflow", 0.0, 0)
    server.faults = {0: [404]}
    with pytest.raises(AnswererError, match="the model 'tiny' refuses"):
        evaluate(asking(server), Sums(1), Settings(), [0])


def test_a_dead_server_is_given_up(server):
    server.faults = {question: [502] * 99 for question in range(100)}
    with pytest.raises(AnswererError, match="16 requests in a row had no answer.*502"):
        evaluate(asking(server, retries=0), Sums(100), Settings(), range(100))
    assert len(server.seen) < 30
    gone = Server("http://127.0.0.1:9/v1", "tiny", retries=0, pause=0.001, concurrency=16)
    with pytest.raises(AnswererError, match="in a row"):
        evaluate(gone, Sums(100), Settings(), range(100))


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (completion("<think>no</think>7"), ("7", 3, "stop")),
        (completion("<think>on and on", "length"), ("", 3, "length")),
        (completion(None, "tool_calls"), ("", 3, "tool_calls")),
        (completion("7", usage={}), ("7", None, "stop")),
        (completion("7", usage={"prompt_tokens": 90, "completion_tokens": 11}), ("7", 11, "overflow")),
    ],
)
def test_completions(body, wanted):
    answer = read_completion(body, context=100)
    assert (answer.text, answer.tokens, answer.finish) == wanted


def test_media_travel_without_loss(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (9, 7, 3)).astype(np.uint8)
    frames = generator.integers(0, 256, (3, 9, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    parts = [pixels, (tmp_path / "a.png").read_bytes(), tmp_path / "a.png"]
    message = {"role": "user", "content": [*({"image": part} for part in parts), {"video": frames}, {"text": "?"}]}
    *images, video, text = api_message(message)["content"]
    for image in images:
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64" and image["type"] == "image_url"
        assert (load_image(base64.b64decode(data)) == pixels).all()
    head, _, data = video["video_url"]["url"].partition(",")
    back, times = load_video(base64.b64decode(data), fps=2.0)
    assert head == "data:video/mp4;base64" and times == [0.0, 0.5, 1.0]
    assert all((frame[:9, :8] == wanted).all() for frame, wanted in zip(back, frames, strict=True))
    assert text == {"type": "text", "text": "?"}
    for bad in (b"what is this", tmp_path / "none.png"):
        with pytest.raises(ConfigError, match=r"content\[0\].image"):
            api_message({"role": "user", "content": [{"image": bad}]})


def test_urls_and_limits_are_checked():
    for url in ("ftp://a/v1", "localhost:8000", "http://name:password@a/v1", "http://a/v1?key=1"):
        with pytest.raises(ConfigError, match="--url") as caught:
            Server(url, "tiny")
        assert "password" not in str(caught.value).replace("a password or a query", "")
    for more in ({"model": ""}, {"concurrency": 0}, {"timeout": 0}, {"retries": -1}):
        with pytest.raises(ConfigError):
            Server(**({"url": "http://a/v1", "model": "tiny"} | more))


def test_the_command_asks_a_server(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", SECRET)
    rows = [
        {"question": f"{i} and one?", "options": "[]", "answer": str(i + 1 + (i == 3)), "id": str(i)} for i in range(4)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", f"--url={server.url}", "--model=tiny", "--api_key_env=MY_KEY", "--task=mmmu", "--json", "--k=2",
               f"--data={tmp_path / 'm.jsonl'}", f"--workdir={tmp_path / 'out'}"]  # fmt: skip
    assert main(command) == 0
    (score,) = json.loads(capsys.readouterr().out)
    assert (score["score"], score["questions"], score["k"], score["tokens"]) == (0.75, 4, 2, 3.0)
    assert {body["max_tokens"] for *_, body in server.seen} == {65536} and len(server.seen) == 8
    assert {key for _, key, _ in server.seen} == {f"Bearer {SECRET}"}
    assert main(command) == 0 and len(server.seen) == 8
    assert all(SECRET not in path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())
    assert main([*command[:2], "--model=other", *command[3:]]) == 2
    assert "answerer.model was 'tiny' and is now 'other'" in capsys.readouterr().err
    server.faults = {0: [404]}
    assert main([*command[:-1], f"--workdir={tmp_path / 'new'}"]) == 2
    assert "the model 'tiny' refuses" in capsys.readouterr().err


def test_requests_are_read_as_they_are_needed(server):
    read = []
    requests = (read.append(i) or Request(Sums(99).prompt(i, 0), i, Settings()) for i in range(99))
    stream = asking(server).answer(requests)
    next(stream)
    assert len(read) <= 5
    stream.close()
