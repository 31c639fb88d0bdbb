"""The safetensors reader and writer: against the package byte for byte, and against files made to break readers."""

import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights import tensors
from qwen_jax.weights.safetensors import DTYPES, SafetensorsFile, SafetensorsWriter, package_order
from qwen_jax.weights.tensors import TensorInfo

SHAPES = [(), (0, 3), (5,), (2, 3), (3, 1, 2)]


def raw_file(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="U8", shape=(4,), begin=0, end=4) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def save(path: Path, arrays: dict, metadata: dict | None = None) -> None:
    infos = {name: TensorInfo(shape=array.shape, dtype=array.dtype) for name, array in arrays.items()}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def example(seed=0) -> dict[str, np.ndarray]:
    """Every dtype and shape, with arbitrary bytes."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            values = random.integers(0, 2 if name == "BOOL" else 100, shape)
            arrays[f"{name}.{len(shape)}.é"] = np.asarray(values, dtype)
    return arrays


def run_here(code: str, *arguments: Path) -> None:
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=Path(__file__).parents[2], check=True)


@pytest.fixture
def reads(monkeypatch):
    """(offset, bytes) of every read of a file."""
    calls = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        calls.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    return calls


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}, None])
def test_writes_and_reads_what_the_package_does(metadata, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = example()
    numpy.save_file(arrays, tmp_path / "theirs", metadata)
    infos = {name: TensorInfo(shape=array.shape, dtype=array.dtype) for name, array in arrays.items()}
    save(tmp_path / "ours", {name: arrays[name] for name in package_order(infos)}, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert file.metadata == metadata
        assert list(file.tensors) == package_order(infos)
        for name, array in arrays.items():
            value = file.read(name)
            assert (value.dtype, value.shape) == (array.dtype, array.shape)
            assert value.flags.c_contiguous and value.flags.writeable
            assert value.tobytes() == array.tobytes()


def test_a_header_is_escaped_as_the_package_does(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    array = np.arange(3, dtype=np.float32)
    metadata = {'q"\\\n\t\x01\x7f/': "\u2028é😀"}
    numpy.save_file({"a\x1f\b": array}, tmp_path / "theirs", metadata)
    save(tmp_path / "ours", {"a\x1f\b": array}, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rewriting_keeps_the_order_of_the_file(tmp_path):
    save(tmp_path / "first", {"b": np.zeros(3, np.int8), "a": np.ones(2, np.float64)}, {"z": "1", "a": "2"})
    with SafetensorsFile(tmp_path / "first") as file:
        save(tmp_path / "second", {name: file.read(name) for name in file.tensors}, file.metadata)
    assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_slice_is_what_numpy_slices(data, tmp_path_factory):
    shape = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)))
    array = np.arange(np.prod(shape)).reshape(shape).astype(ml_dtypes.bfloat16)
    path = tmp_path_factory.mktemp("slice") / "file"
    save(path, {"x": array})
    bound = st.none() | st.integers(-8, 8)
    index = tuple(data.draw(st.lists(st.builds(slice, bound, bound), max_size=len(shape))))
    page, block = data.draw(st.sampled_from([(1, 1), (4, 16), (4096, 2**24)]))
    with pytest.MonkeyPatch.context() as patch, SafetensorsFile(path) as file:
        patch.setattr(tensors, "PAGE_BYTES", page)
        patch.setattr(tensors, "BLOCK_BYTES", block)
        part = file.read("x", index)
    assert part.flags.c_contiguous
    assert part.shape == array[index].shape
    assert part.tobytes() == array[index].tobytes()


def test_a_slice_reads_no_more_than_it_needs(tmp_path, reads):
    array = np.arange(64 * 4096, dtype=np.float32).reshape(64, 4096)
    save(tmp_path / "file", {"other": array, "x": array})
    with SafetensorsFile(tmp_path / "file") as file:
        for index, nbytes, num_reads in [
            ((slice(5, 9),), 4 * 4096 * 4, 1),  # rows
            ((slice(None), slice(1024, 2048)), 64 * 1024 * 4, 64),  # columns, a page of each row
            ((slice(3, 4), slice(7, 8)), 4, 1),  # an element
            ((slice(None), slice(7, 8)), 64 * 4096 * 4, 1),  # short runs: all rows together
            ((slice(2, 2),), 0, 0),
        ]:
            reads.clear()
            np.testing.assert_array_equal(file.read("x", index), array[index])
            assert (sum(count for _, count in reads), len(reads)) == (nbytes, num_reads), index


def test_blocks_of_short_runs_are_bounded(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 1000)
    array = np.arange(2 * 3 * 700, dtype=np.uint16).reshape(2, 3, 700)
    save(tmp_path / "file", {"x": array})
    with SafetensorsFile(tmp_path / "file") as file:
        reads.clear()
        np.testing.assert_array_equal(file.read("x", (slice(None), slice(0, 2))), array[:, :2])
        assert max(count for _, count in reads) <= 2 * 700 * 2
        np.testing.assert_array_equal(file.read("x", (slice(None), slice(None), slice(3, 5))), array[..., 3:5])


def test_a_slice_that_is_none_of_ours_is_refused(tmp_path):
    save(tmp_path / "file", {"x": np.zeros((2, 2))})
    with SafetensorsFile(tmp_path / "file") as file:
        with pytest.raises(ValueError, match="step 2"):
            file.read("x", (slice(0, 2, 2),))
        with pytest.raises(ValueError, match="3 slices for a tensor of 2 axes"):
            file.read("x", (slice(1),) * 3)


def test_a_file_cut_after_opening_is_an_error(tmp_path):
    save(tmp_path / "file", {"x": np.zeros(100_000)})
    with SafetensorsFile(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", 5000)
        with pytest.raises(ModelError, match="ends at byte 5000, .* early"):
            file.read("x")


def test_a_closed_file_cannot_be_read(tmp_path):
    save(tmp_path / "file", {"x": np.zeros(3)})
    with SafetensorsFile(tmp_path / "file") as file:
        pass
    file.close()
    with pytest.raises(FileError, match="cannot be read"):
        file.read("x")


def many(count: int) -> bytes:
    return b"{%s}" % b",".join(
        b'"%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(count)
    )


def header_of(entries: dict) -> bytes:
    return json.dumps(entries).encode()


BAD = {
    "empty": (b"", "0 bytes"),
    "7 bytes": (b"\0" * 7, "7 bytes"),
    "length 0": (raw_file(b"", b"{}"), "header has 0 bytes"),
    "length 2^63": (raw_file(b"{}", length=2**63), "header has 9223372036854775808 bytes"),
    "length over the file": (raw_file(b"{}", length=3), "header has 3 bytes"),
    "length 7 in the middle of the text": (raw_file(b"{}      ", length=7)[:-1] + b"x", "describes 0 bytes"),
    "no JSON": (raw_file(b"{'a': 1}"), "malformed at character 1"),
    "UTF-16": (raw_file("{}".encode("utf-16")), "not UTF-8"),
    "byte order mark": (raw_file("\ufeff{}".encode()), "malformed"),
    "array": (raw_file(b"[]"), "not an object"),
    "nested": (raw_file(b'{"a":' * 10_000), "nested too deeply"),
    "nested arrays": (raw_file(b'{"a":' + b"[" * 300_000), "nested too deeply"),
    "many small values": (raw_file(b'{"a":[' + b"{}," * 700_000 + b"{}]}"), "over 400000"),
    "two keys": (raw_file(b'{"a":%s,"a":%s}' % ((header_of(entry()),) * 2), b"1234"), "'a' appears twice"),
    "two inner keys": (raw_file(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' appears twice"),
    "NaN": (raw_file(b'{"a":NaN}'), "NaN"),
    "half a surrogate pair": (raw_file(rb'{"\ud800":1}'), "not Unicode"),
    "huge integer": (raw_file(b'{"a":{"shape":[%s]}}' % (b"9" * 10_000)), "10000 digits"),
    "entry is no object": (raw_file(header_of({"a": 5})), "'a' does not have dtype"),
    "entry with more": (raw_file(header_of({"a": entry() | {"x": 1}}), b"1234"), "and nothing else"),
    "entry with less": (raw_file(header_of({"a": {"dtype": "U8", "shape": [4]}}), b"1234"), "does not have"),
    "dtype": (raw_file(header_of({"a": entry("F12")}), b"1234"), "dtype 'F12'"),
    "dtype is a list": (raw_file(header_of({"a": entry([1])}), b"1234"), r"dtype \[1\]"),
    "shape is text": (raw_file(header_of({"a": entry() | {"shape": "4"}}), b"1234"), "not a list"),
    "shape of bool": (raw_file(header_of({"a": entry(shape=[True], end=1)}), b"1"), "integers"),
    "shape of float": (raw_file(header_of({"a": entry(shape=[4.0])}), b"1234"), "integers"),
    "negative size": (raw_file(header_of({"a": entry(shape=[-2, -2])}), b"1234"), "integers >= 0"),
    "product overflows": (raw_file(header_of({"a": entry(shape=[2**32, 2**32, 4])}), b"1234"), "more elements"),
    "product overflows to 0 bytes": (raw_file(header_of({"a": entry(shape=[2**63, 2, 0], end=0)})), "more elements"),
    "100 axes": (raw_file(header_of({"a": entry(shape=[1] * 100, end=1)}), b"1"), "100 axes"),
    "range is not the size": (raw_file(header_of({"a": entry("U16")}), b"1234"), "takes 8 bytes"),
    "range of bool": (raw_file(header_of({"a": entry(shape=[1], begin=False, end=True)}), b"1"), "two integers"),
    "range of 3": (raw_file(header_of({"a": entry() | {"data_offsets": [0, 4, 4]}}), b"1234"), "two integers"),
    "range backwards": (raw_file(header_of({"a": entry(begin=4, end=0)}), b"1234"), "takes 4 bytes"),
    "range is negative": (raw_file(header_of({"a": entry(begin=-4, end=0)}), b"1234"), "starts at byte -4"),
    "overlap": (raw_file(header_of({"a": entry(), "b": entry(begin=2, end=6)}), b"123456"), "byte 2 .* 4 is expected"),
    "the same place": (raw_file(header_of({"a": entry(), "b": entry()}), b"1234"), "byte 0 .* 4 is expected"),
    "gap": (raw_file(header_of({"a": entry(), "b": entry(begin=5, end=9)}), b"1" * 9), "byte 5 .* 4 is expected"),
    "gap at the start": (raw_file(header_of({"a": entry(begin=1, end=5)}), b"12345"), "byte 1 .* 0 is expected"),
    "empty tensor in another": (
        raw_file(header_of({"a": entry(), "b": entry(shape=[0], begin=2, end=2)}), b"1234"),
        "byte 2 .* 4 is expected",
    ),
    "empty tensor behind the end": (
        raw_file(header_of({"a": entry(), "b": entry(shape=[0], begin=9, end=9)}), b"1234"),
        "byte 9 .* 4 is expected",
    ),
    "trailing bytes": (raw_file(header_of({"a": entry()}), b"12345"), "4 bytes of data and the file has 5"),
    "missing bytes": (raw_file(header_of({"a": entry()}), b"123"), "4 bytes of data and the file has 3"),
    "data without tensors": (raw_file(b"{}", b"1"), "0 bytes of data and the file has 1"),
    "metadata is a list": (raw_file(header_of({"__metadata__": []})), "__metadata__ is not"),
    "metadata is null": (raw_file(b'{"__metadata__":null}'), "__metadata__ is not"),
    "metadata of numbers": (raw_file(header_of({"__metadata__": {"a": 1}})), "__metadata__ is not"),
    "60,000 entries": (raw_file(many(60_000), b"1" * 60_000), "over 400000"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(name, tmp_path):
    contents, reason = BAD[name]
    (tmp_path / "file").write_bytes(contents)
    start = time.process_time()
    with pytest.raises(ModelError, match=f"not a valid safetensors file: .*{reason}") as caught:
        SafetensorsFile(tmp_path / "file")
    assert time.process_time() - start < 1
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert str(tmp_path / "file") in str(caught.value)


def test_a_million_entries_cost_neither_time_nor_memory(tmp_path):
    header = many(10**6)
    (tmp_path / "large").write_bytes(raw_file(header, b"1" * 10**6))
    (tmp_path / "small").write_bytes(raw_file(header[: 2**23], b""))  # small enough to be read and counted
    code = (
        "import resource, sys, time\n"
        "from pathlib import Path\n"
        "from qwen_jax.errors import ModelError\n"
        "from qwen_jax.weights.safetensors import SafetensorsFile\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    start = time.process_time()\n"
        "    try: SafetensorsFile(Path(path)); sys.exit('accepted')\n"
        "    except ModelError: assert time.process_time() - start < 1\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024\n"
    )
    # One character outside Latin-1 makes Python keep every character of a text in 4 bytes.
    (tmp_path / "text").write_bytes(raw_file('{"😀'.encode() + b"x" * 10_000_000 + b'":0}'))
    files = [tmp_path / "large", tmp_path / "small", tmp_path / "text"]
    run_here(code, *files)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_to_the_header_is_refused_or_harmless(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged"
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 2), np.int8)}
    save(path, arrays, {"format": "pt"})
    contents = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(contents[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        contents[data.draw(st.integers(0, end - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(b'0123456789"[]{},:')
        )
    path.write_bytes(contents)
    try:
        with SafetensorsFile(path) as file:
            for name, info in file.tensors.items():
                value = file.read(name)
                assert (value.shape, value.dtype) == (info.shape, info.dtype)
            assert sum(info.nbytes for info in file.tensors.values()) == len(contents) - end
    except ModelError as error:
        assert "\n" not in str(error)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ModelError, match="not a regular file"):
            SafetensorsFile(path)
    with pytest.raises(FileError, match="No such file"):
        SafetensorsFile(tmp_path / "nothing")


def test_a_refused_file_is_closed(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("needs /proc")
    for _ in range(3):
        with pytest.raises(ModelError):
            SafetensorsFile(tmp_path / "file")
    assert len(os.listdir("/proc/self/fd")) == before


INFO = {"x": TensorInfo(shape=(4, 3), dtype=np.dtype(np.float32))}


def test_rows_in_any_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    with SafetensorsWriter(tmp_path / "file", INFO, None) as writer:
        writer.write("x", array[3:], start=3)
        writer.write("x", array[:1])
        writer.write("x", np.asfortranarray(array[1:3]), start=1)
        assert [path.name for path in tmp_path.iterdir()] == [f".file.{os.getpid()}.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with SafetensorsFile(tmp_path / "file") as file:
        np.testing.assert_array_equal(file.read("x"), array)


@pytest.mark.parametrize("rows", [[], [(0, 3)], [(1, 4)], [(0, 2), (1, 3)], [(0, 4), (0, 4)], [(0, 2), (0, 2)]])
def test_rows_missing_or_written_twice_make_no_file(rows, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="rows of x were not each written once"):
        with SafetensorsWriter(tmp_path / "file", INFO, None) as writer:
            for first, last in rows:
                writer.write("x", np.zeros((last - first, 3), np.float32), start=first)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_scalar_has_one_place(tmp_path):
    info = {"x": TensorInfo(shape=(), dtype=np.dtype(np.float32))}
    with pytest.raises(ValueError, match="^x has 1 rows"), SafetensorsWriter(tmp_path / "file", info, None) as writer:
        writer.write("x", np.zeros((), np.float32), start=1)


def test_an_exception_makes_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "file", INFO, None):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("array", "start"),
    [
        (np.zeros((4, 3)), 0),
        (np.zeros((4, 3), ">f4"), 0),
        (np.zeros((4, 2), np.float32), 0),
        (np.zeros(3, np.float32), 0),
        (np.zeros((4, 3), np.float32), 1),
        (np.zeros((1, 3), np.float32), -1),
        (np.zeros((), np.float32), 0),
    ],
)
def test_an_array_that_does_not_fit_is_refused(array, start, tmp_path):
    with pytest.raises(ValueError, match="^x "), SafetensorsWriter(tmp_path / "file", INFO, None) as writer:
        writer.write("x", array, start=start)


def test_two_writers_of_one_file_do_not_mix(tmp_path, monkeypatch):
    """The last to end wins."""
    with SafetensorsWriter(tmp_path / "file", INFO, None) as first:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with SafetensorsWriter(tmp_path / "file", INFO, None) as second:
            first.write("x", np.zeros((4, 3), np.float32))
            second.write("x", np.ones((4, 3), np.float32))
        with SafetensorsFile(tmp_path / "file") as file:
            assert file.read("x").all()
    with SafetensorsFile(tmp_path / "file") as file:
        assert not file.read("x").any()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_larger_than_the_memory_limit_is_copied_in_pieces(tmp_path):
    """A reader that maps the file, or a writer that gathers it, does not fit."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    header = header_of({"x": entry("F32", (2**14, 2**10), 0, 2**26)})
    (tmp_path / "file").write_bytes(raw_file(header))
    os.truncate(tmp_path / "file", 8 + len(header) + 2**26)
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from qwen_jax.weights.safetensors import SafetensorsFile, SafetensorsWriter\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24,) * 2)\n"
        "source, target = map(Path, sys.argv[1:])\n"
        "with SafetensorsFile(source) as file, SafetensorsWriter(target, file.tensors, file.metadata) as writer:\n"
        "    for start in range(0, 2**14, 2**10):\n"
        "        writer.write('x', file.read('x', (slice(start, start + 2**10),)), start=start)\n"
        "try: bytearray(2**26); sys.exit('no limit')\n"
        "except MemoryError: pass\n"
    )
    run_here(code, tmp_path / "file", tmp_path / "copy")
    with SafetensorsFile(tmp_path / "copy") as file:
        assert file.tensors["x"].shape == (2**14, 2**10)


def test_a_full_disk_is_one_line(tmp_path):
    array = np.zeros(2**16, np.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(FileError, match="cannot be written: File too large"):
            save(tmp_path / "file", {"x": array})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileError, match="cannot be written: No such file"):
        save(tmp_path / "none" / "file", {"x": np.zeros(3)})


def test_the_umask_decides_who_may_read(tmp_path):
    save(tmp_path / "file", {"x": np.zeros(3)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
