"""Sizes of blocks: the table, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from qwen_jax.kernels.blocks import Generation, tuned


@pytest.mark.parametrize("generation", get_args(Generation))
@pytest.mark.parametrize("head_dim", [8, 72, 128, 192, 384, 1024])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_long_rows_take_no_more_memory_than_those_of_the_table(generation, head_dim, itemsize):
    table = tuned(generation, head_dim=128, itemsize=2)
    blocks = tuned(generation, head_dim=head_dim, itemsize=itemsize)
    lanes = -(-head_dim // 128) * 128
    for keys, most, least in (
        (blocks.block_kv, table.block_kv, table.block_kv_compute),
        (blocks.backward_block_kv, table.backward_block_kv, table.backward_block_kv_compute),
    ):
        assert keys == least or keys * lanes * itemsize <= most * 128 * 2


@pytest.mark.parametrize("change", [dict(block_q=96), dict(block_kv=64), dict(backward_block_kv_compute=8192)])
def test_bad_blocks_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(tuned("v5e", head_dim=128, itemsize=2), **change)
