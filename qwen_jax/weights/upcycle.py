"""A mixture of experts made of a dense model, as Qwen2-57B-A14B was (arXiv 2407.10671, section 2.2.2):

    python -m qwen_jax.weights.upcycle DENSE OUT --experts 64 --top-k 8 --expert-ffn 2560 --shared-ffn 20480

In every layer the dense MLP is copied, the inner dimension of each copy is shuffled, and the copies, one after the
other, are cut into experts; then a part of every expert's parameters is drawn anew. What the report leaves open: which
parameters are drawn anew is decided one by one, the shared expert is cut likewise and kept whole, and the router and
the gate of the shared expert start as in a fresh model. The result is to be trained, not used.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from qwen_jax.command import Parser, run_command
from qwen_jax.config import Moe
from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.text import Tokenizer
from qwen_jax.weights import hf
from qwen_jax.weights.convert import convert
from qwen_jax.weights.source import Model, Piece, open_model, pieces
from qwen_jax.weights.verify import add_model_options

_MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class Upcycled(Model):
    """What becomes of a dense model, computed as it is read.

    Args:
      dense: of Qwen1.5 or later; it stays open, and is the caller's to close.
      moe: the experts.
      reinit: part of the experts' parameters that is drawn anew.
      seed: of all that is drawn.

    Raises ModelError where the dense model cannot become such a mixture.
    """

    def __init__(self, dense: Model, moe: Moe, *, reinit: float, seed: int) -> None:
        kinds: dict[hf.ModelType, hf.ModelType] = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
        if dense.model_type not in kinds:
            raise ModelError(f"{dense.path} is a {dense.model_type}; a qwen2 or qwen3 can become a mixture of experts")
        self.path, self.chat, self.layout = dense.path, dense.chat, None
        self.model_type = kinds[dense.model_type]
        self.config = dataclasses.replace(dense.config, mlp_width=0, moe=moe)
        self.table = hf.table(self.config, self.model_type)
        self._dense, self._moe, self._reinit, self._seed = dense, moe, reinit, seed
        self._kept = {tensor.name: tensor for tensor in dense.table}
        # One layer's MLP, and what threads a little ahead or behind have of the next.
        self._matrix = functools.lru_cache(maxsize=6)(self._read_matrix)
        self._reading = threading.Lock()

    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        return self._dense.dtype(self._kept.get(tensor.name, self._dense.table[0]))

    def read(self, piece: Piece) -> np.ndarray:
        if kept := self._kept.get(piece.tensor.name):
            part = next(part for part in kept.parts if part.path == piece.part.path)
            return self._dense.read(dataclasses.replace(piece, tensor=kept, part=part))
        *_, owner, matrix, _ = piece.part.path.split("/")
        if owner not in ("experts", "shared"):  # the router, and the gate of the shared expert
            return self._fresh(piece)[0].astype(self.dtype(piece.tensor))
        values = self._cut(piece, matrix, shared=owner == "shared")
        if owner == "experts":
            fresh, chance = self._fresh(piece)
            values = np.where(chance < self._reinit, fresh.astype(values.dtype), values)
        return values

    def _cut(self, piece: Piece, matrix: str, *, shared: bool) -> np.ndarray:
        """The piece of an expert, or of the shared one, out of shuffled copies of the dense MLP."""
        layer, inner = piece.part.stack[0], self._dense.config.mlp_width
        width = self._moe.shared_width if shared else self._moe.expert_width
        start = 0 if shared else piece.part.stack[1] * width
        # Copies of the shared expert are shuffled apart from those of the others.
        copies = [
            np.random.default_rng([self._seed, layer, copy, shared]).permutation(inner)
            for copy in range(start // inner, -(-(start + width) // inner))
        ]
        places = np.concatenate(copies)[start % inner :][:width]
        whole = self._locked_matrix(layer, matrix)
        if matrix == "down":
            return whole[piece.start : piece.stop, places]
        return whole[places[piece.start : piece.stop]]

    def _fresh(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """Values as a fresh model has them, and beside each a number of 0 to 1; the same however it is cut."""
        columns = math.prod(piece.part.shape[1:])
        rng = np.random.PCG64([self._seed, zlib.crc32(piece.tensor.name.encode())])
        rng.advance(3 * piece.start * columns)  # three numbers for each value
        chance, radius, angle = np.random.Generator(rng).random((math.prod(piece.shape), 3)).T
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
        scale = 0.5 / self.config.num_layers if piece.part.path.endswith("/down/w") else 1.0
        return ((scale / columns) ** 0.5 * normal).reshape(piece.shape), chance.reshape(piece.shape)

    def _locked_matrix(self, layer: int, matrix: str) -> np.ndarray:
        with self._reading:  # else every thread would read the same one
            return self._matrix(layer, matrix)

    def _read_matrix(self, layer: int, matrix: str) -> np.ndarray:
        tensor = self._kept[f"model.layers.{layer}.mlp.{_MATRICES[matrix]}.weight"]
        return np.concatenate([self._dense.read(piece) for piece in pieces(tensor, self.dtype(tensor).itemsize)])

    def side_files(self) -> dict[str, bytes]:
        return self._dense.side_files()

    def tokenizer(self) -> Tokenizer:
        return self._dense.tokenizer()

    def close(self) -> None:
        self._matrix.cache_clear()


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    options = parse(arguments)
    jax.config.update("jax_platforms", "cpu")
    say = lambda line: print(line, file=sys.stderr)
    with open_model(options.dense, allow_pickle_format=options.allow_pickle_format, warn=say) as dense:
        moe = Moe(
            num_experts=options.experts,
            top_k=options.top_k,
            expert_width=options.expert_ffn,
            shared_width=options.shared_ffn,
            normalize_top_k=dense.model_type == "qwen3",  # as published
        )
        with Upcycled(dense, moe, reinit=options.reinit, seed=options.seed) as source:
            convert(source, options.out, to=options.to, dtype=None, say=say)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Raises ConfigError for any it does not know, or out of its range."""
    parser = Parser(
        prog="python -m qwen_jax.weights.upcycle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser, "dense")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new, or empty")
    parser.add_argument("--experts", type=int, required=True, help="experts of each layer")
    parser.add_argument("--top-k", type=int, required=True, help="experts that see a token")
    parser.add_argument("--expert-ffn", type=int, required=True, help="inner width of an expert")
    parser.add_argument("--shared-ffn", type=int, default=0, help="inner width of the shared expert (default: none)")
    parser.add_argument("--reinit", type=float, default=0.5, help="part of the experts drawn anew (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of shuffles and of what is drawn (default: 0)")
    parser.add_argument("--to", choices=["hf", "native"], default="native", help="form to write (default: native)")
    options = parser.parse_args(arguments)
    if not 0 <= options.reinit <= 1:
        raise ConfigError(f"--reinit {options.reinit} must be between 0 and 1")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed} must not be negative")
    return options


if __name__ == "__main__":
    sys.exit(run_command("upcycle", main))
