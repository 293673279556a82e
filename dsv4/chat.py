# SPDX-License-Identifier: Apache-2.0
"""Conversations that keep their state from turn to turn, and the command `dsv4 chat`.

A conversation is its messages; its session is what has been computed of them.  Each turn encodes
all messages, goes back to the end of what the session has in common with them and appends the rest:
usually the new message alone, and after reasoning, which the format leaves out later, the last
answer too.  An answer has therefore the bits that `generate` gives to the same messages, however
the conversation came there: resumed, forked, rewound or interrupted.

Ctrl-C ends the reply.  What was said so far is part of the conversation; if nothing was said yet,
or an error ended the reply, the message is taken back.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dsv4.answer import Answer, Completion, Event
from dsv4.arrays import check_room
from dsv4.batch_files import replace as write_file
from dsv4.completion import ThinkingMode
from dsv4.encoding import encode_messages
from dsv4.errors import DeviceError, FormatError, NonFiniteLogitsError, shown
from dsv4.files import parse_json
from dsv4.generate import answers, checked_sampling, events_of
from dsv4.model import Model
from dsv4.output import Output
from dsv4.prefixes import common
from dsv4.session import Session

HELP = """\
/save PATH   write the conversation: its state to PATH, its messages to PATH.json
/load PATH   go on with a saved one
/fork [NAME] go on in a copy; the original stays as it is
/switch NAME go to another branch; without a name: which there are
/rewind [N]  take the last N turns back, one by default
/new         start over
/think       switch reasoning on or off
/help        this text
/quit        leave, as Ctrl-D does; Ctrl-C stops a reply"""
FIRST_BRANCH = "main"
# a turn leaves two: the states before its prompt and at its end
CHECKPOINTS = 8
FORMAT = 1
MOST_FILE_BYTES = 1 << 28
HISTORY_LINES = 1000
# what a turn or a command may fail with while the conversation goes on
REPORTED = (OSError, MemoryError, ValueError, DeviceError, NonFiniteLogitsError)


class Conversation:
    """Messages, and the session that has computed them as far as it could.

    Parameters
    ----------
    model : Model
    messages : sequence of dict
        As for `dsv4.encode_messages`.
    session : Session, optional
        Continued as far as it agrees with the messages; a new one by default.

    Examples
    --------
    >>> import dsv4
    >>> with dsv4.load() as model:
    ...     talk = Conversation(model)
    ...     with talk.reply("Who is Juliet?", max_new_tokens=4, seed=1) as reply:
    ...         text = "".join(event.text for event in reply)
    ...     [message["role"] for message in talk.messages], talk.messages[1]["content"] == text
    (['user', 'assistant'], True)
    """

    def __init__(
        self, model: Model, messages: list[dict[str, Any]] | None = None,
        session: Session | None = None,
    ) -> None:
        self.model = model
        self.messages = list(messages or ())
        self.session = session or model.session(checkpoints=CHECKPOINTS)

    def reply(
        self, text: str, thinking: bool = False, reasoning_effort: str | None = None,
        **sampling: Any,
    ) -> "Reply":
        """The answer to a message, to be read as a stream inside ``with``.

        Raises
        ------
        ValueError, TypeError
            The message, the parameters, or too long a conversation; nothing has changed.
        """
        return Reply(self, text, thinking, reasoning_effort, sampling)

    @property
    def turns(self) -> int:
        """Messages of the user."""
        return sum(message["role"] == "user" for message in self.messages)

    def fork(self) -> "Conversation":
        """Another one with the same past; costs nothing until one of the two goes on."""
        return Conversation(self.model, self.messages, self.session.fork())

    def rewind(self, turns: int = 1) -> None:
        """Take the last messages of the user back, with all that followed them."""
        if not 1 <= turns <= self.turns:
            raise ValueError(f"turns: got {turns}, wanted 1 to {self.turns}, as many as there are")
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[starts[-turns] :]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to `path` and the messages to `path` + ".json", each whole or not at all.

        The messages alone say what the conversation is: the state spares computing it again.
        """
        self.session.save(path)
        text = json.dumps({"dsv4_chat": FORMAT, "messages": self.messages}, indent=1)
        write_file(_messages_file(path), [text.encode(), b"\n"])

    @classmethod
    def load(cls, model: Model, path: str | os.PathLike[str]) -> "Conversation":
        """Go on with a saved one.

        Raises
        ------
        FormatError
            One of the files is damaged or of something else; the state of another model.
        OSError
            One of them cannot be read.
        """
        messages = _read_messages(_messages_file(path))
        return cls(model, messages, model.load_session(path, checkpoints=CHECKPOINTS))

    def close(self) -> None:
        """Give the state back."""
        self.session.close()


class Reply:
    """One answer while it is made; leaving the ``with`` block makes it part of the conversation.

    Attributes
    ----------
    prompt_tokens, computed_tokens : int
        Of the prompt, and how many of these had to be computed.
    """

    def __init__(
        self, talk: Conversation, text: str, thinking: bool, reasoning_effort: str | None,
        sampling: dict[str, Any],
    ) -> None:
        model = talk.model
        self.talk = talk
        self.messages = [*talk.messages, {"role": "user", "content": text}]
        self.mode: ThinkingMode = "thinking" if thinking else "chat"
        prompt = encode_messages(self.messages, self.mode, reasoning_effort=reasoning_effort,
                                 version=model.version)
        self.ids = model.ids(prompt, "message", bos=False, special=True)
        self.sampling = checked_sampling(model, None, sampling)
        context = model.config.max_position_embeddings
        check_room(0, len(self.ids) + 1, context, "the conversation and one token of an answer")
        self.prompt_tokens = len(self.ids)
        self.computed_tokens = 0
        self.answer: Answer | None = None
        self._events = self._run()

    def _run(self) -> Generator[Event, None, None]:
        session, last = self.talk.session, len(self.ids) - 1
        have = min(common(session.tokens, self.ids), last)
        if have < session.position:
            session.rewind(have)
        self.computed_tokens = len(self.ids) - have
        # The last token alone: the state before it is kept, and the next turn may begin there,
        # because that token says whether reasoning follows.
        if have < last:
            session.append(self.ids[have:last], logits="none")
        (self.answer,) = answers(self.talk.model, self.ids[last:], self.sampling, session)
        self.answer.chat = self.mode
        yield from events_of(self.talk.model, [self.answer])

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def __enter__(self) -> "Reply":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._events.close()
        completion = self.completion
        if completion is None or isinstance(error, Exception):
            return
        said = completion.text or completion.reasoning or completion.tool_calls
        if said or completion.finish_reason != "cancelled":
            self.talk.messages = [*self.messages, _message(completion)]

    @property
    def completion(self) -> Completion | None:
        """What there is of the answer; None before its prompt was computed."""
        if self.answer is None:
            return None
        completion = self.answer.completion()
        new = completion.usage["completion_tokens"]
        return replace(completion, usage=dict(
            prompt_tokens=self.prompt_tokens, completion_tokens=new,
            total_tokens=self.prompt_tokens + new))


def _message(completion: Completion) -> dict[str, Any]:
    """The assistant's message that an answer is."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.text}
    if completion.reasoning:
        message["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        message["tool_calls"] = completion.tool_calls
    return message


def _messages_file(path: str | os.PathLike[str]) -> Path:
    return Path(os.fsdecode(path) + ".json")


def _read_messages(path: Path) -> list[dict[str, Any]]:
    with open(path, "rb") as file:
        data = file.read(MOST_FILE_BYTES + 1)
    if len(data) > MOST_FILE_BYTES:
        raise FormatError(file=str(path), rule="size", got=f"over {MOST_FILE_BYTES:,} bytes",
                          wanted="the messages of a conversation")
    value = parse_json(data, str(path))
    if not isinstance(value, dict) or value.get("dsv4_chat") != FORMAT:
        raise FormatError(file=str(path), rule="dsv4_chat", got=shown(
            value.get("dsv4_chat") if isinstance(value, dict) else type(value).__name__),
            wanted=f"{FORMAT}: the messages of a conversation")
    messages = value.get("messages")
    if not isinstance(messages, list):
        raise FormatError(file=str(path), rule="messages", got=type(messages).__name__,
                          wanted="a list")
    try:
        if messages:
            encode_messages(messages)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: {error}", file=str(path), rule="messages") from None
    return messages


# ---- the command ----

class _Talk:
    """The branches of a chat, and the commands that act on them."""

    def __init__(self, model: Model, args: argparse.Namespace, sampling: dict[str, Any]) -> None:
        self.model = model
        self.args = args
        self.sampling = sampling
        self.system = [] if args.system is None else [{"role": "system", "content": args.system}]
        self.name = FIRST_BRANCH
        self.branches = {self.name: Conversation(model, self.system)}
        self.commands = {
            "/save": self.save, "/load": self.load, "/fork": self.fork, "/switch": self.switch,
            "/rewind": self.rewind, "/new": self.new, "/think": self.think, "/help": self.help}

    @property
    def talk(self) -> Conversation:
        return self.branches[self.name]

    def do(self, line: str) -> None:
        """Carry out a command."""
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            say(f"{shown(name)}: unknown; /help lists the commands")
            return
        self.commands[name](rest.strip())

    def save(self, path: str) -> None:
        if not path:
            raise ValueError("/save: got no PATH")
        self.talk.save(os.path.expanduser(path))
        say(f"saved {self.talk.turns} turns, {self.talk.session.position:,} tokens: {path}")

    def load(self, path: str) -> None:
        if not path:
            raise ValueError("/load: got no PATH")
        self._replace(Conversation.load(self.model, os.path.expanduser(path)))
        say(f"loaded {self.talk.turns} turns, {self.talk.session.position:,} tokens: {path}")

    def fork(self, name: str) -> None:
        if not name:
            name = next(n for i in range(1, len(self.branches) + 1)
                        if (n := f"fork-{i}") not in self.branches)
        if name in self.branches:
            raise ValueError(f"/fork: got {shown(name)}, which is there; /switch goes to it")
        self.branches[name] = self.talk.fork()
        say(f"now in {shown(name)}; /switch {shown(self.name)} goes back")
        self.name = name

    def switch(self, name: str) -> None:
        if not name:
            for each, talk in self.branches.items():
                say(f"{'*' if each == self.name else ' '} {shown(each)}: {talk.turns} turns")
            return
        if name not in self.branches:
            raise ValueError(f"/switch: got {shown(name)}, wanted one of "
                             f"{', '.join(map(shown, self.branches))}")
        self.name = name
        say(f"now in {shown(name)}, {self.talk.turns} turns")

    def rewind(self, turns: str) -> None:
        if not (turns or "1").isdecimal():
            raise ValueError(f"/rewind: got {shown(turns)}, wanted a number of turns")
        self.talk.rewind(int(turns or 1))
        say(f"{self.talk.turns} turns are left")

    def new(self, _: str) -> None:
        self._replace(Conversation(self.model, self.system))

    def think(self, _: str) -> None:
        self.args.thinking = not self.args.thinking
        say(f"reasoning is {'on' if self.args.thinking else 'off'}")

    def help(self, _: str) -> None:
        say(HELP)

    def _replace(self, talk: Conversation) -> None:
        self.talk.close()
        self.branches[self.name] = talk

    def answer(self, line: str, interruptible: bool) -> None:
        """Send a message and show the answer."""
        out = Output(sys.stdout, hidden=self.args.json)
        try:
            with self.talk.reply(line, self.args.thinking, self.args.reasoning_effort,
                                 **self.sampling) as reply:
                for event in reply:
                    out.show(event)
        except KeyboardInterrupt:
            if not interruptible:
                raise
        finally:
            out.end()
        if self.args.json and reply.completion is not None:
            computed = {"computed_tokens": reply.computed_tokens}
            print(json.dumps(reply.completion.as_dict() | computed), flush=True)


def run(model: Model, args: argparse.Namespace, sampling: dict[str, Any]) -> int:
    """Talk until the end of the input; the exit code."""
    talk, terminal = _Talk(model, args, sampling), sys.stdin.isatty()
    lines = _Lines(sys.stdin, sys.stdout)
    if terminal:
        say(f"{model.kind}\n/help lists the commands; Ctrl-D leaves")
    while True:
        try:
            line = lines.read("> " if talk.name == FIRST_BRANCH else f"{shown(talk.name)}> ")
            if line is None or line in ("/quit", "/exit"):
                return 0
            if line.startswith("/"):
                talk.do(line)
            elif line:
                talk.answer(line, terminal)
        except KeyboardInterrupt:
            if not terminal:
                raise
            say("")  # what was typed is forgotten
        except REPORTED as error:
            if not terminal:
                raise
            say(f"dsv4: error: {error or type(error).__name__}")


def say(line: str) -> None:
    """To standard error: standard output has the answers alone."""
    print(line, file=sys.stderr, flush=True)


class _Lines:
    """Lines of input; on a terminal with line editing, and the history of earlier chats."""

    def __init__(self, source: TextIO, screen: TextIO) -> None:
        self.source = source
        self.edited = source.isatty() and screen.isatty()
        self.history: Path | None = None
        if self.edited:
            with contextlib.suppress(ImportError):
                import readline
                self.readline = readline
                self._open_history()

    def _open_history(self) -> None:
        """Without a place for it the history lasts as long as the chat: never an error."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self.readline.set_history_length(HISTORY_LINES)
            path = history_file()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self.readline.read_history_file(path)
            self.history = path

    def read(self, prompt: str) -> str | None:
        """The next line without white space around it; None at the end."""
        if not self.edited:
            line = self.source.readline()
            return line.strip() if line else None
        before = self.readline.get_current_history_length() if self.history else 0
        try:
            line = input(prompt).strip()
        except EOFError:
            say("")
            return None
        if self.history and self.readline.get_current_history_length() > before:
            with contextlib.suppress(OSError, AttributeError):
                self.readline.append_history_file(1, self.history)
        return line


def history_file() -> Path:
    """Where the lines of earlier chats are: in the user's state folder (XDG)."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path.home() / ".local" / "state"
    return state / "dsv4" / "chat_history"
