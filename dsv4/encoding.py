# SPDX-License-Identifier: Apache-2.0
"""Text in: messages rendered as the prompt text that DeepSeek V4 was trained on.

The format is fixed byte for byte by the official encoder (no separators between messages, the
transition to the assistant written by the message before it).  What the official encoder would
drop or turn into nonsense by accident (unknown roles, content that is no text) is refused here
with the index of the message and the field.

Source: SPEC §7.2 and §7.3; reading the answer back is `dsv4.completion`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from dsv4.completion import (
    BOS,
    CALLS_CLOSE,
    CALLS_OPEN,
    EOS,
    INVOKE_CLOSE,
    INVOKE_OPEN,
    PARAMETER_CLOSE,
    PARAMETER_OPEN,
    THINK_END,
    THINK_START,
    ThinkingMode,
    check_thinking_mode,
    parse_completion,
)
from dsv4.errors import EncodingError

__all__ = ["EncodingError", "encode_messages", "parse_completion"]

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
TASKS = {
    name: f"<｜{name}｜>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")

# The fixed texts of the format; the tests hold their digests.
TOOLS_TEMPLATE = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "{CALLS_OPEN}" block like the following:

{CALLS_OPEN}
{INVOKE_OPEN} name="$TOOL_NAME">
{PARAMETER_OPEN} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_CLOSE}
...
{INVOKE_CLOSE}
{INVOKE_OPEN} name="$TOOL_NAME2">
...
{INVOKE_CLOSE}
{CALLS_CLOSE}

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning \
inside {THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

{{tool_schemas}}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
RESPONSE_FORMAT_TEMPLATE = """## Response Format:

You MUST strictly adhere to the following schema to reply:
{schema}"""
EFFORT_ABSOLUTE = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve \
the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and \
adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, \
considered alternative, and rejected hypothesis to ensure absolutely no assumption is left \
unchecked.

"""
EFFORT_BEYOND = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: \
exhaustively decompose the problem into its most fundamental components, trace every causal chain \
to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and \
are certain that no assumption remains unchecked and no error remains undiscovered.

"""
# version -> reasoning_effort -> text before everything else of the first message
EFFORTS: dict[str, dict[str | None, str]] = {
    "v4": {None: "", "high": "", "max": EFFORT_ABSOLUTE},
    "0731": {None: "", "low": "", "high": EFFORT_ABSOLUTE, "max": EFFORT_BEYOND},
}


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    thinking_mode: ThinkingMode = "chat",
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    version: Literal["v4", "0731"] = "v4",
) -> str:
    """Render messages as prompt text, byte for byte as the official encoder does.

    Parameters
    ----------
    messages : sequence of dict
        OpenAI-like: ``role`` (system, developer, user, assistant, tool, latest_reminder) and
        ``content`` (text, or a list of ``{"type": "text", "text": ...}`` parts, joined by an
        empty line).  System and developer messages may carry ``tools`` and ``response_format``;
        assistant messages ``reasoning_content``, ``tool_calls`` and ``wo_eos``; tool messages
        ``tool_call_id``; any message a ``task``.  Other fields are ignored.
    thinking_mode : "chat" or "thinking"
        Whether the answer starts with reasoning.
    drop_thinking : bool
        Thinking mode: leave out the reasoning of answers before the last user message (and
        developer messages before it).  Has no effect if any message has tools.
    add_default_bos_token : bool
        False to continue a conversation that is already in the context.
    reasoning_effort : str or None
        Thinking mode.  Version "v4": "high" (nothing) or "max"; "0731": "low", "high" or "max".
    version : "v4" or "0731"
        The generation of the checkpoint.

    Returns
    -------
    str
        To be tokenised with ``special=True``.

    Raises
    ------
    dsv4.EncodingError
        A message is not what the format allows; names its index and field.
    ValueError
        Unknown mode, effort or version.

    Examples
    --------
    >>> encode_messages([{"role": "user", "content": "hi"}])
    '<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜></think>'
    """
    check_thinking_mode(thinking_mode)
    effort = _effort_prefix(reasoning_effort, version)
    turns = _merge(messages)
    _sort_tool_results(turns)
    if any(turn.tools for turn in turns):
        drop_thinking = False
    thinking = thinking_mode == "thinking"
    if thinking and drop_thinking:
        turns = _drop_old_reasoning(turns)
    parts = [BOS if add_default_bos_token else "", effort if thinking else ""]
    last_user = _last_user(turns)
    for i, turn in enumerate(turns):
        recent = thinking and not drop_thinking
        after_task = i > 0 and turns[i - 1].task is not None
        parts.append(_render(turn, thinking and not after_task and (recent or i > last_user)))
        if i + 1 == len(turns) or turns[i + 1].role in ("assistant", "latest_reminder"):
            parts.append(_transition(turn, thinking, recent or (thinking and i >= last_user)))
    return "".join(parts)


@dataclass
class _Block:
    """Part of a user message: text, or the result of a tool call."""

    text: str
    is_tool_result: bool = False
    call_id: str = ""


@dataclass
class _Turn:
    """One message after merging, every field checked."""

    role: str
    content: str = ""
    blocks: list[_Block] = field(default_factory=list)  # of a user message
    tools: list[str] = field(default_factory=list)  # JSON texts
    response_format: str = ""  # JSON text
    reasoning: str = ""
    calls: str = ""  # rendered
    call_ids: list[str] = field(default_factory=list)
    task: str | None = None
    wo_eos: bool = False


def _effort_prefix(reasoning_effort: str | None, version: str) -> str:
    if version not in tuple(EFFORTS):
        raise ValueError(f"version: got {version!r}, expected 'v4' or '0731'")
    efforts = EFFORTS[version]
    if reasoning_effort not in tuple(efforts):
        names = ", ".join(repr(name) for name in efforts)
        raise ValueError(
            f"reasoning_effort: got {reasoning_effort!r}, version {version!r} knows {names}"
        )
    return efforts[reasoning_effort]


# --- reading messages -----------------------------------------------------------------------


def _refuse(where: str, got: object, wanted: str) -> NoReturn:
    raise EncodingError(f"{where}: got {got}, expected {wanted}")


def _read(index: int, message: Mapping[str, Any]) -> _Turn:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        _refuse(where, type(message).__name__, "a dict with role and content")
    role = message.get("role")
    if role not in ROLES:
        _refuse(f"{where}.role", repr(role), f"one of {', '.join(ROLES)}")
    turn = _Turn(role, task=_task(where, message), wo_eos=bool(message.get("wo_eos")))
    if role == "tool":
        result = _tool_result(where, message.get("content", ""))
        call_id = _optional_text(f"{where}.tool_call_id", message, "tool_call_id")
        turn.blocks = [_Block(result, True, call_id)]
        return turn
    turn.content = _content(where, role, message)
    if role == "user":
        turn.blocks = [_Block(turn.content)]
        return turn
    turn.tools = _tools(where, message.get("tools"))
    turn.response_format = _response_format(where, message.get("response_format"))
    if role == "assistant":
        turn.reasoning = _optional_text(f"{where}.reasoning_content", message, "reasoning_content")
        _read_calls(turn, where, message.get("tool_calls"))
    return turn


def _task(where: str, message: Mapping[str, Any]) -> str | None:
    task = message.get("task")
    if task is not None and task not in tuple(TASKS):
        _refuse(f"{where}.task", repr(task), f"one of {', '.join(TASKS)}")
    return task


def _optional_text(where: str, message: Mapping[str, Any], key: str) -> str:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        _refuse(where, type(value).__name__, "a string")
    return value or ""


def _content(where: str, role: str, message: Mapping[str, Any]) -> str:
    where = f"{where}.content"
    content = message.get("content")
    if role == "user" and content is None and message.get("content_blocks"):
        _refuse(where, "content_blocks instead", "text, or the parts as a list")
    if isinstance(content, list):
        content = "\n\n".join(_text_part(f"{where}[{i}]", part) for i, part in enumerate(content))
    may_lack = ("system", "assistant") if "content" in message else ("system", "assistant", "user")
    if content is None and role in may_lack:
        content = ""
    if not isinstance(content, str):
        _refuse(where, type(content).__name__, "a string or a list of text parts")
    if role == "developer" and not content:
        _refuse(where, "nothing", "text: a developer message cannot be empty")
    return content


def _text_part(where: str, part: object) -> str:
    if not isinstance(part, Mapping):
        _refuse(where, type(part).__name__, "a dict with type and text")
    text = part.get("text", "")
    if part.get("type") != "text" or not isinstance(text, str):
        _refuse(where, f"a part of type {part.get('type')!r}", "text")
    return text


def _tool_result(where: str, content: object) -> str:
    where = f"{where}.content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _refuse(where, type(content).__name__, "a string or a list of parts")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, Mapping) and part.get("type") != "text":
            texts.append(f"[Unsupported {part.get('type')}]")  # the official wording
        else:
            texts.append(_text_part(f"{where}[{i}]", part))
    return "\n\n".join(texts)


def _tools(where: str, tools: object) -> list[str]:
    where = f"{where}.tools"
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        _refuse(where, type(tools).__name__, "a list")
    texts = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            _refuse(f"{where}[{i}]", repr(tool)[:60], "a dict with a function in it")
        texts.append(_as_json(f"{where}[{i}].function", function))
    return texts


def _as_json(where: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingError(f"{where}: cannot be written as JSON: {error}") from None


def _response_format(where: str, value: object) -> str:
    return _as_json(f"{where}.response_format", value) if value else ""


def _read_calls(turn: _Turn, where: str, calls: object) -> None:
    where = f"{where}.tool_calls"
    if not calls:
        return
    if not isinstance(calls, list | tuple):
        _refuse(where, type(calls).__name__, "a list")
    invokes = []
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            _refuse(at, repr(call)[:60], "a dict with a function in it")
        name = function.get("name")
        if not isinstance(name, str):
            _refuse(f"{at}.function.name", type(name).__name__, "a string")
        arguments = _arguments(f"{at}.function.arguments", function.get("arguments"))
        invokes.append(_invoke(f"{at}.function.arguments", name, arguments))
        turn.call_ids.append(_optional_text(f"{at}.id", call, "id"))
    turn.calls = "\n".join(["\n", CALLS_OPEN, *invokes, CALLS_CLOSE])


def _arguments(where: str, arguments: object) -> Mapping[str, Any]:
    if isinstance(arguments, Mapping):
        return arguments
    if not isinstance(arguments, str):
        _refuse(where, type(arguments).__name__, "JSON text")
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {"arguments": arguments}
    if not isinstance(value, dict):
        _refuse(where, f"JSON of a {type(value).__name__}", "JSON of an object")
    return value


def _invoke(where: str, name: str, arguments: Mapping[str, Any]) -> str:
    parameters = [
        f'{PARAMETER_OPEN} name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _as_json(where, value)}{PARAMETER_CLOSE}"
        for key, value in arguments.items()
    ]
    return f'{INVOKE_OPEN} name="{name}">\n' + "\n".join(parameters) + f"\n{INVOKE_CLOSE}"


# --- from messages to turns -----------------------------------------------------------------


def _merge(messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
    """Check all messages; tool results and consecutive user messages become one user message."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: got {type(messages).__name__}, expected a list of dicts")
    if not messages:
        raise EncodingError("messages: got an empty list, expected at least one message")
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        turn = _read(index, message)
        previous = turns[-1] if turns and turns[-1].role == "user" else None
        if turn.role == "tool" and previous:
            previous.blocks += turn.blocks
        elif turn.role == "tool":
            turns.append(_Turn("user", blocks=turn.blocks))
        elif turn.role == "user" and previous and previous.task is None:
            previous.blocks += turn.blocks  # a task of the merged message is lost, officially too
        else:
            turns.append(turn)
    return turns


def _sort_tool_results(turns: list[_Turn]) -> None:
    """Put the tool results of each user message in the order of the calls they answer."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.calls:
            order = {call_id: i for i, call_id in enumerate(turn.call_ids) if call_id}
        slots = [i for i, block in enumerate(turn.blocks) if block.is_tool_result]
        results = sorted((turn.blocks[i] for i in slots), key=lambda b: order.get(b.call_id, 0))
        for i, block in zip(slots, results, strict=True):
            turn.blocks[i] = block


def _last_user(turns: list[_Turn]) -> int:
    return max((i for i, t in enumerate(turns) if t.role in ("user", "developer")), default=-1)


def _drop_old_reasoning(turns: list[_Turn]) -> list[_Turn]:
    """Without developer messages before the last user message; `_render` leaves out the reasoning
    there."""
    last = _last_user(turns)
    return [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]


# --- rendering ------------------------------------------------------------------------------


def _render(turn: _Turn, with_reasoning: bool) -> str:
    if turn.role == "user":
        texts = (
            f"<tool_result>{block.text}</tool_result>" if block.is_tool_result else block.text
            for block in turn.blocks
        )
        return USER + "\n\n".join(texts)
    if turn.role == "latest_reminder":
        return LATEST_REMINDER + turn.content
    if turn.role == "assistant":
        reasoning = turn.reasoning + THINK_END if with_reasoning else ""
        return reasoning + turn.content + turn.calls + ("" if turn.wo_eos else EOS)
    text = (USER if turn.role == "developer" else "") + turn.content
    if turn.tools:
        text += "\n\n" + TOOLS_TEMPLATE.replace("{tool_schemas}", "\n".join(turn.tools))
    if turn.response_format:
        text += "\n\n" + RESPONSE_FORMAT_TEMPLATE.replace("{schema}", turn.response_format)
    return text


def _transition(turn: _Turn, thinking: bool, think_next: bool) -> str:
    """What follows a message before an answer, a reminder or the end."""
    if turn.task == "action":
        return ASSISTANT + (THINK_START if thinking else THINK_END) + TASKS["action"]
    if turn.task is not None:
        return TASKS[turn.task]
    if turn.role in ("user", "developer"):
        return ASSISTANT + (THINK_START if think_next else THINK_END)
    return ""
