"""A model as an adapter changes it: a `Model` like any other, computed as it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import ModelError
from qwen_jax.model.adapter import TABLES, A, B
from qwen_jax.text import Tokenizer
from qwen_jax.weights import hf
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.fields import Fields
from qwen_jax.weights.source import ADAPTER, Model, Piece, PublishedFolder, parse_json
from qwen_jax.weights.stored import StoredArrays
from qwen_jax.weights.targets import modules, paths_of

_TABLES = tuple(f"{name}/w" for name in TABLES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in the memory of the host.

    Attributes:
      base: what names the model it is of.
      scale: of its products.
      dropout: that it was trained with.
      arrays: float32 by path: of matrices "layers/attention/q/lora_a" [L, r, inputs] and its "lora_b" [L, outputs, r],
        and of tables that are other than the model's "embed/w" and "head/w" [V, D].
    """

    base: str
    scale: float
    dropout: float
    arrays: Mapping[str, np.ndarray]

    def to_json(self) -> bytes:
        """What a checkpoint keeps of it beside the arrays."""
        return (json.dumps({"base": self.base, "scale": self.scale, "dropout": self.dropout}, indent=2) + "\n").encode()

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Adapter:
        """The adapter that a run has trained. Raises ModelError for one that is damaged."""
        where = checkpoint.path / ADAPTER
        fields = Fields(parse_json(checkpoint.read(ADAPTER), where), str(where))
        shapes = checkpoint.shapes("params")
        stored = StoredArrays(checkpoint.path, "params", shapes, np.dtype(np.float32))
        whole = {path: stored.read(path, tuple(slice(0, size) for size in shape)) for path, shape in shapes.items()}
        stored.close()
        dropout = fields.number("dropout") if fields.values.get("dropout") else 0.0  # which is no positive number
        return cls(base=fields.text("base"), scale=fields.number("scale"), dropout=dropout, arrays=whole)


class AdaptedModel(Model):
    """A base with an adapter merged into it, piece by piece.

    Args:
      base: closed with this model.
      adapter: of it.
      path: of the adapter.
      config: what the adapter was trained as; None for the base's.
      chat: whether it was trained to answer in turns; None for what the base says.
      files: what lies beside the adapter and takes the place of the base's, such as a chat template.

    Raises ModelError unless the adapter is one of such a model.
    """

    def __init__(
        self,
        base: Model,
        adapter: Adapter,
        *,
        path: Path,
        config: ModelConfig | None = None,
        chat: bool | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.base, self.adapter, self.path, self._files = base, adapter, path, files
        config = config or base.config
        self.config = dataclasses.replace(config, param_dtype=base.config.param_dtype)
        self.model_type, self.table, self.layout = base.model_type, base.table, base.layout
        self.chat = base.chat if chat is None else chat
        self._check()

    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        return self.base.dtype(tensor)

    def read(self, piece: Piece) -> np.ndarray:
        path, arrays, rows = piece.part.path, self.adapter.arrays, slice(piece.start, piece.stop)
        if path in arrays:
            return arrays[path][rows].astype(self.dtype(piece.tensor))
        values, module = self.base.read(piece), path.removesuffix("/w")
        if f"{module}/{A}" not in arrays:
            return values
        (layer,) = piece.part.stack
        change = np.tensordot(arrays[f"{module}/{B}"][layer][rows], arrays[f"{module}/{A}"][layer], axes=1)
        return (values.astype(np.float32) + np.float32(self.adapter.scale) * change).astype(values.dtype)

    def side_files(self) -> dict[str, bytes]:
        return {**self.base.side_files(), **self._files}

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def close(self) -> None:
        self.base.close()

    def _check(self) -> None:
        wanted, layers = {}, self.config.num_layers
        for tensor in modules(self.table).values():
            for part, rows in zip(tensor.parts, tensor.rows, strict=True) if paths_of(tensor) else ():
                module, outputs = part.path.removesuffix("/w"), hf.output_axes(part, rows)
                rank = self.adapter.arrays.get(f"{module}/{A}", np.zeros((0, 0))).shape[1]
                wanted[f"{module}/{A}"] = (layers, rank, *part.shape[outputs:])
                wanted[f"{module}/{B}"] = (layers, *part.shape[:outputs], rank)
        wanted |= {part.path: part.shape for tensor in self.table for part in tensor.parts if part.path in _TABLES}
        for path, array in self.adapter.arrays.items():
            if array.shape != wanted.get(path):
                raise ModelError(
                    f"{self.path} is no adapter of {self.base.path}: it has {path} of shape {list(array.shape)}, "
                    f"where {list(wanted[path]) if path in wanted else 'nothing'} fits"
                )
            other = path.removesuffix(A) + B if path.endswith(A) else path.removesuffix(B) + A
            if path not in _TABLES and other not in self.adapter.arrays:
                raise ModelError(f"{self.path} is no adapter: it has {path} without {other}")


def is_quantized(model: Model) -> bool:
    """Whether any weight of a model, or of the one that it is an adapter of, is quantised."""
    if isinstance(model, AdaptedModel):
        return is_quantized(model.base)
    return isinstance(model, PublishedFolder) and bool(model.quantized.names)
