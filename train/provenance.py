"""What a run is of: its tokens and the model beside it. A checkpoint remembers both, and goes on with no others."""

from __future__ import annotations

import hashlib
from typing import Any

from qwen_jax.errors import ConfigError, DataError
from qwen_jax.weights.adapted import is_quantized
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.source import Model, Piece
from train.config import TrainConfig
from train.data import Corpus
from train.data.config import Chats


def fingerprint(corpus: Corpus, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint remembers of its data, so that it is not trained on with other data.

    And whether it is a model that chats: one that was trained on conversations alone ends its texts as they do, and so
    does one that was asked in chats.
    """
    tokens = {part.part.name: len(part.train) for part in corpus.parts}
    known = {"tokenizer": corpus.tokenizer.fingerprint, "train_tokens": tokens.get("all", tokens)}
    prompts = config.data.prompts
    chats = prompts.chat if prompts else all(isinstance(part.part.source, Chats) for part in corpus.parts)
    return known | ({"chat": True} if chats else {})


def check_corpus(corpus: Corpus, config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Raises an error unless the model has a row for each token, and a checkpoint was made with this very data."""
    if corpus.tokenizer.num_tokens > config.model_config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.tokenizer.num_tokens} tokens and model.vocab_size is "
            f"{config.model_config.vocab_size}; make it at least that"
        )
    asks = [*["evaluation.samples"] * bool(config.evaluation.samples), *["keep_best"] * config.checkpoint.keep_best]
    if (
        asks
        and not any(len(part.held_out) for part in corpus.parts)
        and not (config.data.prompts and config.data.held_out)
    ):
        raise ConfigError(f"{' and '.join(asks)} looks at held-out text, and there is none; set data.held_out above 0")
    meta = {name: value for name, value in (checkpoint.meta if checkpoint else {}).items() if name != "base"}
    if checkpoint and meta != (found := fingerprint(corpus, config)):
        raise DataError(
            f"the tokens are not those that {checkpoint.path} was trained on: {found}, not {meta}; "
            "restore them, or choose another run_dir"
        )


def check_tokenizer(corpus: Corpus, source: Model) -> None:
    """Raises DataError unless the tokens are those that the model knows."""
    if corpus.tokenizer.fingerprint != source.tokenizer().fingerprint:
        raise DataError(
            f"the tokens are of another tokenizer than {source.path}, and its weights would mean nothing; "
            "set data.tokenizer = @TokenizerFile and data.tokenizer.path to the tokenizer of that model"
        )


def base_digest(config: TrainConfig, source: Model, checkpoint: Checkpoint | None) -> str:
    """What tells the base from others of its shape: a digest of the first row of each of its tensors.

    Raises DataError if the adapter of a checkpoint was trained beside another, ConfigError if it cannot be exported.
    """
    if config.export and config.export.merged and is_quantized(source) and not config.export.dtype:
        raise ConfigError(
            f'{source.path} is quantised, and export.merged writes its weights whole: set export.dtype = "bfloat16"'
        )
    digest = hashlib.sha256()
    for tensor in source.table:
        part, rows = tensor.parts[0], tensor.rows[0]
        ratio = (rows.stop - rows.start) // part.shape[0]
        row = Piece(tensor, part, slice(rows.start, rows.start + ratio), 0, 1)
        digest.update(f"{tensor.name} {source.dtype(tensor)}".encode() + source.read(row).tobytes())
    found = digest.hexdigest()
    if checkpoint and checkpoint.meta.get("base", found) != found:
        raise DataError(
            f"{source.path} has other weights than the base that {checkpoint.path} was trained beside; put that one "
            "back, or choose another run_dir"
        )
    return found
