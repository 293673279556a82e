# SPDX-License-Identifier: Apache-2.0
"""Conversations: each answer is that of all messages, computed from what the session has already;
and `dsv4 chat` on a terminal and in a pipe."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dsv4
from dsv4 import chat
from dsv4.chat import Conversation
from dsv4.cli import main

QUESTIONS = ["Who is Juliet?", "And Romeo?", "Why?", "Wherefore?", "Is it so?"]
SAMPLING: dict[str, Any] = {"max_new_tokens": 12, "seed": 5}


def ask(talk: Conversation, text: str, thinking: bool = False, **more: Any) -> dsv4.Completion:
    with talk.reply(text, thinking, **(SAMPLING | more)) as reply:
        for _ in reply:
            pass
    assert reply.completion is not None
    return reply.completion


def wanted(
    model: dsv4.Model, messages: list[dict[str, Any]], thinking: bool = False, **more: Any
) -> dsv4.Completion:
    answer = model.generate(
        messages, thinking_mode="thinking" if thinking else "chat", **(SAMPLING | more))
    assert isinstance(answer, dsv4.Completion)
    return answer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Counting:
    """An engine's model that notes how many tokens each step computes."""

    def __init__(self, core: Any, found: list[int]) -> None:
        self.core = core
        self.found = found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def step(self, segments: Any, *rest: Any) -> Any:
        self.found.append(sum(len(segment[1]) for segment in segments))
        return self.core.step(segments, *rest)


@pytest.fixture
def counted(model: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """counted(work, ...) calls work(...) and returns how many tokens it computed."""
    def count(work: Callable[..., Any], *arguments: Any, **more: Any) -> int:
        found: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(model, "_core", Counting(model._core, found))
            work(*arguments, **more)
        return sum(found)

    return count


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_are_those_of_all_messages(model: dsv4.Model, thinking: bool) -> None:
    talk = Conversation(model, [{"role": "system", "content": "Be brief."}])
    for i, question in enumerate(QUESTIONS):
        messages = [*talk.messages, user(question)]
        for more in ({"seed": i}, {"presence_penalty": 1.5, "frequency_penalty": 1.0}):
            branch = talk.fork()
            got, want = ask(branch, question, thinking, **more), \
                wanted(model, messages, thinking, **more)
            assert (got.tokens, got.text, got.reasoning, got.usage) == \
                (want.tokens, want.text, want.reasoning, want.usage)
        talk = branch
    assert talk.turns == len(QUESTIONS)


def test_a_turn_computes_what_is_new_alone(
    model: dsv4.Model, counted: Callable[..., int]
) -> None:
    talk = Conversation(model)
    # an answer whose text becomes the same tokens again: what models say almost always
    answer = model.text_tokenizer("answer").encode("I am Romeo, and thou art Juliet.")
    new = len(model.ids(chat.encode_messages([user("And now?")]), bos=False, special=True))
    for turn in range(4):
        session, before = talk.session, talk.session.position
        n = counted(ask, talk, "And now?", force_tokens=answer, max_new_tokens=len(answer))
        # after the first: the last token of the answer before, its end, and the message, without
        # a begin of sentence; each time all but one of the answer
        assert n == (new if turn == 0 else new + 1) + len(answer) - 1
        assert talk.session is session and session.position == before + n


def test_reasoning_that_disappears_costs_no_replay(
    model: dsv4.Model, counted: Callable[..., int]
) -> None:
    """The next turn begins where the reasoning began: that state was kept."""
    talk = Conversation(model)
    words = model.text_tokenizer("words").encode("It is so</think>Yes.", special=True)
    replies = []

    def turn() -> None:
        with talk.reply("Is it so?", True, force_tokens=words, max_new_tokens=len(words)) as reply:
            for _ in reply:
                pass
        replies.append(reply)

    costs = [counted(turn) for _ in range(3)]
    assert costs == [reply.computed_tokens + len(words) - 1 for reply in replies]
    assert replies[2].computed_tokens == replies[1].computed_tokens < replies[0].prompt_tokens + 9
    assert talk.messages[-1]["reasoning_content"] == "It is so"
    assert talk.messages[-1]["content"] == "Yes."


def test_forks_and_rewinds(model: dsv4.Model) -> None:
    talk = Conversation(model)
    ask(talk, QUESTIONS[0])
    ask(talk, QUESTIONS[1])
    other = talk.fork()
    ask(talk, QUESTIONS[2])
    first = [*other.messages, user("Another way")]
    assert ask(other, "Another way").tokens == wanted(model, first).tokens
    assert talk.turns == other.turns == 3 and talk.messages[:4] == other.messages[:4]
    talk.rewind(2)
    assert talk.turns == 1
    assert ask(talk, "Again").tokens == wanted(model, [*talk.messages[:2], user("Again")]).tokens
    with pytest.raises(ValueError, match="turns: got 3, wanted 1 to 2"):
        talk.rewind(3)
    other.rewind(3)
    assert other.messages == []
    assert ask(other, "New").tokens == wanted(model, [user("New")]).tokens


def test_saved_conversations(
    model: dsv4.Model, tmp_path: Path, counted: Callable[..., int]
) -> None:
    talk = Conversation(model, [{"role": "system", "content": "Sø ☺"}])
    for question in QUESTIONS:
        ask(talk, question)
    talk.save(tmp_path / "talk")
    assert sorted(os.listdir(tmp_path)) == ["talk", "talk.json"]
    loaded = Conversation.load(model, tmp_path / "talk")
    assert loaded.messages == talk.messages and loaded.session.position == talk.session.position
    assert counted(ask, loaded, "And?") < 60 < loaded.session.position
    got = wanted(model, [*talk.messages, user("And?")])
    assert loaded.messages[-1]["content"] == got.text
    # a state of another moment, as a kill between the two files leaves it, changes nothing
    ask(talk, "More")
    talk.session.save(tmp_path / "talk")
    mixed = Conversation.load(model, tmp_path / "talk")
    assert mixed.turns == 5
    assert ask(mixed, "And?").tokens == got.tokens


def test_what_cannot_be_loaded(model: dsv4.Model, flash: dsv4.Model, tmp_path: Path) -> None:
    talk, file = Conversation(model), tmp_path / "talk"
    ask(talk, "Hello")
    for name, error in (("nothing", FileNotFoundError), (".", (OSError, dsv4.FormatError))):
        with pytest.raises(error):
            Conversation.load(model, tmp_path / name)
    talk.save(file)
    with pytest.raises(dsv4.FormatError, match=r"model\.config"):
        Conversation.load(flash, file)
    whole = (tmp_path / "talk.json").read_text()
    for text, says in (
        ("", "JSON"), ("[]", "dsv4_chat: got list"), ('{"dsv4_chat": 2}', "got 2"),
        ('{"dsv4_chat": 1}', "messages"), (whole[:-5], "JSON"),
        (whole.replace('"user"', '"nobody"'), "nobody"),
        (whole.replace('"Hello"', "7"), r"messages\[0\].content"),
    ):
        (tmp_path / "talk.json").write_text(text)
        with pytest.raises(dsv4.FormatError, match=says):
            Conversation.load(model, file)
    (tmp_path / "talk.json").write_text(whole)
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(dsv4.FormatError, match="damaged"):
        Conversation.load(model, file)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_interrupted_replies(model: dsv4.Model, after: int) -> None:
    """What was said stays; nothing said, nothing kept; the session goes on either way."""
    talk = Conversation(model)
    ask(talk, "Hello")
    before = list(talk.messages)
    said = []
    with pytest.raises(KeyboardInterrupt), talk.reply("And?", **SAMPLING) as reply:
        for event in reply:
            if len(said) == after:
                raise KeyboardInterrupt
            said.append(event.text)
    if after:
        assert talk.messages[:-2] == before and talk.messages[-2] == user("And?")
        assert talk.messages[-1]["content"].startswith("".join(said))
    messages = [*talk.messages, user("Why?")]
    assert ask(talk, "Why?").tokens == wanted(model, messages).tokens


def test_interrupted_while_reading(model: dsv4.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(model)
    ask(talk, "Hello")
    before, at = list(talk.messages), talk.session.position

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dsv4.Session, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(talk, "And?")
    assert talk.messages == before and talk.session.position <= at
    assert ask(talk, "Why?").tokens == wanted(model, [*before, user("Why?")]).tokens


def test_refused_turns_change_nothing(model: dsv4.Model) -> None:
    talk = Conversation(model)
    ask(talk, "Hello")
    before, at = list(talk.messages), talk.session.position
    for text, more, error in (
        ("word " * 5000, {}, "the conversation and one token of an answer"),
        ("Hi", {"top_p": 2}, "top_p"), ("Hi", {"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            ask(talk, text, **more)
    with pytest.raises(ZeroDivisionError):
        ask(talk, "Hi", logits_processor=lambda *_: 1 / 0)
    assert talk.messages == before and talk.session.position >= at
    assert ask(talk, "Why?").tokens == wanted(model, [*before, user("Why?")]).tokens


# ---- the command in a pipe ----

def piped(monkeypatch: pytest.MonkeyPatch, lines: str, *flags: str) -> int:
    monkeypatch.setenv("DSV4_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8"))
    return main(["chat", "--max-new-tokens", "6", "--seed", "1", *flags])


def test_commands(
    model: dsv4.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = f"{tmp_path}/a talk"
    lines = f"""Hello
/save {file}
/fork
And?
/switch
/switch main
And?
/rewind
/fork b
Or?
/new
/help
/load {file}
And?
/quit
never"""
    assert piped(monkeypatch, lines, "--json") == 0
    out = capfd.readouterr()
    answers = [json.loads(line) for line in out.out.splitlines()]
    assert [a["tokens"] for a in answers[1:3]] == [answers[1]["tokens"]] * 2
    assert answers[4]["tokens"] == answers[1]["tokens"] != answers[3]["tokens"]
    first = [user("Hello"), {"role": "assistant", "content": answers[0]["text"]}, user("Or?")]
    assert answers[3]["tokens"] == wanted(model, first, max_new_tokens=6, seed=1).tokens
    assert all(a["computed_tokens"] <= a["usage"]["prompt_tokens"] for a in answers)
    for line in ("now in fork-1", "* fork-1: 2 turns", "  main: 1 turns", "1 turns are left",
                 "now in b", "/rewind [N]", "saved 1 turns", "loaded 1 turns"):
        assert line in out.err, line


@pytest.mark.parametrize(("line", "says"), [
    ("/save", "/save: got no PATH"), ("/load", "/load: got no PATH"),
    ("/load /no/such", "No such file"), ("/save /no/such/x", "No such file"),
    ("/fork main", "/fork: got main"), ("/switch x", "/switch: got x, wanted one of main"),
    ("/rewind", "turns: got 1, wanted 1 to 0"), ("/rewind x", "/rewind: got x"),
    ("word " * 5000, "the context of this model"),
])
def test_failing_lines_end_a_pipe(
    line: str, says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert piped(monkeypatch, f"{line}\nHello\n") == 1
    out = capfd.readouterr()
    assert out.out.strip() == "" and says in out.err and "Traceback" not in out.err


def test_history_lies_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert chat.history_file() == Path("/somewhere/dsv4/chat_history")
    monkeypatch.setenv("HOME", "/someone")
    for value in ("", "relative/folder"):  # which the standard says to ignore
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert chat.history_file() == Path("/someone/.local/state/dsv4/chat_history")


# ---- on a terminal ----

class Terminal:
    """`dsv4 chat` behind a pseudo-terminal that controls it."""

    def __init__(self, folder: Path, *flags: str, **env: str) -> None:
        self.fd, slave = pty.openpty()

        def controlling() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsv4", "chat", "--threads", "1", *flags], cwd=folder,
            stdin=slave, stdout=slave, stderr=slave, preexec_fn=controlling, env={
                **os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(folder / "state"),
                "PYTHONPATH": str(Path(dsv4.__file__).parents[1]), **env})
        os.close(slave)
        self.seen = ""

    def until(self, text: str, keys: str = "") -> str:
        """What comes up to and with this text; the keys are pressed now, and each second again."""
        end = time.monotonic() + 60
        pressed = 0.0
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if keys and time.monotonic() > pressed + 1:
                self.send(keys)
                pressed = time.monotonic()
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"no {text!r} in {self.seen!r}: it ended") from error
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def line(self, text: str) -> str:
        """Send a line; what comes after its echo, up to the next prompt."""
        self.send(f"{text}\r")
        self.until(f"{text}\r\n")
        return self.until("> ")

    def leave(self, keys: str = "\x04") -> int:
        self.send(keys)
        return self.process.wait(30)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*flags: str, **env: str) -> Terminal:
        made.append(Terminal(tmp_path, *flags, **env))
        made[-1].until("> ")
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.wait()
        os.close(each.fd)


def test_a_chat_on_a_terminal(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    one = terminal("--max-new-tokens", "6", "--seed", "1")
    first = one.line("Hello")
    one.send("Ha\x01o\x05t\r")  # edited: "oHat"
    one.until("\r\n")
    one.until("> ")
    assert "\x1b[2m" not in first
    one.line("/think")
    thought = one.line("Why?")
    assert "\x1b[2m" in thought and thought.index("\x1b[0m") > thought.index("\x1b[2m")
    one.line("/save kept")
    assert "error: turns: got 9" in one.line("/rewind 9")  # and it goes on
    assert "fork-1> " in one.line("/fork") + one.seen
    assert one.leave() == 0
    texts = [m["content"] for m in json.loads((tmp_path / "kept.json").read_text())["messages"]]
    assert texts[0] == "Hello" and texts[2] == "oHat" and len(texts) == 6

    two = terminal("--max-new-tokens", "6", "--seed", "1", NO_COLOR="1")
    assert two.line("Hello").replace("\r", "") == first.replace("\r", "")
    two.line("/load kept")
    two.send("\x1b[A\x1b[A\x1b[A\x10\r")  # four lines up: the last but one of the chat before
    assert "error: turns: got 9" in two.until("turns: got 9")
    two.until("> ")
    assert "<think>" in two.line("/think") + two.line("And?")
    assert two.leave("/quit\r") == 0
    history = tmp_path / "state" / "dsv4" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.read_text().splitlines()[:3] == ["Hello", "oHat", "/think"]


def test_ctrl_c_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    """It ends a reply, then empties the line; what was said belongs to the conversation."""
    one = terminal("--seed", "1", "--min-new-tokens", "100000")
    one.send("Tell me everything\r")
    one.until("everything\r\n")
    one.until("e")  # of the reply
    one.until("> ", "\x03")
    assert "main: 1 turns" in one.line("/switch")
    one.send("half a line")
    one.until("half a line")
    one.until("> ", "\x03")
    assert "main: 1 turns" in one.line("/switch") and one.leave() == 0


@pytest.mark.parametrize("state", ["/proc/nowhere", "/dev/null", "full"])
def test_a_history_that_cannot_be_written_is_no_error(
    terminal: Callable[..., Terminal], tmp_path: Path, state: str
) -> None:
    if state == "full":
        (tmp_path / "dsv4").mkdir()
        (tmp_path / "dsv4" / "chat_history").symlink_to("/dev/full")
        state = str(tmp_path)
    one = terminal("--max-new-tokens", "2", XDG_STATE_HOME=state)
    assert "rror" not in one.line("Hello") + one.line("/switch") and one.leave() == 0


def test_ctrl_c_ends_a_pipe() -> None:
    with subprocess.Popen(
            [sys.executable, "-m", "dsv4", "chat", "--threads", "1"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={
                **os.environ, "PYTHONPATH": str(Path(dsv4.__file__).parents[1])}) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in err
