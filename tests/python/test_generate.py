# SPDX-License-Identifier: Apache-2.0
"""Answers: tokens, text, events, log-probabilities, what ends them, what is refused."""

import gc
import json
import math
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4
from dsv4 import generate as module
from dsv4 import nano

EOS = "<｜end▁of▁sentence｜>"


def one(answer: Any) -> dsv4.Completion:
    assert isinstance(answer, dsv4.Completion)
    return answer


def many(answer: Any) -> list[dsv4.Completion]:
    assert isinstance(answer, list)
    return answer


def forced(model: dsv4.Model, text: str) -> list[int]:
    """The tokens of an answer that a test dictates, markers included."""
    assert model.tokenizer is not None
    return model.tokenizer.encode(text, special=True)


# ---- tokens ----

def test_seed_gives_the_same_again(model: dsv4.Model) -> None:
    a = one(model.generate("ROMEO:", max_new_tokens=12))
    b = one(model.generate("ROMEO:", max_new_tokens=12, seed=a.seed))
    c = one(model.generate("ROMEO:", max_new_tokens=12, seed=a.seed ^ 1))
    assert a.tokens == b.tokens != c.tokens
    assert str(a) == a.text == b.text and model.tokenizer is not None
    assert a.text == model.tokenizer.decode(a.tokens)
    assert a.finish_reason == "length" and a.index == 0
    prompt = len(model.ids("ROMEO:"))
    assert a.usage == dict(prompt_tokens=prompt, completion_tokens=12, total_tokens=prompt + 12)
    assert a.timings["prompt_s"] > 0 and a.timings["tokens_per_s"] > 0


def test_greedy_is_the_argmax(flash: dsv4.Model) -> None:
    ids = [0, 9, 9, 4]
    tokens = one(flash.generate(ids, max_new_tokens=4, temperature=0)).tokens
    session, wanted = flash.session(), []
    for _ in range(4):
        ids = [int(np.argmax(session.append(ids)))]
        wanted += ids
    assert tokens == wanted


def test_a_list_is_answered_in_order_and_like_each_alone(flash: dsv4.Model) -> None:
    prompts = [[0, 1, 2], np.array([0, 7]), list(range(30)), (0, 3)]
    options: dict[str, Any] = dict(max_new_tokens=5, seed=3)
    together = many(flash.generate(prompts, **options))
    assert [a.index for a in together] == [0, 1, 2, 3]
    for prompt, answer in zip(prompts, together, strict=True):
        assert one(flash.generate(prompt, **options)).tokens == answer.tokens


def test_n_answers_differ_and_the_first_is_the_only_one(flash: dsv4.Model) -> None:
    options: dict[str, Any] = dict(max_new_tokens=5, seed=3)
    answers = many(flash.generate([0, 1, 2], n=3, **options))
    assert len({tuple(a.tokens) for a in answers}) == 3
    assert answers[0].tokens == one(flash.generate([0, 1, 2], **options)).tokens
    both = many(flash.generate([[0, 1, 2], [0, 5]], n=2, **options))
    assert [a.tokens for a in both[:2]] == [a.tokens for a in answers[:2]]
    assert len(both) == 4


def test_more_prompts_than_places(flash: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[0, i] for i in range(7)]
    wanted = [a.tokens for a in many(flash.generate(prompts, max_new_tokens=3, seed=1))]
    monkeypatch.setattr(module, "MAX_LIVE", 3)
    assert [a.tokens for a in many(flash.generate(prompts, max_new_tokens=3, seed=1))] == wanted


def test_a_list_of_one_is_a_list(model: dsv4.Model) -> None:
    assert len(many(model.generate(["ROMEO:"], max_new_tokens=1))) == 1


def test_sampling_object(model: dsv4.Model) -> None:
    sampling = dsv4.Sampling(max_new_tokens=3, seed=5, eos_token_ids=1, temperature=0.8)
    a = one(model.generate("ROMEO:", sampling=sampling))
    b = one(model.generate("ROMEO:", max_new_tokens=3, seed=5, temperature=0.8))
    assert a.tokens == b.tokens
    with pytest.raises(TypeError, match="sampling"):
        model.generate("ROMEO:", sampling=sampling, top_p=0.5)


def test_defaults_come_from_generation_config(model: dsv4.Model) -> None:
    temperature = model.generation_config["temperature"]
    a = one(model.generate("ROMEO:", max_new_tokens=8, seed=1))
    b = one(model.generate("ROMEO:", max_new_tokens=8, seed=1, temperature=temperature))
    assert a.tokens == b.tokens and temperature != 1.0
    assert model.generation_config["eos_token_id"] == model.config.eos_token_id


def test_penalties_count_the_prompt_and_the_session(flash: dsv4.Model) -> None:
    options: dict[str, Any] = dict(max_new_tokens=1, temperature=0, repetition_penalty=4.0)
    start = [0, 1, 2]
    for _ in range(6):
        start.append(int(np.argmax(flash.session().append(start))))
    checked = 0
    for last in range(5, 60):
        row = flash.session().append([*start, last])[0]
        best = int(np.argmax(row))
        seen = sorted({*start, last})
        row[seen] = np.where(row[seen] > 0, row[seen] / 4, row[seen] * 4)
        if best not in start or best == int(np.argmax(row)):
            continue
        wanted = [int(np.argmax(row))]
        assert one(flash.generate([*start, last], **options)).tokens == wanted
        session = flash.session()
        session.append(start, logits="none")
        assert one(flash.generate([last], session=session, **options)).tokens == wanted
        checked += 1
    assert checked


# ---- what ends an answer ----

def test_stop_ids_and_end_of_sentence(model: dsv4.Model) -> None:
    tokens = [*forced(model, "good night"), 1]
    answer = one(model.generate("a", force_tokens=tokens))
    assert answer.finish_reason == "stop" and answer.text == "good night"
    assert answer.tokens == tokens
    answer = one(model.generate("a", force_tokens=tokens, ignore_eos=True, max_new_tokens=12))
    assert answer.finish_reason == "length" and len(answer.tokens) == 12
    answer = one(model.generate("a", force_tokens=tokens[:2], stop_token_ids=[tokens[1]]))
    assert answer.finish_reason == "stop" and answer.tokens == tokens[:2]


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_stop_strings_at_any_split(model: dsv4.Model, length: int) -> None:
    options: dict[str, Any] = dict(max_new_tokens=14, seed=4)
    whole = one(model.generate("ROMEO:", **options)).text
    for start in range(1, len(whole) - length, 6):
        stop = whole[start : start + length]
        events = list(model.stream("ROMEO:", stop=[stop, "never so"], **options))
        assert "".join(e.text for e in events) == whole[: whole.index(stop)]


def test_stop_string_ends_early_and_says_so(model: dsv4.Model) -> None:
    answer = one(model.generate(
        "a", force_tokens=forced(model, "one two three four five six"), stop="three",
        max_new_tokens=100))
    assert answer.text == "one two " and answer.finish_reason == "stop"
    assert len(answer.tokens) < 20


def test_min_new_tokens(model: dsv4.Model) -> None:
    bias = {1: 1e9}
    early = one(model.generate("a", logit_bias=bias, max_new_tokens=9))
    assert early.finish_reason == "stop" and early.text == ""
    late = one(model.generate("a", logit_bias=bias, min_new_tokens=5, max_new_tokens=9))
    assert len(late.tokens) == 6 and late.finish_reason == "stop"
    text = forced(model, "aaaa bbbb cccc dddd eeee")
    answer = one(model.generate("a", force_tokens=text, stop=["a", "e"], min_new_tokens=5,
                                max_new_tokens=len(text)))
    assert answer.text.startswith("aaaa") and answer.finish_reason == "stop"


def test_the_context_ends_it(tmp_path: Path) -> None:
    seed, changes = nano.CHECKPOINTS["nano-odd"]
    folder = nano.make("short", seed, tmp_path, **{**changes, "max_position_embeddings": 40})
    with dsv4.load(folder, threads=1) as short:
        answer = one(short.generate([5] * 37, ignore_eos=True))
        assert len(answer.tokens) == 3 and answer.finish_reason == "length"
        answer = one(short.generate([5] * 38, max_new_tokens=50, min_new_tokens=40))
        assert len(answer.tokens) == 2
        assert len(one(short.generate([5] * 39)).tokens) == 1
        with pytest.raises(ValueError, match="prompt: got 40 tokens at position 0, wanted at most"):
            short.generate([5] * 40)
        session = short.session()
        session.append([5] * 30)
        with pytest.raises(ValueError, match="got 10 tokens at position 30, wanted at most 9"):
            short.generate([5] * 10, session=session)


# ---- log-probabilities ----

def test_logprobs(flash: dsv4.Model) -> None:
    ids = [0, *range(5, 150)]  # more than one piece of prompt
    answer = one(flash.generate(ids, max_new_tokens=3, seed=2, logprobs=3, prompt_logprobs=2))
    assert answer.logprobs is not None and answer.prompt_logprobs is not None
    rows = flash.session().append([*ids, *answer.tokens], logits="all").astype(np.float64)
    rows -= np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) + rows.max(
        1, keepdims=True)
    assert answer.prompt_logprobs[0] is None
    told = [*answer.prompt_logprobs[1:], *answer.logprobs]
    assert len(told) == len(ids) - 1 + 3
    for i, entry in enumerate(told):
        assert entry is not None
        assert entry.token == [*ids, *answer.tokens][i + 1]
        # the sampler sums weights as integers of 2^-42 and takes an f32 logarithm: errors of a few
        # units in the last place of values below 32
        assert entry.logprob == pytest.approx(rows[i, entry.token], abs=1e-5)
        best = [t for t, _ in entry.top]
        assert best == np.argsort(-rows[i], kind="stable")[: len(best)].tolist()
        assert len(best) == (2 if i < len(ids) - 1 else 3)
    assert one(flash.generate(ids, max_new_tokens=3, seed=2)).logprobs is None
    single = one(flash.generate([0], max_new_tokens=1, prompt_logprobs=0))
    assert single.prompt_logprobs == [None]


def test_events_carry_logprobs(model: dsv4.Model) -> None:
    stream = model.stream("ROMEO:", max_new_tokens=10, seed=1, logprobs=0)
    events = list(stream)
    answer = stream.completions[0]
    told = [entry for e in events for entry in e.logprobs or ()]
    assert told == answer.logprobs and [e.token for e in told] == answer.tokens
    assert json.loads(json.dumps(answer.as_dict()))["logprobs"][0]["token"] == answer.tokens[0]


# ---- logits processor ----

def test_logits_processor(flash: dsv4.Model) -> None:
    options: dict[str, Any] = dict(max_new_tokens=5, seed=3)
    plain = one(flash.generate([0, 4, 5], logprobs=1, **options))
    seen: list[list[int]] = []

    def look(logits: Any, tokens: Any) -> None:
        assert logits.shape == (512,) and logits.dtype == np.float32
        seen.append(tokens.tolist())

    same = one(flash.generate([0, 4, 5], logits_processor=look, logprobs=1, **options))
    assert same.tokens == plain.tokens and same.logprobs == plain.logprobs
    assert seen == [[0, 4, 5, *plain.tokens[:i]] for i in range(5)]

    def only(logits: Any, tokens: Any) -> Any:
        edited = np.full_like(logits, -math.inf, dtype=np.float64)
        edited[len(tokens)] = 1.0
        return edited

    answers = many(flash.generate([[0, 4], [0, 4, 5]], logits_processor=only, prompt_logprobs=0,
                                  **options))
    assert [a.tokens for a in answers] == [[2, 3, 4, 5, 6], [3, 4, 5, 6, 7]]


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros(512, int), "text", 1.0])
def test_logits_processor_must_return_logits(flash: dsv4.Model, bad: Any) -> None:
    with pytest.raises(ValueError, match="logits_processor: returned"):
        flash.generate([0], max_new_tokens=2, logits_processor=lambda logits, tokens: bad)


def test_logits_processor_may_raise(flash: dsv4.Model) -> None:
    def broken(logits: Any, tokens: Any) -> None:
        raise ZeroDivisionError

    session = flash.session()
    with pytest.raises(ZeroDivisionError):
        flash.generate([0, 1], max_new_tokens=2, logits_processor=broken, session=session)
    assert session.position == 2
    session.append([3])


# ---- text ----

def test_events_add_up(model: dsv4.Model) -> None:
    stream = model.stream(["ROMEO:", "JULIET:"], max_new_tokens=15, seed=7)
    assert isinstance(stream, Generator)
    text, tokens = ["", ""], [[], []]  # type: ignore[var-annotated]
    for event in stream:
        assert event.kind == "text" and event.tokens
        text[event.index] += event.text
        tokens[event.index] += event.tokens
    assert text == [a.text for a in stream.completions]
    assert tokens == [a.tokens for a in stream.completions]


def test_half_characters_are_never_shown(model: dsv4.Model) -> None:
    text = "naïve 🙂 café 你好 end"
    tokens = forced(model, text)
    events = list(model.stream("a", force_tokens=tokens, max_new_tokens=len(tokens)))
    assert "".join(e.text for e in events) == text
    assert not any("\ufffd" in e.text for e in events)
    assert len(events) < len(tokens)  # some tokens are part of a character


def test_messages_reasoning_and_markers(model: dsv4.Model) -> None:
    messages = [{"role": "user", "content": "Is it so?"}]
    tokens = forced(model, f"Let me think.</think>It is <so>.{EOS}")
    stream = model.stream(messages, thinking_mode="thinking", force_tokens=tokens)
    events = list(stream)
    answer = stream.completions[0]
    assert answer.reasoning == "Let me think." and answer.text == "It is <so>."
    assert {e.kind for e in events} == {"text", "reasoning"}
    for kind, wanted in (("reasoning", answer.reasoning), ("text", answer.text)):
        assert "".join(e.text for e in events if e.kind == kind) == wanted
    assert answer.tokens == tokens == [t for e in events for t in e.tokens]
    prompt = dsv4.encode_messages(messages, thinking_mode="thinking")
    assert answer.usage["prompt_tokens"] == len(model.ids(prompt, bos=False, special=True))
    # a stop string ends the text, not the reasoning
    answer = one(model.generate(messages, thinking_mode="thinking", force_tokens=tokens, stop="is"))
    assert answer.reasoning == "Let me think." and answer.text == "It "


def test_tool_calls(model: dsv4.Model) -> None:
    call = ("<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"add\">\n"
            "<｜DSML｜parameter name=\"a\" string=\"false\">2</｜DSML｜parameter>\n"
            "</｜DSML｜invoke>\n</｜DSML｜tool_calls>")
    tokens = forced(model, f"Adding.\n\n{call}{EOS}")
    stream = model.stream([{"role": "user", "content": "2+2"}], force_tokens=tokens, stop="#")
    events = list(stream)
    answer = stream.completions[0]
    assert answer.text.rstrip() == "Adding." and len(answer.tool_calls) == 1
    function = answer.tool_calls[0]["function"]
    assert function["name"] == "add" and json.loads(function["arguments"]) == {"a": 2}
    assert [e.tool_call for e in events if e.kind == "tool_call"] == answer.tool_calls
    assert not any("DSML" in e.text for e in events)


def test_text_held_back_comes_before_a_tool_call(model: dsv4.Model) -> None:
    call = ("\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n\n"
            "</｜DSML｜invoke>\n</｜DSML｜tool_calls>")
    events = list(model.stream([{"role": "user", "content": "x"}], stop="#!",
                               force_tokens=forced(model, f"Wait#{call}{EOS}")))
    shown = "".join("[call]" if e.kind == "tool_call" else e.text for e in events)
    assert shown == "Wait#[call]"


def test_special_tokens_in_raw_answers_are_not_shown(model: dsv4.Model) -> None:
    tokens = forced(model, f"one{EOS}two")
    answer = one(model.generate("a", force_tokens=tokens, max_new_tokens=len(tokens),
                                ignore_eos=True))
    assert answer.tokens == tokens and answer.text == "onetwo"


def test_messages_continue_a_session_without_another_bos(model: dsv4.Model) -> None:
    session = model.session()
    messages = [{"role": "user", "content": "x"}]
    for _ in range(2):
        model.generate(messages, max_new_tokens=1, session=session)
    assert session.tokens.tolist().count(model.config.bos_token_id) == 1


def test_several_conversations(model: dsv4.Model) -> None:
    talks = [[{"role": "user", "content": text}] for text in ("a", "b")]
    answers = many(model.generate(talks, max_new_tokens=3, seed=1))
    assert answers[1].tokens == one(model.generate(talks[1], max_new_tokens=3, seed=1)).tokens


def test_without_a_tokenizer(flash: dsv4.Model) -> None:
    events = list(flash.stream([0, 1], max_new_tokens=4, seed=1))
    assert [len(e.tokens) for e in events] == [1] * 4 and not any(e.text for e in events)
    for arguments in (dict(stop="x"), dict(prompt="text"),
                      dict(prompt=[{"role": "user", "content": "x"}])):
        with pytest.raises(ValueError, match="no tokenizer.json"):
            flash.generate(**{"prompt": [0], **arguments})  # type: ignore[arg-type]


# ---- streams ----

def test_closing_a_stream_cancels(model: dsv4.Model) -> None:
    stream = model.stream("ROMEO:", max_new_tokens=500)
    next(stream)
    stream.close()
    stream.close()
    assert repr(stream._answers[0].session) == "<dsv4.Session, closed>"
    answer = stream.completions[0]
    assert answer.finish_reason == "cancelled" and 0 < len(answer.tokens) < 500
    with pytest.raises(StopIteration):
        next(stream)
    with model.stream("ROMEO:", max_new_tokens=500) as stream:
        for _ in stream:
            break
    assert stream.completions[0].finish_reason == "cancelled"
    unread = model.stream("ROMEO:", max_new_tokens=500)
    assert unread.completions[0].tokens == []


def test_a_dropped_stream_frees_its_sessions(model: dsv4.Model) -> None:
    stream = model.stream("ROMEO:", max_new_tokens=500)
    next(stream)
    session = weakref.ref(stream._answers[0].session)
    assert session() is not None
    del stream
    gc.collect()
    assert session() is None


def test_continuing_a_session(model: dsv4.Model) -> None:
    options: dict[str, Any] = dict(seed=6, temperature=0.5)
    session = model.session()
    first = one(model.generate("ROMEO: I", max_new_tokens=6, session=session, **options))
    tokens = [*model.ids("ROMEO: I").tolist(), *first.tokens]
    assert session.tokens.tolist() == tokens[:-1]
    more = [first.tokens[-1], 9, 10]
    second = one(model.generate(more, max_new_tokens=5, session=session, **options))
    fresh = one(model.generate([*tokens[:-1], *more], max_new_tokens=5, **options))
    assert second.tokens == fresh.tokens
    text = one(model.generate("and", max_new_tokens=1, session=session))
    assert text.usage["prompt_tokens"] == len(model.ids("and", bos=False))


def test_session_arguments(model: dsv4.Model, flash: dsv4.Model) -> None:
    with pytest.raises(ValueError, match="session: got one of another model"):
        model.generate("a", session=flash.session())
    for arguments in (dict(prompt=["a", "b"]), dict(prompt="a", n=2)):
        with pytest.raises(ValueError, match="one session for several"):
            model.generate(**arguments, session=model.session())  # type: ignore[arg-type]


# ---- what is refused, before any work ----

@pytest.mark.parametrize(("arguments", "error", "says"), [
    (dict(temperature=-1), ValueError, "temperature: got -1"),
    (dict(temperature=math.nan), ValueError, "temperature: got nan"),
    (dict(top_p=2), ValueError, "top_p: got 2"), (dict(n=10**9), ValueError, "n: got 1000000000"),
    (dict(seed=2**128), ValueError, "seed"), (dict(max_new_tokens=0), ValueError, "max_new_tokens"),
    (dict(tmperature=1), TypeError, "did you mean 'temperature'"),
    (dict(max_tokens=1, max_new_tokens=1), TypeError, "two names for one thing"),
    (dict(stop_token_ids=[10**6]), ValueError, "stop_token_ids: got 1000000"),
    (dict(logit_bias={10**6: 1.0}), ValueError, "logit_bias: got 1000000"),
    (dict(logprobs=10**5), ValueError, "logprobs: got 100000"),
    (dict(json_schema={}), NotImplementedError, "json_schema"),
    (dict(regex="a"), NotImplementedError, "regex"),
    (dict(choices=["a"]), NotImplementedError, "choices"),
    (dict(thinking_budget=5), NotImplementedError, "thinking_budget"),
    (dict(thinking_mode="loud"), ValueError, "thinking_mode: got 'loud'"),
    (dict(prompt=""), ValueError, "prompt: got an empty string"),
    (dict(prompt=[]), ValueError, "prompt: got no tokens"),
    (dict(prompt=["a", ""]), ValueError, r"prompt\[1\]: got an empty string"),
    (dict(prompt=[[0], [10**6]]), ValueError, r"prompt\[1\]\[0\]: got 1000000"),
    (dict(prompt=None), TypeError, "prompt: got NoneType"),
    (dict(prompt=[{"role": "nobody", "content": "x"}]), dsv4.EncodingError, "nobody"),
    (dict(prompt=[{"role": "user", "content": "x"}], thinking_mode="thinking",
          reasoning_effort="huge"), ValueError, "huge"),
    (dict(prompt="\ud800"), ValueError, "surrogate"),
])
def test_refused(
    model: dsv4.Model, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any],
    error: type[Exception], says: str,
) -> None:
    monkeypatch.setattr(dsv4.Model, "session", None)  # no work begins
    with pytest.raises(error, match=says):
        model.stream(**{"prompt": "a", **arguments})
    with pytest.raises(error, match=says):
        model.generate(**{"prompt": "a", **arguments})
