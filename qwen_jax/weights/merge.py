"""One model made of several that have learned different things from the same start, without training:

    python -m qwen_jax.weights.merge A B OUT --method slerp --t 0.3
    python -m qwen_jax.weights.merge A B C OUT --method ties --base BASE --density 0.2

linear is the weighted mean, slerp goes from A to B along an arc. The others add up what each model has learned since
BASE: task_arithmetic all of it (arXiv 2212.04089), ties the largest of it where the signs agree (arXiv 2306.01708),
dare_linear and dare_ties a part drawn at random and scaled up (arXiv 2311.03099). Weights pass through in pieces, so
memory does not grow with the models. Config, tokenizer and the other files beside the weights are those of A.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np

from qwen_jax.command import Parser, run_command
from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.text import Tokenizer
from qwen_jax.weights import hf
from qwen_jax.weights.convert import convert
from qwen_jax.weights.source import Model, Piece, open_model, pieces

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
_WITH_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
_SPARSE = ("ties", "dare_linear", "dare_ties")
# Nearer to a line than this (as a cosine) an arc is one, and its sine too small to divide by; as mergekit has it.
_PARALLEL = 0.9995


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How models are merged.

    Attributes:
      method: see above.
      weights: of each model; those of `linear` are divided by their sum.
      density: fraction of what a model has learned that is kept, tensor by tensor: for `ties` the largest, for `dare_*`
        drawn at random and divided by this.
      scale: what was learned is multiplied with this at the end (lambda of the papers).
      t: of `slerp`, 0 for the first model and 1 for the second.
      seed: of `dare_*`.
    """

    method: Method
    weights: tuple[float, ...]
    density: float = 1.0
    scale: float = 1.0
    t: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method == "slerp" and len(self.weights) != 2:
            raise ConfigError(f"slerp goes from one model to another, and {len(self.weights)} are given")
        if self.method == "linear" and not sum(self.weights):
            raise ConfigError(f"weights {self.weights} have the sum 0, by which linear divides")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density {self.density} must be above 0 and at most 1")
        if not 0 <= self.t <= 1:
            raise ConfigError(f"t {self.t} must be between 0 and 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} must not be negative")


def linear(models: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The mean of arrays of one shape, float32 as all arrays here."""
    total = sum(weights)
    return _sum(models, [weight / total for weight in weights])


def slerp(a: np.ndarray, b: np.ndarray, t: float, *, cosine: float) -> np.ndarray:
    """The point `t` of the arc from a to b; `cosine` is that of the angle between the whole tensors."""
    if abs(cosine) > _PARALLEL:
        return _sum([a, b], [1 - t, t])
    angle = math.acos(cosine)
    return _sum([a, b], [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)])


def agreed(learned: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted mean, number by number, of those that have the sign of the weighted sum; 0 is of no sign."""
    sign = np.sign(_sum(learned, weights))
    agree = [(np.sign(each) == sign) & (sign != 0) for each in learned]
    count = _sum([each.astype(np.float32) for each in agree], weights)
    total = _sum([np.where(yes, each, 0) for yes, each in zip(agree, learned, strict=True)], weights)
    return np.divide(total, count, out=np.zeros_like(total), where=count != 0)


def largest(learned: np.ndarray, least: float) -> np.ndarray:
    """What is at least as far from 0 as `least`, and 0."""
    return np.where(np.abs(learned) >= least, learned, np.float32(0))


def drawn(learned: np.ndarray, chance: np.ndarray, density: float) -> np.ndarray:
    """What is kept of it where `chance`, uniform in [0, 1), is below `density`, scaled so that the mean stays."""
    return np.where(chance < density, learned / np.float32(density), np.float32(0))


class Merged(Model):
    """What becomes of several models, computed as it is read.

    Args:
      models: of one shape; they stay open, and are the caller's to close. The first is what the result is but for its
        weights.
      recipe: how.
      base: what they have learned from, for the methods that want it, else None.

    Raises ModelError for models of other shapes or tokenizers, ConfigError where the base is missing or too much.
    """

    def __init__(self, models: Sequence[Model], recipe: Recipe, base: Model | None) -> None:
        if (base is None) == (recipe.method in _WITH_BASE):
            wants = "wants a base" if base is None else "has no base"
            raise ConfigError(f"method {recipe.method} {wants}; those that have one are {', '.join(_WITH_BASE)}")
        first = models[0]
        for other in [*models[1:], *([base] if base else [])]:
            _check_alike(first, other)
        self.path, self.config, self.model_type = first.path, first.config, first.model_type
        self.chat, self.table, self.layout = first.chat, first.table, None
        self._models, self._recipe, self._base = models, recipe, base
        self._known: dict[str, list[float]] = {}  # a few numbers for each tensor that is not merged by its pieces alone

    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        return self._models[0].dtype(tensor)

    def read(self, piece: Piece) -> np.ndarray:
        return self._merge(piece).astype(self.dtype(piece.tensor))

    def _merge(self, piece: Piece) -> np.ndarray:
        recipe = self._recipe
        values = [_read(model, piece) for model in self._models]
        if recipe.method == "linear":
            return linear(values, recipe.weights)
        if recipe.method == "slerp":
            (cosine,) = self._of_tensor(piece.tensor)
            a, b = values
            return slerp(a, b, recipe.t, cosine=cosine)
        base, learned = self._learned(piece)
        if recipe.method == "ties":
            known = self._of_tensor(piece.tensor)
            learned = [largest(each, least) for each, least in zip(learned, known, strict=True)]
        elif recipe.method != "task_arithmetic":
            chances = [_chances(piece, recipe.seed, number) for number in range(len(learned))]
            learned = [drawn(each, by, recipe.density) for each, by in zip(learned, chances, strict=True)]
        combine = agreed if recipe.method.endswith("ties") else _sum
        return base + np.float32(recipe.scale) * combine(learned, recipe.weights)

    def _learned(self, piece: Piece) -> tuple[np.ndarray, list[np.ndarray]]:
        """Of a piece the base, and what each model is away from it."""
        assert self._base is not None
        base = _read(self._base, piece)
        return base, [_read(model, piece) - base for model in self._models]

    def _of_tensor(self, tensor: hf.Tensor) -> list[float]:
        """What is to be known of a whole tensor: slerp's cosine, or for each model the least that ties keeps."""
        if tensor.name not in self._known:
            whole = self._cosine if self._recipe.method == "slerp" else self._least
            self._known[tensor.name] = whole(list(pieces(tensor, 4)))
        return self._known[tensor.name]

    def _cosine(self, tensor: Sequence[Piece]) -> list[float]:
        sums = np.zeros(3)
        for piece in tensor:
            a, b = (_read(model, piece).astype(np.float64).ravel() for model in self._models)
            sums += [a @ b, a @ a, b @ b]
        norms = math.sqrt(sums[1] * sums[2])
        return [sums[0] / norms if norms else 1.0]

    def _least(self, tensor: Sequence[Piece]) -> list[float]:
        """Sizes as bits sort like sizes: one walk counts upper halves, another the lower ones where the border is."""
        keep = max(1, round(self._recipe.density * math.prod(tensor[0].tensor.shape)))
        upper = functools.reduce(np.add, (_counts(bits >> 16) for bits in self._bits(tensor)))
        places, more = zip(*(_place(counts, keep) for counts in upper), strict=True)
        border = np.array(places, np.uint32)[:, None]
        below = lambda bits: [_count(row & 0xFFFF, (row >> 16) == at) for row, at in zip(bits, border, strict=True)]
        lower = functools.reduce(np.add, (np.stack(below(bits)) for bits in self._bits(tensor)))
        found = [_place(counts, keep - above)[0] for counts, above in zip(lower, more, strict=True)]
        exact = (border[:, 0] << 16) | np.array(found, np.uint32)
        return exact.view(np.float32).tolist()

    def _bits(self, tensor: Sequence[Piece]) -> Iterator[np.ndarray]:
        """Of each piece the bits of how far each model is from the base, [models, n]."""
        for piece in tensor:
            yield np.stack([np.abs(each).ravel() for each in self._learned(piece)[1]]).view(np.uint32)

    def side_files(self) -> dict[str, bytes]:
        return self._models[0].side_files()

    def tokenizer(self) -> Tokenizer:
        return self._models[0].tokenizer()

    def close(self) -> None:
        self._known.clear()


def _sum(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    total = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights, strict=True):
        total += np.float32(weight) * array
    return total


def _count(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.bincount(values[where], minlength=2**16)


def _counts(values: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(row, minlength=2**16) for row in values])


def _place(counts: np.ndarray, keep: int) -> tuple[int, int]:
    """The bin that the `keep`-th number from above is in, and how many are in those above it."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, keep))
    return len(counts) - 1 - place, int(above[place - 1]) if place else 0


def _read(model: Model, piece: Piece) -> np.ndarray:
    return model.read(piece).astype(np.float32)


def _chances(piece: Piece, seed: int, number: int) -> np.ndarray:
    """Numbers of 0 to 1, of the place in the tensor alone: the same however it is cut."""
    rng = np.random.PCG64([seed, number, zlib.crc32(piece.tensor.name.encode())])
    rng.advance(piece.rows.start * math.prod(piece.tensor.shape[1:]))
    return np.random.Generator(rng).random(piece.shape)


def _check_alike(one: Model, other: Model) -> None:
    """Raises ModelError unless two models compute the same with the same weights, of the same tokens."""
    # Types are as stored, and the positions what a model was tuned for.
    loose = dict(dtype="float32", param_dtype="float32", max_position=1)
    a, b = (dataclasses.asdict(dataclasses.replace(model.config, **loose)) for model in (one, other))
    if differs := [name for name in a if a[name] != b[name]]:
        name = differs[0]
        raise ModelError(f"{one.path} and {other.path} cannot be merged: {name} is {a[name]} and {b[name]}")
    if one.model_type != other.model_type:
        raise ModelError(f"{one.path} is a {one.model_type} and {other.path} a {other.model_type}")
    if one.tokenizer().fingerprint != other.tokenizer().fingerprint:
        raise ModelError(f"{one.path} and {other.path} have different tokenizers: their tables mean different tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    options = parse(arguments)
    recipe = _recipe(options)
    jax.config.update("jax_platforms", "cpu")
    say = lambda line: print(line, file=sys.stderr)
    with contextlib.ExitStack() as opened:
        how = dict(allow_pickle_format=options.allow_pickle_format, warn=say)
        models = [opened.enter_context(open_model(name, **how)) for name in options.models]
        base = None if options.base is None else opened.enter_context(open_model(options.base, **how))
        source = opened.enter_context(Merged(models, recipe, base))
        convert(source, options.out, to=options.to, dtype=options.dtype, say=say)
    return 0


def _recipe(options: argparse.Namespace) -> Recipe:
    """Raises ConfigError for an option that the method does not have."""
    method, count = options.method, len(options.models)
    of = {"weights": tuple(set(get_args(Method)) - {"slerp"}), "density": _SPARSE, "scale": _WITH_BASE}
    of |= {"t": ("slerp",), "seed": ("dare_linear", "dare_ties")}
    given = {name: getattr(options, name) for name in of if getattr(options, name) is not None}
    for name in given:
        if method not in of[name]:
            raise ConfigError(f"--{name} is not of --method {method}; leave it out")
    if method in _SPARSE and "density" not in given:
        raise ConfigError(
            f"--method {method} wants --density, the fraction that is kept of what each model has learned"
        )
    weights = tuple(given.pop("weights", [1.0] * count))
    if len(weights) != count:
        raise ConfigError(f"--weights {' '.join(map(str, weights))} are {len(weights)}, and there are {count} models")
    return Recipe(method=method, weights=weights, **given)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Raises ConfigError for any it does not know."""
    parser = Parser(
        prog="python -m qwen_jax.weights.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 unexpected, 2 usage, 3 model, 4 file or permission, 130 interrupted",
    )
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="what to merge, each named as for convert")
    add("out", metavar="OUT", type=Path, help="folder to write; new, or empty")
    add("--method", choices=get_args(Method), required=True, help="see above")
    add("--base", metavar="MODEL", help="what the models were trained from")
    add("--weights", metavar="W", type=float, nargs="+", help="of each model (default: 1 each)")
    add("--density", metavar="P", type=float, help="fraction that ties and dare keep of what a model has learned")
    add("--scale", metavar="S", type=float, help="factor of all that was learned (default: 1)")
    add("--t", metavar="T", type=float, help="where on slerp's arc, 0 for the first model and 1 for the second (0.5)")
    add("--seed", metavar="N", type=int, help="of what dare draws (default: 0)")
    add("--to", choices=["hf", "native"], default="hf", help="form to write (default: hf)")
    add("--dtype", choices=["float32", "bfloat16"], help="type to write (default: that of the first model)")
    add("--allow-pickle-format", action="store_true", help="read PyTorch's own format (.bin) where there is no other")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_command("merge", main))
