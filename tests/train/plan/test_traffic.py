"""Bytes moved to and from HBM, on small texts in the compiler's style, each counted by hand."""

from __future__ import annotations

import re

import pytest

from train.plan.traffic import hbm_bytes

ROWS = "{1,0:T(8,128)(2,1)}"  # a layout in HBM
VMEM = "{1,0:T(8,128)(2,1)S(1)}"
ROW = 128 * 2  # bytes of bf16[1,128]


def program(instructions: str, computations: str = "") -> str:
    """A module with a table of 1000 rows, eight more rows, and an index."""
    text = f"""HloModule jit_step, is_scheduled=true
{computations}
ENTRY %main (t: bf16[1000,128], u: bf16[8,128], i: s32[]) -> bf16[8,128] {{
  %t = bf16[1000,128]{ROWS} parameter(0), sharding={{replicated}}
  %u = bf16[8,128]{ROWS} parameter(1), sharding={{replicated}}
  %i = s32[]{{:T(128)S(6)}} parameter(2)
  {instructions.strip()}
}}
"""
    return re.sub(r"\bHBM\b", ROWS, text).replace("VMEM", VMEM)


@pytest.mark.parametrize(
    "instruction, rows",
    [
        ("%x = bf16[8,128]HBM negate(%u)", 8 + 8),
        ("%x = bf16[8,128]VMEM negate(%u)", 8),
        ("%x = f32[8,128]HBM convert(%u)", 8 + 16),
        ("%x = bf16[1000,8]VMEM convolution(%t, %u), dim_labels=bf_oi->bf", 1000 + 8),
        ("%x = bf16[8,128]HBM dynamic-slice(%t, %i, %i), dynamic_slice_sizes={8,128}", 8 + 8),
        # Part of a tile is read to be written; the rest of the table stays where it is.
        ("%x = bf16[1000,128]HBM dynamic-update-slice(%t, %u, %i, %i)", 8 + 2 * 8),
        ("%x = bf16[1000,128]HBM copy(%t)", 1000 + 1000),
        ("%x = bf16[128000]{0:T(1024)(128)(2,1)} bitcast(%t)", 0),
        ("%x = bf16[8,128]HBM all-reduce(%u), channel_id=1, replica_groups={{0,1}}, to_apply=%add", 8 + 8),
        # Kernels fetch what they need, which their operands do not tell.
        ('%x = bf16[8,128]VMEM custom-call(%u, %t), custom_call_target="tpu_custom_call"', 0),
        ('%x = bf16[8,128]HBM custom-call(%u), custom_call_target="TopK"', 8 + 8),
    ],
)
def test_an_instruction(instruction, rows):
    assert hbm_bytes(program(instruction)) == rows * ROW


@pytest.mark.parametrize(
    "start, rows",
    [
        ("%s = (bf16[8,128]VMEM, bf16[8,128]HBM, u32[]{:S(2)}) copy-start(%u)", 8),
        ("%s = (bf16[8,128]HBM, bf16[8,128]VMEM, u32[]{:S(2)}) copy-start(%u)", 8),
        ("%s = ((bf16[1000,128]HBM), bf16[8,128]VMEM, s32[]{:S(2)}) slice-start(%t), slice={[0:8], [0:128]}", 8),
        ("%s = ((bf16[1000,128]HBM), bf16[8,128]HBM, s32[]{:S(2)}) slice-start(%t), slice={[0:8], [0:128]}", 16),
        ("%s = (bf16[8,128]HBM, bf16[32,128]HBM) all-gather-start(%u), replica_groups={{0,1,2,3}}", 8 + 32),
    ],
)
def test_what_is_started_counts_once(start, rows):
    done = start[5:].replace("-start(%u)", "-done(%s)").replace("-start(%t)", "-done(%s)")
    assert hbm_bytes(program(f"{start}\n  %d = {done}")) == rows * ROW


def fused(types: str, body: str) -> str:
    """A computation of parameters of these types."""
    parameters = "".join(f"  %p{i} = {kind} parameter({i})\n" for i, kind in enumerate(types.split()))
    return f"%fused (p: bf16[1]) -> bf16[1] {{\n{parameters}{body}\n}}\n"


@pytest.mark.parametrize(
    "kind, types, body, operands, rows",
    [
        # Eight rows of the table, wherever they are; their numbers are in VMEM.
        ("bf16[8,128]HBM", "bf16[1000,128]HBM s32[8]VMEM", "%g = bf16[8,128]HBM gather(%p0, %p1)", "%t, %n", 8 + 8),
        # As a view of other dimensions, too.
        (
            "bf16[8,128]VMEM",
            "bf16[1000,128]HBM s32[8]VMEM",
            "%b = bf16[10,100,128]HBM bitcast(%p0)\n  %g = bf16[8,128]HBM gather(%b, %p1)",
            "%t, %n",
            8,
        ),
        # In place: eight rows are taken in, and as many read and written.
        (
            "bf16[1000,128]HBM",
            "bf16[1000,128]HBM s32[8]VMEM bf16[8,128]HBM",
            "%s = bf16[1000,128]HBM scatter(%p0, %p1, %p2), to_apply=%add",
            "%t, %n, %u",
            8 + 2 * 8,
        ),
        # Rows are looked up, changed and put back.
        (
            "bf16[1000,128]HBM",
            "bf16[1000,128]HBM s32[8]VMEM",
            "%g = bf16[8,128]HBM gather(%p0, %p1)\n  %s = bf16[1000,128]HBM scatter(%p0, %p1, %g), to_apply=%add",
            "%t, %n",
            8 + 2 * 8,
        ),
        # Whatever else looks at the table reads it, and once.
        (
            "bf16[8,128]VMEM",
            "bf16[1000,128]HBM s32[8]VMEM",
            "%g = bf16[8,128]HBM gather(%p0, %p1)\n  %r = bf16[128]HBM reduce(%p0, %p1)",
            "%t, %n",
            1000,
        ),
        # Where the table itself says which rows, it is no table.
        ("bf16[8,128]VMEM", "s32[8]VMEM bf16[1000,128]HBM", "%g = bf16[8,128]HBM gather(%p0, %p1)", "%n, %t", 1000),
    ],
)
def test_a_fusion(kind, types, body, operands, rows):
    index = "%n = s32[8]{0:T(128)S(1)} iota(), iota_dimension=0"
    text = program(f"{index}\n  %x = {kind} fusion({operands}), kind=kCustom, calls=%fused", fused(types, f"  {body}"))
    assert hbm_bytes(text) == rows * ROW


@pytest.mark.parametrize("operation", ["while", "conditional", "call"])
def test_what_runs_any_number_of_times_is_refused(operation):
    with pytest.raises(ValueError, match="x may run"):
        hbm_bytes(program(f"%x = bf16[8,128]HBM {operation}(%u), to_apply=%fused"))
