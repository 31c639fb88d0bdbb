"""Whether two models hold the same weights, whatever they are stored in: `python -m qwen_jax.weights.verify A B`.

The certificate of a model is the digest, shape and dtype of each of its tensors, under its published name. Two
models with equal certificates compute the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from qwen_jax.command import Parser, run_command
from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights import hf
from qwen_jax.weights.progress import Bytes
from qwen_jax.weights.source import Model, Piece, open_model, pieces

THREADS = min(8, 2 * (os.cpu_count() or 1))  # some wait for the disk while others hash; each holds a piece or two


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a certificate says of one tensor. BLAKE2b of 256 bits (RFC 7693) over its values, row by row."""

    shape: tuple[int, ...]
    dtype: str
    blake2b: str


Certificate = Mapping[str, Entry]
T = TypeVar("T")


def certify(
    model: Model,
    *,
    advance: Callable[[int], None] = lambda count: None,
    check: Callable[[Piece, np.ndarray], None] = lambda piece, values: None,
) -> Certificate:
    """The certificate of a model as it is stored.

    Args:
      model: read once, from several threads.
      advance: takes the number of bytes done, often.
      check: takes every piece with its values.
    """

    def one(tensor: hf.Tensor) -> Entry:
        digest = hashlib.blake2b(digest_size=32)
        for piece in pieces(tensor, model.dtype(tensor).itemsize):
            values = np.ascontiguousarray(model.read(piece))
            check(piece, values)
            digest.update(values.view(np.uint8).data)
            advance(values.nbytes)
        return Entry(tensor.shape, str(model.dtype(tensor)), digest.hexdigest())

    return dict(zip((tensor.name for tensor in model.table), in_threads(one, model.table), strict=True))


def in_threads(work: Callable[[hf.Tensor], T], table: Sequence[hf.Tensor]) -> list[T]:
    """`work` on every tensor, on THREADS at once, the largest first: then all end at about the same time."""
    order = sorted(range(len(table)), key=lambda i: -math.prod(table[i].shape))
    with ThreadPoolExecutor(THREADS) as pool:
        futures = {i: pool.submit(work, table[i]) for i in order}
        try:
            return [futures[i].result() for i in range(len(table))]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # one has failed: the others are for nothing
            raise


def differences(a: Certificate, b: Certificate) -> list[str]:
    """What differs, a phrase for each tensor; none if the certificates are equal."""
    found = [f"{name} is only in the first" for name in a if name not in b]
    found += [f"{name} is only in the second" for name in b if name not in a]
    for name in a.keys() & b.keys():
        one, other = a[name], b[name]
        if one.shape != other.shape:
            found.append(f"{name} has shape {list(one.shape)} and {list(other.shape)}")
        elif one.dtype != other.dtype:
            found.append(f"{name} is {one.dtype} and {other.dtype}")
        elif one != other:
            found.append(f"{name} has other values")
    return sorted(found)


def to_json(certificate: Certificate) -> str:
    """The certificate as text, a line for each tensor."""
    lines = (f"{json.dumps(name)}: {json.dumps(dataclasses.asdict(entry))}" for name, entry in certificate.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the models are equal, 3 if not."""
    options = parse(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave the TPU to whom it belongs
    with contextlib.ExitStack() as opened:
        models = [
            opened.enter_context(open_model(path, allow_pickle_format=options.allow_pickle_format))
            for path in (options.a, options.b)
        ]
        return _verify(models, options)


def _verify(models: Sequence[Model], options: argparse.Namespace) -> int:
    certificates = []
    for model in models:
        with Bytes(f"reading {model.path.name}", model.nbytes) as progress:
            certificates.append(certify(model, advance=progress.advance))
    if options.output:
        try:
            options.output.write_text(to_json(certificates[0]), encoding="utf-8")
        except OSError as error:
            raise FileError(f"{options.output} cannot be written: {error.strerror}") from error
    found = differences(*certificates)
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ModelError(f"{options.a} and {options.b} are not equal: {'; '.join(found[:5])}{more}")
    print(f"equal: {len(certificates[0])} tensors, {models[0].nbytes / 1e9:.2f} GB")
    if options.forward:
        from qwen_jax.weights.forward import compare  # torch and transformers, which few have

        for name, difference, largest in compare(models[0], models[1].path):
            print(f"{name:12} differs by {difference:.1e} of {largest:.3g}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Raises ConfigError for any it does not know."""
    parser = Parser(prog="python -m qwen_jax.weights.verify", description=(__doc__ or "").splitlines()[0])
    add_model_options(parser, "a", "b")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the certificate of A to this file")
    parser.add_argument(
        "--forward", action="store_true", help="also compare our forward pass of A with transformers' of B, by layer"
    )
    return parser.parse_args(arguments)


def add_model_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Positional model references, and how they are read."""
    for name in names:
        parser.add_argument(
            name,
            metavar=name.upper(),
            help="a published folder, a checkpoint, a run, or a name such as Qwen/Qwen2.5-0.5B",
        )
    parser.add_argument(
        "--allow-pickle-format", action="store_true", help="read PyTorch's own format (.bin) where there is no other"
    )


if __name__ == "__main__":
    sys.exit(run_command("verify", main))
