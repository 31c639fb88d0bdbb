"""Quantised weights of published folders: read as they are, a part at a time, or as the numbers they stand for.

    PREFIX.qweight, .qzeros, .scales [, .g_idx]      where another folder has PREFIX.weight

What a config.json says of them is believed no further than it can be seen in the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import numpy as np

from qwen_jax.errors import ModelError
from qwen_jax.weights.folder import Tensors
from qwen_jax.weights.hf_quantization import Quantization
from qwen_jax.weights.tensors import TensorInfo

_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
# In which of a word's places the numbers of eight neighbouring outputs are, in AWQ.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
# Numbers of a weight that are enough to see whether its zeros are in their middle.
_SAMPLE = 2**20


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers [n, ...] in words [n * bits / 32, ...] int32, the first of each in its lowest bits."""
    parts = numbers.reshape(-1, 32 // bits, *numbers.shape[1:])
    words = np.zeros((len(parts), *numbers.shape[1:]), np.uint32)
    for i in range(32 // bits):
        words |= parts[:, i].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse: uint8."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape(1, -1, *(1 for _ in words.shape[1:]))
    numbers = words.view(np.uint32)[:, None] >> shifts & np.uint32(2**bits - 1)
    return numbers.astype(np.uint8).reshape(-1, *words.shape[1:])


class QuantizedTensors:
    """Those weights of a folder that are quantised. Thread-safe.

    Attributes:
      names: what their names would be if they were not.

    Raises ModelError where their shapes or types are not those that the config has.
    """

    def __init__(self, files: Tensors, quantization: Quantization | None) -> None:
        self._files, self._quantization = files, quantization
        stems = [name.removesuffix(".qweight") for name in files.tensors if name.endswith(".qweight")]
        self.names = {f"{stem}.weight" for stem in stems if quantization}
        self._shapes = {name: self._checked_shape(name) for name in sorted(self.names)}
        self._seen: set[str] = set()

    def of(self, name: str) -> Quantization:
        """How a weight is stored."""
        assert self._quantization is not None  # or there would be no names
        scales = self._files.tensors.get(self._part(name, "scales"))
        return dataclasses.replace(self._quantization.of(name), scales=str(scales.dtype) if scales else "none")

    def shapes(self, known: Collection[str]) -> dict[str, tuple[int, ...]]:
        """The shapes [outputs, inputs] of all tensors of the folder if none were quantised.

        Quantised weights of a model without biases may have some all the same, which are zeros.

        Args:
          known: the names of the model's tensors.

        Raises ModelError for one that is not.
        """
        found = {name: info.shape for name, info in self._files.tensors.items()}
        for name, shape in self._shapes.items():
            stem = name.removesuffix("weight")
            for suffix in _SUFFIXES:
                found.pop(stem + suffix, None)
            found[name] = shape
            if (bias := stem + "bias") in found and bias not in known:
                if self._files.read(bias).astype(np.float32).any():
                    raise ModelError(f"{self._files.where(bias)} is not zero, and the model has no such bias")
                del found[bias]
        return found

    def dequantize(self, name: str, outputs: slice) -> np.ndarray:
        """Some rows of the weight [outputs, inputs] that a quantised one stands for, float32."""
        inputs = self._shapes[name][1]
        numbers = unpack(self.words(name, slice(0, inputs), outputs), self.of(name).bits).astype(np.int16)
        groups = slice(0, self.of(name).groups(inputs))
        repeat = lambda of_groups: np.repeat(of_groups, self.of(name).group or inputs, axis=0)[:inputs]
        zeros = self.of(name).middle + self.zeros(name, groups, outputs).astype(np.int16)
        return ((numbers - repeat(zeros)) * repeat(self.scales(name, groups, outputs).astype(np.float32))).T

    def words(self, name: str, inputs: slice, outputs: slice) -> np.ndarray:
        """The numbers of some inputs and outputs in words [inputs * bits / 32, outputs], however the file has them."""
        self._check(name)
        return self._words(name, inputs, outputs)

    def scales(self, name: str, groups: slice, outputs: slice) -> np.ndarray:
        """[groups, outputs] float16, or as they are stored."""
        return self._files.read(self._part(name, "scales"), (groups, outputs))

    def zeros(self, name: str, groups: slice, outputs: slice) -> np.ndarray:
        """[groups, outputs] int8: how far each zero is from the middle of the range."""
        how = self.of(name)
        stored = self._by_columns(self._part(name, "qzeros"), groups, outputs, how).astype(np.int16)
        return (((stored + how.offset) & (2**how.bits - 1)) - how.middle).astype(np.int8)

    def _words(self, name: str, inputs: slice, outputs: slice) -> np.ndarray:
        how, of_name = self.of(name), self._part(name, "qweight")
        if how.method == "awq":
            return pack(self._by_columns(of_name, inputs, outputs, how), how.bits)
        return self._files.read(of_name, (slice(inputs.start // how.count, inputs.stop // how.count), outputs))

    def _by_columns(self, part: str, rows: slice, columns: slice, how: Quantization) -> np.ndarray:
        """The numbers [rows, columns] of a tensor in which those of neighbouring columns share a word."""
        start, stop = columns.start // how.count, -(-columns.stop // how.count)
        words = self._files.read(part, (rows, slice(start, stop)))
        numbers = unpack(np.ascontiguousarray(words.T), how.bits).reshape(-1, how.count, len(words))
        if how.method == "awq":
            numbers = numbers[:, _AWQ_PLACES]
        of_words = numbers.reshape(-1, len(words)).T
        return of_words[:, columns.start - start * how.count : columns.stop - start * how.count]

    def _part(self, name: str, suffix: str) -> str:
        return name.removesuffix("weight") + suffix

    def _checked_shape(self, name: str) -> tuple[int, int]:
        how, infos = self.of(name), self._files.tensors
        if name in infos:
            raise ModelError(
                f"{self._files.where(name)} is there quantised too: which is the model's? Remove the other"
            )
        rows, columns = _matrix(infos[self._part(name, "qweight")])
        inputs, outputs = (rows, columns * how.count) if how.method == "awq" else (rows * how.count, columns)
        if how.group and inputs % how.group:
            raise ModelError(
                f"{self._files.where(self._part(name, 'qweight'))} has {inputs} inputs, which is no multiple of "
                f"group_size {how.group}"
            )
        for suffix, shape in how.shapes(outputs, inputs).items():
            part = self._part(name, suffix)
            if part not in infos:
                if suffix == "g_idx":  # of neighbouring inputs, then
                    continue
                raise ModelError(
                    f"{self._files.where(self._part(name, 'qweight'))} is quantised, and {part} is missing"
                )
            kinds = ("float16", "bfloat16", "float32") if suffix == "scales" else ("int32",)
            if infos[part].shape != shape or str(infos[part].dtype) not in kinds:
                raise ModelError(
                    f"{self._files.where(part)} is {infos[part].dtype}{list(infos[part].shape)} for "
                    f"{kinds[0]}{list(shape)}: are bits and group_size of quantization_config right?"
                )
        return outputs, inputs

    def _check(self, name: str) -> None:
        """Raises ModelError unless groups are of neighbouring inputs, scales are finite, and zeros where they belong.

        Looks the first time only.
        """
        if name in self._seen:
            return
        how, (outputs, inputs) = self.of(name), self._shapes[name]
        if (g_idx := self._part(name, "g_idx")) in self._files.tensors and how.method == "gptq":
            if (self._files.read(g_idx) != np.arange(inputs) // (how.group or inputs)).any():
                raise ModelError(
                    f"{self._files.where(g_idx)} puts inputs into groups by their activations (desc_act), "
                    "which is not read: take a model with neighbouring inputs in a group"
                )
        groups = slice(0, how.groups(inputs))
        if not np.isfinite(self.scales(name, groups, slice(0, outputs)).astype(np.float32)).all():
            raise ModelError(
                f"{self._files.where(self._part(name, 'scales'))} has scales that are infinite or no numbers: "
                "is the file damaged? Download it again"
            )
        if how.symmetric:
            if self.zeros(name, groups, slice(0, outputs)).any():
                raise ModelError(
                    f"{self._files.where(self._part(name, 'qzeros'))} has zeros that are not {how.middle}, and "
                    "config.json says sym: true; are they of another checkpoint_format?"
                )
        else:
            whole = how.group or how.count  # groups of weights, or words, of which there are as many as the sample has
            self._check_middle(name, how, min(inputs, max(1, _SAMPLE // outputs // whole) * whole))
        self._seen.add(name)

    def _check_middle(self, name: str, how: Quantization, inputs: int) -> None:
        # Weights are spread evenly about 0. A zero that is off by one, as when a version of the format is taken for
        # the other, moves all of them by a whole step.
        outputs = slice(0, self._shapes[name][0])
        numbers = unpack(self._words(name, slice(0, inputs), outputs), how.bits).astype(np.float32) - how.middle
        zeros = self.zeros(name, slice(0, how.groups(inputs)), outputs)
        off = numbers - np.repeat(zeros, how.group or inputs, axis=0)[:inputs]
        if abs(off.mean()) > 0.5 + 6 * off.std() / math.sqrt(off.size):
            raise ModelError(
                f"{self._files.where(self._part(name, 'qzeros'))}: the weights are {off.mean():.1f} steps off zero on "
                "average; is checkpoint_format of quantization_config right?"
            )


def _matrix(info: TensorInfo) -> tuple[int, int]:
    rows, columns = info.shape if len(info.shape) == 2 else (0, 0)
    return rows, columns


def arrays(weight: np.ndarray, scales: np.ndarray, how: Quantization) -> Mapping[str, np.ndarray]:
    """The tensors of a symmetrically quantised weight in GPTQ's form, by the ends of their names.

    Args:
      weight: unsigned numbers [inputs, outputs].
      scales: [groups, outputs].
      how: what is to be written.
    """
    inputs, outputs = weight.shape
    zeros = np.full((outputs, len(scales)), how.middle - how.offset, np.uint8)
    return {
        "qweight": pack(weight, how.bits),
        "qzeros": np.ascontiguousarray(pack(zeros, how.bits).T),
        "scales": scales,
        "g_idx": np.arange(inputs, dtype=np.int32) // (how.group or inputs),
    }
