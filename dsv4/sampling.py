# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen: one frozen set of parameters, checked before any work.

Names follow the field, with the aliases of its other libraries; a name that is unknown, or given
twice under two names, is refused.  Defaults are those of the checkpoint's generation_config.json
and what the caller gives always wins, in thinking mode too: nothing is overridden or ignored.
Lengths in generation_config.json are not used: there is no silent default length.

Source: SPEC §7.5; the C sampler that takes the numbers is csrc/gen/sampler.h.
"""

import difflib
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np

from dsv4.errors import FormatError

INT32_MAX = 2**31 - 1

# alias -> the name here
ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "num_return_sequences": "n",
    "repeat_penalty": "repetition_penalty",
}
NOT_YET = ("json_schema", "regex", "choices", "thinking_budget")
FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True)
class _Range:
    """What one number may be."""

    low: float
    high: float
    integer: bool = False
    above_low: bool = False  # low itself is not allowed
    optional: bool = False

    def __str__(self) -> str:
        kind = "an integer" if self.integer else "a number"
        low, high = (str(x) if self.integer else f"{x:g}" for x in (self.low, self.high))
        limits = f"above {low}, up to {high}" if self.above_low else f"from {low} to {high}"
        return f"{kind} {limits}" + (" or None" * self.optional)

    def holds(self, value: float) -> bool:
        if not self.integer:  # the sampler computes in float32: 1e-50 is 0 there
            with np.errstate(over="ignore"):
                value = float(np.float32(value))
        return self.low <= value <= self.high and not (self.above_low and value == self.low)


RANGES = {
    "max_new_tokens": _Range(1, INT32_MAX, integer=True, optional=True),
    "min_new_tokens": _Range(0, INT32_MAX, integer=True),
    "temperature": _Range(0, 100),
    "top_p": _Range(0, 1, above_low=True),
    "top_k": _Range(-1, INT32_MAX, integer=True),
    "min_p": _Range(0, 1),
    "seed": _Range(0, 2**64 - 1, integer=True, optional=True),
    "n": _Range(1, 65536, integer=True),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "repetition_penalty": _Range(0, 100, above_low=True),
    "logprobs": _Range(0, 2**20, integer=True, optional=True),
    "prompt_logprobs": _Range(0, 2**20, integer=True, optional=True),
}
TOKEN_ID = _Range(0, INT32_MAX, integer=True)
BIAS = _Range(-math.inf, float(np.float32(1e30)))

LogitsProcessor = Callable[..., Any]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; every value is checked and normalised when the object is made.

    Parameters
    ----------
    max_new_tokens : int or None
        At most so many tokens; None: until the end of the sentence or of the context.
    min_new_tokens : int
        Stop ids (end of sentence included) and stop strings do not end the answer before.
    temperature : float
        0 is greedy.
    top_p, min_p : float
        Nucleus; least probability relative to the highest.  1 and 0 are off.
    top_k : int
        0 (or -1) is off.
    stop : str or list of str
        The text ends before the first of them; kept as a tuple.
    stop_token_ids : int or list of int
        End the answer too, besides the model's own end of sentence; kept as a tuple.
    seed : int or None
        None draws one; it stays readable here and gives the same tokens again.
    n : int
        So many answers; each has its own random numbers from the same seed.
    presence_penalty, frequency_penalty : float
        From -2 to 2, 0 is off.
    repetition_penalty : float
        Above 0, 1 is off.
    logit_bias : dict from int to float
        Added to the logits of these ids; -inf bans one.  Kept as a tuple of pairs.
    logprobs, prompt_logprobs : int or None
        With each token (of the answer, of the prompt) its log-probability and those of so many
        best ones; None: none.
    force_tokens : sequence of int
        The answer begins with these tokens, whatever the logits say.
    logits_processor : callable or None
        Called with the logits as a NumPy array before each choice.
    ignore_eos : bool
        Generate past the model's own end of sentence.  `stop_token_ids` still hold.
    eos_token_ids : int or list of int
        The model's own end-of-sentence ids; `build` takes them from generation_config.json.

    Raises
    ------
    ValueError
        Out of range; names the argument, what was got and the limits.
    TypeError
        Of the wrong type (a bool is not a number; NumPy scalars are).

    Examples
    --------
    >>> Sampling(temperature=0.7, stop="\\n", seed=1).native()["temperature"]
    0.7
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: Any = ()
    stop_token_ids: Any = ()
    seed: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Any = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    force_tokens: Any = ()
    logits_processor: LogitsProcessor | None = None
    ignore_eos: bool = False
    eos_token_ids: Any = ()

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f.name, getattr(self, f.name)))
        if self.seed is None:
            object.__setattr__(self, "seed", int.from_bytes(os.urandom(8), "little"))
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: got {self.min_new_tokens}, expected at most max_new_tokens, "
                f"which is {self.max_new_tokens}"
            )

    @classmethod
    def build(cls, defaults: Mapping[str, Any] | None = None, **kwargs: Any) -> "Sampling":
        """Make the parameters of one call.

        Parameters
        ----------
        defaults : dict or None
            The checkpoint's generation_config.json.
        **kwargs
            Parameters by name or alias: ``max_tokens``, ``max_completion_tokens``, ``min_tokens``,
            ``stop_strings``, ``eos_token_id``, ``num_return_sequences``, ``repeat_penalty``, and
            ``do_sample`` (False is ``temperature=0``).  None means not given.

        Returns
        -------
        Sampling

        Raises
        ------
        TypeError
            Unknown name, or two names for one thing.
        NotImplementedError
            ``json_schema``, ``regex``, ``choices`` or ``thinking_budget``.
        dsv4.FormatError
            A default in generation_config.json is out of range.

        Examples
        --------
        >>> Sampling.build({"temperature": 0.6, "eos_token_id": 1}, max_tokens=5).temperature
        0.6
        """
        _refuse_unknown(kwargs)
        given = by_our_names({k: v for k, v in kwargs.items() if v is not None})
        values = _from_config(defaults or {}, sampled=given.get("do_sample") is True)
        do_sample = given.pop("do_sample", None)
        if do_sample is not None:
            _apply_do_sample(do_sample, given)
        return cls(**(values | given))

    def check_vocab(self, vocab_size: int) -> None:
        """Raise ValueError unless all token ids, and the numbers of logprobs, fit a vocabulary."""
        ids = {
            "stop_token_ids": self.stop_token_ids, "force_tokens": self.force_tokens,
            "logit_bias": [i for i, _ in self.logit_bias],
        }
        for name, some in ids.items():
            for i in some:
                if i >= vocab_size:
                    raise ValueError(f"{name}: got {i}, expected ids from 0 to {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            k = getattr(self, name)
            if k is not None and k > vocab_size:
                raise ValueError(f"{name}: got {k}, expected at most the {vocab_size} of the model")

    def native(self) -> dict[str, Any]:
        """The numbers for the C sampler.

        Returns
        -------
        dict
            ``temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty``
            float; ``top_k`` int, 0 off; ``seed`` int; ``logprobs`` int, -1 none;
            ``min_new_tokens`` int; ``stop_ids`` tuple of int, the model's end of sentence among
            them unless it is ignored; ``logit_bias`` tuple of (int, float); ``force_tokens`` tuple
            of int; ``ignore_eos`` bool.
        """
        eos = () if self.ignore_eos else self.eos_token_ids
        return {
            "temperature": self.temperature,
            "top_k": max(self.top_k, 0),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "logprobs": -1 if self.logprobs is None else self.logprobs,
            "min_new_tokens": self.min_new_tokens,
            "stop_ids": tuple(dict.fromkeys((*eos, *self.stop_token_ids))),
            "logit_bias": self.logit_bias,
            "force_tokens": self.force_tokens,
            "ignore_eos": self.ignore_eos,
        }


PARAMETERS = tuple(f.name for f in fields(Sampling) if f.name != "eos_token_ids")


# --- names ----------------------------------------------------------------------------------


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    known = (*PARAMETERS, *ALIASES, "do_sample", *NOT_YET)
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PARAMETERS)}"
            raise TypeError(f"{name}: unknown sampling parameter; {hint}")
    for name in NOT_YET:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: dsv4 does not have this sampling parameter yet")


def by_our_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with every alias replaced; TypeError if two of them are one thing."""
    values: dict[str, Any] = {}
    used: dict[str, str] = {}
    for name, value in given.items():
        ours = ALIASES.get(name, name)
        if ours in used:
            raise TypeError(f"{name} and {used[ours]} are two names for one thing: give one")
        used[ours] = name
        values[ours] = value
    return values


def _apply_do_sample(do_sample: object, given: dict[str, Any]) -> None:
    if not isinstance(do_sample, bool | np.bool_):
        _refuse_type("do_sample", do_sample, "True or False")
    temperature = _checked("temperature", given["temperature"]) if "temperature" in given else None
    if temperature is not None and bool(do_sample) == (temperature == 0):
        raise ValueError(
            f"do_sample: got {do_sample} with temperature {temperature}; "
            "do_sample=False is temperature 0"
        )
    if not do_sample:
        given["temperature"] = 0.0


def _from_config(config: Mapping[str, Any], sampled: bool) -> dict[str, Any]:
    """The defaults in generation_config.json; `sampled`: although it says not to sample."""
    values = {}
    wanted = {name: name for name in FROM_GENERATION_CONFIG} | {"eos_token_id": "eos_token_ids"}
    for key, name in wanted.items():
        if config.get(key) is not None:
            try:
                values[name] = _checked(name, config[key])
            except (TypeError, ValueError) as error:
                raise FormatError(f"{GENERATION_CONFIG_FILE}: {error}") from None
    do_sample = config.get("do_sample")
    if do_sample not in (None, True, False):
        raise FormatError(
            file=GENERATION_CONFIG_FILE, rule="do_sample", got=do_sample, wanted="true or false"
        )
    if do_sample is False and not sampled:
        values["temperature"] = 0.0
    return values


# --- values ---------------------------------------------------------------------------------


def _refuse_type(name: str, value: object, wanted: object) -> NoReturn:
    raise TypeError(f"{name}: got {type(value).__name__} {value!r:.60}, expected {wanted}")


def _number(name: str, value: object, allowed: _Range) -> Any:
    """The value as a plain int or float, or an error that names it and its limits."""
    if value is None and allowed.optional:
        return None
    kind = numbers.Integral if allowed.integer else numbers.Real
    if isinstance(value, bool | np.bool_) or not isinstance(value, kind):
        _refuse_type(name, value, allowed)
    plain: Any = value
    try:
        plain = operator.index(plain) if allowed.integer else float(plain)
    except OverflowError:
        raise ValueError(f"{name}: got a number beyond floats, expected {allowed}") from None
    if not allowed.holds(plain):
        huge = isinstance(plain, int) and plain.bit_length() > 128
        raise ValueError(f"{name}: got {'a huge integer' if huge else plain}, expected {allowed}")
    return plain


def _checked(name: str, value: Any) -> Any:
    """One parameter, checked and in its normal form."""
    if name in RANGES:
        return _number(name, value, RANGES[name])
    if name == "stop":
        return _stop_strings(value)
    if name in ("stop_token_ids", "force_tokens", "eos_token_ids"):
        return _token_ids(name, value)
    if name == "logit_bias":
        return _bias(value)
    if name == "logits_processor":
        if value is not None and not callable(value):
            _refuse_type(name, value, "a callable or None")
        return value
    if not isinstance(value, bool | np.bool_):
        _refuse_type(name, value, "True or False")
    return bool(value)


def _stop_strings(value: object) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple):
        _refuse_type("stop", value, "a string or a list of strings")
    for stop in stops:
        if not isinstance(stop, str):
            _refuse_type("stop", stop, "a string")
        if not stop:
            raise ValueError("stop: got an empty string, expected at least one character")
    return tuple(stops)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, numbers.Integral):
        value = (value,)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        _refuse_type(name, value, "a list of token ids")
    return tuple(_number(name, i, TOKEN_ID) for i in value)


def _bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = tuple(value.items())
    pairs = isinstance(value, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in value)
    if not pairs:
        _refuse_type("logit_bias", value, "a dict from token id to number")
    assert isinstance(value, tuple)
    return tuple(
        (_number("logit_bias", i, TOKEN_ID), _number(f"logit_bias[{i!r}]", bias, BIAS))
        for i, bias in value
    )
