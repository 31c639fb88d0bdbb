"""Work and memory of a model by formula. Attention counts as causal: half of what it takes without a mask."""

from __future__ import annotations

from qwen_jax.config import ModelConfig
from qwen_jax.weights import hf
from train.config import LoRA, TrainConfig

# Bytes of a parameter in training, all float32: itself, its two moments, and its gradient until the update.
PARAMETER, MOMENTS, GRADIENT = 4, 8, 4
STATE = PARAMETER + MOMENTS + GRADIENT

BF16, F32 = 2, 4

# Of the forward kernel's work: it has two products, and the backward kernel five, the first of them the scores again.
_ATTENTION_BACKWARD = 2.5

# Tokens of a piece of the MLP, which a device with more than two of them computes one by one, and again backward. A
# copy of `qwen_jax.ops.mlp.PIECE`, since importing that would load jax.
MLP_PIECE = 8192

# Logits of one chunk of the loss, and its gradient.
_LOSS_CHUNK = 2 * 128 * 2**20


def matmul_parameters(config: ModelConfig, *, experts: float | None = None) -> float:
    """Parameters that every token is multiplied with: the matrices of the layers and the output head.

    Of each layer's experts those that a token is sent to, or so many.
    """
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    mlp = 3 * config.width * config.mlp_width
    if moe := config.moe:
        mlp = config.width * (moe.num_experts + 3 * moe.shared_width + (moe.shared_width > 0))
    layers = config.num_layers * (attention + mlp)
    return layers + expert_parameters(config, experts) + config.vocab_size * config.width


def expert_parameters(config: ModelConfig, experts: float | None = None) -> float:
    """Parameters, in all layers, of those experts that a token is sent to, or of so many."""
    if config.moe is None:
        return 0
    chosen = config.moe.top_k if experts is None else experts
    return 3 * config.width * config.moe.expert_width * chosen * config.num_layers


def held_parameters(config: TrainConfig) -> float:
    """Parameters whose state a device keeps."""
    model, mesh = config.model_config, config.mesh
    experts = expert_parameters(model, model.moe.num_experts) if model.moe else 0
    return (model.num_parameters - experts + experts / mesh.expert) / (mesh.fsdp * mesh.tensor)


def used_parameters(config: TrainConfig) -> float:
    """Parameters that a device multiplies with, gathered along fsdp."""
    model, mesh = config.model_config, config.mesh
    experts = model.moe.num_experts / mesh.expert if model.moe else None
    return matmul_parameters(model, experts=experts) / mesh.tensor


def attention_flops(config: ModelConfig, length: int) -> float:
    """Operations per token of scores and weighted values, forward, the mean over a sequence of `length` tokens."""
    windows = config.windows or (0,) * config.num_layers
    most = [min(window or length, length) for window in windows]
    keys = sum(window * (1 - window / (2 * length)) for window in most)
    return 4 * config.num_heads * config.head_dim * keys


def train_flops(config: ModelConfig, length: int) -> float:
    """Operations per token of a training step, forward and twice that backward, without recomputation."""
    return 3 * (2 * matmul_parameters(config) + attention_flops(config, length))


def tokens_of_device(config: TrainConfig) -> float:
    """Tokens that go through the model at once on one device."""
    mesh = config.mesh
    return config.micro_batch_size * config.data.sequence_length / (mesh.row_shards * mesh.context)


def executed_matmul_flops(config: TrainConfig) -> float:
    """Operations per token of a step's products with weights, with what its backward pass recomputes."""
    model = config.model_config
    elsewhere = matmul_parameters(model, experts=0)
    recomputed = 0
    if config.remat == "full":
        recomputed = 2 * (elsewhere - model.vocab_size * model.width)
    elif tokens_of_device(config) > 2 * MLP_PIECE:  # gate and up
        recomputed = 2 * 2 * model.width * _mlp_width(model) * model.num_layers
    return 6 * elsewhere + recomputed + executed_expert_flops(model)


def executed_expert_flops(config: ModelConfig) -> float:
    """Operations per token of a step in experts: they keep none of their three products, and compute two again."""
    return (6 + 2 * 2 / 3) * expert_parameters(config)


def executed_attention_flops(config: TrainConfig, *, forward: float) -> float:
    """Operations per token of a step's attention, whose forward kernel runs so many times for one backward."""
    return (forward + _ATTENTION_BACKWARD) * attention_flops(config.model_config, config.data.sequence_length)


def passes(config: TrainConfig) -> int:
    """How often a step goes through the layers: forward, backward, and where whole layers are recomputed, once more."""
    return 3 if config.remat == "full" else 2


def state_bytes(config: TrainConfig) -> float:
    """Bytes per device of parameters, moments and gradients."""
    return whole_state_bytes(config) * held_parameters(config) / config.model_config.num_parameters


def whole_state_bytes(config: TrainConfig) -> float:
    """Bytes of them over all devices; beside an adapter the parameters have the type they compute in, and no more."""
    model = config.model_config
    if not config.adapter:
        return STATE * model.num_parameters
    frozen = BF16 if model.dtype == "bfloat16" else F32
    return frozen * model.num_parameters + STATE * adapter_parameters(model, config.adapter)


def adapter_parameters(model: ModelConfig, adapter: LoRA) -> int:
    """Parameters of an adapter, the tables that it trains whole among them."""
    paths, count = set(adapter.paths(model)), 0
    for tensor in hf.table(model, hf.model_type_of(model)):
        outputs, *inputs = tensor.shape
        adapted = [part for part in tensor.parts if part.path.removesuffix("/w") in paths]
        count += adapter.rank * (outputs + len(adapted) * sum(inputs)) if adapted else 0
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.width
    return count + (tables if adapter.train_embeddings else 0)


def activation_bytes(config: TrainConfig) -> float:
    """Bytes per device that the backward pass finds, and of the weights that are gathered at a time."""
    model, mesh, tokens = config.model_config, config.mesh, tokens_of_device(config)
    heads, kv = model.num_heads * model.head_dim / mesh.tensor, model.num_kv_heads * model.head_dim / mesh.tensor
    mlp = _mlp_width(model) / mesh.tensor
    pieces = tokens > 2 * MLP_PIECE
    # Products: queries and what attention makes of them, keys and values, gate and up, and both outputs.
    products = 2 * heads + 2 * kv + (0 if pieces else 2 * mlp) + 2 * model.width
    saved = {"full": model.width, "dots": model.width + products, "none": 8 * model.width + 2 * products}
    working = 4 * model.width + 2 * products
    layer = (2 * model.width * (heads + kv) + 3 * model.width * mlp) * (BF16 + F32)
    if moe := model.moe:
        layer += 3 * model.width * moe.expert_width / mesh.tensor * moe.num_experts / mesh.expert * (BF16 + F32)
        # The tokens of all devices along `expert`, their gradient, and the sums of both.
        layer += mesh.expert * tokens * model.width * 2 * (BF16 + F32)
    # The loss holds the whole output head along fsdp, and its gradient.
    head = model.vocab_size * model.width / mesh.tensor * (BF16 + BF16)
    by_token = tokens * BF16 * (model.num_layers * saved[config.remat] + working)
    piece = MLP_PIECE * BF16 * 4 * mlp if pieces else 0
    return by_token + piece + layer + head + _LOSS_CHUNK


def train_bytes(config: TrainConfig) -> float:
    """Bytes per device at the peak of a training step."""
    return state_bytes(config) + activation_bytes(config)


def _mlp_width(model: ModelConfig) -> int:
    """Of the MLP that every token goes through."""
    return model.moe.shared_width if model.moe else model.mlp_width


def kv_bytes(config: ModelConfig) -> int:
    """Bytes of the keys and values of one token, in bfloat16."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BF16
