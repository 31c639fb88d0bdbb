"""The files beside the weights of a published model: those it came with, or new ones for a model trained here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from qwen_jax.config import DType
from qwen_jax.text.tokenizer import END_OF_TEXT
from qwen_jax.weights import hf_config
from qwen_jax.weights.hf_quantization import KEY
from qwen_jax.weights.source import Model, parse_json

END_OF_TURN = "<|im_end|>"


def side_files(
    model: Model, dtypes: Mapping[str, np.dtype], quantization: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Every file but the weights and their index. What the model came with stays as it is where it is still true.

    A model that was tuned to chat ends its turns with <|im_end|>, whatever the model it began as did: other programs
    read from these files where to stop.

    Args:
      model: its own side files are the start.
      dtypes: of the weights that are written as they are.
      quantization: what config.json says of the others.

    Raises ModelError for one that is not JSON.
    """
    files = model.side_files()
    old = {name: parse_json(files[name], model.path / name) for name in files if name.endswith("config.json")}
    stored = old.pop("config.json", None)
    config = model.config
    if any(dtypes.get(tensor.name, kind) != kind for tensor in model.table for kind in [model.dtype(tensor)]):
        config = dataclasses.replace(config, param_dtype=_param_dtype(dtypes))
    about = hf_config.to_hf(config, model.model_type, keep=stored)
    about = {name: value for name, value in about.items() if name != KEY} | (
        {KEY: quantization} if quantization else {}
    )
    new = old | {"config.json": about}
    if stored is None or model.chat:
        new |= _endings(model, new)
    if stored is not None:
        old["config.json"] = stored
    changed = {name: values for name, values in new.items() if values != old.get(name)}
    return files | {name: (json.dumps(values, indent=2) + "\n").encode() for name, values in changed.items()}


def _param_dtype(dtypes: Mapping[str, np.dtype]) -> DType:
    """What config.json calls the dtype of the weights."""
    kinds = {str(dtype) for dtype in dtypes.values()}
    return cast(DType, "bfloat16" if kinds == {"bfloat16"} else "float32")


def _endings(model: Model, files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Three files, with where the model's text ends."""
    tokenizer = model.tokenizer()
    last, end, ids = END_OF_TEXT, tokenizer.end_of_text, [tokenizer.end_of_text]
    if model.chat:
        last, ids = END_OF_TURN, [tokenizer.control[END_OF_TURN], end]
    # Which transformers leaves out where it looks for the last token of a text that is scored.
    padding = {"pad_token_id": end} if model.config.score else {}
    about = {"clean_up_tokenization_spaces": False, "model_max_length": model.config.max_position}
    return {
        "config.json": {**files["config.json"], "eos_token_id": ids[0], **padding},
        "generation_config.json": {"pad_token_id": end, **files.get("generation_config.json", {}), "eos_token_id": ids},
        "tokenizer_config.json": {
            **files.get("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **about}),
            "eos_token": last,
            "pad_token": END_OF_TEXT,
        },
    }
