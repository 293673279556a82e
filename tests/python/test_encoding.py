# SPDX-License-Identifier: Apache-2.0
"""Messages to prompt text, and completions back to messages, against the official encoder."""

import copy
import doctest
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4 import completion, encoding
from dsv4.encoding import encode_messages, parse_completion
from dsv4.errors import EncodingError

FOLDER = Path(__file__).resolve().parents[1] / "vectors" / "encoding"
B, E = completion.BOS, completion.EOS
U, A = encoding.USER, encoding.ASSISTANT
T, T_END = completion.THINK_START, completion.THINK_END
D = completion.DSML


def rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# --- text in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size", "digest"),
    [
        (encoding.TOOLS_TEMPLATE.replace("{tool_schemas}", ""), 989, "c7d3159308f7d076"),
        (encoding.RESPONSE_FORMAT_TEMPLATE, 88, "012f31fcc1338bdf"),
        (encoding.EFFORT_ABSOLUTE, 476, "f7a24f3b3050d4a8"),
        (encoding.EFFORT_BEYOND, 528, "53fb31b8392ec5b4"),
    ],
)
def test_fixed_texts(text: str, size: int, digest: str) -> None:
    data = text.encode()
    assert (len(data), hashlib.sha256(data).hexdigest()[:16]) == (size, digest)


def test_fixed_texts_equal_the_official_constants() -> None:
    official = json.loads((FOLDER / "constants.json").read_text("utf-8"))
    tools = official["TOOLS_TEMPLATE"]
    for name, value in {
        "dsml_token": D, "thinking_start_token": T, "thinking_end_token": T_END,
    }.items():
        tools = tools.replace(f"{{{name}}}", value)
    assert tools == encoding.TOOLS_TEMPLATE
    assert official["response_format_template"] == encoding.RESPONSE_FORMAT_TEMPLATE
    assert official["effort_max_july"] == encoding.EFFORTS["v4"]["max"]
    assert official["effort_max_0731"] == encoding.EFFORTS["0731"]["max"]
    assert official["effort_high_0731"] == encoding.EFFORTS["0731"]["high"]


@pytest.mark.parametrize(
    ("number", "mode", "digest"),
    [(1, "thinking", "9b366d9d"), (2, "thinking", "ca66b01a"), (3, "thinking", "b3b1cd87"),
     (4, "chat", "60e16438")],
)
def test_golden_pairs(number: int, mode: Any, digest: str) -> None:
    messages = json.loads((FOLDER / f"test_input_{number}.json").read_text("utf-8"))
    if isinstance(messages, dict):
        tools, messages = messages["tools"], messages["messages"]
        messages[0]["tools"] = tools
    wanted = (FOLDER / f"test_output_{number}.txt").read_bytes()
    assert hashlib.sha256(wanted).hexdigest().startswith(digest)
    assert encode_messages(messages, mode).encode() == wanted


@pytest.mark.parametrize(("name", "count"), [("render", 300), ("render_edges", 240)])
def test_rendered_rows(name: str, count: int) -> None:
    cases = rows(name)
    assert len(cases) == count
    for case in cases:
        wanted = case.pop("text")
        before = copy.deepcopy(case["messages"])
        assert encode_messages(**case) == wanted, case
        assert repr(case["messages"]) == repr(before), "the messages were changed"


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def test_examples_of_the_specification() -> None:
    talk = [{"role": "system", "content": "S"}, user("a"),
            assistant("b", reasoning_content="r"), user("c")]
    assert encode_messages([user("hi")]) == f"{B}{U}hi{A}{T_END}"
    assert encode_messages([user("hi")], "thinking") == f"{B}{U}hi{A}{T}"
    assert encode_messages(talk, "thinking") == f"{B}S{U}a{A}{T_END}b{E}{U}c{A}{T}"
    assert (encode_messages(talk, "thinking", drop_thinking=False)
            == f"{B}S{U}a{A}{T}r{T_END}b{E}{U}c{A}{T}")
    assert encode_messages([user("a"), user("b")]) == f"{B}{U}a\n\nb{A}{T_END}"
    reminder = {"role": "latest_reminder", "content": "L"}
    assert (encode_messages([user("a"), reminder, user("b")])
            == f"{B}{U}a{A}{T_END}<｜latest_reminder｜>L{U}b{A}{T_END}")
    assert encode_messages([user("a", task="query")]) == f"{B}{U}a<｜query｜>"
    after_task = encode_messages([user("a", task="query"), user("b")])
    assert after_task == f"{B}{U}a{U}b{A}{T_END}", "not merged"
    titled = encode_messages([user("a"), assistant("b", task="title")])
    assert titled.endswith(f"b{E}<｜title｜>")
    assert encode_messages([user("a")], add_default_bos_token=False) == f"{U}a{A}{T_END}"


def test_content_as_a_list_of_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode_messages([user(parts)]) == encode_messages([user("a\n\nb")])  # type: ignore[arg-type]


def test_arguments_as_a_dict_are_those_of_their_json() -> None:
    def call(arguments: object) -> list[dict[str, Any]]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        return [user("u"), assistant("", tool_calls=calls)]

    fields = {"a": 1, "b": "é"}
    assert encode_messages(call(fields)) == encode_messages(call(json.dumps(fields)))


@pytest.mark.parametrize(
    ("version", "effort", "prefix"),
    [("v4", None, ""), ("v4", "high", ""), ("v4", "max", encoding.EFFORT_ABSOLUTE),
     ("0731", None, ""), ("0731", "low", ""), ("0731", "high", encoding.EFFORT_ABSOLUTE),
     ("0731", "max", encoding.EFFORT_BEYOND)],
)
def test_effort_of_both_versions(version: Any, effort: str | None, prefix: str) -> None:
    messages = [user("hi")]
    kwargs: dict[str, Any] = {"reasoning_effort": effort, "version": version}
    assert encode_messages(messages, "thinking", **kwargs) == f"{B}{prefix}{U}hi{A}{T}"
    assert encode_messages(messages, "chat", **kwargs) == f"{B}{U}hi{A}{T_END}"


def test_0731_differs_in_the_effort_alone() -> None:
    for case in rows("render"):
        wanted = case.pop("text")
        if case.pop("reasoning_effort") != "max":
            assert encode_messages(**case, version="0731") == wanted


def with_call(**function: object) -> list[dict[str, Any]]:
    return [user("u"), assistant("", tool_calls=[{"type": "function", "function": function}])]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages: got an empty list"),
        ([user("a"), "b"], r"messages\[1\]: got str"),
        ([{"content": "a"}], r"messages\[0\].role: got None"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\].role"),
        ([user("a"), {"role": "direct_search_results", "content": "a"}], r"messages\[1\].role"),
        ([user(None)], r"messages\[0\].content: got NoneType"),  # type: ignore[arg-type]
        ([user(5)], r"messages\[0\].content: got int"),  # type: ignore[arg-type]
        ([user([{"type": "image"}])], r"messages\[0\].content\[0\]: got a part of type 'image'"),  # type: ignore[arg-type]
        ([{"role": "user", "content_blocks": [{}]}], r"messages\[0\].content: got content_blocks"),
        ([{"role": "developer", "content": ""}], r"messages\[0\].content: got nothing"),
        ([{"role": "tool", "content": {"a": 1}}], r"messages\[0\].content: got dict"),
        ([{"role": "tool", "content": "a", "tool_call_id": 1}], r"messages\[0\].tool_call_id"),
        ([user("a", task="extracted_url")], r"messages\[0\].task: got 'extracted_url'"),
        ([user("a", task=[])], r"messages\[0\].task"),
        ([user("a"), assistant("b", reasoning_content=1)], r"messages\[1\].reasoning_content"),
        ([{"role": "system", "content": "", "tools": {}}], r"messages\[0\].tools: got dict"),
        ([{"role": "system", "tools": [{"name": "f"}]}], r"messages\[0\].tools\[0\]"),
        ([{"role": "system", "content": "", "response_format": {1: {2}}}],
         r"messages\[0\].response_format: cannot be written as JSON"),
        ([user("a"), assistant("", tool_calls={"a": 1})], r"messages\[1\].tool_calls: got dict"),
        ([user("a"), assistant("", tool_calls=["f"])], r"messages\[1\].tool_calls\[0\]"),
        (with_call(arguments="{}"), r"messages\[1\].tool_calls\[0\].function.name: got NoneType"),
        (with_call(name="f"), r"messages\[1\].tool_calls\[0\].function.arguments: got NoneType"),
        (with_call(name="f", arguments="[1]"), r"function.arguments: got JSON of a list"),
        (with_call(name="f", arguments={"a": {1}}), r"function.arguments: cannot be written"),
    ],
)
def test_bad_messages_name_index_and_field(messages: list[Any], words: str) -> None:
    with pytest.raises(EncodingError, match=words):
        encode_messages(messages)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"thinking_mode": "think"}, "thinking_mode: got 'think'"),
        ({"thinking_mode": []}, "thinking_mode"),
        ({"reasoning_effort": "low"}, "reasoning_effort: got 'low', version 'v4' knows"),
        ({"reasoning_effort": ["max"]}, "reasoning_effort"),
        ({"version": "v4.1"}, "version: got 'v4.1'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode_messages([user("a")], **kwargs)
    with pytest.raises(TypeError, match="messages: got str"):
        encode_messages("hi")  # type: ignore[arg-type]


# --- text out -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count", "refused"), [("parse", 200, 18),
                                                        ("parse_edges", 300, 150)])
def test_parsed_rows(name: str, count: int, refused: int) -> None:
    cases = rows(name)
    assert len(cases) == count
    assert sum(case["error"] is not None for case in cases) == refused
    for case in cases:
        text, mode = case["completion"], case["thinking_mode"]
        if case["error"] is None:
            assert parse_completion(text, mode) == case["message"], text
        else:
            with pytest.raises(EncodingError, match="^completion"):
                parse_completion(text, mode)


def arguments_are_json(message: dict[str, Any]) -> bool:
    try:
        for call in message["tool_calls"]:
            json.loads(call["function"]["arguments"])
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", ["parse", "parse_edges"])
def test_lenient_equals_strict_on_well_formed_text(name: str) -> None:
    seen = 0
    for case in rows(name):
        lenient = parse_completion(case["completion"], case["thinking_mode"], strict=False)
        assert arguments_are_json(lenient)
        if case["error"] is None and arguments_are_json(case["message"]):
            assert lenient == case["message"], case
            seen += 1
    assert seen >= 100


def invoke(name: str, *parameters: str) -> str:
    return "\n".join([f'<{D}invoke name="{name}">', *(parameters or [""]), f"</{D}invoke>"])


def parameter(key: str, value: str, is_string: str = "true") -> str:
    return f'<{D}parameter name="{key}" string="{is_string}">{value}</{D}parameter>'


def block(*invokes: str) -> str:
    return "\n".join(["\n", f"<{D}tool_calls>", *invokes, f"</{D}tool_calls>"])


F = {"type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}
CALL_F = invoke("f", parameter("a", "x"))
TWICE = invoke("f", parameter("a", "x"), parameter("a", "y"))


@pytest.mark.parametrize(
    ("mode", "text", "reasoning", "content", "calls"),
    [
        # the reasoning is not closed before a call, and the call is whole: it counts
        ("thinking", f"hm{block(CALL_F)}{E}", "hm", "", [F]),
        ("thinking", f"hm{block(CALL_F, CALL_F)}\n", "hm", "", [F, F]),
        # ... but a call that the reasoning goes on after was a draft
        ("thinking", f"hm{block(CALL_F)}no{T_END}yes{E}", f"hm{block(CALL_F)}no", "yes", []),
        ("thinking", f"hm{block(CALL_F)}{T_END}{block(CALL_F)}{E}", f"hm{block(CALL_F)}", "", [F]),
        ("thinking", f"hm{block(CALL_F)[:-5]}", f"hm{block(CALL_F)[:-5]}", "", []),
        ("thinking", f"<{D}tool_calls>\n<{D}invoke name=\"f\">{T_END}yes",
         f"<{D}tool_calls>\n<{D}invoke name=\"f\">", "yes", []),
        # cut off
        ("thinking", "hm", "hm", "", []),
        ("chat", "yes", "", "yes", []),
        ("chat", "yes<｜end▁of", "", "yes<｜end▁of", []),
        ("chat", "yes\n\n", "", "yes\n\n", []),
        ("chat", f"yes{block(CALL_F)[:-30]}{E}", "", f"yes{block(CALL_F)[:-30]}", []),
        # the second call is cut off: the first counts, the rest is content as written
        ("chat", f"yes{block(CALL_F, CALL_F)[:-60]}", "",
         "yes" + f"\n{CALL_F}\n</{D}tool_calls>"[:-60], [F]),
        # malformed: content, as written
        ("chat", f"say <{D}tool_calls> aloud{E}", "", f"say <{D}tool_calls> aloud", []),
        ("chat", f"a{block(invoke('f', 'junk'))}{E}", "", f"a{block(invoke('f', 'junk'))}", []),
        ("chat", f"a{block(TWICE)}{E}", "", f"a{block(TWICE)}", []),
        ("chat", f"a{T_END}b{E}", "", f"a{T_END}b", []),
        ("chat", f"a{E}b", "", f"a{E}b", []),
        # white space and newlines that the strict reader refuses
        ("chat", f"a\n<{D}tool_calls>{CALL_F}</{D}tool_calls>\n{E}", "", "a\n", [F]),
        ("chat", f"<{D}tool_calls>\n\n{CALL_F}\n\n</{D}tool_calls>", "", "", [F]),
        # a value that claims to be JSON and is not becomes a string
        ("chat", block(invoke("f", parameter("a", "x", "false"))), "", "", [F]),
    ],
)
def test_lenient(mode: Any, text: str, reasoning: str, content: str, calls: list[Any]) -> None:
    assert parse_completion(text, mode, strict=False) == {
        "role": "assistant", "content": content, "reasoning_content": reasoning,
        "tool_calls": calls,
    }


TOKENS = [
    B, E, T, T_END, D, completion.CALLS_OPEN, completion.CALLS_CLOSE, completion.INVOKE_OPEN,
    completion.INVOKE_CLOSE, completion.PARAMETER_OPEN, completion.PARAMETER_CLOSE, "\n", "\n\n",
    ' name="f">\n', ' name="a" string="true">v', ' name="b" string="false">1', ">\n", "<", "</",
    '"', "é🙂", "\n\n" + completion.CALLS_OPEN + "\n",
]
TEXTS = st.lists(st.sampled_from(TOKENS) | st.text(max_size=3), max_size=14).map("".join)
MODES = st.sampled_from(["chat", "thinking"])


@settings(max_examples=300, deadline=None)
@given(TEXTS, MODES)
def test_lenient_never_raises_and_agrees_with_strict(text: str, mode: Any) -> None:
    lenient = parse_completion(text, mode, strict=False)
    assert arguments_are_json(lenient)
    try:
        strict = parse_completion(text, mode)
    except EncodingError:
        return
    if arguments_are_json(strict):
        assert lenient == strict


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<｜"), max_size=20)
VALUES = st.recursive(
    WORDS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS, CALLS)
def test_what_is_encoded_is_parsed_back(content: str, reasoning: str, calls: list[Any]) -> None:
    message = assistant(content, reasoning_content=reasoning, tool_calls=[
        {"type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls
    ])
    question = [user("u")]
    prompt = encode_messages(question, "thinking")
    text = encode_messages([*question, message], "thinking").removeprefix(prompt)
    parsed = parse_completion(text, "thinking")
    assert parsed == parse_completion(text, "thinking", strict=False)
    assert (parsed["content"], parsed["reasoning_content"]) == (content, reasoning)
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"]))
             for c in parsed["tool_calls"]]
    assert found == calls


def test_parse_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="thinking_mode: got 'x'"):
        parse_completion("a", thinking_mode="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text: got bytes"):
        parse_completion(b"a")  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [encoding, completion])
def test_examples_in_docstrings(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0
