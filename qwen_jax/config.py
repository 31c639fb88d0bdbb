"""What a Qwen is: the numbers that fix its function, checked in sentences.

Names are the paper's: `width` (HF hidden_size), `mlp_width` (intermediate_size), `num_*` for counts. Nothing
here has a default that changes the function a model computes: theta, eps and biases always come from the config.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal, get_args

from qwen_jax.errors import ConfigError, ModelError

DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear interpolation: every rotation is `factor` times slower."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK:
    """transformers' "dynamic": past `original_positions` the base grows with the length of the sequence, to
    `theta * (factor * length / original_positions - factor + 1) ** (head_dim / (head_dim - 2))`.
    """

    factor: float
    original_positions: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original_positions(self.original_positions)

    @property
    def reach(self) -> int:
        """Positions that a model trained for `original_positions` serves with it."""
        return int(self.factor * self.original_positions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenNTK:
    """Qwen1's dynamic NTK: past `original_positions` the base is `theta * alpha ** (head_dim / (head_dim - 2))` with
    alpha = 3 for a prompt of up to twice as many tokens, 7 up to four times, 15 up to eight times, and so on.

    A sequence keeps the alpha of its prompt, however long it grows.
    """

    original_positions: int

    def __post_init__(self) -> None:
        _check_original_positions(self.original_positions)

    @property
    def reach(self) -> int:
        """Positions that a model trained for `original_positions` serves with it: eight times as many, up to 32768.

        The report measures each model to there: those trained for 2048 up to 16384, those for 8192 up to 32768, which
        is also where the published code's table for log-n attention ends.
        """
        return max(self.original_positions, min(8 * self.original_positions, 32768))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al., 2023), at any length: pairs that turn less than `beta_slow` times in `original_positions` are
    `factor` times slower, those that turn more than `beta_fast` times stay, and between the two is a ramp.

    `attention_factor` multiplies queries and keys alike, so its square the scores; the paper has 0.1 ln(factor) + 1.
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original_positions(self.original_positions)
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ConfigError(
                f"beta_slow={self.beta_slow} must be above 0 and below beta_fast={self.beta_fast} (the paper has 1, 32)"
            )
        if not 0 < self.attention_factor < math.inf:
            raise ConfigError(f"attention_factor={self.attention_factor} must be above 0 (1.0 leaves scores alone)")

    @property
    def reach(self) -> int:
        """Positions that a model trained for `original_positions` serves with it."""
        return int(self.factor * self.original_positions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualChunk:
    """Dual chunk attention (An et al., 2024): at any length no two tokens seem further apart than `chunk_size`.

    A sequence is cut into chunks of `chunk_size - local_size` tokens, and keys turn by their place in the chunk.
    Queries turn in one way for keys of their own chunk, in another for those of the chunk before, in a third for
    earlier ones: distances up to `local_size + 1`, and all within a chunk, are true. While `local_size` is less than a
    chunk, rows of up to `chunk_size + 1` tokens have plain attention.

    Past `original_positions` queries and keys are multiplied by `0.1 ln(length / original_positions) + 1`; 0 for never.
    """

    chunk_size: int
    local_size: int
    original_positions: int

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size:
            raise ConfigError(
                f"local_size={self.local_size} must be above 0 and below chunk_size={self.chunk_size} (Qwen2.5-1M has "
                f"8192 and 262144)"
            )
        if self.original_positions < 0:
            raise ConfigError(
                f"original_positions={self.original_positions} must be the length before it was extended, or 0 to "
                f"leave scores alone at any length"
            )

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size


def _check_factor(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ConfigError(f"factor={factor} must be at least 1: how many times longer sequences become")


def _check_original_positions(positions: int) -> None:
    if positions < 1:
        raise ConfigError(f"original_positions={positions} must be at least 1: the length before it was extended")


Scaling = Linear | DynamicNTK | QwenNTK | Yarn | DualChunk
_KINDS = {kind.__name__: kind for kind in get_args(Scaling)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions become rotations: rotary embedding with base frequency `theta`.

    `scaling` extends it past the lengths that a model was trained for; None for plain rotary embedding.
    """

    theta: float
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if not self.theta > 1:
            raise ConfigError(f"theta={self.theta} must be above 1 (Qwen2.5 has 1000000.0)")

    @property
    def by_length(self) -> bool:
        """Whether what becomes of a query or key depends on how long its sequence is."""
        if isinstance(self.scaling, DualChunk):
            return self.scaling.original_positions > 0
        return isinstance(self.scaling, DynamicNTK | QwenNTK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The head of a reward or classification model: `labels` numbers per position, from the final hidden state.

    One matrix without bias, or with `hidden` two matrices with biases and a ReLU between them.
    """

    labels: int
    hidden: bool

    def __post_init__(self) -> None:
        if self.labels < 1:
            raise ConfigError(f"labels={self.labels} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """The feed-forward part of every layer of a mixture of experts, in place of one MLP.

    Attributes:
      num_experts: gated MLPs that a router chooses from.
      top_k: how many of them see each token.
      expert_width: inner size of each (HF moe_intermediate_size).
      shared_width: inner size of the MLP that sees every token, behind a gate of its own; 0 for none (Qwen3).
      normalize_top_k: whether the weights of the chosen experts are made to sum to one.
    """

    num_experts: int
    top_k: int
    expert_width: int
    shared_width: int
    normalize_top_k: bool

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "expert_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.shared_width < 0:
            raise ConfigError(f"shared_width={self.shared_width} must not be negative; 0 means no shared expert")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k} must not exceed num_experts={self.num_experts}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the constants of one Qwen.

    Attributes:
      vocab_size: rows of the embedding table, padding rows included.
      width: size of the residual stream (HF hidden_size).
      num_layers: number of blocks.
      num_heads: query heads.
      num_kv_heads: key/value heads; each serves num_heads / num_kv_heads query heads.
      head_dim: size of one head; need not be width / num_heads (Qwen3).
      mlp_width: inner size of the gated MLP (HF intermediate_size; half of Qwen1's field of that name); 0 in a mixture
        of experts, which has none.
      max_position: positions the model serves.
      norm_eps: epsilon of every RMSNorm.
      qkv_bias: whether the query, key and value projections have a bias (Qwen1 to Qwen2.5).
      qk_norm: whether queries and keys are normalised per head before rotation (Qwen3).
      tie_embeddings: whether the output head is the embedding table; without effect where there is a score.
      rope: how positions become rotations.
      logn: the training length n of Qwen1's log-n attention, with which the query at position p is multiplied by
        log(p + 1) / log(n) where p + 1 > n; 0 for none.
      windows: per layer, how many of the latest keys a query sees; 0 for all; empty for all in each layer.
      moe: the experts of each layer; None in a dense model.
      score: the head that stands in place of the output head in a reward or classification model; None in others.
      param_dtype: type the parameters are kept in.
      dtype: type of activations and of matmul inputs; norms, softmax, rope angles and the loss are float32.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_position: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    rope: Rope
    logn: int = 0
    windows: tuple[int, ...] = ()
    moe: Moe | None = None
    score: Score | None = None
    param_dtype: DType = "float32"
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.moe and self.mlp_width:
            raise ConfigError(f"mlp_width={self.mlp_width} is of a dense model; a mixture of experts has mlp_width=0")
        if self.mlp_width < 1 and not self.moe:
            raise ConfigError(f"mlp_width={self.mlp_width} must be at least 1")
        if self.max_position < 1:
            raise ConfigError(f"max_position={self.max_position} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if isinstance(self.rope.scaling, DynamicNTK | QwenNTK) and self.head_dim == 2:
            raise ConfigError("head_dim=2 has one pair, and NTK scaling slows every pair but the first; take 4 or more")
        if self.logn < 0 or self.logn == 1:
            raise ConfigError(f"logn={self.logn} must be the training length, at least 2, or 0 for plain attention")
        if not 0 < self.norm_eps < 1:
            raise ConfigError(
                f"norm_eps={self.norm_eps} must be between 0 and 1 (published models have 1e-06 or 1e-05)"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ConfigError(
                f"windows has {len(self.windows)} entries for num_layers={self.num_layers}; give one per layer"
            )
        if any(w < 0 for w in self.windows):
            raise ConfigError(f"windows={self.windows} must not be negative; 0 means every earlier key")
        if isinstance(self.rope.scaling, DualChunk) and (self.logn or any(self.windows)):
            name = "logn" if self.logn else "windows"
            raise ConfigError(f"{name}={getattr(self, name)} and DualChunk cannot be combined; no model has both")

    @property
    def tensor_sizes(self) -> list[int]:
        """The sizes that the mesh axis `tensor` may have: those that split heads, widths and vocabulary evenly."""
        inner = (self.moe.expert_width, self.moe.shared_width) if self.moe else (self.mlp_width,)
        split, kv = math.gcd(self.num_heads, *inner, self.vocab_size), self.num_kv_heads
        return [size for size in range(1, split + 1) if split % size == 0 and (kv % size == 0 or size % kv == 0)]

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        d, h = self.width, self.head_dim
        q, kv = self.num_heads * h, self.num_kv_heads * h
        attention = 2 * d * q + 2 * d * kv + (q + 2 * kv if self.qkv_bias else 0) + (2 * h if self.qk_norm else 0)
        block = attention + 3 * d * self.mlp_width + 2 * d
        if self.moe:
            shared = 3 * d * self.moe.shared_width + d if self.moe.shared_width else 0
            block += self.moe.num_experts * d + shared
        experts = self._expert_parameters * self.moe.num_experts if self.moe else 0
        head = 0 if self.tie_embeddings else self.vocab_size * d
        if self.score:
            labels = self.score.labels
            head = d * d + d + labels * d + labels if self.score.hidden else labels * d
        return self.vocab_size * d + self.num_layers * block + experts + d + head

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token is computed with: of the experts, those that it is sent to."""
        idle = self.moe.num_experts - self.moe.top_k if self.moe else 0
        return self.num_parameters - idle * self._expert_parameters

    @property
    def _expert_parameters(self) -> int:
        """Parameters of one expert, in all layers."""
        return 3 * self.width * self.moe.expert_width * self.num_layers if self.moe else 0

    def to_json(self) -> str:
        """The config as JSON that `from_json` reads back to an equal one."""
        values = dataclasses.asdict(self)
        if self.rope.scaling:
            values["rope"]["scaling"]["kind"] = type(self.rope.scaling).__name__
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The config that `to_json` wrote. A missing or unknown field is a ModelError."""
        try:
            values: dict[str, Any] = json.loads(text)
            parts: dict[str, Any] = {"rope": _rope(**values["rope"]), "windows": tuple(values["windows"])}
            # Absent from configs written before there were scores and mixtures of experts.
            for name, part in {"score": Score, "moe": Moe}.items():
                if values.get(name) is not None:
                    parts[name] = part(**values[name])
            return cls(**(values | parts))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"not a model config of this library: {error}") from error


def _rope(*, scaling: dict[str, Any] | None = None, **values: Any) -> Rope:
    """From the JSON, in which a scaling has its kind as a field, and which had none once."""
    if scaling is None:
        return Rope(**values)
    kind = _KINDS[scaling["kind"]]
    return Rope(scaling=kind(**{name: value for name, value in scaling.items() if name != "kind"}), **values)
