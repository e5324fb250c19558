"""OpenAI's own client with what it and its like send, against the real server on loopback."""

import dataclasses
import json
import logging
import urllib.request

import openai
import pydantic
import pytest

from benchmarks.serving import minute_model, serving
from saying import SayingEngine

HI = [{"role": "user", "content": "hi"}]
HOW = {"model": "minute", "messages": HI}


@pytest.fixture(scope="module")
def world():
    engine = SayingEngine()
    with serving(engine, minute_model()) as (_, url):
        yield engine, url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


class City(pydantic.BaseModel):
    """Where to look."""

    city: str


def call(written, arguments):
    return (
        f"<|tool_calls_section_begin|><|tool_call_begin|>{written}<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    )


def test_the_models_name_may_have_a_slash(world):
    engine, name = world[0], "moonshotai/Kimi-K2.5"
    with serving(engine, dataclasses.replace(minute_model(), name=name)) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert client.models.retrieve(name).id == name == client.models.list().data[0].id
        for path in (name, name.replace("/", "%2F")):
            assert json.load(urllib.request.urlopen(f"{url}/v1/models/{path}"))["id"] == name
        for path in (f"{name}/", f"{name}/x", "moonshotai", "Kimi-K2.5"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{url}/v1/models/{path}")


def test_everything_that_the_client_can_send(world):
    engine, _, client = world
    engine.said = "hello<|im_end|>"
    answer = client.chat.completions.create(
        **HOW, seed=-1, reasoning_effort="none", store=True, metadata={"a": "b"}, user="me", service_tier="auto",
        parallel_tool_calls=True, prompt_cache_key="k", safety_identifier="s", verbosity="medium", n=2,
        max_completion_tokens=20, stream_options=None, modalities=["text"], response_format={"type": "text"},
        logprobs=True, top_logprobs=0, prediction={"type": "content", "content": "hello"},
    )  # fmt: skip
    assert [choice.message.content for choice in answer.choices] == ["hello", "hello"]
    with pytest.raises(openai.BadRequestError, match="verbosity is not supported; leave it out"):
        client.chat.completions.create(**HOW, verbosity="low")


def test_strict_tools_of_the_sdk_are_called_and_noted_once(world, caplog):
    engine, _, client = world
    tool = openai.pydantic_function_tool(City, name="get_weather")
    assert tool["function"]["strict"] is True
    engine.said = "I look." + call("get_weather:0", '{"city": "Paris"}')
    caplog.set_level(logging.WARNING)
    raw = client.chat.completions.with_raw_response.create(**HOW, tools=[tool])
    assert "not constrained" in raw.headers["Warning"]
    message = raw.parse().choices[0].message
    (made,) = message.tool_calls
    assert (made.id, made.function.name, message.content) == ("functions.get_weather:0", "get_weather", "I look.")
    with client.chat.completions.stream(**HOW, tools=[tool]) as stream:
        last = stream.get_final_completion()
    assert last.choices[0].message.tool_calls[0].function.parsed_arguments == City(city="Paris")
    assert last.choices[0].finish_reason == "tool_calls"
    assert sum("not constrained" in record.message for record in caplog.records) <= 1
    again = [*HI, message, {"role": "tool", "tool_call_id": made.id, "content": "sunny"}]
    engine.said = "Sunny.<|im_end|>"
    said = client.chat.completions.create(model="minute", messages=again, tools=[tool]).choices[0].message
    assert said.content == "Sunny."
    assert client.chat.completions.with_raw_response.create(**HOW).headers.get("Warning") is None


def test_stop_texts_and_thinking_over_the_wire(world):
    engine, _, client = world
    engine.said = "STOP here</think>the answer STOP more<|im_end|>"
    for effort in ("low", "medium", "high"):
        chunks = list(
            client.chat.completions.create(
                **HOW, stop="STOP", reasoning_effort=effort, stream=True, stream_options={"include_usage": True}
            )
        )
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == "the answer "
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "STOP here"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == len("STOP here") + 1


def test_a_completion_ends_at_a_special_token_that_is_not_its_own(world):
    engine, _, client = world
    engine.said = "hello[EOS]more<|im_user|>"
    answer = client.completions.create(model="minute", prompt="a", stop=["[EOS]"], max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello", "stop")


def test_an_answer_goes_back_as_it_came(world):
    """Also one that was cut off while it thought, whose content is nothing."""
    engine, _, client = world
    for said in ("only thoughts", "hm</think>yes<|im_end|>"):
        engine.said = said
        message = client.chat.completions.create(**HOW, reasoning_effort="high").choices[0].message
        back = message.model_dump()
        client.chat.completions.create(model="minute", messages=[*HI, message, *HI])
        for turn in (back, back | {"content": back["content"] or None}):
            client.chat.completions.create(model="minute", messages=[*HI, turn, *HI])
