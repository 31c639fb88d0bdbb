"""The `quantization_config` of published checkpoints: how their weights are quantised, read strictly and written.

Two forms are read: GPTQ's, as AutoGPTQ and its successors write it, which is also the one that is written, and AWQ's
for matrix products ("GEMM").
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from qwen_jax.errors import ConfigError
from qwen_jax.weights import hf
from qwen_jax.weights.fields import Fields

KEY = "quantization_config"
HEAD = "lm_head.weight"
_HEAD_MODULE = "lm_head"
_DYNAMIC_EMBEDDING = {"bits": 8, "group_size": -1}

# Nothing else that is published of these models has a form of its own; those of AutoGPTQ for single kernels are not.
_FORMATS = {"gptq": 1, "gptq_v2": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the quantised weights of a checkpoint are stored.

    Attributes:
      method: "gptq", with the numbers of neighbouring inputs in a word, or "awq", with those of outputs.
      bits: of a number.
      group: inputs that share a scale and a zero; 0 for all of them.
      symmetric: whether all zeros are the middle of the range.
      offset: what stored zeros are short of.
      head_bits: of the output head's numbers, where it is quantised too.
      embedding: the published name of the embedding, where it is quantised too: in 8 bits, with a scale for each
        token. Nobody else reads that.
      scales: their type.
    """

    method: Literal["gptq", "awq"]
    bits: int
    group: int
    symmetric: bool
    offset: int
    head_bits: int
    embedding: str | None = None
    scales: str = "float16"

    def of(self, name: str) -> Quantization:
        """How the weight of that published name is stored."""
        if name == self.embedding:
            return dataclasses.replace(self, bits=8, group=0)
        return dataclasses.replace(self, bits=self.head_bits) if name == HEAD else self

    @property
    def count(self) -> int:
        """Numbers in a word."""
        return 32 // self.bits

    @property
    def middle(self) -> int:
        """Of the range of numbers, which is its zero where all zeros are one."""
        return 2 ** (self.bits - 1)

    def groups(self, inputs: int) -> int:
        """How many there are of so many inputs."""
        return inputs // self.group if self.group else 1

    def shapes(self, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Of the tensors that stand for a weight, by the ends of their names."""
        groups, n = self.groups(inputs), self.count
        if self.method == "awq":
            return {"qweight": (inputs, outputs // n), "qzeros": (groups, outputs // n), "scales": (groups, outputs)}
        return {
            "qweight": (inputs // n, outputs),
            "qzeros": (groups, outputs // n),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
        }

    def to_hf(self, *, head: bool) -> dict[str, Any]:
        """The field of a `config.json` that says so, in the form of GPTQ; and whether the head is quantised too."""
        dynamic: dict[str, Any] = {}
        if head and self.head_bits != self.bits:
            dynamic[_HEAD_MODULE] = {"bits": self.head_bits}
        if self.embedding:
            dynamic[self.embedding.removesuffix(".weight")] = _DYNAMIC_EMBEDDING
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group or -1,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "lm_head": head,
            **({"dynamic": dynamic} if dynamic else {}),
        }


def read_quantization(config: Mapping[str, Any], *, where: str) -> Quantization | None:
    """What a `config.json` says; None where the weights are not quantised.

    Raises ModelError, beginning with `where`, for a method or a form that is not read.
    """
    if not config.get(KEY):
        return None
    fields = Fields(config, where).mapping(KEY)
    method = fields.values[fields.name_of("quant_method")]
    if method not in ("gptq", "awq"):
        raise fields.refusal("quant_method", "'gptq' and 'awq' are read: take one of these, or the unquantised model")
    found = _gptq(fields) if method == "gptq" else _awq(fields)
    if found.group % 8:
        raise fields.refusal(fields.name_of("group_size", "q_group_size"), "a multiple of 8 is wanted")
    return found


def _gptq(fields: Fields) -> Quantization:
    kind = fields.values.get("checkpoint_format") or "gptq"
    if kind not in list(_FORMATS):
        raise fields.refusal("checkpoint_format", f"{' and '.join(_FORMATS)} are read")
    if fields.values.get("is_marlin_format"):
        raise fields.refusal("is_marlin_format", "false is read")
    bits = head_bits = _bits(fields, "bits")
    embedding = None
    # GPTQModel's way to treat some modules otherwise.
    for module in fields.mapping("dynamic").values if fields.values.get("dynamic") else ():
        own = fields.mapping("dynamic").mapping(module)
        if module == _HEAD_MODULE and list(own.values) == ["bits"]:
            head_bits = _bits(own, "bits")
        elif (name := f"{module}.weight") in hf.EMBEDDINGS and own.values == _DYNAMIC_EMBEDDING:
            embedding = name
        else:
            raise fields.refusal(
                "dynamic", f"only bits of {_HEAD_MODULE}, and {_DYNAMIC_EMBEDDING} of the embedding, are read"
            )
    return Quantization(
        method="gptq",
        bits=bits,
        group=_group(fields, "group_size"),
        symmetric=fields.flag("sym"),
        offset=_FORMATS[kind],
        head_bits=head_bits,
        embedding=embedding,
    )


def _awq(fields: Fields) -> Quantization:
    if (version := fields.values.get("version")) is not None and str(version).lower() != "gemm":
        raise fields.refusal("version", "'gemm' is read")
    bits = fields.name_of("bits", "w_bit")
    if fields.integer(bits) != 4:
        raise fields.refusal(bits, "4 is read")
    if not fields.flag("zero_point"):
        raise fields.refusal("zero_point", "true is read")
    group = _group(fields, fields.name_of("group_size", "q_group_size"))
    return Quantization(method="awq", bits=4, group=group, symmetric=False, offset=0, head_bits=4)


def _bits(fields: Fields, name: str) -> int:
    bits = fields.integer(name)
    if bits not in (4, 8):
        raise fields.refusal(name, "4 and 8 are read")
    return bits


def _group(fields: Fields, name: str) -> int:
    return 0 if fields.values.get(name) == -1 else fields.integer(name)


def parse(text: str) -> Quantization:
    """What is written for "int4-g128", 4 bits in groups of 128 inputs, or "int8", 8 bits with a scale for each output.

    Raises ConfigError for anything else.
    """
    found = re.fullmatch("int([48])(?:-g([1-9][0-9]{,5}))?", text)
    group = int(found[2] or 0) if found else 0
    if found is None or group % 8:
        raise ConfigError(
            f"{text!r} is none of int4, int8, or such as int4-g128, with groups of a multiple of 8 inputs"
        )
    bits = int(found[1])
    return Quantization(method="gptq", bits=bits, group=group, symmetric=True, offset=1, head_bits=8)
