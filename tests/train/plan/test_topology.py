"""Names of topologies, and what their links carry."""

from __future__ import annotations

import itertools

import pytest

from qwen_jax.errors import ConfigError
from train.plan.chips import BETWEEN_SLICES, CHIPS
from train.plan.topology import parse

LINK = CHIPS["v5e"].link


@pytest.mark.parametrize(
    "text, label, chips, devices",
    [
        ("v5e:16x16", "v5e:16x16", 256, 256),
        ("v5litepod-256", "v5e:16x16", 256, 256),
        ("v5e-8", "v5e:2x4", 8, 8),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("v5p:4x4x8", "v5p:4x4x8", 128, 128),
        ("v5p-256", "v5p:4x4x8", 128, 128),  # two cores per chip
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v7x:2x2x1", "v7x:2x2x1", 4, 8),  # two devices per chip
        ("tpu7x-8", "v7x:2x2x1", 4, 8),
    ],
)
def test_names(text, label, chips, devices):
    topology = parse(text)
    assert (topology.label, topology.num_chips, topology.num_devices) == (label, chips, devices)
    assert parse(topology.label) == topology
    assert parse(text, slices=3).num_devices == 3 * devices


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5e:3x3", r"v5e has no topology 3x3; it has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5e:32x32", "v5e has no topology 32x32"),
        ("v5p:4x4", "v5p has no topology 4x4; it has 2x2x1"),
        ("v5p-100", "no accelerator type 'v5p-100'; there is v5p-8, v5p-16"),
        ("v5p-" + "9" * 5000, "no topology"),
        ("v9:2x2", "write a chip .v4, v5e, v5p, v6e, v7x. and its shape"),
        ("", "no topology ''"),
        ("v5e", "no topology 'v5e'"),
        ("v5e:2x2\n", "no topology"),
    ],
)
def test_a_topology_that_does_not_exist(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_slices_are_at_least_one():
    with pytest.raises(ConfigError, match="--slices 0 must be at least 1"):
        parse("v5e:2x2", slices=0)


def places(*spans: int, slices: int = 1):
    return list(itertools.product(range(slices), *map(range, spans)))


def test_rates_of_links():
    slice_, two = parse("v5e:16x16"), parse("v5e:16x16", slices=2)
    assert slice_.rate(places(16, 16)) == 4 * LINK  # both rings, both directions
    assert slice_.rate(places(16, 1)) == 2 * LINK
    assert slice_.rate(places(4, 1)) == LINK  # a part of a ring has no way round
    assert parse("v5e:8x8").rate(places(8, 8)) == 2 * LINK  # nor has a slice of less than 16
    assert two.rate(places(1, 1, slices=2)) == BETWEEN_SLICES
    assert two.rate(places(16, 16, slices=2)) == min(4 * LINK, 256 * BETWEEN_SLICES)


def test_the_devices_of_a_chip_share_it():
    v7x = parse("v7x:4x4x4")
    assert v7x.hbm * 2 == v7x.chip.hbm and v7x.flops * 2 == v7x.chip.flops
    assert v7x.rate(places(4, 1, 1)) == v7x.chip.link
