"""Layouts: which there are, in what order, and what cannot be laid out."""

from __future__ import annotations

import dataclasses
import math

import pytest

from qwen_jax.errors import ConfigError
from train.config import Mesh
from train.plan import candidates, estimate, formulas
from train.plan.topology import parse

V5E, V5P = parse("v5e:16x16"), parse("v5p:4x4x8")


def test_every_candidate_trains_the_same_run_on_all_devices(planned):
    found = candidates.candidates(planned, V5E)
    assert len(found) > 100
    for each in found:
        assert math.prod(dataclasses.astuple(each.mesh)) == 256
        same = dataclasses.replace(each, mesh=planned.mesh, remat=planned.remat, accumulation=planned.accumulation)
        assert same == planned
    assert {each.mesh.tensor for each in found} == {1, 2, 4}  # of 28 heads and 4 kv heads, 7 and 14 would not do


def test_slices_lie_along_data(planned):
    found = candidates.candidates(dataclasses.replace(planned, batch_size=512), parse("v5e:16x16", slices=2))
    assert found and all(each.mesh.data % 2 == 0 for each in found)


def test_what_fits_comes_first_and_then_what_is_faster(planned):
    found = candidates.candidates(planned, V5E)
    fits = [formulas.train_bytes(each) <= V5E.hbm for each in found]
    assert fits == sorted(fits, reverse=True) and not all(fits)
    steps = [estimate.by_formula(each, V5E).step for each in found[: sum(fits)]]
    assert steps == sorted(steps)


def test_the_mesh_must_have_the_devices(planned):
    assert candidates.with_devices(planned, V5E) is planned
    with pytest.raises(
        ConfigError, match=r"the mesh has 256 devices and v5p:4x4x8 has 128; --set mesh.fsdp=128 .*--search"
    ):
        candidates.with_devices(planned, V5P)


def test_the_mesh_of_one_slice_is_repeated(planned):
    two = parse("v5e:16x16", slices=2)
    with pytest.raises(ConfigError, match="mesh is that of one slice, and with mesh.data=2 a micro-batch has 256 rows"):
        candidates.with_devices(planned, two)
    planned = dataclasses.replace(planned, batch_size=512)
    both = candidates.with_devices(planned, two)
    assert both.mesh == Mesh(data=2, fsdp=256)
    assert candidates.with_devices(both, two) is both
    wrong = dataclasses.replace(planned, mesh=Mesh(fsdp=128, tensor=4))
    with pytest.raises(ConfigError, match="mesh.data=1 must be a multiple of the 2 slices"):
        candidates.with_devices(wrong, two)


def test_a_model_that_fits_nowhere_says_what_it_takes(planned):
    small = parse("v5e:2x2")
    with pytest.raises(ConfigError, match=r"113 GiB and a v5e:2x2 holds 63 GiB; it takes 8 chips, so at least v5e:2x4"):
        candidates.check_state(planned, small)
    with pytest.raises(ConfigError, match="a v5e:2x2 holds 63 GiB"):  # slices repeat it
        candidates.check_state(planned, parse("v5e:2x2", slices=8))
    huge = dataclasses.replace(planned, model=dataclasses.replace(planned.model_config, num_layers=2000))
    with pytest.raises(ConfigError, match="no slice of v5e has as many"):
        candidates.check_state(huge, small)
