"""Configs that cannot run are refused in sentences, before anything is loaded."""

from __future__ import annotations

import dataclasses

import pytest

from qwen_jax import bindings
from qwen_jax.config import DualChunk, DynamicNTK, Linear, QwenNTK, Rope, Yarn
from qwen_jax.errors import ConfigError, FileError
from tests.conftest import tiny_config
from tests.published import publish
from train.config import LM, Mesh, Stage, TrainConfig, Zoo


@pytest.mark.parametrize(
    "path, value, sentence",
    [
        ("steps", 0, "steps=0 and epochs=0.0: say one of them"),
        ("accumulation", 3, "batch_size=8 must be a multiple of accumulation=3"),
        ("mesh.fsdp", 16, "a micro-batch has 8 rows .* multiple of .* = 16"),
        ("mesh.context", 3, r"data.sequence_length=16 must be a multiple of 2 \* mesh.context = 6"),
        ("mesh.tensor", 4, "model.num_heads=2 must be a multiple of mesh.tensor=4"),
        ("mesh.tensor", 0, "tensor=0 must be at least 1"),
        (
            "model.rope",
            Rope(theta=1e4, scaling=QwenNTK(original_positions=15)),
            "data.sequence_length=16 must not exceed model.rope.scaling.original_positions=15: past it QwenNTK goes by",
        ),
        (
            "model.rope",
            Rope(theta=1e4, scaling=DynamicNTK(factor=2.0, original_positions=8)),
            "original_positions=8: past it DynamicNTK goes by",
        ),
        (
            "model.rope",
            Rope(theta=1e4, scaling=DualChunk(chunk_size=8, local_size=2, original_positions=8)),
            "original_positions=8: past it DualChunk goes by",
        ),
        ("data.sequence_length", 33, "data.sequence_length=33 must not exceed model.max_position=32"),
        ("schedule.warmup_steps", 6, "warmup_steps=6 must be below steps=6"),
        ("schedule.warmup_steps", None, "warmup_steps=None and warmup_fraction=None: say one of them"),
        ("schedule.warmup_fraction", 0.1, "warmup_steps=2 and warmup_fraction=0.1: say one of them"),
        ("schedule.final_fraction", 1.5, "final_fraction=1.5 must be between 0 and 1"),
        ("optimizer.peak_lr", 0.0, "peak_lr=0.0 must be above 0"),
        ("optimizer.b2", 1.0, "b2=1.0 must be at least 0 and below 1"),
        ("checkpoint.keep", 0, "keep=0 must be at least 1"),
        ("model.param_dtype", "bfloat16", "would lose most updates to rounding"),
        ("run_dir", "", "run_dir is empty"),
        ("objective", LM(balance=0.1), "objective.balance is for a mixture of experts, and the model is dense"),
        ("objective", LM(z=0.1), "objective.z is for a mixture of experts, and the model is dense"),
    ],
)
def test_refused(config, change, path, value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        change(config, path, value)


@pytest.mark.parametrize(
    "values, sentence",
    [
        (dict(balance=-1.0), "balance=-1.0 must be at least 0"),
        (dict(balance_over="sequence"), "balance_over='sequence' does nothing with balance=0.0"),
    ],
)
def test_refused_of_the_router(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LM(**values)


@pytest.mark.parametrize(
    "path, value, sentence",
    [
        ("mesh.expert", 4, "model.moe.num_experts=6 must be a multiple of mesh.expert=4"),
        ("mesh.tensor", 2, "model.moe.shared_width=9 must be a multiple of mesh.tensor=2; it can be 1"),
    ],
)
def test_experts_are_split_evenly(mixture, change, path, value, sentence):
    moe = dataclasses.replace(mixture.model.moe, num_experts=6, shared_width=9)
    with pytest.raises(ConfigError, match=sentence):
        change(change(mixture, "model.moe", moe), path, value)


def test_a_mixture_that_could_not_be_opened_is_not_trained(mixture, change):
    with pytest.raises(ConfigError, match="shared_width=0 with model.qk_norm=False is of no published architecture"):
        change(mixture, "model.moe.shared_width", 0)


def test_micro_batches_and_rows_are_split_together(config, change):
    fine = change(config, "mesh.data", 4)
    with pytest.raises(ConfigError, match="a micro-batch has 2 rows"):
        change(fine, "accumulation", 4)


@pytest.fixture
def staged(config, change):
    return change(config, "stages", (Stage(from_step=2, mesh=Mesh()), Stage(from_step=3, theta=1e6)))


@pytest.mark.parametrize("kind", ["config", "mixture", "staged"])
def test_rendered_config_reads_back_equal(request, kind, tmp_path):
    config, file = request.getfixturevalue(kind), tmp_path / "again.gin"
    file.write_text(bindings.render(config, {}))
    assert bindings.resolve(TrainConfig, bindings.read(file))[0] == config


def test_a_pretrained_model_has_its_own_shape_and_what_is_changed_of_it(config, tmp_path):
    folder, file = tmp_path / "published", tmp_path / "plain.gin"
    own = tiny_config(vocab_size=264, num_layers=2)
    publish(folder, own, "qwen2")
    file.write_text(bindings.render(config, {}))
    resolve = lambda *more: bindings.resolve(
        TrainConfig, [*bindings.read(file), *bindings.parse_set(["model = @Pretrained", *more])]
    )[0]
    path = f'model.path = "{folder}"'
    assert resolve(path).model_config == dataclasses.replace(own, dtype="bfloat16", param_dtype="float32")
    made = resolve(path, "model.rope.theta = 2e6", "model.rope.scaling = @Linear", "model.rope.scaling.factor = 2")
    assert made.model_config.rope == Rope(theta=2e6, scaling=Linear(factor=2.0))
    file.write_text(bindings.render(made, {}))
    assert bindings.resolve(TrainConfig, bindings.read(file))[0] == made
    with pytest.raises(ConfigError, match="sequence_length=16 must not exceed model.max_position=15"):
        resolve(path, "model.max_position = 15")
    with pytest.raises(ConfigError, match='path="" names no model'):
        resolve('model.path = ""')
    with pytest.raises(FileError, match="nowhere does not exist"):
        resolve(f'model.path = "{tmp_path / "nowhere"}"')


def test_rope_scalings_are_bound_by_name(config, tmp_path):
    fields = dict(factor=2.0, original_positions=16, beta_fast=32.0, beta_slow=1.0, attention_factor=1.07)
    lines = ["@Yarn", *fields.values()]
    names = ["model.rope.scaling", *(f"model.rope.scaling.{name}" for name in fields)]
    assignments = [f"{name} = {line}" for name, line in zip(names, lines, strict=True)]
    file = tmp_path / "plain.gin"
    file.write_text(bindings.render(config, {}))
    resolve = lambda *more: bindings.resolve(TrainConfig, [*bindings.read(file), *bindings.parse_set(more)])[0]
    made = resolve("model.logn = 16", *assignments)
    assert (made.model.rope, made.model.logn) == (Rope(theta=1e4, scaling=Yarn(**fields)), 16)
    file.write_text(bindings.render(made, {}))
    assert resolve() == made and resolve("model.rope.scaling = None").model.rope == Rope(theta=1e4)
    with pytest.raises(ConfigError, match=r"scaling \(Linear\) has fields without a value; write `.*factor = "):
        resolve("model.rope.scaling = @Linear")
    with pytest.raises(ConfigError, match="scaling cannot be @YaRN; did you mean @Yarn"):
        resolve("model.rope.scaling = @YaRN")


def test_a_stage_keeps_what_it_does_not_change(config, change):
    stages = (
        Stage(from_step=2, sequence_length=32, full_length=0.75, theta=1e5, batch_size=4),
        Stage(from_step=4, sequence_length=64, accumulation=2, remat="full"),
    )
    config = change(config, "stages", stages)
    (first, base), (second, longer), (third, longest) = config.stage_configs
    assert (first, second, third) == (range(2), range(2, 4), range(4, 6))
    assert base == change(config, "stages", ())
    assert (longer.batch_size, longest.batch_size, longest.accumulation, longest.remat) == (4, 4, 2, "full")
    assert (longer.data.full_length, longest.data.full_length) == (0.75, 0.75)
    assert (longer.data.shorter_lengths, longest.data.shorter_lengths) == ((16,), (16, 32))
    assert (longer.model.rope.theta, longest.model.rope.theta) == (1e5, 1e5)
    assert (longer.model.max_position, longest.model.max_position) == (32, 64)
    assert longest.optimizer == base.optimizer and longest.steps == base.steps, "one schedule for all of them"
    assert [config.tokens_after(step) for step in (1, 3, 6)] == [128, 256 + 128, 256 + 256 + 512]


@pytest.mark.parametrize(
    "stages, sentence",
    [
        ([dict(from_step=6)], "stages.1.from_step=6 must be above 0 and below steps=6"),
        ([dict(from_step=0)], "stages.1.from_step=0 must be above 0 and below steps=6"),
        ([dict(from_step=3), dict(from_step=3)], "stages.2.from_step=3 must be above stages.1.from_step=3 and"),
        ([dict(from_step=3, batch_size=0)], "from stages.1.from_step=3 on, batch_size=0 must be at least 1"),
        ([dict(from_step=3, sequence_length=0)], "from stages.1.from_step=3 on, sequence_length=0 must be at least 1"),
        ([dict(from_step=3, theta=1.0)], "from stages.1.from_step=3 on, theta=1.0 must be above 1"),
        ([dict(from_step=3, full_length=0.5)], "full_length=0.5 leaves rows for shorter_lengths, and there are none"),
        (
            [dict(from_step=3, mesh=Mesh(data=2))],
            "from stages.1.from_step=3 on, the mesh has 2 devices, and at first 1",
        ),
    ],
)
def test_stages_are_refused_by_number(config, change, stages, sentence):
    with pytest.raises(ConfigError, match=sentence):
        change(config, "stages", tuple(Stage(**stage) for stage in stages))


def test_a_mistake_in_a_stage_is_said_with_its_line(config, tmp_path):
    file = tmp_path / "staged.gin"
    file.write_text(
        bindings.render(config) + "stages.1.batch_size = 5\nstages.1.from_step = 2\nstages.1.accumulation = 2\n"
    )
    number = len(file.read_text().splitlines()) - 1
    with pytest.raises(
        ConfigError, match=rf"staged.gin:{number}: TrainConfig: from stages.1.from_step=2 on, batch_size=5"
    ):
        bindings.resolve(TrainConfig, [b for b in bindings.read(file) if b.path != "stages"])


def test_a_published_model_begins_with_another_theta(config, change):
    made = change(config, "model", Zoo(name="Qwen2.5-7B", rope=Rope(theta=1e4)))
    assert made.model_config.rope == Rope(theta=1e4)
    assert change(config, "model", Zoo(name="Qwen2.5-7B")).model_config.rope == Rope(theta=1e6)
