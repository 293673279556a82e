# SPDX-License-Identifier: Apache-2.0
"""The command `dsv4`: generate, batch, chat, info, verify, bench; each with --json.

Answers and reports go to standard output, everything else to standard error.  Exit codes: 0 done,
1 failed (one sentence says why), 2 wrong usage, 130 Ctrl-C, 141 the reader of the output went
away.  Source: DESIGN 7.
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dsv4
from dsv4 import batch_command
from dsv4.device_names import numbers
from dsv4.errors import (
    BackendUnavailable,
    DeviceError,
    FormatError,
    NonFiniteLogitsError,
)
from dsv4.output import Output

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
# what a user can cause; anything else is a bug and keeps its traceback
EXPECTED = (
    OSError, MemoryError, ImportError, ValueError, BackendUnavailable, DeviceError, FormatError,
    NonFiniteLogitsError, NotImplementedError,
)
SAMPLING = (
    ("max-new-tokens", int, "N", "at most N tokens; by default until the sentence or context ends"),
    ("min-new-tokens", int, "N", "do not end before N tokens"),
    ("temperature", float, "T", "0 is greedy"),
    ("top-p", float, "P", "nucleus; 1 is off"),
    ("top-k", int, "K", "0 is off"),
    ("min-p", float, "P", "least probability relative to the highest; 0 is off"),
    ("seed", int, "S", "the same seed gives the same text"),
    ("presence-penalty", float, "X", "-2 to 2; 0 is off"),
    ("frequency-penalty", float, "X", "-2 to 2; 0 is off"),
    ("repetition-penalty", float, "X", "above 0; 1 is off"),
)
CHAT_HELP = (
    "Each line is a message; lines that begin with / are commands, /help lists them: they save and "
    "load the conversation, fork it and take turns back.  Ctrl-C stops a reply, Ctrl-D leaves.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        The exit code.

    Examples
    --------
    >>> main(["generate", "--max-new-tokens", "0", "ROMEO:"])
    2
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("")
        return INTERRUPTED
    except BrokenPipeError:
        # nothing more can be written; the interpreter must not try when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except _Usage as error:
        _say(f"dsv4: error: {error}")
        return USAGE
    except EXPECTED as error:
        _say(f"dsv4: error: {error or type(error).__name__}")
        return FAILED


class _Usage(Exception):
    """The command line cannot be carried out as it is written."""


def _say(line: str) -> None:
    print(line, file=sys.stderr)


# ---- arguments ----

def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv4", description="DeepSeek V4 language models, on this machine.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C, 141 output closed")
    parser.add_argument("--version", action="version", version=f"dsv4 {dsv4.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a text, or answer a message")
    generate.add_argument("prompt", metavar="PROMPT", help="the text; - reads standard input")
    generate.add_argument("--chat", action="store_true", help="send it as a user's message")
    generate.add_argument(
        "--special", action="store_true", help="markers in a raw prompt become their tokens")
    generate.add_argument("-n", "--n", type=int, metavar="N", help="so many answers")
    generate.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--ignore-eos", action="store_true", help="do not end with the sentence")
    generate.add_argument(
        "--logprobs", type=int, metavar="K", help="with --json: log-probabilities, K alternatives")
    generate.set_defaults(run=_generate)

    batch = commands.add_parser(
        "batch", help="answer a file of requests", description=batch_command.DESCRIPTION,
        epilog="exit codes: as for dsv4; 129, 130 or 143 after SIGHUP, Ctrl-C or SIGTERM: start "
        "again to go on")
    batch_command.add_arguments(batch)
    batch.set_defaults(run=_batch)

    chat = commands.add_parser("chat", help="talk with the model", description=CHAT_HELP)
    chat.set_defaults(run=_chat)
    for command in (generate, batch, chat):
        _add_model_arguments(command, *("--limit-memory",) * (command is batch))
        for name, kind, metavar, text in SAMPLING:
            command.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
        if command is not batch:
            command.add_argument("--system", metavar="TEXT", help="a system message (chat)")
        command.add_argument("--thinking", action="store_true", help="reason before the answer")
        command.add_argument("--reasoning-effort", metavar="E", help="low, high or max")

    info = commands.add_parser("info", help="what is in a folder; this machine; memory needed")
    info.add_argument("path", nargs="?", metavar="PATH", help="by default the model inside dsv4")
    info.add_argument("--context", type=int, metavar="N", help="tokens per sequence")
    info.add_argument("--batch", type=int, default=1, metavar="N", help="sequences")
    info.add_argument("--device", default="cpu", type=_device, metavar="DEVICE",
                      help="where they are to be: cpu, cuda, cuda:1, or cuda:0,1")
    _add_memory_argument(info)
    info.set_defaults(run=_info)

    verify = commands.add_parser(
        "verify", help="check this machine's kernels, or a folder",
        description="Without a folder: a tiny model against its stored values, with every kernel "
        "this machine has.  With one: its structure, its scales, its checksums.")
    verify.add_argument("path", nargs="?", metavar="PATH")
    verify.set_defaults(run=_verify)

    bench = commands.add_parser(
        "bench", help="how fast this machine is, and how fast it could be",
        description="Measures a synthetic model of the published dimensions, each figure between "
        "two measurements of its limit.")
    bench.add_argument("--quick", action="store_true", help="four layers, under 90 seconds")
    bench.add_argument("--model", default="flash", choices=("flash", "pro"), help="dimensions")
    bench.add_argument("--experts", type=int, metavar="N", help="a layer; by default what fits")
    bench.add_argument("--threads", type=int, metavar="N", help="by default one per core")
    bench.add_argument("--only", action="append", metavar="NAME", help="this row; may be repeated")
    bench.add_argument("--plot", metavar="FILE.png", help="bars and a roofline")
    bench.add_argument(
        "--peers", metavar="FILE", help="add the rows that tests/bench/peers.py --json printed")
    bench.set_defaults(run=_bench)
    for command in (generate, batch, chat, info, verify, bench):
        command.add_argument("--json", action="store_true", help="for machines")
    return parser


def _add_model_arguments(command: argparse.ArgumentParser, *memory: str) -> None:
    command.add_argument("--model", metavar="PATH", help="folder or hub id; by default the model "
                         "inside dsv4")
    command.add_argument("--threads", type=int, metavar="N", help="by default one per core")
    command.add_argument("--numerics", default="official", choices=("official", "weights"))
    command.add_argument("--device", default="auto", metavar="DEVICE", type=_device,
                         help="auto, cpu, cuda, a GPU as in cuda:1, or several as in cuda:0,1")
    command.add_argument("--no-mmap", action="store_true", help="read the weights into memory")
    _add_memory_argument(command, *memory)


def _add_memory_argument(command: argparse.ArgumentParser, *more: str) -> None:
    command.add_argument(
        "--memory", *more, type=_bytes, metavar="SIZE", help="use at most so many bytes (24G is "
        "24 GiB); by default what is free.  Routed experts beyond that are read from disk when "
        "chosen")


def _device(text: str) -> str:
    """The name of a device."""
    try:
        numbers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device: ")) from None
    return text


def _bytes(text: str) -> int:
    """A number of bytes, with K, M, G or T for powers of 1024."""
    unit = "KMGT".find(text[-1:].upper()) + 1 if text else 0
    try:
        return round(float(text[:-1] if unit else text) * (1 << 10 * unit))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted a number of bytes, as in 24G") from None


def _load(args: argparse.Namespace) -> dsv4.Model:
    return dsv4.load(
        args.model, device=args.device, threads=args.threads, numerics=args.numerics,
        mmap=not args.no_mmap, memory=args.memory)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters given; refused here, before a model is loaded."""
    names = [name.replace("-", "_") for name, *_ in SAMPLING]
    names += ["n", "stop", "logprobs"]
    given = {name: getattr(args, name, None) for name in names}
    given["ignore_eos"] = getattr(args, "ignore_eos", False) or None
    given = {name: value for name, value in given.items() if value is not None}
    try:
        dsv4.Sampling.build({}, **given)
    except (TypeError, ValueError) as error:
        raise _Usage(str(error)) from None
    return given


# ---- generate ----

def _generate(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    chat = args.chat or args.thinking or args.system is not None
    prompt: Any = _read_stdin() if args.prompt == "-" else args.prompt
    if not prompt:
        raise _Usage("PROMPT: got an empty text, wanted at least one character")
    arguments = dict(special=args.special) if not chat else _chat_arguments(args)
    if chat:
        prompt = [*_system(args), {"role": "user", "content": prompt}]
    with _load(args) as model, model.stream(prompt, **arguments, **sampling) as events:
        out = Output(sys.stdout, hidden=args.json or args.n not in (None, 1))
        for event in events:
            out.show(event)
        out.end()
        if args.json:
            results = [completion.as_dict() for completion in events.completions]
            print(json.dumps(results if args.n not in (None, 1) else results[0]))
        elif out.hidden:
            for completion in events.completions:
                print(f"--- {completion.index + 1} ---\n{completion.text}")
    return 0


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise _Usage(
            f"PROMPT: byte {error.start} of standard input is not UTF-8 text") from None


def _system(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _chat_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return dict(thinking_mode="thinking" if args.thinking else "chat",
                reasoning_effort=args.reasoning_effort)


# ---- batch ----

def _batch(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    form = _chat_arguments(args)
    code, report = batch_command.run(lambda: _load(args), dict(
        input=args.input, output=args.output, seed=sampling.pop("seed", 0),
        concurrency=args.concurrency, limit_memory=args.memory, skip_invalid=args.skip_invalid,
        follow=args.follow, force_new=args.force_new, **form, **sampling))
    if report is not None:
        print(json.dumps(report.as_dict()) if args.json else report)
    return code


# ---- chat ----

def _chat(args: argparse.Namespace) -> int:
    from dsv4 import chat

    sampling = _sampling(args)
    with _load(args) as model:
        return chat.run(model, args, sampling)


# ---- info ----

def _info(args: argparse.Namespace) -> int:
    facts = {"model": _model_facts(args), "machine": _machine_facts()}
    if args.json:
        print(json.dumps(facts))
        return 0
    model, machine = facts["model"], facts["machine"]
    print(f"{model['path']}\n{model['kind']}")
    for name in ("shards", "tensors", "dtypes", "tokenizer"):
        if name in model:
            value = model[name]
            if isinstance(value, dict):
                value = ", ".join(f"{n} {key}" for key, n in value.items())
            print(f"  {name:<10} {value}")
    for warning in model.get("warnings", ()):
        print(f"  warning    {warning}")
    print(f"memory for {model['plan']['batch']} x {model['plan']['context']:,} tokens")
    print("  " + model["plan_table"].replace("\n", "\n  "))
    print(f"  free now: {model['free'] / 2**30:,.2f} GiB\nthis machine")
    for name in ("versions", "cpu", "kernels"):
        print(f"  {name}")
        for key, value in machine[name].items():
            print(f"    {key:<22} {value}")
    print(f"  cuda\n    {'state':<22} {machine['cuda']['state']}")
    if machine["cuda"]["built"]:
        print(f"    {'plugin':<22} {machine['cuda']['built']}")
    for i, device in enumerate(machine["cuda"]["devices"]):
        print(f"    {f'device {i}':<22} {device['text']}")
    return 0


def _model_facts(args: argparse.Namespace) -> dict[str, Any]:
    from dsv4 import hub, memory
    from dsv4.checkpoint import Checkpoint
    from dsv4.files import Folder
    from dsv4.loading import DEFAULT_MODEL
    from dsv4.tokenizer import TOKENIZER_FILE

    path = str(DEFAULT_MODEL) if args.path is None else args.path
    free = memory.available_memory()
    needs = dsv4.plan(path, args.context, args.batch, args.device, memory=args.memory or free)
    config = asdict(needs.config)
    facts: dict[str, Any] = {
        "path": path, "kind": f"{needs.config.num_hidden_layers} layers, from its config alone",
        "config": config, "plan": needs.as_dict(), "plan_table": str(needs),
        "free": free,
    }
    if hub.is_repo_id(path) or not Path(path).is_dir():
        return facts
    with Checkpoint.open(path) as checkpoint, Folder(path) as folder:
        facts |= {
            "kind": checkpoint.kind, "shards": len(checkpoint.shards),
            "tensors": len(checkpoint.tensors), "nbytes": checkpoint.nbytes,
            "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
            "draft": checkpoint.draft, "tokenizer": folder.has(TOKENIZER_FILE),
            "warnings": list(checkpoint.warnings),
        }
    return facts


def _machine_facts() -> dict[str, Any]:
    from importlib.metadata import version

    from dsv4 import _core, devices

    versions = {"dsv4": dsv4.__version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("numpy", "tokenizers")}
    versions["platform"] = platform.platform()
    return {
        "versions": versions,
        "cpu": {name: "yes" if has else "no" for name, has in _core.cpu_sets()},
        "kernels": dsv4.kernel_info(),
        "cuda": devices.find().as_dict(),
    }


# ---- verify ----

def _verify(args: argparse.Namespace) -> int:
    from dsv4.verify import verify

    report = verify(args.path)
    print(json.dumps(report.as_dict()) if args.json else report)
    return 0 if report.ok else FAILED


# ---- bench ----

def _bench(args: argparse.Namespace) -> int:
    from dsv4 import bench
    from dsv4.bench import plot, report

    try:
        bench.check(args.model, args.quick, args.experts, args.threads, args.only or ())
        peers, engines = report.read_peers(args.peers) if args.peers else ([], {})
    except ValueError as error:
        raise _Usage(str(error)) from None
    if args.plot:
        plot.check()
    found = bench.run(
        args.model, quick=args.quick, experts=args.experts, threads=args.threads,
        only=args.only or ())
    found = replace(found, rows=[*found.rows, *peers], details=found.details | engines)
    print(json.dumps(found.as_dict()) if args.json else found)
    if args.plot:
        plot.draw(found, args.plot)
    return 0
