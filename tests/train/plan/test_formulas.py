"""Formulas against published tables and against each other."""

from __future__ import annotations

import dataclasses

import pytest

from qwen_jax import zoo
from qwen_jax.ops import mlp
from train.config import LoRA, Mesh, Zoo
from train.plan import formulas


@pytest.mark.parametrize(
    "name, at_4k, at_32k",
    [("0.5B", 3.5, 7.2), ("1.5B", 10.3, 17.7), ("7B", 44.9, 62.2), ("14B", 89.3, 132), ("72B", 444, 556)],
)
def test_training_flops_per_token(name, at_4k, at_32k):
    model = zoo.published(f"Qwen2.5-{name}")
    for length, giga in ((4096, at_4k), (32768, at_32k)):
        assert formulas.train_flops(model, length) / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("name, size", [("0.5B", 12288), ("7B", 57344), ("72B", 327680)])
def test_cache_per_token(name, size):
    assert formulas.kv_bytes(zoo.published(f"Qwen2.5-{name}")) == size


def test_a_window_takes_work_away():
    model = zoo.published("Qwen2.5-0.5B")
    windows = lambda size: dataclasses.replace(model, windows=(size,) * model.num_layers)
    full = formulas.attention_flops(model, 4096)
    assert formulas.attention_flops(windows(4096), 4096) == full == formulas.attention_flops(windows(8192), 4096)
    # Tokens past the first 1024 see 1024 keys, those before them half of that.
    mean = (1024 * 512 + 3072 * 1024) / 4096
    assert formulas.attention_flops(windows(1024), 4096) == pytest.approx(full * mean / 2048)


def test_recomputation_costs_work_and_saves_memory(planned, change):
    none, dots, full = (change(planned, "remat", remat) for remat in ("none", "dots", "full"))
    matmul = [formulas.executed_matmul_flops(each) for each in (none, dots, full)]
    attention = formulas.attention_flops(none.model_config, 4096)
    assert matmul[0] + 3 * attention == formulas.train_flops(none.model_config, 4096)
    assert matmul[0] == matmul[1] < matmul[2] < 4 / 3 * matmul[0]  # the output head is not computed again
    assert formulas.train_bytes(none) > formulas.train_bytes(dots) > formulas.train_bytes(full)


def test_the_mlp_of_a_long_row_takes_no_memory_by_token(planned, change):
    assert formulas.MLP_PIECE == mlp.PIECE
    long = change(change(planned, "data.sequence_length", 131072), "remat", "none")
    short = change(long, "data.sequence_length", 4096)
    by_token = lambda config: formulas.activation_bytes(config) / formulas.tokens_of_device(config)
    assert by_token(long) < by_token(short) - 2 * 28 * 2 * 18944
    # Gate and up of 28 layers once more.
    extra = formulas.executed_matmul_flops(long) - formulas.executed_matmul_flops(short)
    assert extra == 2 * 2 * 3584 * 18944 * 28


def test_state_is_four_numbers_per_parameter(planned):
    whole = 16 * planned.model_config.num_parameters
    assert formulas.state_bytes(planned) == whole / 256


def test_beside_an_adapter_parameters_have_no_moments(planned):
    """Of rank 64 on all linear layers of Qwen2.5-7B, whose parameters PEFT counts as 161,480,704."""
    adapted = dataclasses.replace(planned, adapter=LoRA(rank=64))
    assert formulas.adapter_parameters(planned.model_config, adapted.adapter) == 161_480_704
    whole = 2 * planned.model_config.num_parameters + 16 * 161_480_704
    assert formulas.whole_state_bytes(adapted) == whole < formulas.whole_state_bytes(planned) / 6
    tables = dataclasses.replace(adapted, adapter=LoRA(rank=64, train_embeddings=True))
    assert formulas.whole_state_bytes(tables) == whole + 16 * 2 * 152064 * 3584


def test_only_active_experts_cost_work_and_all_cost_memory(planned):
    model = zoo.published("Qwen3-30B-A3B")
    tables = model.vocab_size * model.width
    # All but the embedding, norms included, multiply a token.
    assert formulas.matmul_parameters(model) == pytest.approx(model.num_active_parameters - tables, rel=1e-3)
    mixture = dataclasses.replace(planned, model=Zoo(name="Qwen3-30B-A3B"))
    spread = dataclasses.replace(mixture, mesh=Mesh(fsdp=64, expert=4))
    assert formulas.state_bytes(mixture) == 16 * model.num_parameters / 256
    rest = model.num_parameters - formulas.expert_parameters(model, 128)
    assert formulas.state_bytes(spread) == pytest.approx(formulas.state_bytes(mixture) + 16 * rest * (1 / 64 - 1 / 256))
    assert formulas.used_parameters(spread) < formulas.used_parameters(mixture) / 3
