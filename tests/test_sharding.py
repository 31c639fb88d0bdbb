"""The order of the columns of a batch on a mesh that splits sequences."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qwen_jax import sharding


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_balanced_columns_give_each_device_the_same_work(ways):
    with jax.set_mesh(sharding.make_mesh(context=ways, devices=jax.devices()[:ways])):
        columns = sharding.balanced_columns(32)
    assert sorted(columns) == list(range(32))
    visible = (columns + 1).reshape(ways, -1).sum(axis=1)  # token t sees t + 1 keys
    assert len(set(visible)) == 1


@pytest.mark.parametrize("ways", [2, 4])
def test_sequence_order_is_the_inverse(ways):
    with jax.set_mesh(sharding.make_mesh(context=ways, devices=jax.devices()[:ways])):
        columns = sharding.balanced_columns(16)
        batch = np.arange(48).reshape(3, 16)
        np.testing.assert_array_equal(sharding.sequence_order(jax.numpy.asarray(batch[:, columns]), 1), batch)


def test_the_platform_is_the_mesh_s():
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert sharding.platform() == "cpu"
        assert sharding.tpu_generation() is None
