"""The reader of PyTorch files: against torch.save, and against archives and pickles made to do harm."""

import collections
import gc
import os
import pickle
import pickletools
import struct
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ModelError
from qwen_jax.weights.torch_bin import TorchFile
from qwen_jax.weights.torch_pickle import MAX_OPCODES, parse_state

EMPTY_HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def storage(kind="Float", key="0", size=6) -> bytes:
    return (
        b"("
        + text("storage")
        + b"ctorch\n%sStorage\n" % kind.encode()
        + text(key)
        + text("cpu")
        + integer(size)
        + b"tQ"
    )


def tensor(record: bytes | None = None, offset=0, shape=(2, 3), strides=(3, 1), hooks=EMPTY_HOOKS) -> bytes:
    parts = [storage() if record is None else record, integer(offset)]
    parts += [b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (shape, strides)]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(parts) + b"\x89" + hooks + b"tR"


def state(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


def archive(path: Path, data: bytes, records: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED) -> Path:
    """A file as torch.save makes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")
        for name, contents in ({"archive/data/0": bytes(24)} if records is None else records).items():
            file.writestr(name, contents)
    return path


def refusal(path: Path) -> str:
    gc.freeze()  # what other tests have left in memory is not to be gone through while this one is timed
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        TorchFile(path)
    assert time.process_time() - start < 1
    gc.unfreeze()
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as PyTorch weights: ") and message.endswith("safetensors")
    assert "\n" not in message and len(message) < 1000
    return message


def test_the_helpers_make_what_torch_reads(tmp_path):
    """If they did not, the refusals below would prove nothing."""
    torch = pytest.importorskip("torch")
    contents = np.arange(6, dtype=np.float32)
    path = archive(
        tmp_path / "x.bin", state(x=tensor()), {"archive/data/0": contents.tobytes(), "archive/version": b"3\n"}
    )
    assert torch.load(path, weights_only=True)["x"].tolist() == contents.reshape(2, 3).tolist()
    with TorchFile(path) as file:
        np.testing.assert_array_equal(file.read("x"), contents.reshape(2, 3))


def as_numpy(value) -> np.ndarray:
    torch = pytest.importorskip("torch")
    value = value.detach()
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()


def check_against_torch(path: Path, values: dict) -> None:
    with TorchFile(path) as file:
        assert list(file.tensors) == list(values)
        for name, value in values.items():
            expected = as_numpy(value)
            assert (file.tensors[name].shape, file.tensors[name].dtype) == (expected.shape, expected.dtype)
            read = file.read(name)
            assert (read.shape, read.dtype) == (expected.shape, expected.dtype)
            assert read.flags.c_contiguous and read.flags.writeable
            assert read.tobytes() == expected.tobytes()
            index = tuple(slice(1, None) for _ in expected.shape)[:2]
            part = file.read(name, index)
            assert part.flags.c_contiguous and part.shape == expected[index].shape
            assert part.tobytes() == expected[index].tobytes()


def test_reads_what_torch_saves(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    values = {
        f"{dtype}": torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16),
            *(torch.int8, torch.uint8, torch.bool),
        )
    }
    values |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "base": base,
        "tied": base,
        "permuted": base.permute(2, 0, 1),
        "strided": base[1:3, ::2, 1::3],
        "one row": base[3:4, :, 2],
        "diagonal": base[0].diagonal(),
        "é😀": torch.ones(1),
    }
    torch.save(values, tmp_path / "x.bin")
    check_against_torch(tmp_path / "x.bin", values)


def test_reads_the_state_of_a_module(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7), torch.nn.BatchNorm1d(7))
    module[1].weight = module[0].weight
    values = module.to(torch.bfloat16).state_dict()
    assert values._metadata
    torch.save(values, tmp_path / "x.bin")
    check_against_torch(tmp_path / "x.bin", values)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_view_and_any_slice(data, tmp_path_factory):
    torch = pytest.importorskip("torch")
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    base = torch.arange(int(np.prod(shape))).reshape(shape).permute(data.draw(st.permutations(range(len(shape)))))
    view = base[tuple(slice(data.draw(st.integers(0, 2)), None, data.draw(st.integers(1, 3))) for _ in shape)]
    path = tmp_path_factory.getbasetemp() / "view.bin"
    torch.save({"x": view}, path)
    bound = st.none() | st.integers(-6, 6)
    index = tuple(data.draw(st.lists(st.builds(slice, bound, bound), max_size=len(shape))))
    with TorchFile(path) as file:
        np.testing.assert_array_equal(file.read("x", index), view.numpy()[index])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda torch: {"x": torch.ones(3).to_sparse()}, "_rebuild_sparse_tensor"),
        (lambda torch: {"x": torch.ones(3, dtype=torch.complex64)}, "ComplexFloatStorage"),
        (lambda torch: {"x": torch.ones(3).to(torch.float8_e4m3fn)}, "_rebuild_tensor_v3"),
        (lambda torch: {"x": torch.zeros(1).expand(10**6, 10**6)}, "repeats the elements"),
        (lambda torch: {"model": {"x": torch.zeros(1)}}, "'model' is of type dict, not a tensor"),
        (lambda torch: {"x": torch.zeros(1), "epoch": 3}, "'epoch' is of type int, not a tensor"),
        (lambda torch: {1: torch.zeros(1)}, "a name of type int"),
        (lambda torch: [torch.zeros(1)], "type list, not a dictionary"),
        (lambda torch: torch.zeros(1), "type StoredTensor, not a dictionary"),
        (lambda torch: torch.nn.Linear(2, 2), "torch.nn.modules.linear Linear"),
    ],
)
def test_other_things_that_torch_saves(make, reason, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(make(torch), tmp_path / "x.bin")
    assert reason in refusal(tmp_path / "x.bin")


def test_the_legacy_formats(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.ones(3)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(tmp_path / "x.bin")
    for contents in (b"", b"PK", b"\x80\x02}.", b"ustar" * 200):
        (tmp_path / "y.bin").write_bytes(contents)
        assert "before 1.6" in refusal(tmp_path / "y.bin")


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def canary_command(path: Path) -> str:
    return f"touch {path}"


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(protocol, tmp_path):
    canary = tmp_path / "canary"
    for attack in (
        Call(os.system, canary_command(canary)),
        Call(exec, f"open({str(canary)!r}, 'w')"),
        Call(getattr, Call(__import__, "os"), "system"),
        Call(map, os.system, [canary_command(canary)]),
        collections.OrderedDict(x=Call(os.system, canary_command(canary))),
    ):
        refusal(archive(tmp_path / "x.bin", pickle.dumps({"x": attack}, protocol)))
        assert not canary.exists()


def test_the_canary_works(tmp_path):
    pickle.loads(pickle.dumps(Call(os.system, canary_command(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()


SYSTEM = text("touch /nowhere/canary")
ATTACKS = {
    "unknown global": (b"\x80\x02cos\nsystem\n" + SYSTEM + b"\x85R.", "'os system'"),
    "getattr": (b"\x80\x02c__builtin__\ngetattr\n(ccollections\nOrderedDict\n" + text("x") + b"tR.", "getattr"),
    "dotted name": (b"\x80\x02ccollections\nOrderedDict.__init__.__globals__\n.", "OrderedDict.__init__"),
    "dotted module": (b"\x80\x02ctorch._utils._rebuild_tensor_v2\n__globals__\n.", "__globals__"),
    "name with a space": (b"\x80\x02ctorch\nFloatStorage x\n.", "FloatStorage x"),
    "split otherwise": (b"\x80\x02ctorch._utils _rebuild_tensor_v2\n\n.", "_rebuild_tensor_v2 "),
    "STACK_GLOBAL": (b"\x80\x02" + text("os") + text("system") + b"\x93" + SYSTEM + b"\x85R.", "STACK_GLOBAL"),
    "STACK_GLOBAL from the memo": (
        b"\x80\x04\x8c\x02os\x940\x8c\x06system\x940h\x00h\x01\x93\x8c\x02id\x85R.",
        "protocol 4",
    ),
    "INST": (b"\x80\x02(" + SYSTEM + b"ios\nsystem\n.", "INST"),
    "OBJ": (b"\x80\x02(cos\nsystem\n" + SYSTEM + b"o.", "'os system'"),
    "OBJ of what is allowed": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
    "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "NEWOBJ_EX": (b"\x80\x02ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
    "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
    "EXT2": (b"\x80\x02\x83\x01\x00.", "EXT2"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
    "PERSID": (b"\x80\x02Pos\n.", "PERSID"),
    "BUFFER": (b"\x80\x02\x97.", "NEXT_BUFFER"),
    "call of text": (b"\x80\x02" + text("torch._utils _rebuild_tensor_v2") + b")R.", "type str where type _Function"),
    "call of a dtype": (b"\x80\x02ctorch\nFloatStorage\n)R.", "where type _Function"),
    "call of a result": (b"\x80\x02ccollections\nOrderedDict\n)R)R.", "type OrderedDict where type _Function"),
    "OrderedDict of arguments": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "1 values where 0"),
    "too few arguments": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "0 values where 6"),
    "arguments in a list": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n]R.", "type list where type tuple"),
    "BUILD on a dict": (b"\x80\x02}}b.", "type dict where type OrderedDict"),
    "BUILD with a tuple": (b"\x80\x02ccollections\nOrderedDict\n)RN}\x86b.", "type tuple where type dict"),
    "BUILD on a function": (b"\x80\x02ccollections\nOrderedDict\n}b.", "type _Function where type OrderedDict"),
    "empty": (b"", "the bytes b'' at byte 0"),
    "no STOP": (b"\x80\x02}", "the bytes b'' at byte 3"),
    "something after STOP": (b"\x80\x02}.N", "STOP"),
    "two values": (b"\x80\x02}}.", "STOP"),
    "an open MARK": (b"\x80\x02(}.", "STOP"),
    "no value": (b"\x80\x02.", "STOP"),
    "pop of nothing": (b"\x80\x02R.", "malformed"),
    "pop below a MARK": (b"\x80\x02}(" + text("x") + b"Ns.", "malformed"),
    "put of nothing": (b"\x80\x02q\x00.", "malformed"),
    "get of nothing": (b"\x80\x02h\x00.", "malformed"),
    "no MARK": (b"\x80\x02t.", "malformed"),
    "odd items": (b"\x80\x02}(" + text("x") + b"u.", "zip"),
    "cut argument": (b"\x80\x02X\xff\xff\xff\x7fabc.", "cut in the argument at byte 7"),
    "unknown opcode": (b"\x80\x02\xff.", r"the bytes b'\xff' at byte 2"),
    "cut number": (b"\x80\x02J\x00", "malformed"),
    "cut long": (b"\x80\x02\x8a\x09\x00", "cut in the argument"),
    "cut name": (b"\x80\x02cos\nsystem", "a name without an end"),
    "long name": (b"\x80\x02c" + b"x" * 300 + b"\nx\n.", "a name without an end"),
    "escaped name": (b"\x80\x02c\\x63ollections\nOrderedDict\n)R.", "x63ollections"),
    "protocol 200": (b"\x80\xc8}.", "protocol 200"),
    "APPEND to a dict": (b"\x80\x02}Na.", "type dict where type list"),
    "item of a list": (b"\x80\x02]" + text("x") + b"Ns.", "type list where type dict"),
    "item of a tensor": (b"\x80\x02" + tensor() + text("x") + b"Ns.", "type StoredTensor where type dict"),
    "name of bytes": (b"\x80\x02}(" + tensor() + tensor() + b"u.", "a name of type StoredTensor"),
    "half a surrogate pair": (b"\x80\x02}(X\x03\x00\x00\x00\xed\xa0\x80" + tensor() + b"u.", "utf-8"),
    "two states": (state(x=state()[2:-1]), "'x' is of type dict"),
    "a list of itself": (b"\x80\x02}" + text("x") + b"]q\x00h\x00as.", "'x' is of type list"),
    "storage outside": (state(x=storage(size=6)), "'x' is of type Storage"),
    "unknown storage": (state(x=tensor(storage("QInt8"))), "torch QInt8Storage"),
    "other reference": (b"\x80\x02(" + text("module") + text("x") * 3 + b"K\x01tQ.", "refers to a 'module'"),
    "reference of text": (b"\x80\x02" + text("0") + b"Q.", "type str where type tuple"),
    "reference of 2": (b"\x80\x02NN\x86Q.", "2 values where 5"),
    "key is a number": (state(x=tensor(storage().replace(text("0"), b"K\x00"))), "type int where type str"),
    "key with a path": (state(x=tensor(storage(key="../data.pkl"))), "no storage '../data.pkl'"),
    "missing storage": (state(x=tensor(storage(key="1"))), "no storage '1'"),
    "storage larger than its record": (state(x=tensor(storage(size=7))), "has 24 bytes, not 7 elements"),
    "storage smaller than its record": (state(x=tensor(storage(size=5), shape=(2,), strides=(1,))), "not 5 elements"),
    "storage of another width": (state(x=tensor(storage("Double"))), "not 6 elements of float64"),
    "negative storage": (state(x=tensor(storage(size=-6), shape=(0,), strides=(1,))), "not -6 elements"),
    "huge storage": (state(x=tensor(storage(size=2**2000), shape=(0,), strides=(1,))), "elements"),
    "bool for a size": (state(x=tensor(storage().replace(b"K\x06tQ", b"\x88tQ"))), "type bool where type int"),
    "tensor too large": (state(x=tensor(shape=(3, 3))), "reaches to element 8"),
    "offset too large": (state(x=tensor(offset=1)), "reaches to element 6"),
    "huge offset": (state(x=tensor(offset=2**62)), "reaches to element"),
    "stride too large": (state(x=tensor(strides=(4, 1))), "reaches to element 6"),
    "huge stride": (state(x=tensor(strides=(2**64, 1))), "reaches to element"),
    "negative stride": (state(x=tensor(offset=5, strides=(-3, -1))), "do not go together"),
    "negative offset": (state(x=tensor(offset=-1)), "do not go together"),
    "negative size": (state(x=tensor(shape=(-2, 3))), "do not go together"),
    "other rank": (state(x=tensor(strides=(1,))), "do not go together"),
    "zero strides": (state(x=tensor(shape=(10**9, 10**9), strides=(0, 0))), "repeats"),
    "overflow to 0": (state(x=tensor(shape=(2**63, 2, 0), strides=(0, 0, 0))), "more elements"),
    "100 axes": (state(x=tensor(shape=(1,) * 100, strides=(1,) * 100)), "100 axes"),
    "hooks": (state(x=tensor(hooks=EMPTY_HOOKS + text("x") + b"Ns")), "hooks, which are code"),
    "hooks in a tuple": (state(x=tensor(hooks=b")")), "type tuple where type OrderedDict"),
    "parameter of nothing": (
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x88" + EMPTY_HOOKS + b"\x87R.",
        "type NoneType where",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_is_not_a_state_dict_is_refused(name, tmp_path):
    contents, reason = ATTACKS[name]
    assert reason in refusal(archive(tmp_path / "x.bin", contents))


def doubling(levels: int, pair: bytes) -> bytes:
    """A value that holds the one before it twice, and so on: small here, 2^levels when walked."""
    steps = [
        b"h" + bytes([level]) + b"h" + bytes([level]) + pair + b"q" + bytes([level + 1]) for level in range(levels)
    ]
    return b")q\x00" + b"".join(steps)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"\x80\x02}" + text("x") + doubling(200, b"\x86") + b"s.", "STOP"),
        (b"\x80\x02}(" + text("x") + b"(" + doubling(200, b"\x86") + b"tu.", "'x' is of type tuple"),
        (b"\x80\x02}(" + doubling(200, b"\x86") + b"N" * 200 + b"u.", "a name of type tuple"),
        (b"\x80\x02(" + doubling(200, b"\x86") + b"tQ.", "201 values where 5"),
        (b"\x80\x02" + tensor(hooks=b"(" + doubling(200, b"\x86") + b"t") + b".", "type tuple where type OrderedDict"),
        (b"\x80\x02" + b"]" * (MAX_OPCODES - 1) + b"a" * MAX_OPCODES, f"over {MAX_OPCODES} opcodes"),
        (b"\x80\x02" + b"(" * (MAX_OPCODES + 10), f"over {MAX_OPCODES} opcodes"),
        (b"\x80\x02Nq\x00" + b"h\x00" * MAX_OPCODES, f"over {MAX_OPCODES} opcodes"),
        (b"\x80\x02}(" + b"X\x00\x00\x08\x00" + b"x" * 2**19 * 17, "data.pkl has"),
    ],
)
def test_bombs(contents, reason, tmp_path):
    assert reason in refusal(archive(tmp_path / "x.bin", contents))


def test_a_deep_value_that_is_not_needed_is_dropped(tmp_path):
    depth = 50_000
    contents = EMPTY_HOOKS + b"}" + text("_metadata") + b")" + b"\x85" * depth + b"sb"
    with TorchFile(archive(tmp_path / "x.bin", b"\x80\x02" + contents + b".")) as file:
        assert not file.tensors


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ({"archive/../../x": b""}, "'archive/../../x', which a state dict does not need"),
        ({"../x": b""}, "2 folders"),
        ({"/archive/x": b""}, "2 folders"),
        ({"data.pkl": b""}, "2 folders"),
        ({"archive/code/model.py": b""}, "'archive/code/model.py'"),
        ({"archive/data/0/1": b""}, "'archive/data/0/1'"),
        ({"archive/data/0\n": b""}, "data/0"),
        ({"archive/data/٣": b""}, "does not need"),
        ({"archive\\data\\0": b""}, "2 folders"),
    ],
)
def test_names_outside_the_archive(records, reason, tmp_path):
    path = archive(tmp_path / "x.bin", state(), records)
    assert reason in refusal(path)


def test_archives_that_torch_does_not_write(tmp_path):
    path = tmp_path / "x.bin"
    assert "'archive/data.pkl' is compressed" in refusal(archive(path, state(), compression=zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(archive(path, state(x=tensor())), "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data/0", bytes(24))
    assert "two entries 'archive/data/0'" in refusal(path)
    with zipfile.ZipFile(archive(path, state()), "a") as file:
        file.comment = b"comment"
    assert "does not end" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", b"3\n")
    assert "no data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", state())
        file.writestr("archive/byteorder", b"big")
    assert "not little endian" in refusal(path)
    path.write_bytes(archive(path, state()).read_bytes() + b"\0")
    assert "does not end" in refusal(path)
    path.write_bytes(archive(path, state()).read_bytes()[:-1])
    assert "does not end" in refusal(path)


def patched(path: Path, signature: bytes, offset: int, value: bytes, which=0) -> Path:
    """The archive with bytes of its `which`-th structure of that signature replaced."""
    contents = bytearray(archive(path, state(x=tensor())).read_bytes())
    starts = [at for at in range(len(contents)) if contents.startswith(signature, at)]
    contents[starts[which] + offset : starts[which] + offset + len(value)] = value
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((b"PK\1\2", 8, b"\x01\x00"), "encrypted"),
        ((b"PK\1\2", 10, b"\x08\x00"), "compressed"),
        ((b"PK\3\4", 6, b"\x01\x00"), "not a plain file"),
        ((b"PK\3\4", 8, b"\x08\x00"), "not a plain file"),
        ((b"PK\3\4", 26, b"\xff\xff"), "overlaps"),
        ((b"PK\3\4", 30, b"X"), "another name"),
        ((b"PK\1\2", 24, b"\xff\xff\xff\x7f"), "two different sizes"),
        ((b"PK\1\2", 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"), "data.pkl has 2147483647 bytes"),
        ((b"PK\1\2", 20, b"\x00\x01\x00\x00" * 2, 2), "has 256 bytes, not 6 elements"),
        ((b"PK\1\2", 42, b"\0\0\0\0", 2), "at the same place"),
        ((b"PK\1\2", 42, b"\xff\xff\xff\xff", 2), "overlaps"),
        ((b"PK\1\2", 0, b"XX"), "no signature"),
        ((b"PK\1\2", 28, b"\xff\xff"), "shorter than its entries"),
        ((b"PK\5\6", 10, b"\x02\x00"), "longer than its entries"),
        ((b"PK\5\6", 10, b"\xff\x0f"), "shorter than its entries"),
        ((b"PK\5\6", 10, b"\xff\xff"), "65535 entries"),
        ((b"PK\5\6", 12, b"\xff\xff\xff\xff"), "does not end where"),
        ((b"PK\5\6", 16, b"\0\0\0\0"), "does not end where"),
    ],
)
def test_directories_that_contradict_the_file(change, reason, tmp_path):
    assert reason in refusal(patched(tmp_path / "x.bin", *change))


def test_many_entries(tmp_path):
    path = archive(tmp_path / "x.bin", state())
    contents = path.read_bytes()
    start = contents.index(b"PK\1\2")
    directory = contents[start : contents.index(b"PK\1\2", start + 1)] * 200_000
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 200_000, 200_000, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    path.write_bytes(contents[:start] + directory + end + locator + contents[-22:])
    assert "200000 entries" in refusal(path)


def test_a_directory_of_64_bits(tmp_path):
    """torch.save writes one when the file passes 4 GiB."""
    path = archive(tmp_path / "x.bin", state(x=tensor()))
    contents = path.read_bytes()
    start = contents.index(b"PK\1\2")
    directory = b""
    for info in zipfile.ZipFile(path).infolist():
        name = info.filename.encode()
        wide = struct.pack("<2H3Q", 1, 24, info.file_size, info.file_size, info.header_offset)
        fields = (b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, *[2**32 - 1] * 2, len(name), len(wide), 0, 0, 0, 0, 2**32 - 1)
        directory += struct.pack("<4s6H3L5H2L", *fields) + name + wide
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    short_end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(contents[:start] + directory + end + locator + short_end)
    assert zipfile.ZipFile(path).namelist() == ["archive/data.pkl", "archive/byteorder", "archive/data/0"]
    with TorchFile(path) as file:
        assert file.read("x").shape == (2, 3)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_refused_or_harmless(data, tmp_path_factory):
    path = archive(
        tmp_path_factory.getbasetemp() / "damaged.bin", state(x=tensor(), y=tensor(shape=(3, 2), strides=(1, 3)))
    )
    contents = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(contents)
    try:
        with TorchFile(path) as file:
            for name, info in file.tensors.items():
                assert (file.read(name).shape, file.read(name).dtype) == (info.shape, info.dtype)
    except ModelError as error:
        assert "\n" not in str(error)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_arbitrary_opcodes_are_refused_or_harmless(data):
    pieces = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None]
    pieces += [text("x"), b"q\x00", b"h\x00", b"K\x06", storage(), tensor(), EMPTY_HOOKS, b"ctorch\nFloatStorage\n"]
    contents = b"\x80\x02" + b"".join(data.draw(st.lists(st.sampled_from(pieces), max_size=20))) + b"."
    try:
        assert isinstance(parse_state(contents), dict)
    except ValueError as error:
        assert "\n" not in str(error)
