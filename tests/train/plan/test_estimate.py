"""Seconds of a step: of collectives, of a program, and by formula."""

from __future__ import annotations

import dataclasses

import pytest

from train.config import Mesh
from train.plan import estimate, formulas, page
from train.plan.chips import BETWEEN_SLICES
from train.plan.compiled import Compiled
from train.plan.hlo import Collective, Program
from train.plan.topology import parse

V5E = parse("v5e:4x4")
PLACES = [(0, x, y, 0) for x in range(4) for y in range(4)]


@pytest.fixture
def on_sixteen(planned):
    return dataclasses.replace(planned, batch_size=16, mesh=Mesh(fsdp=16))


def collective(kind="all-gather", size=1e6, group=(0, 1, 2, 3), **fields):
    fields = dict(executions=1, overlapped=False, where="") | fields
    return Collective(kind=kind, bytes=size, group=group, **fields)


def compiled(*collectives, kernels=None, cycles=0.0):
    program = Program(matmul_cycles=cycles, other_cycles=0, kernels=kernels or {}, collectives=collectives)
    return Compiled(seconds=1, parameters=4, optimizer=8, batch=0, peak=1000, program=program, places=PLACES)


@pytest.mark.parametrize(
    "found, received",
    [
        (collective(), 0.75e6),
        (collective(executions=5), 5 * 0.75e6),
        (collective("all-reduce"), 1.5e6),
        (collective("reduce-scatter", size=0.25e6), 0.75e6),  # its result is one part of four
        (collective("collective-permute", group=(0, 1)), 1e6),
        (collective(group=(3,)), 0.0),
    ],
)
def test_what_a_device_receives(found, received):
    # Devices 0 to 3 lie along a line of four, which is not a ring on this chip.
    assert estimate.duration(found, compiled(found), V5E) == pytest.approx(received / V5E.chip.link)


def test_between_slices_the_network_is_slow():
    sent = collective("all-reduce", group=(), between_slices=True)
    two = dataclasses.replace(V5E, slices=2)
    assert estimate.duration(sent, compiled(sent), two) == pytest.approx(1e6 / BETWEEN_SLICES)


def test_a_step_takes_the_longest_and_what_it_waits_for(on_sixteen):
    beside, waited = collective(size=4e9, overlapped=True), collective(size=1e9)
    second = V5E.chip.clock
    busy = estimate.of_program(on_sixteen, V5E, compiled(beside, waited, cycles=second))
    assert busy.compute == 1 and busy.step == max(1, busy.overlapped) + busy.exposed
    assert busy.tokens_per_second == on_sixteen.tokens_per_step / busy.step
    useful = formulas.train_flops(on_sixteen.model_config, 4096) * on_sixteen.tokens_per_step
    assert busy.mfu == pytest.approx(useful / (busy.step * V5E.num_chips * V5E.chip.flops))


@pytest.mark.parametrize("remat, forward, products", [("none", 28, 7), ("full", 56, 9)])
def test_kernels_count_by_formula(on_sixteen, change, remat, forward, products):
    # Of long sequences the backward kernel runs several times for each forward.
    kernels = {"flash_attention_forward": forward, "flash_attention_backward": 4 * 28}
    found = estimate.of_program(change(on_sixteen, "remat", remat), V5E, compiled(kernels=kernels))
    # Of half the scores: forward has two products, which may run twice, and backward five.
    product = 2 * 28 * 28 * 128 * 4096 * 4096 / 2  # layers, heads, head dim, queries, keys
    assert found.compute == pytest.approx(products * product / V5E.flops / estimate.KERNEL_EFFICIENCY)


def test_the_formula_knows_what_each_axis_costs(planned, change):
    pod = parse("v5e:16x16")
    step = lambda **sizes: estimate.by_formula(change(planned, "mesh", Mesh(**sizes)), pod)
    fsdp, tensor, context = step(fsdp=256), step(fsdp=64, tensor=4), step(fsdp=64, context=4)
    assert fsdp.exposed == 0 < fsdp.overlapped
    assert tensor.exposed > context.exposed > 0
    assert fsdp.compute == tensor.compute == context.compute
    # Half the slices' network: the sum of gradients over data is exposed, and slow.
    two = estimate.by_formula(
        change(change(planned, "batch_size", 512), "mesh", Mesh(data=2, fsdp=256)), parse("v5e:16x16", slices=2)
    )
    gradient = 4 * planned.model_config.num_parameters / 256
    assert two.exposed == pytest.approx(gradient / BETWEEN_SLICES)


def test_the_page_has_every_number(on_sixteen, a_compiler):
    name = "jit(train_step)/transpose(jvp(Qwen))/while/body/closed_call/checkpoint/layers/mlp/up/dot_general"
    kernels = {"flash_attention_forward": 56, "flash_attention_backward": 28}
    found = compiled(collective(executions=28, where=name), kernels=kernels, cycles=1e9)
    text = page.render(on_sixteen, V5E, found)
    for expected in (
        "compiled, not run: compiler estimates (a compiler)",
        "7,615,616,512 parameters",
        "16 x v5e (v5e:4x4), 16 devices",
        "28 x 1.0 MB all-gather, layers/mlp/up backward",
        "56 x flash_attention_forward, 28 x flash_attention_backward",
        "44.9 GFLOP per token (causal attention, no recomputation)",
    ):
        assert expected in text
    fields = page.as_json(on_sixteen, V5E, found)
    assert fields["fits"] and fields["advice"] == [] and fields["estimate"]["mfu"] > 0
