"""Work and memory of a model by formula. Attention counts as causal: half of what it takes without a mask."""

from __future__ import annotations

from qwen_jax.config import ModelConfig
from train.config import TrainConfig

# Bytes of a parameter in training, all float32: itself, its two moments, and its gradient until the update.
PARAMETER, MOMENTS, GRADIENT = 4, 8, 4
STATE = PARAMETER + MOMENTS + GRADIENT

BF16, F32 = 2, 4

# Of the forward kernel's work: it has two products, and the backward kernel five, the first of them the scores again.
_ATTENTION_BACKWARD = 2.5

# Logits of one chunk of the loss, and its gradient.
_LOSS_CHUNK = 2 * 128 * 2**20


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: the matrices of the layers and the output head."""
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    layers = config.num_layers * (attention + 3 * config.width * config.mlp_width)
    return layers + config.vocab_size * config.width


def attention_flops(config: ModelConfig, length: int) -> float:
    """Operations per token of scores and weighted values, forward, the mean over a sequence of `length` tokens."""
    windows = config.windows or (0,) * config.num_layers
    most = [min(window or length, length) for window in windows]
    keys = sum(window * (1 - window / (2 * length)) for window in most)
    return 4 * config.num_heads * config.head_dim * keys


def train_flops(config: ModelConfig, length: int) -> float:
    """Operations per token of a training step, forward and twice that backward, without recomputation."""
    return 3 * (2 * matmul_parameters(config) + attention_flops(config, length))


def executed_matmul_flops(config: TrainConfig) -> float:
    """Operations per token of a step's products with weights, with what its backward pass recomputes."""
    model = config.model_config
    in_layers = matmul_parameters(model) - model.vocab_size * model.width
    recomputed = 2 * in_layers if config.remat == "full" else 0
    return 6 * matmul_parameters(model) + recomputed


def executed_attention_flops(config: TrainConfig, *, forward: float) -> float:
    """Operations per token of a step's attention, whose forward kernel runs so many times for one backward."""
    return (forward + _ATTENTION_BACKWARD) * attention_flops(config.model_config, config.data.sequence_length)


def passes(config: TrainConfig) -> int:
    """How often a step goes through the layers: forward, backward, and where whole layers are recomputed, once more."""
    return 3 if config.remat == "full" else 2


def state_bytes(config: TrainConfig) -> float:
    """Bytes per device of parameters, moments and gradients."""
    return STATE * config.model_config.num_parameters / (config.mesh.fsdp * config.mesh.tensor)


def activation_bytes(config: TrainConfig) -> float:
    """Bytes per device that the backward pass finds, and of the weights that are gathered at a time."""
    model, mesh = config.model_config, config.mesh
    heads, kv = model.num_heads * model.head_dim / mesh.tensor, model.num_kv_heads * model.head_dim / mesh.tensor
    mlp = model.mlp_width / mesh.tensor
    # Products: queries and what attention makes of them, keys and values, gate and up, and both outputs.
    products = 2 * heads + 2 * kv + 2 * mlp + 2 * model.width
    saved = {"full": model.width, "dots": model.width + products, "none": 8 * model.width + 2 * products}
    working = 4 * model.width + 2 * products
    tokens = config.micro_batch_size * config.data.sequence_length / (mesh.row_shards * mesh.context)
    layer = (2 * model.width * (heads + kv) + 3 * model.width * mlp) * (BF16 + F32)
    # The loss holds the whole output head along fsdp, and its gradient.
    head = model.vocab_size * model.width / mesh.tensor * (BF16 + BF16)
    by_token = tokens * BF16 * (model.num_layers * saved[config.remat] + working)
    return by_token + layer + head + _LOSS_CHUNK


def train_bytes(config: TrainConfig) -> float:
    """Bytes per device at the peak of a training step."""
    return state_bytes(config) + activation_bytes(config)


def kv_bytes(config: ModelConfig) -> int:
    """Bytes of the keys and values of one token, in bfloat16."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BF16
