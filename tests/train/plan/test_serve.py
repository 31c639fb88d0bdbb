"""Decoding by formula, against the published table of rooflines."""

from __future__ import annotations

import pytest

from qwen_jax import zoo
from qwen_jax.errors import ConfigError
from train.plan import serve
from train.plan.topology import parse


@pytest.mark.parametrize(
    "name, topology, one", [("7B", "v5p:2x2x1", 193), ("7B", "v4:2x2x1", 84), ("0.5B", "v5e:1x1", 804)]
)
def test_decoding_one_row_is_reading_the_weights(name, topology, one):
    model = zoo.published(f"Qwen2.5-{name}")
    assert serve.plan(model, parse(topology))[0].one == pytest.approx(one, rel=0.02)


def test_serving_more_devices_hold_more_cache():
    config, topology = zoo.published("Qwen2.5-7B"), parse("v5e:2x2")
    found = serve.plan(config, topology)
    assert [each.tensor for each in found] == [1, 2, 4] and set(config.tensor_sizes) >= {1, 2, 4}
    assert [each.tokens for each in found] == sorted(each.tokens for each in found)
    for each in found:
        for context, (rows, _) in each.batches.items():
            assert each.weights + rows * context * each.kv <= topology.hbm
    assert "nothing compiled" in serve.render(found, config, topology)


def test_weights_that_fit_nowhere_cannot_be_served():
    with pytest.raises(ConfigError, match="the weights are 135 GiB, and 4 devices of v5e:2x2"):
        serve.plan(zoo.published("Qwen2.5-72B"), parse("v5e:2x2"))
