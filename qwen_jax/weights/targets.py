"""Which matrices an adapter is of, by the names that PEFT and its users give them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_jax.errors import ConfigError
from qwen_jax.weights import hf

ALL_LINEAR = "all-linear"
_CAN_BE = re.compile(r"layers/(attention/[qkvo]|mlp/(shared/)?(gate|up|down))/w")
_WEIGHT = ".weight"


def modules(table: Sequence[hf.Tensor]) -> dict[str, hf.Tensor]:
    """The matrices of a model by their module's name, such as "model.layers.0.self_attn.q_proj"."""
    return {tensor.name.removesuffix(_WEIGHT): tensor for tensor in table if len(tensor.shape) == 2}


def paths_of(tensor: hf.Tensor) -> tuple[str, ...]:
    """Where the parts of a matrix are in the tree, such as "layers/attention/q"; none if it cannot be adapted."""
    paths = tuple(part.path for part in tensor.parts)
    return tuple(path.removesuffix("/w") for path in paths) if all(map(_CAN_BE.fullmatch, paths)) else ()


def select(table: Sequence[hf.Tensor], targets: Sequence[str]) -> tuple[str, ...]:
    """The paths of the matrices that `targets` name: ends of modules' names, or "all-linear".

    All of them are those of attention, and of MLPs and shared experts; a router, experts, the embedding and the head
    are not among them.

    Raises ConfigError for a name of nothing, or of something that cannot be adapted.
    """
    found: list[str] = []
    for target in targets:
        named = [
            (module, paths_of(tensor))
            for module, tensor in modules(table).items()
            if module.endswith(f".{target}") or (target == ALL_LINEAR and paths_of(tensor))
        ]
        if refused := [module for module, paths in named if not paths]:
            raise ConfigError(
                f"adapter.targets: {target!r} is also {refused[0]}, which cannot be adapted: experts, routers and "
                f"tables are not; name others, such as {_names(table)}"
            )
        if not named:
            raise ConfigError(
                f"adapter.targets: {target!r} names no matrix of this model; there are {_names(table)}, "
                f"and {ALL_LINEAR!r} for all of them"
            )
        found += [path for _, paths in named for path in paths]
    return tuple(dict.fromkeys(found))


def short_name(table: Sequence[hf.Tensor], module: str) -> str:
    """As few words of the end of a module's name as no other kind of matrix ends with."""
    words = re.sub(r"^.*\.\d+\.", "", module).split(".")
    own = paths_of(modules(table)[module])
    for count in range(1, len(words)):
        name = ".".join(words[-count:])
        if all(paths_of(tensor) == own for other, tensor in modules(table).items() if other.endswith(f".{name}")):
            return name
    return ".".join(words)


def _names(table: Sequence[hf.Tensor]) -> str:
    kinds = {paths: module for module, tensor in modules(table).items() if (paths := paths_of(tensor))}
    return ", ".join(short_name(table, module) for module in kinds.values())
