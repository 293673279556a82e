# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters: names, aliases, defaults, limits, and what the C sampler gets."""

import dataclasses
import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4 import sampling
from dsv4.errors import FormatError
from dsv4.sampling import RANGES, Sampling

CONFIG = Path(__file__).resolve().parents[1] / "vectors" / "configs" / "generation_config.json"
OFFICIAL = json.loads(CONFIG.read_text("utf-8"))

NATIVE_OFF = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "repetition_penalty": 1.0, "seed": 5, "logprobs": -1,
    "min_new_tokens": 0, "stop_ids": (), "logit_bias": (), "force_tokens": (),
    "ignore_eos": False,
}


def native(defaults: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    return Sampling.build(defaults, **{"seed": 5} | kwargs).native()


def test_everything_is_off_without_defaults() -> None:
    assert native() == NATIVE_OFF
    assert Sampling(seed=5).native() == NATIVE_OFF
    assert Sampling.build().max_new_tokens is None, "no silent default length"


def test_defaults_of_the_checkpoint() -> None:
    assert native(OFFICIAL) == NATIVE_OFF | {"stop_ids": (1,)}
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1,
              "repetition_penalty": 1.1, "eos_token_id": [1, 7], "do_sample": True,
              "max_new_tokens": 5, "max_length": 20, "unknown": "ignored", "logprobs": None}
    assert native(config) == NATIVE_OFF | {
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1,
        "stop_ids": (1, 7),
    }
    assert Sampling.build(config).max_new_tokens is None, "lengths of the file are not used"


def test_what_the_caller_gives_wins_and_nothing_is_overridden() -> None:
    """The policy for thinking mode too: it knows no sampling of its own."""
    config = {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.3, "do_sample": True}
    given = {"temperature": 0.2, "top_p": 0.5, "repetition_penalty": 1.0, "presence_penalty": 1.5}
    got = native(config, **given)
    assert {name: got[name] for name in given} == given
    assert native(config, temperature=None)["temperature"] == 0.6, "None is not given"


@pytest.mark.parametrize(
    ("defaults", "kwargs", "temperature"),
    [
        ({"do_sample": False}, {}, 0.0),
        ({"do_sample": False, "temperature": 0.6}, {}, 0.0),
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": True}, 0.6),
        ({"do_sample": False}, {"temperature": 0.7}, 0.7),
        ({"do_sample": False}, {"top_p": 0.7}, 0.0),
        ({"temperature": 0.6}, {"do_sample": False}, 0.0),
        ({"temperature": 0.6}, {"do_sample": np.True_}, 0.6),
        ({}, {"do_sample": True}, 1.0),
        ({}, {"do_sample": False, "temperature": 0}, 0.0),
    ],
)
def test_do_sample(defaults: Any, kwargs: Any, temperature: float) -> None:
    assert native(defaults, **kwargs)["temperature"] == temperature


@pytest.mark.parametrize(
    ("alias", "value", "name", "normal"),
    [
        ("max_tokens", 9, "max_new_tokens", 9),
        ("max_completion_tokens", 9, "max_new_tokens", 9),
        ("min_tokens", 2, "min_new_tokens", 2),
        ("stop_strings", "x", "stop", ("x",)),
        ("eos_token_id", 4, "stop_token_ids", (4,)),
        ("num_return_sequences", 3, "n", 3),
        ("repeat_penalty", 1.2, "repetition_penalty", 1.2),
    ],
)
def test_aliases(alias: str, value: Any, name: str, normal: Any) -> None:
    assert getattr(Sampling.build({}, **{alias: value}), name) == normal
    with pytest.raises(TypeError, match=f"{name} and {alias}|{alias} and {name}"):
        Sampling.build({}, **{alias: value, name: value})
    assert getattr(Sampling.build({}, **{alias: value, name: None}), name) == normal
    assert alias in sampling.ALIASES and len(sampling.ALIASES) == 7


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("topp", "top_p"),
     ("max_length", "max_new_tokens"), ("stops", "stop"), ("eos_token_ids", "eos_token_id")],
)
def test_unknown_names_get_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: unknown .* did you mean '") as error:
        Sampling.build({}, **{name: None})
    if name != "max_length":
        assert f"'{suggestion}'" in str(error.value)


def test_a_name_like_nothing_lists_all() -> None:
    with pytest.raises(TypeError, match="qqqq: unknown sampling parameter; known are max_new"):
        Sampling.build({}, qqqq=1)


@pytest.mark.parametrize("name", ["json_schema", "regex", "choices", "thinking_budget"])
def test_what_is_not_there_yet_says_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        Sampling.build({}, **{name: "x"})
    assert native(**{name: None}) == NATIVE_OFF


# --- limits ---------------------------------------------------------------------------------


def just_outside(name: str) -> list[Any]:
    allowed = RANGES[name]
    step: Any = 1 if allowed.integer else 1e-3
    low: Any = allowed.low if allowed.above_low else allowed.low - step
    return [low, allowed.high + step, -(10**400), 10**400]


@pytest.mark.parametrize("name", RANGES)
def test_limits_of_every_number(name: str) -> None:
    allowed = RANGES[name]
    for value in (allowed.high, allowed.low + (0.5 if allowed.above_low else 0)):
        assert getattr(Sampling(**{name: value}), name) == value
    for value in just_outside(name):
        words = f"^{name}: got .*, expected an? (integer|number) .* to "
        with pytest.raises(ValueError, match=words) as error:
            Sampling.build({}, **{name: value})
        assert len(str(error.value)) < 160
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(TypeError if allowed.integer else ValueError, match=f"^{name}: got"):
            Sampling(**{name: value})
    for wrong in (True, np.True_, "1", [1], 1j, {}, np.array([1, 2])):
        with pytest.raises(TypeError, match=f"^{name}: got .*, expected a"):
            Sampling(**{name: wrong})
    if not allowed.optional:
        with pytest.raises(TypeError, match=f"^{name}: got NoneType"):
            Sampling(**{name: None})


@pytest.mark.parametrize("name", RANGES)
def test_numpy_scalars_become_plain_numbers(name: str) -> None:
    kinds: list[Any] = [np.int32, np.uint8, np.int64]
    if not RANGES[name].integer:
        kinds += [np.float32, np.float64, np.float16]
    for kind in kinds:
        value = getattr(Sampling(**{name: kind(1)}), name)
        assert value == 1 and type(value) is (int if RANGES[name].integer else float)
    if RANGES[name].integer:
        with pytest.raises(TypeError, match=f"{name}: got float 1.0, expected an integer"):
            Sampling(**{name: 1.0})


def test_numbers_that_are_zero_in_float32() -> None:
    with pytest.raises(ValueError, match="top_p: got 1e-50, expected a number above 0, up to 1"):
        Sampling(top_p=1e-50)
    with pytest.raises(ValueError, match="repetition_penalty"):
        Sampling(repetition_penalty=1e-50)
    with pytest.raises(ValueError, match="temperature: got 1e\\+300"):
        Sampling(temperature=1e300)


@pytest.mark.parametrize(
    ("kwargs", "kind", "words"),
    [
        ({"stop": ""}, ValueError, "stop: got an empty string"),
        ({"stop": ["a", ""]}, ValueError, "stop: got an empty string"),
        ({"stop": [1]}, TypeError, "stop: got int 1, expected a string"),
        ({"stop": b"a"}, TypeError, "stop: got bytes"),
        ({"stop_token_ids": "12"}, TypeError, "stop_token_ids: got str"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids: got -1"),
        ({"stop_token_ids": [True]}, TypeError, "stop_token_ids: got bool"),
        ({"force_tokens": [1.5]}, TypeError, "force_tokens: got float"),
        ({"force_tokens": [2**31]}, ValueError, "force_tokens: got 2147483648"),
        ({"force_tokens": {1: 2}}, TypeError, "force_tokens: got dict"),
        ({"logit_bias": [1]}, TypeError, "logit_bias: got list"),
        ({"logit_bias": {"1": 1}}, TypeError, "logit_bias: got str"),
        ({"logit_bias": {1: math.nan}}, ValueError, r"logit_bias\[1\]: got nan"),
        ({"logit_bias": {1: math.inf}}, ValueError, r"logit_bias\[1\]: got inf"),
        ({"logit_bias": {1: 1e31}}, ValueError, r"logit_bias\[1\]: got 1e\+31"),
        ({"logit_bias": {-1: 1}}, ValueError, "logit_bias: got -1"),
        ({"logits_processor": 5}, TypeError, "logits_processor: got int 5, expected a callable"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos: got int 1, expected True or False"),
        ({"do_sample": 1}, TypeError, "do_sample: got int 1"),
        ({"do_sample": False, "temperature": 0.5}, ValueError, "do_sample: got False with"),
        ({"do_sample": True, "temperature": 0}, ValueError, "do_sample: got True with"),
        ({"do_sample": True, "temperature": math.nan}, ValueError, "temperature: got nan"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, ValueError,
         "min_new_tokens: got 5, expected at most max_new_tokens, which is 4"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        Sampling.build({}, **kwargs)


@pytest.mark.parametrize(
    "config",
    [{"temperature": -1}, {"top_p": "0.9"}, {"top_k": 1.5}, {"eos_token_id": -1},
     {"eos_token_id": "1"}, {"do_sample": "yes"}, {"min_p": math.nan}],
)
def test_a_bad_default_names_the_file(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=f"generation_config.json: {next(iter(config))}"):
        Sampling.build(config, temperature=0.5)


def test_ids_are_checked_against_the_vocabulary() -> None:
    Sampling(stop_token_ids=9, force_tokens=[9], logit_bias={9: 1.0}, logprobs=10).check_vocab(10)
    for bad in ({"stop_token_ids": 10}, {"force_tokens": [3, 10]}, {"logit_bias": {10: 1}}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: got 10, expected ids from 0 to"):
            Sampling(**bad).check_vocab(10)
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(ValueError, match=f"{name}: got 11, expected at most the 10"):
            Sampling(**{name: 11}).check_vocab(10)


# --- what comes out -------------------------------------------------------------------------


def test_normal_forms() -> None:
    made = Sampling.build(
        OFFICIAL, seed=np.uint64(2**64 - 1), top_k=-1, stop=["a", "b"], logprobs=0,
        stop_token_ids=np.array([5, 1, 5]), force_tokens=iter([3, 4]), n=2, prompt_logprobs=3,
        logit_bias={np.int64(3): np.float32(-1.5), 4: -math.inf}, min_new_tokens=2,
    )
    assert made.stop == ("a", "b") and (made.n, made.prompt_logprobs) == (2, 3)
    assert made.native() == NATIVE_OFF | {
        "seed": 2**64 - 1, "logprobs": 0, "stop_ids": (1, 5), "force_tokens": (3, 4),
        "logit_bias": ((3, -1.5), (4, -math.inf)), "min_new_tokens": 2,
    }
    assert hash(made) == hash(dataclasses.replace(made)) and made == dataclasses.replace(made)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.temperature = 0.0  # type: ignore[misc]


def test_ignoring_the_end_of_sentence_keeps_explicit_stops() -> None:
    got = native(OFFICIAL, ignore_eos=True, stop_token_ids=[7])
    assert (got["stop_ids"], got["ignore_eos"]) == ((7,), True)


def test_a_seed_is_drawn_and_recorded() -> None:
    seeds = {Sampling().seed for _ in range(20)}
    assert len(seeds) == 20 and all(s is not None and 0 <= s < 2**64 for s in seeds)
    one = Sampling()
    assert one.native()["seed"] == one.seed == dataclasses.replace(one, temperature=0.5).seed


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(
    st.sampled_from([*sampling.PARAMETERS, *sampling.ALIASES, "do_sample"]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.lists(st.integers(-1, 9), max_size=3) | st.dictionaries(st.integers(), st.floats()),
    max_size=4,
))
def test_any_values_are_taken_or_refused_by_name(kwargs: dict[str, Any]) -> None:
    try:
        made = Sampling.build(OFFICIAL, **kwargs)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in [*kwargs, *sampling.ALIASES.values()])
        return
    got = made.native()
    assert set(got) == set(NATIVE_OFF)
    for name, value in got.items():
        assert type(value) is type(NATIVE_OFF[name])
    assert Sampling(**dataclasses.asdict(made)) == made


def test_examples_in_docstrings() -> None:
    failed, tried = doctest.testmod(sampling)
    assert tried > 0 and failed == 0
