# SPDX-License-Identifier: Apache-2.0
"""The exceptions of dsv4.

Wrong arguments raise ValueError or TypeError, too little memory MemoryError; everything else that
can go wrong has its own class here.  All messages are one sentence: what, what was got, what was
expected.
"""


class FormatError(ValueError):
    """A file is not what it says it is.

    Parameters
    ----------
    message : str
        The whole sentence.  Left empty, it is composed from the other arguments.
    file, tensor, rule, got, wanted : str, optional
        Which file, which tensor in it, the rule it breaks, what it holds and what it should hold.
        They stay readable as attributes; what does not apply is None.

    Examples
    --------
    >>> FormatError(file="a.safetensors", tensor="norm.weight", rule="shape", got=[3], wanted=[4])
    FormatError('a.safetensors: norm.weight: shape: got [3], wanted [4]')
    """

    def __init__(
        self, message: str = "", *, file: str | None = None, tensor: str | None = None,
        rule: str | None = None, got: object = None, wanted: object = None,
    ) -> None:
        self.file = file
        self.tensor = tensor
        self.rule = rule
        self.got = None if got is None else shown(got)
        self.wanted = None if wanted is None else shown(wanted)
        super().__init__(message or self._composed())

    def _composed(self) -> str:
        where = [printable(part) for part in (self.file, self.tensor, self.rule) if part]
        facts = []
        if self.got is not None:
            facts.append(f"got {self.got}")
        if self.wanted is not None:
            facts.append(f"wanted {self.wanted}")
        return ": ".join([*where, ", ".join(facts)] if facts else where)


class EncodingError(ValueError):
    """Text is not what the model's message format allows."""


class BackendUnavailable(RuntimeError):
    """A device or backend was asked for that this machine or build does not have."""


class DeviceError(RuntimeError):
    """A device failed; the objects on it are lost."""


class NonFiniteLogitsError(ArithmeticError):
    """A step gave NaN or infinite logits.

    Parameters
    ----------
    message : str
    layer : int, optional
        The first layer whose output was not finite; None if it could not be told.
    """

    def __init__(self, message: str = "", layer: int | None = None) -> None:
        super().__init__(message)
        self.layer = layer


class ForkedProcessError(RuntimeError):
    """A model was used in a forked child: start child processes with the method "spawn"."""


def printable(text: str, limit: int = 200) -> str:
    """Text from a file, fit for one line of a message: escaped where needed, cut in the middle."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 4 :]}"
    return text if text.isprintable() else ascii(text)[1:-1]


def shown(value: object) -> str:
    """A value for a message: strings as they are, everything else by repr, both cut."""
    return printable(value if isinstance(value, str) else repr(value))


def combined(errors: list[FormatError], limit: int = 20) -> FormatError:
    """One error for several: the first keeps its attributes, the message lists up to `limit`."""
    if len(errors) == 1:
        return errors[0]
    first = errors[0]
    rest = f"; and {len(errors) - limit} more" if len(errors) > limit else ""
    error = FormatError(
        f"{len(errors)} faults: " + "; ".join(str(e) for e in errors[:limit]) + rest,
        file=first.file, tensor=first.tensor, rule=first.rule,
    )
    error.got, error.wanted = first.got, first.wanted
    return error
