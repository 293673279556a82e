# SPDX-License-Identifier: Apache-2.0
"""The command line: output, --json, exit codes, errors without a traceback."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsv4
from dsv4.cli import main

COMMAND = [sys.executable, "-m", "dsv4"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_NUM_THREADS", "1")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def test_generate_prints_the_answer_alone(
    model: dsv4.Model, capfd: pytest.CaptureFixture[str], stdin: Callable[[bytes], None]
) -> None:
    wanted = str(model.generate("ROMEO:", max_new_tokens=8, seed=1))
    flags = ["--max-new-tokens", "8", "--seed", "1"]
    assert main(["generate", "ROMEO:", *flags]) == 0
    out = capfd.readouterr()
    assert out.out == wanted + ("" if wanted.endswith("\n") else "\n") and out.err == ""
    stdin(b"ROMEO:")
    assert main(["generate", "-", *flags, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["text"] == wanted and told["finish_reason"] == "length" and told["seed"] == 1


def test_generate_options(model: dsv4.Model, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-new-tokens", "6", "--seed", "2", "--temperature", "0.5", "--top-k", "50",
             "--top-p", "0.9", "--min-p", "0.01", "--ignore-eos", "--logprobs", "1"]
    assert main(["generate", "a", *flags, "-n", "2", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    wanted = model.generate("a", max_new_tokens=6, seed=2, temperature=0.5, top_k=50, top_p=0.9,
                            min_p=0.01, ignore_eos=True, logprobs=1, n=2)
    assert isinstance(wanted, list)
    assert [a["tokens"] for a in told] == [a.tokens for a in wanted]
    assert told[0]["logprobs"][0].keys() == {"token", "logprob", "top"}
    assert main(["generate", "a", *flags, "-n", "2"]) == 0
    assert capfd.readouterr().out.startswith("--- 1 ---\n")
    text = wanted[0].text
    assert main(["generate", "a", *flags, "--stop", text[2:4], "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == text[: text.index(text[2:4])]


def test_generate_as_chat(model: dsv4.Model, capfd: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wanted = model.generate(messages, thinking_mode="thinking", max_new_tokens=6, seed=3)
    assert isinstance(wanted, dsv4.Completion)
    flags = ["--system", "Be brief.", "--thinking", "--max-new-tokens", "6", "--seed", "3"]
    assert main(["generate", "Hi", *flags, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["tokens"] == wanted.tokens and told["reasoning"] == wanted.reasoning
    assert main(["generate", "Hi", *flags]) == 0
    out = capfd.readouterr().out
    assert out.startswith("<think>\n" + wanted.reasoning) and out.endswith("</think>\n")


def test_chat(capfd: pytest.CaptureFixture[str], stdin: Callable[[bytes], None]) -> None:
    stdin(b"Hello\n\n/think\n/nonsense\nAgain\n/new\n/exit\nnever\n")
    assert main(["chat", "--max-new-tokens", "4", "--seed", "1", "--json"]) == 0
    out = capfd.readouterr()
    answers = [json.loads(line) for line in out.out.splitlines()]
    assert len(answers) == 2 and answers[1]["usage"]["prompt_tokens"] > 10
    assert answers[0]["text"] and answers[1]["reasoning"]
    assert "reasoning is on" in out.err and "/nonsense: unknown" in out.err


def test_info(
    nano: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["info"]) == 0
    out = capfd.readouterr().out
    for word in ("routed experts", "kernels", "numpy", "linear_few_fp8", "memory for 1 x",
                 "all of it stays in memory"):
        assert word in out
    assert main(["info", str(nano("nano-0731")), "--context", "1000", "--batch", "2",
                 "--memory", "1.5M", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["model"]["draft"] == "dspark" and told["model"]["plan"]["batch"] == 2
    assert told["machine"]["kernels"] == dsv4.kernel_info()
    assert told["model"]["plan"] == dsv4.plan(
        nano("nano-0731"), 1000, 2, memory=3 << 19).as_dict()
    with pytest.raises(SystemExit):
        main(["info", "--memory", "24X"])
    assert "got '24X', wanted a number of bytes, as in 24G" in capfd.readouterr().err


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["generate", "a", "--top-p", "2"], 2, "top_p: got 2"),
    (["generate", "a", "--max-new-tokens", "0"], 2, "max_new_tokens: got 0"),
    (["generate", ""], 2, "PROMPT"),
    (["generate", "a", "--model", "/no/such"], 1, "'/no/such'"),
    (["generate", "a", "--threads", "0"], 1, "threads: got 0"),
    (["generate", "a", "--chat", "--thinking", "--reasoning-effort", "huge"], 1, "huge"),
    (["info", "/no/such"], 1, "/no/such"),
    (["info", "--context", "0"], 1, "context: got 0"),
    (["generate", "--memory", "1K", "x"], 1, "memory: needed"),
])
def test_failures_are_one_sentence(
    arguments: list[str], code: int, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    out = capfd.readouterr()
    assert out.out == "" and out.err.startswith("dsv4: error: ") and says in out.err
    assert out.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate"], ["generate", "a", "--x"],
                                       ["generate", "a", "--seed", "x"]])
def test_wrong_usage(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and "usage: dsv4" in capfd.readouterr().err


def test_broken_folder(
    tmp_path: Path, nano: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert main(["generate", "a", "--model", str(tmp_path)]) == 1
    assert "deepseek_v3" in capfd.readouterr().err
    # random weights and no tokenizer
    assert main(["generate", "a", "--model", str(nano("nano-odd"))]) == 1
    assert "no tokenizer.json" in capfd.readouterr().err


def test_stdin_that_is_not_text(
    capfd: pytest.CaptureFixture[str], stdin: Callable[[bytes], None]
) -> None:
    stdin(b"ab\xff")
    assert main(["generate", "-"]) == 2
    assert "byte 2 of standard input is not UTF-8" in capfd.readouterr().err


def test_version() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert done.stdout == f"dsv4 {dsv4.__version__}\n" and done.returncode == 0


def wait_for_output(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1)


def test_ctrl_c_ends_with_130() -> None:
    with subprocess.Popen([*COMMAND, "generate", "ROMEO:", "--ignore-eos"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_output(process)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130 and b"Traceback" not in err
        assert time.monotonic() - started < 5


def test_closed_pipe_ends_with_141() -> None:
    with subprocess.Popen([*COMMAND, "generate", "ROMEO:", "--ignore-eos"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_output(process)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(20) == 141 and err == b""


def test_text_streams() -> None:
    """The first text is there long before the last: the model goes on to the end of its context."""
    with subprocess.Popen([*COMMAND, "generate", "ROMEO:", "--ignore-eos"],
                          stdout=subprocess.PIPE) as process:
        wait_for_output(process)
        time.sleep(0.3)
        assert process.poll() is None
        process.kill()


def test_a_terminal_gets_styles(script: Callable[..., Any]) -> None:
    code = """
import os, pty, sys
os.environ["TERM"] = "xterm"
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-m", "dsv4", "generate", "Hi", "--thinking",
                              "--max-new-tokens", "3", "--seed", "1"])
out = b""
try:
    while piece := os.read(fd, 4096):
        out += piece
except OSError:
    pass
print(repr(out), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = script(code)
    assert r"\x1b[2m" in done.stdout and r"\x1b[0m" in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith(" 0\n")
