"""A step of supervised fine-tuning as the trainers of transformers and TRL take it, however it is cut."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from tests.published import RELATIVE, tiny_tokenizer
from train import optim
from train.config import LM, AdamW
from train.objectives import lm
from train.step import State, make_train_step

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("mesh")]

IGNORED, LENGTH = -100, 32
COMMON = dict(
    vocab_size=288, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=44, rope_theta=12345.0, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=36,
    output_router_logits=True, router_aux_loss_coef=0.02,
)  # fmt: skip
MODELS = {
    "tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "experts": ("Qwen2Moe", EXPERTS),
}


@pytest.fixture
def make_net(tmp_path):
    """A function: a name to a model of transformers, and the folder it is saved in."""

    def make(name):
        kind, changes = MODELS[name]
        torch.manual_seed(0)
        net = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**COMMON, **changes))
        net.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "tokenizer.json").write_bytes(tiny_tokenizer().to_bytes())
        return net, tmp_path / "base"

    return make


def chat(length, trained):
    """(ids, labels); labels are not shifted, as transformers has them."""
    ids = np.random.default_rng(length).integers(0, COMMON["vocab_size"], length)
    return ids, np.where(np.arange(length) < length - trained, IGNORED, ids)


# By length, each with how many of its last tokens are trained: two micro-batches of very unequal weight.
MICRO_BATCHES = [[chat(20, 3), chat(9, 1), chat(14, 2)], [chat(30, 27), chat(12, 11), chat(17, 15)]]


def padded(ids, labels):
    """A conversation as a row of transformers'."""
    pad = lambda values, fill: torch.tensor(np.pad(values, (0, LENGTH - len(values)), constant_values=fill))
    return dict(input_ids=pad(ids, 0), labels=pad(labels, IGNORED), attention_mask=pad(np.ones_like(ids), 0))


def transformers_trainer(net, **arguments):
    """The kind of trainer, and what it is made with."""
    return transformers.Trainer, dict(model=net, args=transformers.TrainingArguments(**arguments)), padded


def trl_trainer(net, **arguments):
    """The same of TRL, which pads by itself."""
    pytest.importorskip("datasets", reason="TRL needs it: pip install -e '.[parity]'")
    trl = pytest.importorskip("trl", reason="the oracle: pip install -e '.[parity]'")
    from datasets import Dataset

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tiny_tokenizer().to_bytes().decode()),
        eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    plain = lambda ids, labels: dict(input_ids=ids.tolist(), labels=labels.tolist())
    own = trl.SFTConfig(**arguments, bf16=False, max_length=LENGTH)

    class Trainer(trl.SFTTrainer):
        def __init__(self, train_dataset, **made):
            super().__init__(train_dataset=Dataset.from_list(train_dataset), **made)

    return Trainer, dict(model=net, args=own, processing_class=tokenizer), plain


def theirs(net, folder, micro_batches, kind=transformers_trainer):
    """Loss and norm of the gradient of one step of a trainer."""
    trainer_class, made, row = kind(
        net, output_dir=str(folder / "trainer"), max_steps=1, per_device_train_batch_size=len(micro_batches[0]),
        gradient_accumulation_steps=len(micro_batches), max_grad_norm=1e9, learning_rate=0.0, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip

    class Trainer(trainer_class):
        total = 0.0

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *arguments, **options):
            loss = super().training_step(*arguments, **options)
            self.total += loss.item()
            return loss

    trainer = Trainer(train_dataset=[row(*chat) for micro in micro_batches for chat in micro], **made)
    trainer.train()
    return trainer.total, trainer.state.log_history[0]["grad_norm"]


def rows(micro, *, packed):
    """The arrays of a micro-batch: each conversation in a row of its own, or in one with those before it."""
    batch = {name: np.zeros((len(micro), LENGTH), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch["weights"] = np.zeros((len(micro), LENGTH), np.float32)
    row, start, segment = 0, 0, 0
    for ids, labels in micro:
        if segment and (not packed or start + len(ids) > LENGTH):
            row, start, segment = row + 1, 0, 0
        segment += 1
        at = (row, slice(start, start + len(ids)))
        batch["tokens"][at], batch["targets"][at] = ids, np.roll(ids, -1)
        batch["positions"][at], batch["segments"][at] = np.arange(len(ids)), segment
        batch["weights"][at] = np.append(labels[1:] != IGNORED, False)
        start += len(ids)
    return batch


def stepper(folder, objective=LM()):  # noqa: B008
    """A function: micro-batches to loss and norm of the gradient of one step of ours."""
    with open_model(folder) as opened:
        params = load_params(opened, dtype="float32", stacked=True)
    loss = functools.partial(lm.loss, opened.config, objective, attention="reference")
    optimizer = optim.adamw(AdamW(peak_lr=1.0))
    step = make_train_step(loss, optimizer, lambda step: jnp.float32(0))

    def take(*micro_batches):
        batch = {name: np.stack([micro[name] for micro in micro_batches]) for name in micro_batches[0]}
        state = State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params))
        _, metrics = step(state, batch)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return take


@pytest.mark.parametrize("kind", [transformers_trainer, trl_trainer])
def test_a_step_of_two_uneven_micro_batches(make_net, tmp_path, kind):
    net, folder = make_net("tied")
    expected = theirs(net, tmp_path, MICRO_BATCHES, kind)
    take = stepper(folder)
    alone = [rows(micro, packed=False) for micro in MICRO_BATCHES]
    packed = [rows(micro, packed=True) for micro in MICRO_BATCHES]
    assert max(batch["segments"].max() for batch in packed) > 1
    assert take(*alone) == pytest.approx(expected, rel=RELATIVE)
    assert take(*packed) == pytest.approx(expected, rel=RELATIVE)
    # The mean of the means, which trainers took for years, is another number.
    mean = np.mean([take(micro, micro)[0] for micro in alone])
    assert abs(mean - expected[0]) > 1e-3 * expected[0]


def test_a_step_of_a_mixture_of_experts(make_net, tmp_path):
    """With the loss of its router, which transformers has for a micro-batch, and does not divide by their number."""
    net, folder = make_net("experts")
    expected = theirs(net, tmp_path, MICRO_BATCHES[:1])
    take = stepper(folder, LM(balance=EXPERTS["router_aux_loss_coef"]))
    loss, norm = take(rows(MICRO_BATCHES[0], packed=False))
    assert norm == pytest.approx(expected[1], rel=RELATIVE)
    assert loss < expected[0], "its loss has the router's in it"
