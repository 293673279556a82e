# SPDX-License-Identifier: Apache-2.0
"""Batch jobs: a JSONL file of requests in, one of answers out, whatever happens in between.

The whole input is checked before any work (`dsv4.batch_input`); each row that is done is on disk at
once (`dsv4.batch_files`); a job that was killed is started again and gives the same bytes as one
that was not, because a row's seed comes from the job's seed and its custom_id, and its answer does
not depend on its neighbours.

An input that grows (`follow`) cannot be checked before any work: each line is checked when it is
there, those that are not valid go to the error file, and how far the input was read is noted with
its digest before the work on it begins.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dsv4
from dsv4.answer import Completion, TokenLogprob, told
from dsv4.batch import NOT_YET, _Bar, batch
from dsv4.batch_files import Job
from dsv4.batch_input import Growing, Line, Request, read_lines, read_request
from dsv4.errors import FormatError
from dsv4.generate import checked_sampling, form_of, prepared
from dsv4.model import Model
from dsv4.sampling import by_our_names
from dsv4.scheduler import check_concurrency

MOST_FAULTS = 20
LINES_AT_ONCE = 256
FORM_DEFAULTS = dict(
    special=False, thinking_mode="chat", reasoning_effort=None, drop_thinking=True, version=None)


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What a job did.

    Attributes
    ----------
    output, errors : str
        The files; errors is empty if there are none.
    rows, failed, skipped : int
        Requests, those of them that ended in an error, and lines left out as invalid.
    resumed : int
        Rows that were done before this start.
    completion_tokens : int
        Of the rows done by this start.
    seconds : float
    """

    output: str
    errors: str
    rows: int
    failed: int
    skipped: int
    resumed: int
    completion_tokens: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for json."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.output}: {self.rows - self.failed:,} of {self.rows:,} rows answered"]
        if self.resumed:
            parts.append(f"{self.resumed:,} of them before this start")
        if self.errors:
            parts.append(f"{self.failed + self.skipped:,} in {self.errors}")
        rate = self.completion_tokens / self.seconds if self.seconds > 0 else 0.0
        return f"{', '.join(parts)}; {self.completion_tokens:,} tokens, {rate:.1f} a second"


def run_batch(
    model: Model | str | os.PathLike[str] | None, input: str | os.PathLike[str],
    output: str | os.PathLike[str], *, seed: int = 0, concurrency: int | None = None,
    limit_memory: int | None = None, skip_invalid: bool = False, follow: bool = False,
    force_new: bool = False, progress: bool | None = None, **arguments: Any,
) -> BatchReport:
    """Answer a file of requests in OpenAI's batch form.

    Parameters
    ----------
    model : Model, path, hub id or None
        What is not a Model is loaded, after the input was read; None is the model in the package.
    input, output : path
        JSONL.  Beside ``out.jsonl`` there are ``out.errors.jsonl`` with the rows that failed,
        ``out.run.json`` that says whose work this is, and ``out.partial.jsonl`` until it is done.
    seed : int
        Of the job; a row's own comes from it and the custom_id, unless the row gives one.
    concurrency : int, optional
        Sequences in one step; by default what fits, at most 64.  It changes no bit of the output.
    limit_memory : int, optional
        Most bytes to use, weights included; what is free by default.
    skip_invalid : bool
        Lines that are not valid go to the error file; else nothing is done.
    follow : bool
        The input grows: read lines as they are appended, until the line ``{"end": true}``.  Each is
        checked when it is there; those that are not valid go to the error file.  What was read once
        must stay as it is.  Stopped by a signal, the same call goes on.
    force_new : bool
        Begin again, replacing what is there.
    progress : bool, optional
        A bar on standard error; by default on a terminal.
    **arguments
        Sampling parameters and how prompts are read for rows that do not say.

    Returns
    -------
    BatchReport

    Raises
    ------
    FormatError
        Lines are not valid: their numbers, and what is wrong; before any work.
    ValueError
        There is an unfinished job of other facts: names the first that differs.
    OSError
        The disk is full, or another process works on this job.

    Notes
    -----
    Interrupted or killed at any moment, the same call goes on where it was, and the output has the
    same bytes as that of an undisturbed run.  ``created`` is always 0 for that reason.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> import dsv4
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> row = {"custom_id": "a", "body": {"prompt": "ROMEO:", "max_tokens": 4}}
    >>> _ = (folder / "in.jsonl").write_text(json.dumps(row) + "\\n")
    >>> dsv4.run_batch(None, folder / "in.jsonl", folder / "out.jsonl").rows
    1
    >>> json.loads((folder / "out.jsonl").read_text())["response"]["body"]["usage"]["total_tokens"]
    7
    """
    def load() -> Model:
        return dsv4.load(None if isinstance(model, Model) else model, memory=limit_memory)

    return work(
        model if isinstance(model, Model) else load, input, output, seed=seed,
        concurrency=concurrency, limit_memory=limit_memory, skip_invalid=skip_invalid,
        follow=follow, force_new=force_new, progress=progress, **arguments)


def work(
    model: Model | Callable[[], Model], input: str | os.PathLike[str],
    output: str | os.PathLike[str], *, seed: int = 0, concurrency: int | None = None,
    limit_memory: int | None = None, skip_invalid: bool = False, follow: bool = False,
    force_new: bool = False, progress: bool | None = None, **arguments: Any,
) -> BatchReport:
    """As `run_batch`, with a model or a function that loads it once the input is known."""
    started = time.monotonic()
    check_concurrency(concurrency)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: got {seed!r}, wanted an integer from 0 to 2^64 - 1")
    source, target = Path(input), Path(output)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: there is no such folder for the output")
    if target.exists() and source.samefile(target):
        raise ValueError(f"{target}: is the input; wanted another file for the output")
    growing = Growing(source) if follow else None
    with growing or nullcontext():
        lines: list[Line] = []
        about: dict[str, Any] = {"follow": True}
        if growing is None:
            lines, digest = read_lines(source)
            about = {"input_sha256": digest}
            if not skip_invalid:
                _refuse(source, lines)
        with nullcontext(model) if isinstance(model, Model) else model() as loaded:
            form, parameters = form_of(arguments)
            if "logits_processor" in parameters:
                raise TypeError("logits_processor: not available in a job: it could not be resumed")
            parameters = by_our_names({k: v for k, v in parameters.items() if v is not None})
            checked_sampling(loaded, None, parameters)
            defaults = _Defaults(loaded, seed, parameters, form)
            lines = [defaults.check(source, line) for line in lines]
            if not skip_invalid:
                _refuse(source, lines)
            facts = about | {
                "format": 1, "dsv4": dsv4.__version__, "seed": seed,
                "model": {k: v for k, v in loaded._fingerprint.items() if k != "state_layout"},
                "generation_config": loaded.generation_config,
                "sampling": parameters, "prompts": FORM_DEFAULTS | form,
                "skip_invalid": bool(skip_invalid or follow)}
            job = Job(target, facts, force_new)
            done = False
            try:
                inputs = _Inputs(source, lines, growing, defaults, job)
                report = _run(job, defaults, inputs, started, concurrency,
                              _for_states(loaded, limit_memory), progress)
                done = True
            finally:
                job.close(done)
    return report


class _Inputs:
    """The lines of a job: all of them, or those of a growing file as they come.

    Attributes
    ----------
    lines : list of Line
        Those that are known.
    """

    def __init__(
        self, source: Path, lines: list[Line], growing: Growing | None, defaults: "_Defaults",
        job: Job,
    ) -> None:
        self.source, self.lines = source, lines
        self.growing, self.defaults, self.job = growing, defaults, job
        if growing is not None and job.input_read is not None:
            growing.check(**job.input_read)

    def __iter__(self) -> Iterator[Line | None]:
        """Every line; None: the next one is not there yet."""
        if self.growing is None:
            yield from self.lines
            return
        while True:
            new = self.growing.read(LINES_AT_ONCE)
            noted = self.job.input_read or {"bytes": 0}
            if self.growing.nbytes > noted["bytes"]:
                self.job.note_input(self.growing.nbytes, self.growing.digest)
            for line in new:
                self.lines.append(self.defaults.check(self.source, line))
                yield self.lines[-1]
            if self.growing.ended:
                return
            if not new:
                yield None


def _for_states(model: Model, limit: int | None) -> int | None:
    """What a limit leaves for the states of sequences."""
    if limit is None:
        return None
    return max(1, limit - (model.plan.resident - model.plan.state_bytes))


def _refuse(source: Path, lines: list[Line]) -> None:
    """FormatError with the numbers of lines that are not valid, if there are any."""
    bad = [f"line {line.number}: {line.fault}" for line in lines if line.fault is not None]
    if bad:
        rest = f"; and {len(bad) - MOST_FAULTS} more" if len(bad) > MOST_FAULTS else ""
        raise FormatError(f"{source}: {'; '.join(bad[:MOST_FAULTS])}{rest}", file=str(source))


@dataclass(frozen=True)
class _Defaults:
    """What makes a row of a request."""

    model: Model
    seed: int
    parameters: dict[str, Any]
    form: dict[str, Any]

    def arguments(self, request: Request) -> dict[str, Any]:
        """The arguments of a row: its own first."""
        return {"seed": row_seed(self.seed, request.custom_id)} | self.parameters | self.form | \
            by_our_names(request.own)

    def check(self, source: Path, line: Line) -> Line:
        """The line, with the fault that its tokens have."""
        if line.fault is not None:
            return line
        with open(source, "rb") as file:
            try:
                request = read_request(file, line)
                form, parameters = form_of(self.arguments(request))
                prepared(self.model, request.prompt, parameters, form)
            except (ValueError, TypeError) as error:
                return Line(line.number, line.offset, line.nbytes, line.custom_id, str(error))
        return line


def _run(
    job: Job, defaults: _Defaults, inputs: _Inputs, started: float, concurrency: int | None,
    memory: int | None, progress: bool | None,
) -> BatchReport:
    log = job.log
    if job.finished:
        return _finished(job, inputs)
    resumed, tokens = len(log.done), 0
    requests: dict[int, Request] = {}

    def prompts() -> Iterator[Any]:
        with open(inputs.source, "rb") as file:
            i = 0
            for line in inputs:
                if line is None:
                    yield NOT_YET
                elif line.fault is None and line.custom_id not in log.done:
                    requests[i] = read_request(file, line)
                    yield requests[i].prompt, defaults.arguments(requests[i])
                    i += 1

    total = sum(line.fault is None for line in inputs.lines) if inputs.growing is None else None
    bar = _Bar(total, progress)
    try:
        for i, answer in batch(
                defaults.model, prompts(), ordered=False, concurrency=concurrency, memory=memory,
                progress=False):
            answers = answer if isinstance(answer, list) else [answer]
            request = requests.pop(i)
            row = _row(defaults, request, answers)
            log.append(request.custom_id, _text(row), row["error"] is not None)
            tokens += sum(a.usage["completion_tokens"] for a in answers)
            bar.show(len(log.done), tokens)
    finally:
        bar.close()
    log.sync()
    lines = inputs.lines
    valid = [line for line in lines if line.fault is None]
    job.finish(
        (log.row(_id(line)) for line in valid if not log.done[_id(line)][2]),
        (_invalid(line) if line.fault is not None else log.row(_id(line))
         for line in lines if line.fault is not None or log.done[_id(line)][2]))
    return BatchReport(
        str(job.output), str(job.errors) if job.errors.exists() else "", len(valid),
        sum(failed for _, _, failed in log.done.values()), len(lines) - len(valid), resumed, tokens,
        time.monotonic() - started)


def _finished(job: Job, inputs: _Inputs) -> BatchReport:
    """The report of a job that was done before."""
    lines = [line for line in inputs if line is not None]
    skipped = sum(line.fault is not None for line in lines)
    found = job.errors.exists()
    failed = job.errors.read_bytes().count(b"\n") - skipped if found else 0
    rows = len(lines) - skipped
    return BatchReport(str(job.output), str(job.errors) if found else "", rows, failed, skipped,
                       rows, 0, 0.0)


def _id(line: Line) -> str:
    assert line.custom_id is not None
    return line.custom_id


def row_seed(seed: int, custom_id: str) -> int:
    """The seed of a row: that of the job and the custom_id alone decide.  The choices of a row
    have their own random numbers from it (`dsv4.Sampling`)."""
    text = b"%d\0%b" % (seed, custom_id.encode())
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# ---- rows in OpenAI's form ----

def _text(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(
        errors="backslashreplace")


def _name(defaults: _Defaults, request: Request) -> str:
    digest = hashlib.blake2b(b"%d\0%b" % (defaults.seed, request.custom_id.encode()),
                             digest_size=12, person=b"dsv4 row")
    return digest.hexdigest()


def _row(defaults: _Defaults, request: Request, answers: list[Completion]) -> dict[str, Any]:
    """The line of a row that is done."""
    name = _name(defaults, request)
    error = next((a.error for a in answers if a.error is not None), None)
    row: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": request.custom_id}
    if error is not None:
        status = 400 if isinstance(error, ValueError | TypeError) else 500
        fault = {"code": type(error).__name__, "message": told(error)}
        return row | {
            "response": {"status_code": status, "request_id": name, "body": {"error": fault}},
            "error": fault}
    choice = _chat_choice if request.chat else _text_choice
    body = {
        "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{name}",
        "object": "chat.completion" if request.chat else "text_completion", "created": 0,
        "model": request.model or defaults.model.path.name,
        "choices": [choice(defaults.model, a, i, name) for i, a in enumerate(answers)],
        "usage": _usage(answers)}
    return row | {"response": {"status_code": 200, "request_id": name, "body": body}, "error": None}


def _invalid(line: Line) -> bytes:
    return _text({
        "id": f"batch_req_line_{line.number}", "custom_id": line.custom_id, "response": None,
        "error": {"code": "invalid_line", "message": f"line {line.number}: {line.fault}",
                  "line": line.number}})


def _usage(answers: list[Completion]) -> dict[str, int]:
    prompt = answers[0].usage["prompt_tokens"]
    new = sum(a.usage["completion_tokens"] for a in answers)
    return dict(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


def _chat_choice(model: Model, answer: Completion, i: int, name: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": f"call_{name}_{i}_{j}", **call} for j, call in enumerate(answer.tool_calls)]
    ended = "tool_calls" if answer.tool_calls and answer.finish_reason == "stop" else \
        answer.finish_reason
    logprobs = None if answer.logprobs is None else {"content": [
        _token(model, entry.token, entry.logprob) | {
            "top_logprobs": [_token(model, *pair) for pair in entry.top]}
        for entry in answer.logprobs]}
    return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": ended}


def _text_choice(model: Model, answer: Completion, i: int, name: str) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": i, "text": answer.text, "logprobs": None,
                              "finish_reason": answer.finish_reason}
    if model.tokenizer is None:
        choice["token_ids"] = answer.tokens
    if answer.logprobs is not None:
        choice["logprobs"] = _text_logprobs(model, answer.logprobs)
    return choice


def _text_logprobs(model: Model, logprobs: list[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [_spelled(model, entry.token) for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [{_spelled(model, t): p for t, p in entry.top} for entry in logprobs]}


def _token(model: Model, token: int, logprob: float) -> dict[str, Any]:
    text = _spelled(model, token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "token_id": token}


def _spelled(model: Model, token: int) -> str:
    return f"<{token}>" if model.tokenizer is None else model.tokenizer.decode([token])
