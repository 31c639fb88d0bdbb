"""Rotations of long texts: constants worked out by hand from the papers and the published code, and properties."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk, DynamicNTK, Linear, QwenNTK, Rope, Scaling, Yarn
from qwen_jax.ops import rope

EXACT = dict(rtol=1e-6)  # float32, a few operations deep

YARN = Yarn(
    factor=4.0, original_positions=32768, beta_fast=32.0, beta_slow=1.0, attention_factor=0.1 * math.log(4.0) + 1
)


_frequencies = jax.jit(rope.frequencies, static_argnums=0, static_argnames="head_dim")
_rotation = jax.jit(rope.rotation, static_argnums=0, static_argnames=("head_dim", "logn", "dtype"))


def frequencies(theta, scaling, *, head_dim, lengths=None, positions=((0,),)):
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    positions = jnp.array(positions, jnp.int32)
    return np.asarray(_frequencies(Rope(theta=theta, scaling=scaling), positions, lengths, head_dim=head_dim))


def rotation(scaling, positions, lengths=None, *, theta=1e4, head_dim=16, logn=0, dtype=jnp.float32):
    positions = jnp.array(positions, jnp.int32)
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    return _rotation(
        Rope(theta=theta, scaling=scaling), positions, lengths, head_dim=head_dim, logn=logn, dtype=jnp.dtype(dtype)
    )


@pytest.mark.parametrize(
    ("head_dim", "wanted"),
    [
        (128, {0: 1, 23: 1e6 ** (-46 / 128), 24: 0.0053753215, 31: 8.029597e-4, 40: 4.4456985e-5, 63: 3.1023444e-7}),
        (64, {11: 1e6 ** (-22 / 64), 12: 0.0051547955, 20: 4.4456985e-5, 31: 3.849816e-7}),
    ],
)
def test_yarn(head_dim, wanted):
    got = frequencies(1e6, YARN, head_dim=head_dim)
    np.testing.assert_allclose(got[list(wanted)], list(wanted.values()), **EXACT)
    assert YARN.reach == 131072


def test_yarn_multiplies_queries_and_keys():
    plain, scaled = (rotation(dataclasses.replace(YARN, attention_factor=m), [[0, 5]]) for m in (1.0, 1.1386294361))
    assert plain.cos[0, 0].max() == 1
    for name in ("cos", "sin"):
        np.testing.assert_allclose(getattr(scaled, name), 1.1386294361 * getattr(plain, name), **EXACT)
    assert YARN.attention_factor == pytest.approx(1.1386294361) and YARN.attention_factor**2 == pytest.approx(1.296477)


def test_a_ramp_without_width_is_a_step():
    # Both of its ends are pair 0: one is clipped to it, one rounded up.
    yarn = Yarn(factor=8.0, original_positions=1, beta_fast=1.0, beta_slow=0.2, attention_factor=1.0)
    slower = frequencies(1e4, None, head_dim=16) / frequencies(1e4, yarn, head_dim=16)
    np.testing.assert_allclose(slower, [1] + [8] * 7, **EXACT)


BASES = {1: 1e4, 3: 30527.7367, 7: 72195.8601, 15: 156588.3235}


@pytest.mark.parametrize(
    ("trained", "length", "alpha"),
    [
        (2048, 1, 1), (2048, 2048, 1), (2048, 2049, 3), (2048, 4096, 3), (2048, 4097, 7), (2048, 8192, 7),
        (2048, 8193, 15), (2048, 16384, 15), (8192, 8192, 1), (8192, 8193, 3), (8192, 32768, 7),
    ],
)  # fmt: skip
def test_qwen_ntk(trained, length, alpha):
    got = frequencies(1e4, QwenNTK(original_positions=trained), head_dim=128, lengths=[length])[0, 0, 0]
    np.testing.assert_allclose(got, BASES[alpha] ** (-np.arange(0, 128, 2) / 128), **EXACT)
    if alpha == 1:
        np.testing.assert_array_equal(got, frequencies(1e4, None, head_dim=128))


def test_alpha_is_that_of_the_published_formula_at_every_length():
    trained, lengths = 48, np.arange(1, 3000)
    scaling, positions = QwenNTK(original_positions=trained), np.zeros((len(lengths), 1))
    got = frequencies(1e4, scaling, head_dim=4, lengths=lengths, positions=positions)[:, 0, 0, 1]
    alpha = [max(2 ** math.ceil(math.log2(n / trained) + 1) - 1, 1) for n in lengths]
    np.testing.assert_allclose(got[0] / got, alpha, **EXACT)


def test_qwen_ntk_is_one_alpha_for_all_positions_of_a_row():
    together = rotation(QwenNTK(original_positions=8), [[0, 9, 40]] * 3, [8, 9, 17])
    for row, length in enumerate((8, 9, 17)):
        alone = rotation(QwenNTK(original_positions=8), [[0, 9, 40]], [length])
        np.testing.assert_array_equal(together.cos[row], alone.cos[0])
    assert len({together.cos[row, 2].tobytes() for row in range(3)}) == 3


@pytest.mark.parametrize(("trained", "reach"), [(2048, 16384), (8192, 32768), (65536, 65536)])
def test_how_far_qwen_ntk_reaches(trained, reach):
    assert QwenNTK(original_positions=trained).reach == reach


@pytest.mark.parametrize(("trained", "at"), [
    (2048, {0: 1, 2047: 1, 4095: 1.090909, 8191: 1.181818}), (8192, {8191: 1, 16383: 1.076923, 32766: 1.153843}),
])  # fmt: skip
def test_logn(trained, at):
    got = rotation(None, [list(at)], logn=trained).logn
    np.testing.assert_allclose(got[0, :, 0, 0], list(at.values()), **EXACT)
    assert got.shape == (1, len(at), 1, 1) and rotation(None, [[0]]).logn is None
    assert rotation(None, [[0]], logn=trained, dtype=jnp.bfloat16).logn.dtype == jnp.bfloat16


def test_linear():
    np.testing.assert_allclose(
        rotation(Linear(factor=4.0), [[4, 8, 400]]).sin, rotation(None, [[1, 2, 100]]).sin, rtol=1e-5, atol=1e-6
    )


def test_dynamic_goes_by_what_there_is_when_a_token_comes():
    scaling = DynamicNTK(factor=2.0, original_positions=8)
    # A prompt of 12 tokens, then decoded ones at 12 and 31.
    got = frequencies(1e4, scaling, head_dim=16, lengths=[12], positions=[[0, 11, 12, 31]])[0, :, 0]
    for row, length in zip(got, (12, 12, 13, 32), strict=True):
        base = 1e4 * (2 * length / 8 - 1) ** (16 / 14)
        np.testing.assert_allclose(row, base ** (-np.arange(0, 16, 2) / 16), **EXACT)
    short = frequencies(1e4, scaling, head_dim=16, lengths=[3], positions=[[0, 7]])[0, :, 0]
    np.testing.assert_array_equal(short, [frequencies(1e4, None, head_dim=16)] * 2)


@pytest.mark.parametrize(("size", "local"), [(20, 8), (20, 9), (20, 1), (20, 15), (262144, 8192)])
def test_how_far_apart_tokens_seem_in_dual_chunk_attention(size, local):
    chunk, scaling = size - local, DualChunk(chunk_size=size, local_size=local, original_positions=0)
    at = np.unique(np.add.outer(chunk * np.arange(7), np.arange(-30, 31)).clip(0))
    own = rotation(scaling, [at], theta=1e12, head_dim=4)
    # A pair that turns slowly tells its position.
    own, before, earlier = (np.rint(1e6 * np.arctan2(by.sin, by.cos)[0, :, 0, 1]) for by in (own, *own.afar))
    true, back = np.subtract.outer(at, at), np.subtract.outer(at // chunk, at // chunk)
    seen = true >= 0
    seeming = np.where(back == 0, own[:, None], np.where(back == 1, before[:, None], earlier[:, None])) - own
    exact = seeming == true
    assert exact[seen & (back == 0)].all()
    assert seeming[seen].min() == 0 and seeming.max() == min(2 * chunk - 1, size)
    if local < chunk:
        assert exact[seen & (true <= local + 1)].all()
        assert exact[seen & (at <= size)[:, None]].all() and not exact[at > size].all(axis=1).any()


def test_dual_chunk_scores_grow_with_the_length():
    scaling = DualChunk(chunk_size=20, local_size=8, original_positions=10)
    # A prompt of 12 tokens, then decoded ones at 12 and 29; and a short prompt.
    by = rotation(scaling, [[0, 11, 12, 29], [0, 4, 9, 10]], [12, 5])
    lengths = np.array([[12, 12, 13, 30], [10, 10, 10, 11]])
    for turned in (by, *by.afar):
        np.testing.assert_allclose(
            np.hypot(turned.cos, turned.sin)[:, :, 0, 3], 0.1 * np.log(lengths / 10) + 1, **EXACT
        )


KINDS = [
    (Linear(factor=2.0), dict(factor=3.0)),
    (DynamicNTK(factor=2.0, original_positions=8), dict(factor=3.0, original_positions=9)),
    (QwenNTK(original_positions=8), dict(original_positions=30)),
    (
        DualChunk(chunk_size=20, local_size=8, original_positions=8),
        dict(chunk_size=21, local_size=9, original_positions=9),
    ),
    (
        Yarn(factor=2.0, original_positions=500, beta_fast=9.0, beta_slow=1.0, attention_factor=1.0),
        dict(factor=3.0, original_positions=5000, beta_fast=99.0, beta_slow=0.1, attention_factor=1.1),
    ),
]


def test_every_kind_of_scaling_is_here():
    assert {type(kind) for kind, _ in KINDS} == set(get_args(Scaling))


@pytest.mark.parametrize(("scaling", "changes"), KINDS, ids=[type(kind).__name__ for kind, _ in KINDS])
def test_every_field_of_a_scaling_changes_the_rotation(scaling, changes):
    assert changes.keys() == {field.name for field in dataclasses.fields(scaling)}
    turned = lambda scaling: rotation(scaling, [[3, 29]], [30]).cos
    assert not np.array_equal(turned(scaling), turned(None))
    for name, value in changes.items():
        assert not np.array_equal(turned(dataclasses.replace(scaling, **{name: value})), turned(scaling)), name


@pytest.mark.parametrize(
    "scaling",
    [
        DynamicNTK(factor=2.0, original_positions=8),
        QwenNTK(original_positions=8),
        DualChunk(chunk_size=20, local_size=8, original_positions=8),
    ],
)
def test_lengths_are_not_guessed(scaling):
    with pytest.raises(ValueError, match="give lengths"):
        rotation(scaling, [[0]])
