"""Models from one form to the other: `python -m qwen_jax.weights.convert SRC DST [--to hf|native] [--dtype TYPE]`.

Published folders become checkpoints of this library, checkpoints become published folders, and either can be written
again in another dtype, or with `--quantize int4-g128` as a published folder in the form of GPTQ. An adapter is merged
into its model, or with `--to peft` written alone. Weights pass through in pieces, so memory does not grow with the
model. DST appears when all of it is on the disk and has been read back and compared: then it holds certificate.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from qwen_jax.command import Parser, run_command
from qwen_jax.errors import ConfigError, FileError, ModelError
from qwen_jax.weights import hf, peft, publish
from qwen_jax.weights.adapted import AdaptedModel, is_quantized
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.hf_quantization import parse as parse_quantization
from qwen_jax.weights.manifest import sync
from qwen_jax.weights.progress import Bytes
from qwen_jax.weights.quantize import QuantizedSink, Rounding
from qwen_jax.weights.sinks import NativeSink, PublishedSink, Sink, write_files
from qwen_jax.weights.source import INDEX, Model, NativeCheckpoint, Piece, PublishedFolder, open_model, pieces
from qwen_jax.weights.verify import Certificate, add_model_options, certify, in_threads, to_json

CERTIFICATE = "certificate.json"
_OF_WEIGHTS = ("config.json", INDEX, "LICENSE", "NOTICE")  # of whole ones


def convert(
    source: Model,
    target: Path,
    *,
    to: str,
    dtype: str | None,
    say: Callable[[str], None],
    rounding: Rounding | None = None,
) -> None:
    """Writes a model to the folder `target`.

    Args:
      source: the model.
      target: does not exist yet, or is empty.
      to: "hf" for a published folder, "native" for a checkpoint of this library.
      dtype: type to cast the weights to; None for the one they have.
      say: takes a line for each stage.
      rounding: of weights that are quantised, to a published folder.

    Raises ConfigError or FileError if `target` cannot be written, ModelError if the model cannot be held in that form
    or if what was written does not read back equal.
    """
    dtypes = _dtypes(source, to, dtype)
    if rounding:
        dtypes |= dict.fromkeys(rounding.names, np.dtype(np.float32))  # what they are rounded from
    size, lost = _size(source.table, dtypes), dict[str, tuple[float, float]]()
    target = Path(os.path.realpath(target))  # a folder cannot be renamed onto a link
    make = functools.partial(_published, rounding=rounding) if to == "hf" else _native
    try:
        _check_target(source.path, target)
        with _partial_folder(target) as partial:
            _check_room(target, _size(*rounding.tensors(source.table, dtypes)) if rounding else size)
            start = time.perf_counter()
            sink = make(source, partial, dtypes)
            with Bytes("converting", size) as progress, sink:
                _copy(source, sink, dtypes, progress.advance)
            seconds = time.perf_counter() - start
            speed = f"{size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s)"
            say(f"{len(source.table)} tensors, {speed}")
            with Bytes("verifying", size) as progress, _reopen(partial, to) as copy:
                certificate = _certify_copy(source, copy, progress.advance, rounding, lost)
            write_files(partial, {CERTIFICATE: to_json(certificate).encode()})
            os.rename(partial, target)
            sync(target.parent)
    except OSError as error:
        raise FileError(f"{target} cannot be written: {error.strerror}") from error
    say(f"every tensor reads back equal: {target / CERTIFICATE}")
    if lost:
        say(_of_loss(lost))


def write_adapter(source: Model, target: Path) -> None:
    """Writes the adapter of a model, in the form of PEFT, to a folder that does not exist yet, or is empty.

    Beside it lie, as PEFT's own programs leave them, the tokenizer's files, the chat template and generation defaults.

    Raises ModelError if the model has none, ConfigError or FileError if `target` cannot be written.
    """
    if not isinstance(source, AdaptedModel):
        raise ModelError(f"{source.path} is a whole model and no adapter; leave --to peft out")
    target = Path(os.path.realpath(target))
    try:
        _check_target(source.path, target)
        with _partial_folder(target) as partial:
            peft.write(source, partial)
            beside = publish.side_files(source, {tensor.name: source.dtype(tensor) for tensor in source.table})
            write_files(partial, {name: beside[name] for name in beside if name not in _OF_WEIGHTS})
            peft.read(partial, source.base)
            os.rename(partial, target)
            sync(target.parent)
    except OSError as error:
        raise FileError(f"{target} cannot be written: {error.strerror}") from error


def _size(table: Sequence[hf.Tensor], dtypes: Mapping[str, np.dtype]) -> int:
    return sum(dtypes[tensor.name].itemsize * math.prod(tensor.shape) for tensor in table)


def _copy(source: Model, sink: Sink, dtypes: Mapping[str, np.dtype], advance: Callable[[int], None]) -> None:
    def one(tensor: hf.Tensor) -> None:
        dtype = dtypes[tensor.name]
        for piece in pieces(tensor, dtype.itemsize):
            values = source.read(piece).astype(dtype, copy=False)
            sink.write(piece, values)
            advance(values.nbytes)

    in_threads(one, source.table)


def _certify_copy(
    source: Model,
    copy: Model,
    advance: Callable[[int], None],
    rounding: Rounding | None,
    lost: dict[str, tuple[float, float]],
) -> Certificate:
    """The certificate of `copy`. Raises ModelError unless every value is that of `source`, where need be rounded.

    Puts the sums of squares of what that loses of a tensor, and of all of it, into `lost`.
    """

    def check(piece: Piece, values: np.ndarray) -> None:
        wanted, name = source.read(piece).astype(values.dtype, copy=False), piece.tensor.name
        if rounding and name in rounding.names:
            whole = wanted.reshape(-1, piece.tensor.shape[1])
            wanted = rounding.round(name, whole)
            sums = lost.get(name, (0.0, 0.0))
            lost[name] = (sums[0] + float(np.square(wanted - whole).sum()), sums[1] + float(np.square(whole).sum()))
        if not np.array_equal(_words(wanted), _words(values)):
            raise ModelError(
                f"{piece.tensor.name} reads back with other values from {copy.path}: "
                f"is the disk sound, and has nobody changed {source.path} meanwhile?"
            )

    return certify(copy, advance=advance, check=check)


def _of_loss(lost: Mapping[str, tuple[float, float]]) -> str:
    """How far weights are from what they were, as parts of their root mean square."""
    each = {name: math.sqrt(error / total) if total else 0.0 for name, (error, total) in lost.items()}
    mean = math.sqrt(sum(error for error, _ in lost.values()) / max(sum(total for _, total in lost.values()), 1e-38))
    worst = max(each, key=lambda name: each[name])
    return f"{len(lost)} of them are quantised: {mean:.2%} off (root mean square), {worst} most, with {each[worst]:.2%}"


def _words(values: np.ndarray) -> np.ndarray:
    """The bits of an array, to compare: NaN is not equal to itself. As wide as its size allows, which is faster."""
    return values.reshape(-1).view(next(f"u{width}" for width in (8, 4, 2, 1) if values.nbytes % width == 0))


def _dtypes(source: Model, to: str, dtype: str | None) -> dict[str, np.dtype]:
    """The type of each tensor that is written."""
    stored = {tensor.name: source.dtype(tensor) for tensor in source.table}
    if not dtype and is_quantized(source):
        raise ModelError(f"{source.path} is quantised; choose with --dtype in what its weights are to be written")
    if dtype:
        return dict.fromkeys(stored, np.dtype(dtype))
    kinds = sorted({str(kind) for kind in stored.values()})
    if to == "native" and kinds not in (["float32"], ["bfloat16"]):
        raise ModelError(
            f"{source.path} has weights in {' and '.join(kinds)}, and a checkpoint has one type, float32 or bfloat16; "
            "choose it with --dtype"
        )
    return stored


def _check_target(source: Path, target: Path) -> None:
    """Raises ConfigError or FileError unless a new folder can take the place of `target`."""
    source = source.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ConfigError(f"{target} and the model in {source} overlap; choose another folder to write to")
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise FileError(f"{target} exists and is not an empty folder; choose another one, or remove it")
    if target.is_mount():
        raise FileError(f"{target} is a mount point, which cannot be replaced; choose a folder in it")


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, to be renamed to it; removed if that does not come to pass.

    What a killed conversion left there goes first. The lock tells it from one that still runs: the system frees a lock
    when its process dies.
    """
    partial = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(lock, target)
        for left in partial.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(f"{target} is being written by another conversion; wait for it, or choose another") from None
    except OSError:  # not every file system can lock a folder, NFS for one
        pass


def _check_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise FileError(f"{target} needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left; make room")


def _published(
    source: Model, folder: Path, dtypes: Mapping[str, np.dtype], *, rounding: Rounding | None = None
) -> Sink:
    if rounding:
        table, kinds = rounding.tensors(source.table, dtypes)
        kept = {name: dtype for name, dtype in dtypes.items() if name not in rounding.names}
        side_files = publish.side_files(source, kept, rounding.to_hf())
        return QuantizedSink(PublishedSink(folder, table, kinds, layout=None, side_files=side_files), rounding)
    unchanged = all(dtypes[tensor.name] == source.dtype(tensor) for tensor in source.table)
    layout = source.layout if unchanged else None
    return PublishedSink(folder, source.table, dtypes, layout=layout, side_files=publish.side_files(source, dtypes))


def _native(source: Model, folder: Path, dtypes: Mapping[str, np.dtype]) -> Sink:
    (dtype,) = {str(dtype) for dtype in dtypes.values()}
    config = dataclasses.replace(source.config, param_dtype=dtype, dtype=dtype)
    tokenizer = source.tokenizer()
    tokenizer.check_fits(config.vocab_size)
    files = source.side_files() | {"model.json": config.to_json().encode(), "tokenizer.json": tokenizer.to_bytes()}
    meta = {"published": {"model_type": source.model_type, "layout": source.layout}}
    return NativeSink(folder, source.table, config, meta=meta, files=files)


def _reopen(folder: Path, to: str) -> Model:
    if to == "hf":
        return PublishedFolder(folder)
    return NativeCheckpoint(Checkpoint(folder, verified=["params"]))  # by its manifest no more: by comparison, soon


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    options = parse(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave the TPU to whom it belongs
    with open_model(options.src, allow_pickle_format=options.allow_pickle_format, warn=_say) as source:
        rounding = None
        if options.quantize is not None:
            if is_quantized(source) and not isinstance(source, AdaptedModel):
                raise ModelError(f"{source.path} is quantised already; take the model that it was made of")
            how, head, embedding = options.quantize, options.quantize_head, options.quantize_embedding
            rounding = Rounding(source.table, parse_quantization(how), head=head, embedding=embedding)
        to = options.to or ("native" if isinstance(source, PublishedFolder) and not rounding else "hf")
        target = Path(os.path.expanduser(options.dst))
        if to == "peft":
            write_adapter(source, target)
            _say(f"adapter written: {target}")
            return 0
        convert(source, target, to=to, dtype=options.dtype, say=_say, rounding=rounding)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Raises ConfigError for any it does not know."""
    parser = Parser(
        prog="python -m qwen_jax.weights.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 1 unexpected, 2 usage, 3 model, 4 file or permission, 130 interrupted",
    )
    add_model_options(parser, "src")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to write; new, or empty")
    parser.add_argument(
        "--to",
        choices=["hf", "native", "peft"],
        help="form to write (default: hf from a checkpoint, else native); peft: of a run's adapter, the adapter alone",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="type to cast the weights to (default: none)")
    parser.add_argument(
        "--quantize",
        metavar="HOW",
        help="int4-g128: the layers' matrices in 4 bits, 128 inputs to a scale; int8: in 8, with a scale per output",
    )
    parser.add_argument("--quantize-head", action="store_true", help="with --quantize, also the output head, in 8 bits")
    parser.add_argument(
        "--quantize-embedding",
        action="store_true",
        help="with --quantize, also the embedding, in 8 bits, and with it a tied head; no other program reads that",
    )
    options = parser.parse_args(arguments)
    for asked, option in ((options.quantize_head, "head"), (options.quantize_embedding, "embedding")):
        if asked and options.quantize is None:
            raise ConfigError(f"--quantize-{option} goes with --quantize")
    if options.quantize is not None and options.to not in (None, "hf"):
        raise ConfigError(
            f"--quantize writes published folders, and --to {options.to} asks for another form; leave one out"
        )
    if options.dtype and options.to == "peft":
        raise ConfigError("--to peft writes an adapter in float32, as it is trained; leave --dtype out")
    return options


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command("convert", main))
