"""The table of published models against parameter counts worked out from the papers, and its names."""

from __future__ import annotations

import dataclasses

import pytest

from qwen_jax import zoo
from qwen_jax.config import DualChunk, ModelConfig, QwenNTK
from qwen_jax.errors import ConfigError

# Worked out from the published shapes without this code; each rounds to the size on the model's card.
QWEN2 = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}
PARAMETERS = {
    "Qwen-1.8B": 1_836_828_672,
    "Qwen-7B": 7_721_324_544,
    "Qwen-14B": 14_167_290_880,
    "Qwen-72B": 72_287_920_128,
    "Qwen1.5-0.5B": 463_987_712,
    "Qwen1.5-1.8B": 1_836_828_672,
    "Qwen1.5-4B": 3_950_369_280,
    "Qwen1.5-7B": 7_721_324_544,
    "Qwen1.5-14B": 14_167_290_880,
    "Qwen1.5-32B": 32_512_218_112,
    "Qwen1.5-72B": 72_287_920_128,
    "Qwen1.5-110B": 111_209_914_368,
    "CodeQwen1.5-7B": 7_250_284_544,
    **{f"Qwen2-{size}": QWEN2[size] for size in ("0.5B", "1.5B", "7B", "72B")},
    **{f"Qwen2.5-{size}": count for size, count in QWEN2.items()},
    "QwQ-32B": QWEN2["32B"],
    "QwQ-32B-Preview": QWEN2["32B"],
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen2-57B-A14B": 57_408_658_944,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
}
# Of which so many see a token.
ACTIVE = {"Qwen1.5-MoE-A2.7B": 2_689_173_504, "Qwen2-57B-A14B": 14_249_270_784}
VARIANTS = ("-Chat", "-Instruct-1M", "-Instruct-2507", "-Thinking-2507", "-Instruct")


def base_of(name: str) -> str:
    """The model that `name` has the shape of."""
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    return name.replace("-Coder", "").replace("-Math", "")


@pytest.mark.parametrize("name", zoo.names())
def test_parameters_are_counted_as_published(name):
    assert zoo.published(name).num_parameters == PARAMETERS[base_of(name)]


@pytest.mark.parametrize(("name", "count"), ACTIVE.items())
def test_active_parameters_are_counted_as_published(name, count):
    assert zoo.published(name).num_active_parameters == count


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-30B-A3B", 3.35), ("Qwen3-235B-A22B", 22.2)])
def test_active_parameters_round_to_what_is_published(name, billions):
    assert zoo.published(name).num_active_parameters / 1e9 == pytest.approx(billions, abs=0.05)


def test_a_dense_model_is_all_active():
    config = zoo.published("Qwen2.5-7B")
    assert config.num_active_parameters == config.num_parameters


def test_every_size_and_variant_is_there():
    names = zoo.names()
    assert len(set(names)) == len(names)
    assert set(PARAMETERS) <= set(names)
    assert {
        "Qwen-14B-Chat",
        "Qwen1.5-110B-Chat",
        "Qwen2-72B-Instruct",
        "Qwen2-Math-72B-Instruct",
        "Qwen2.5-14B-Instruct-1M",
        "Qwen2.5-Coder-32B-Instruct",
        "Qwen2.5-Math-1.5B",
        "Qwen3-4B-Thinking-2507",
    } <= set(names)


def test_variants_differ_from_their_base_only_in_what_training_changed():
    for name in zoo.names():
        config, base = zoo.published(name), zoo.published(base_of(name))
        changed = {f.name for f in dataclasses.fields(ModelConfig) if getattr(config, f.name) != getattr(base, f.name)}
        assert changed <= {"max_position", "norm_eps", "rope"}, name


@pytest.mark.parametrize(
    ("name", "theta", "max_position", "norm_eps"),
    [
        ("Qwen-7B", 1e4, 32768, 1e-6),
        ("Qwen-14B", 1e4, 16384, 1e-6),
        ("Qwen-72B", 1e6, 8192, 1e-6),
        ("CodeQwen1.5-7B", 1e6, 65536, 1e-6),
        ("Qwen2-7B", 1e6, 131072, 1e-6),
        ("Qwen2-7B-Instruct", 1e6, 32768, 1e-6),
        ("Qwen2.5-0.5B", 1e6, 32768, 1e-6),
        ("Qwen2.5-1.5B", 1e6, 131072, 1e-6),
        ("Qwen2.5-32B", 1e6, 131072, 1e-5),
        ("Qwen2.5-32B-Instruct", 1e6, 32768, 1e-6),
        ("Qwen2.5-7B-Instruct-1M", 1e7, 1010000, 1e-5),
        ("Qwen2.5-Coder-32B", 1e6, 32768, 1e-5),
        ("Qwen2.5-Coder-32B-Instruct", 1e6, 32768, 1e-6),
        ("Qwen2.5-Math-7B", 1e4, 4096, 1e-6),
        ("Qwen3-8B", 1e6, 40960, 1e-6),
        ("Qwen3-4B-Instruct-2507", 5e6, 262144, 1e-6),
    ],
)
def test_constants_that_differ_between_releases(name, theta, max_position, norm_eps):
    config = zoo.published(name)
    assert (config.rope.theta, config.max_position, config.norm_eps) == (theta, max_position, norm_eps)


def test_only_qwen3_normalises_queries_and_keys_and_only_it_has_no_bias():
    for name in zoo.names():
        config = zoo.published(name)
        assert config.qk_norm == (not config.qkv_bias) == name.startswith("Qwen3-")


def test_all_of_qwen1_but_the_largest_has_dynamic_ntk_and_logn_attention_and_1m_dual_chunks():
    for name in zoo.names():
        config, trained = zoo.published(name), 2048 if "14B" in name else 8192
        extended = name.startswith("Qwen-") and "72B" not in name
        scaling = QwenNTK(original_positions=trained) if extended else None
        if name.endswith("-1M"):
            scaling = DualChunk(chunk_size=262144, local_size=8192, original_positions=262144)
        assert (config.rope.scaling, config.logn) == (scaling, trained if extended else 0), name


@pytest.mark.parametrize(("wrong", "near"), [("Qwen2.5-7b", "Qwen2.5-7B"), ("qwen3-0.6b", "Qwen3-0.6B")])
def test_a_misspelt_name_is_refused_with_the_nearest(wrong, near):
    with pytest.raises(ConfigError, match=rf"no published model '{wrong}'; the nearest names are .*{near}(,|$)"):
        zoo.published(wrong)


def test_a_name_like_no_other_is_refused_with_all():
    with pytest.raises(ConfigError, match="Qwen-7B,.*Qwen3-32B"):
        zoo.published("gpt")
