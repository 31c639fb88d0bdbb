"""Every published size of the family, as data: one table of shapes, one of releases.

From the technical reports (arXiv 2309.16609, 2407.10671, 2412.15115, 2505.09388) and the published config files. A
value that no file confirms says so. Where a checkpoint is at hand, its own config decides, not this table.
"""

from __future__ import annotations

import dataclasses
import difflib

from qwen_jax.config import DualChunk, ModelConfig, Moe, QwenNTK, Rope
from qwen_jax.errors import ConfigError

# fmt: off

#  size     width  layers  heads  kv  head_dim    mlp   vocab   tied
_QWEN1 = {  # also Qwen1.5; mlp is half of what Qwen1's own files call intermediate_size
    "0.5B": ( 1024,    24,    16, 16,       64,  2816, 151936, True),  # tied: not confirmed
    "1.8B": ( 2048,    24,    16, 16,      128,  5504, 151936, False),
    "4B":   ( 2560,    40,    20, 20,      128,  6912, 151936, False),
    "7B":   ( 4096,    32,    32, 32,      128, 11008, 151936, False),
    "14B":  ( 5120,    40,    40, 40,      128, 13696, 152064, False),
    "32B":  ( 5120,    64,    40,  8,      128, 27392, 152064, False),
    "72B":  ( 8192,    80,    64, 64,      128, 24576, 152064, False),
    "110B": ( 8192,    80,    64,  8,      128, 49152, 152064, False),
}
_CODE = {
    "7B":   ( 4096,    32,    32,  4,      128, 13440,  92416, False),
}
_QWEN2 = {  # also Qwen2.5
    "0.5B": (  896,    24,    14,  2,       64,  4864, 151936, True),
    "1.5B": ( 1536,    28,    12,  2,      128,  8960, 151936, True),
    "3B":   ( 2048,    36,    16,  2,      128, 11008, 151936, True),
    "7B":   ( 3584,    28,    28,  4,      128, 18944, 152064, False),
    "14B":  ( 5120,    48,    40,  8,      128, 13824, 152064, False),
    "32B":  ( 5120,    64,    40,  8,      128, 27648, 152064, False),
    "72B":  ( 8192,    80,    64,  8,      128, 29568, 152064, False),
}
_QWEN3 = {
    "0.6B": ( 1024,    28,    16,  8,      128,  3072, 151936, True),
    "1.7B": ( 2048,    28,    16,  8,      128,  6144, 151936, True),
    "4B":   ( 2560,    36,    32,  8,      128,  9728, 151936, True),
    "8B":   ( 4096,    36,    32,  8,      128, 12288, 151936, False),
    "14B":  ( 5120,    40,    40,  8,      128, 17408, 151936, False),
    "32B":  ( 5120,    64,    64,  8,      128, 25600, 151936, False),
}

#  size        width  layers  heads  kv  head_dim       vocab   tied   experts top_k width shared normalized
_QWEN1_MOE = {
    "MoE-A2.7B": ( 2048,    24,    16, 16,      128, 0, 151936, False, (   60,    4, 1408,  5632, False)),
}
_QWEN2_MOE = {
    "57B-A14B":  ( 3584,    28,    28,  4,      128, 0, 151936, False, (   64,    8, 2560, 20480, False)),
}
_QWEN3_MOE = {
    "30B-A3B":   ( 2048,    48,    32,  4,      128, 0, 151936, False, (  128,    8,  768,     0, True)),
    "235B-A22B": ( 4096,    94,    64,  4,      128, 0, 151936, False, (  128,    8, 1536,     0, True)),
}

# Of Qwen1 the max_position before dynamic NTK. YaRN, with which Qwen2.5 and Qwen3 are extended to 131072, is in none of
# the files: who wants it writes it there.
_RELEASES = (
    # published name              shapes  sizes                            theta  max_position  norm_eps
    ("Qwen-{}",                   _QWEN1, "1.8B 7B",                            1e4,    8192,   1e-6),
    ("Qwen-{}",                   _QWEN1, "14B",                                1e4,    2048,   1e-6),
    ("Qwen-{}",                   _QWEN1, "72B",                                1e6,    8192,   1e-6),  # readme: 32K
    ("Qwen-{}-Chat",              _QWEN1, "1.8B 7B",                            1e4,    8192,   1e-6),
    ("Qwen-{}-Chat",              _QWEN1, "14B",                                1e4,    2048,   1e-6),
    ("Qwen-{}-Chat",              _QWEN1, "72B",                                1e6,    8192,   1e-6),  # readme: 32K
    # theta of 4B is not confirmed: 1e6 in its inference script, 5e6 by other accounts
    ("Qwen1.5-{}",                _QWEN1, "0.5B 1.8B 4B 7B 14B 32B 72B 110B",   1e6,   32768,   1e-6),
    ("Qwen1.5-{}-Chat",           _QWEN1, "0.5B 1.8B 4B 7B 14B 32B 72B 110B",   1e6,   32768,   1e-6),
    # max_position of the base model is 8192 in some copies of its config
    ("Qwen1.5-{}",                _QWEN1_MOE, "MoE-A2.7B",                      1e6,   32768,   1e-6),
    ("Qwen1.5-{}-Chat",           _QWEN1_MOE, "MoE-A2.7B",                      1e6,   32768,   1e-6),
    ("CodeQwen1.5-{}",            _CODE,  "7B",                                 1e6,   65536,   1e-6),
    # norm_eps of the 72B of Qwen2, Qwen2-Math and Qwen2.5-Math-Instruct is not confirmed: 1e-5 or 1e-6
    ("Qwen2-{}",                  _QWEN2, "0.5B 1.5B 7B",                       1e6,  131072,   1e-6),
    ("Qwen2-{}",                  _QWEN2, "72B",                                1e6,  131072,   1e-5),
    ("Qwen2-{}-Instruct",         _QWEN2, "0.5B 1.5B 7B 72B",                   1e6,   32768,   1e-6),
    ("Qwen2-{}",                  _QWEN2_MOE, "57B-A14B",                       1e6,  131072,   1e-6),
    ("Qwen2-{}-Instruct",         _QWEN2_MOE, "57B-A14B",                       1e6,   32768,   1e-6),
    ("Qwen2-Math-{}",             _QWEN2, "1.5B 7B",                            1e4,    4096,   1e-6),
    ("Qwen2-Math-{}",             _QWEN2, "72B",                                1e4,    4096,   1e-5),
    ("Qwen2-Math-{}-Instruct",    _QWEN2, "1.5B 7B 72B",                        1e4,    4096,   1e-6),
    ("Qwen2.5-{}",                _QWEN2, "0.5B 3B",                            1e6,   32768,   1e-6),
    ("Qwen2.5-{}",                _QWEN2, "1.5B 7B",                            1e6,  131072,   1e-6),
    ("Qwen2.5-{}",                _QWEN2, "14B 32B 72B",                        1e6,  131072,   1e-5),
    ("Qwen2.5-{}-Instruct",       _QWEN2, "0.5B 1.5B 3B 7B 14B 32B 72B",        1e6,   32768,   1e-6),
    ("Qwen2.5-{}-Instruct-1M",    _QWEN2, "7B 14B",                             1e7, 1010000,   1e-5),
    ("Qwen2.5-Coder-{}",          _QWEN2, "0.5B 1.5B 3B 7B",                    1e6,   32768,   1e-6),
    ("Qwen2.5-Coder-{}",          _QWEN2, "14B 32B",                            1e6,   32768,   1e-5),
    ("Qwen2.5-Coder-{}-Instruct", _QWEN2, "0.5B 1.5B 3B 7B 14B 32B",            1e6,   32768,   1e-6),
    ("Qwen2.5-Math-{}",           _QWEN2, "1.5B 7B",                            1e4,    4096,   1e-6),
    ("Qwen2.5-Math-{}",           _QWEN2, "72B",                                1e4,    4096,   1e-5),
    ("Qwen2.5-Math-{}-Instruct",  _QWEN2, "1.5B 7B 72B",                        1e4,    4096,   1e-6),
    ("QwQ-{}-Preview",            _QWEN2, "32B",                                1e6,   32768,   1e-5),
    ("QwQ-{}",                    _QWEN2, "32B",                                1e6,  131072,   1e-5),  # or 40960
    ("Qwen3-{}",                  _QWEN3, "0.6B 1.7B 4B 8B 14B 32B",            1e6,   40960,   1e-6),
    ("Qwen3-{}-Instruct-2507",    _QWEN3, "4B",                                 5e6,  262144,   1e-6),
    ("Qwen3-{}-Thinking-2507",    _QWEN3, "4B",                                 5e6,  262144,   1e-6),
    ("Qwen3-{}",                  _QWEN3_MOE, "30B-A3B 235B-A22B",              1e6,   40960,   1e-6),
    ("Qwen3-{}-Instruct-2507",    _QWEN3_MOE, "30B-A3B",                        1e7,  262144,   1e-6),
    ("Qwen3-{}-Thinking-2507",    _QWEN3_MOE, "30B-A3B",                        1e7,  262144,   1e-6),
    ("Qwen3-{}-Instruct-2507",    _QWEN3_MOE, "235B-A22B",                      5e6,  262144,   1e-6),
    ("Qwen3-{}-Thinking-2507",    _QWEN3_MOE, "235B-A22B",                      5e6,  262144,   1e-6),
)
# fmt: on


def published(name: str) -> ModelConfig:
    """The config of a model under the name it was published with, such as "Qwen2.5-7B-Instruct", in float32.

    Raises ConfigError with the nearest names for one that is not in the table.
    """
    if name not in _ZOO:
        nearest = difflib.get_close_matches(name, _ZOO, n=3, cutoff=0.5) or names()
        raise ConfigError(f"no published model {name!r}; the nearest names are {', '.join(nearest)}")
    return _ZOO[name]


def names() -> list[str]:
    # published name              shapes  sizes                            theta  max_position  norm_eps
    return list(_ZOO)


def _config(shape: tuple, *, theta: float, max_position: int, norm_eps: float, qk_norm: bool) -> ModelConfig:
    width, num_layers, num_heads, num_kv_heads, head_dim, mlp_width, vocab_size, tie_embeddings, *experts = shape
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        max_position=max_position,
        norm_eps=norm_eps,
        qkv_bias=not qk_norm,  # Qwen3 dropped the bias and normalises queries and keys instead
        qk_norm=qk_norm,
        tie_embeddings=tie_embeddings,
        rope=Rope(theta=theta),
        moe=_moe(*experts[0]) if experts else None,
    )


def _moe(num_experts: int, top_k: int, expert_width: int, shared_width: int, normalize_top_k: bool) -> Moe:
    return Moe(
        num_experts=num_experts,
        top_k=top_k,
        expert_width=expert_width,
        shared_width=shared_width,
        normalize_top_k=normalize_top_k,
    )


def _extended(config: ModelConfig) -> ModelConfig:
    """With dynamic NTK and log-n attention, as all of Qwen1 but the 72B was published."""
    ntk = QwenNTK(original_positions=config.max_position)
    rope = dataclasses.replace(config.rope, scaling=ntk)
    return dataclasses.replace(config, max_position=ntk.reach, rope=rope, logn=ntk.original_positions)


def _chunked(config: ModelConfig) -> ModelConfig:
    """With dual chunk attention, as the models of a million tokens were published: trained for 262144."""
    chunks = DualChunk(chunk_size=262144, local_size=8192, original_positions=262144)
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, scaling=chunks))


_ZOO = {
    name.format(size): _config(
        shapes[size], theta=theta, max_position=max_position, norm_eps=norm_eps, qk_norm=name.startswith("Qwen3-")
    )
    for name, shapes, sizes, theta, max_position, norm_eps in _RELEASES
    for size in sizes.split()
}
_ZOO |= {name: _extended(_ZOO[name]) for name in _ZOO if name.startswith("Qwen-") and "72B" not in name}
_ZOO |= {name: _chunked(_ZOO[name]) for name in _ZOO if name.endswith("-1M")}
