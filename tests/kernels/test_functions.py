# SPDX-License-Identifier: Apache-2.0
"""kernels/functions.h against NumPy in float64: special values, errors, rope frequencies.

The vector twins and a denser sample are in tests/c/check_functions.c; `-m long` runs that on all
2^32 floats.
"""

import ctypes
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
F32 = np.float32
NAMES = ["expf", "exp2f", "logf", "log1pf", "sigmoidf", "softplusf"]
DOUBLES = ["exp", "log"]

SOURCE = """
#include "functions.h"
#include <stddef.h>
#define F32(name) \\
    void name##_f32(float *y, const float *x, size_t n); \\
    void name##_f32(float *y, const float *x, size_t n) { \\
        for (size_t i = 0; i < n; i++) y[i] = dsv4_##name(x[i]); }
#define F64(name) \\
    double name##_f64(double x); \\
    double name##_f64(double x) { return dsv4_##name(x); }
double pow_f64(double x, double y);
double pow_f64(double x, double y) { return dsv4_pow(x, y); }
void sincos_f32(float *s, float *c, const float *x, size_t n);
void sincos_f32(float *s, float *c, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) dsv4_sincosf(x[i], s + i, c + i); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """functions.h as a shared library, compiled with the system's compiler."""
    folder = tmp_path_factory.mktemp("functions")
    lines = [f"F32({name})" for name in NAMES] + [f"F64({name})" for name in DOUBLES]
    (folder / "functions.c").write_text(SOURCE + "\n".join(lines) + "\n")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    flags = ["-std=c11", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared"]
    command = [compiler, *flags, f"-I{ROOT / 'kernels'}", "functions.c", "-o", "functions.so"]
    subprocess.run([*command, "-lm"], check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "functions.so"))


@pytest.fixture
def call(library) -> Callable[[str, np.ndarray], np.ndarray]:
    def on_array(name: str, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, F32)
        y = np.empty_like(x)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (y, x)]
        getattr(library, name + "_f32")(*pointers, ctypes.c_size_t(x.size))
        return y

    return on_array


def double(library, name, *x):
    f = getattr(library, name + "_f64")
    f.restype, f.argtypes = ctypes.c_double, [ctypes.c_double] * len(x)
    return f(*x)


def ulps(got, want):
    """Distance in units of the last place of the exact value."""
    place = np.spacing(np.abs(want).astype(F32)).astype(np.float64)
    return np.abs(got.astype(np.float64) - want) / place


# function, NumPy in float64, arguments, ulps as stated in functions.h
g = np.random.default_rng(12)
CASES = [
    ("expf", np.exp, g.uniform(-87.3, 88.7, 200000), 0.90),
    ("exp2f", np.exp2, g.uniform(-126, 127.9, 200000), 0.95),
    ("logf", np.log, 2.0 ** g.uniform(-149, 127, 200000), 0.93),
    ("logf", np.log, g.uniform(0.5, 2, 200000), 0.93),
    ("log1pf", np.log1p, 2.0 ** g.uniform(-140, 127, 200000), 1.27),
    ("log1pf", np.log1p, g.uniform(-0.999, 1, 200000), 1.27),
    ("sigmoidf", lambda x: 1 / (1 + np.exp(-x)), g.uniform(-86, 40, 200000), 2.49),
    ("softplusf", lambda x: np.log1p(np.exp(x)), g.uniform(-86, 20, 200000), 1.67),
]


@pytest.mark.parametrize("name, exact, x, bound", CASES)
def test_error(call, name, exact, x, bound):
    x = x.astype(F32)
    assert ulps(call(name, x), exact(x.astype(np.float64))).max() <= bound


INF, NAN = math.inf, math.nan
SPECIAL = {
    "expf": [
        (0, 1),
        (-INF, 0),
        (INF, INF),
        (NAN, NAN),
        (88.72284, INF),
        (-87.33655, 0),
        (-1e30, 0),
    ],
    "exp2f": [
        (0, 1),
        (10, 1024),
        (-126, 2.0**-126),
        (-126.001, 0),
        (128, INF),
        (-INF, 0),
        (NAN, NAN),
    ],
    "logf": [(1, 0), (0, -INF), (-0.0, -INF), (-1, NAN), (INF, INF), (NAN, NAN), (-INF, NAN)],
    "log1pf": [(0, 0), (-1, -INF), (-1.5, NAN), (INF, INF), (NAN, NAN), (2.0**-149, 2.0**-149)],
    "sigmoidf": [(0, 0.5), (-INF, 0), (INF, 1), (NAN, NAN), (-200, 0), (200, 1)],
    "softplusf": [(INF, INF), (-INF, 0), (NAN, NAN), (20.5, 20.5), (3e38, 3e38), (-200, 0)],
}


@pytest.mark.parametrize("name", NAMES)
def test_special_values(call, name):
    x, want = np.array(SPECIAL[name], np.float64).T.astype(F32)
    got = call(name, x)
    assert np.array_equal(got, want, equal_nan=True)
    assert (got.view(np.uint32)[np.isnan(want)] == 0x7FC00000).all()


def test_softplus_keeps_its_subnormal_tail(call):
    z = np.array([-88, -95, -100, -103], F32)
    np.testing.assert_allclose(call("softplusf", z), np.exp(z.astype(np.float64)), atol=2.0**-149)


def test_sine_and_cosine(library):
    """Angles of every size up to a million radians and far beyond, and near multiples of pi/2."""
    near = (np.arange(1, 700000, 97) * (math.pi / 2)).astype(F32)
    x = np.concatenate([g.uniform(-1.1e6, 1.1e6, 200000).astype(F32), near])
    x = np.concatenate([x, (2.0 ** g.uniform(-40, 29, 100000)).astype(F32), np.zeros(1, F32)])
    s, c = np.empty_like(x), np.empty_like(x)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (s, c, x)]
    library.sincos_f32(*pointers, ctypes.c_size_t(x.size))
    exact = x.astype(np.float64)
    assert ulps(s, np.sin(exact)).max() <= 0.5001 and ulps(c, np.cos(exact)).max() <= 0.5001
    assert s[-1] == 0 and c[-1] == 1


@pytest.mark.parametrize("kind", ["main", "compressed"])
def test_pow_gives_the_rope_frequencies(library, vectors, kind):
    """1 / base^(2i/64), for the compressed table with YaRN (SPEC 3.2), in f32 steps: 1 ulp."""
    base = 10000.0 if kind == "main" else 160000.0
    f = F32(1) / np.array([double(library, "pow", base, 2 * i / 64) for i in range(32)], F32)
    if kind == "compressed":
        turns = [64 * double(library, "log", 65536 / (n * 2 * math.pi)) for n in (32, 1)]
        low, high = (t / (2 * double(library, "log", base)) for t in turns)
        assert (math.floor(low), math.ceil(high)) == (15, 25)
        s = F32(1) - np.clip((np.arange(32, dtype=F32) - F32(15)) / F32(10), F32(0), F32(1))
        f = f / F32(16) * (F32(1) - s) + f * s
    assert ulps(np.load(vectors / "ops.npz")[f"rope/{kind}_freqs"], f).max() <= 1


def test_doubles(library):
    x = 2.0 ** g.uniform(-30, 30, 2000)
    y = g.uniform(-3, 3, 2000)
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        assert double(library, "log", a) == pytest.approx(math.log(a), rel=4.5e-16, abs=1e-300)
        assert double(library, "exp", 50 * b) == pytest.approx(math.exp(50 * b), rel=3.4e-16)
        bound = 2.0**-52 * (3 + abs(b * math.log(a)))
        assert double(library, "pow", a, b) == pytest.approx(a**b, rel=bound)
    assert double(library, "pow", 10000.0, 0.0) == 1.0
    assert math.isnan(double(library, "pow", -1.0, 2.0))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_float(tmp_path):
    sys.path.insert(0, str(ROOT / "tests" / "c"))
    import build

    program = build.build(build.MODES["native"], tmp_path)
    environment = {**os.environ, "DSV4_CHECK_ALL": "1"}
    subprocess.run([program, "--only", "functions"], check=True, env=environment)
