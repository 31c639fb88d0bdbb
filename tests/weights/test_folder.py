"""Weights in a folder: which files are taken, and which indices are refused."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights.folder import open_folder
from qwen_jax.weights.safetensors import SafetensorsWriter
from qwen_jax.weights.tensors import TensorInfo

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ARRAYS = {name: np.full((4, 2), value, np.float32) for value, name in enumerate(["b", "a", "c"])}


def save(path: Path, *names: str, metadata=None) -> None:
    infos = {name: TensorInfo(shape=ARRAYS[name].shape, dtype=ARRAYS[name].dtype) for name in names}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name in names:
            writer.write(name, ARRAYS[name])


def write_index(folder: Path, weight_map: object, name=INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 96}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    save(folder / ONE, "b", "a", metadata={"format": "pt"})
    save(folder / TWO, "c")
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO})
    return folder


def refusal(folder: Path, allow_pickle_format=False) -> str:
    with pytest.raises(ModelError) as caught:
        open_folder(folder, allow_pickle_format=allow_pickle_format)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_are_one(sharded):
    with open_folder(sharded, allow_pickle_format=False) as tensors:
        assert list(tensors.tensors) == ["b", "a", "c"]
        assert tensors.weight_map == {"a": ONE, "b": ONE, "c": TWO}
        assert tensors.files == [sharded / ONE, sharded / TWO]
        assert tensors.where("c") == f"{sharded / TWO}: 'c'"
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(tensors.read(name), array)
            np.testing.assert_array_equal(tensors.read(name, (slice(1, 3),)), array[1:3])
    with pytest.raises(FileError):
        tensors.read("a")


def test_the_layout_writes_the_same_files_again(sharded, tmp_path):
    with open_folder(sharded, allow_pickle_format=False) as tensors:
        layout = json.loads(json.dumps(tensors.layout))
        for name, contents in layout.items():
            infos = {tensor: tensors.tensors[tensor] for tensor in contents["tensors"]}
            with SafetensorsWriter(tmp_path / name, infos, contents["metadata"]) as writer:
                for tensor in infos:
                    writer.write(tensor, tensors.read(tensor))
            assert (tmp_path / name).read_bytes() == (sharded / name).read_bytes()
    assert set(layout) == {ONE, TWO}


def test_threads_share_the_files(sharded):
    with open_folder(sharded, allow_pickle_format=False) as tensors, ThreadPoolExecutor(8) as pool:
        names = list(ARRAYS) * 100
        for name, value in zip(names, pool.map(tensors.read, names), strict=True):
            assert (value == ARRAYS[name]).all()


@pytest.mark.parametrize("name", ["model.safetensors", "any.safetensors", ONE])
def test_a_single_file(name, tmp_path):
    save(tmp_path / name, "a", "c")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    (tmp_path / ".hidden.safetensors").write_bytes(b"not looked at")
    with open_folder(tmp_path, allow_pickle_format=True) as tensors:
        assert tensors.weight_map == {"a": name, "c": name}
        assert tensors.layout == {name: {"metadata": None, "tensors": ["a", "c"]}}


def test_nothing_or_too_much(tmp_path):
    assert "no weights: model.safetensors or" in refusal(tmp_path)
    save(tmp_path / ONE, "a")
    save(tmp_path / TWO, "c")
    assert f"{ONE} and {TWO}" in refusal(tmp_path)
    save(tmp_path / "model.safetensors", "a")
    open_folder(tmp_path, allow_pickle_format=False).close()
    write_index(tmp_path, {"a": ONE})
    assert f"{INDEX} and model.safetensors" in refusal(tmp_path)
    with pytest.raises(FileError, match="cannot be listed: No such file"):
        open_folder(tmp_path / "none", allow_pickle_format=False)
    with pytest.raises(FileError, match="cannot be listed: Not a directory"):
        open_folder(tmp_path / ONE, allow_pickle_format=False)


@pytest.mark.parametrize("index", [False, True])
def test_pickle_needs_permission(index, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    if index:
        (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00001.bin")
        write_index(tmp_path, dict.fromkeys("ab", "pytorch_model-00001-of-00001.bin"), "pytorch_model.bin.index.json")
    assert "--allow-pickle-format" in refusal(tmp_path)
    with open_folder(tmp_path, allow_pickle_format=True) as tensors:
        assert tensors.read("a").tolist() == [1, 1]
        assert tensors.layout is None


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/tmp/outside.safetensors",
        "sub/inside.safetensors",
        f"./{ONE}",
        f"{ONE}/",
        f"{ONE}\0",
        f"{ONE}\n",
        "..",
        ".",
        "",
        ".hidden.safetensors",
        "-rf.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "config.json",
        "pytorch_model.bin",
        "\ud800.safetensors",
        5,
        None,
        [ONE],
        {"file": ONE},
    ],
)
def test_names_that_are_no_plain_names(name, sharded):
    (sharded / "sub").mkdir()
    for path in ("sub/inside.safetensors", "../outside.safetensors", ".hidden.safetensors", "-rf.safetensors"):
        save(sharded / path, "c")
    write_index(sharded, {"a": ONE, "b": ONE, "c": name})
    message = refusal(sharded)
    assert INDEX in message
    assert "the file of 'c'" in message or "not Unicode" in message


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "malformed"),
        (b"[]", "not an object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": "%s", "a": "%s"}}' % (ONE.encode(), TWO.encode()), "'a' appears twice"),
        (b'{"weight_map":' * 5000, "nested too deeply"),
        (b'{"weight_map": {"\xff": 1}}', "not UTF-8"),
        (b" " * (10 * 2**20 + 1), "10485761 bytes"),
        (b"{" + b'"":"",' * 500_000 + b"}", "over 400000"),
    ],
)
def test_an_index_that_is_none(contents, reason, sharded):
    (sharded / INDEX).write_bytes(contents)
    assert reason in refusal(sharded)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": ONE, "b": ONE, "c": "none.safetensors"}, ("none.safetensors is missing", "'c'")),
        ({"a": ONE, "b": ONE, "c": TWO, "d": TWO}, (f"{TWO} does not hold 'd'",)),
        ({"a": ONE, "c": TWO}, (f"{ONE} holds 'b', which is not in {INDEX}",)),
        ({"a": ONE, "b": TWO, "c": TWO}, (f"{ONE} holds 'b', which {INDEX} places in {TWO}",)),
    ],
)
def test_an_index_that_is_not_of_these_files(weight_map, words, sharded):
    write_index(sharded, weight_map)
    message = refusal(sharded)
    assert all(word in message for word in words), message


def test_a_tensor_in_two_files(sharded):
    save(sharded / TWO, "c", "a")
    assert f"{TWO} holds 'a', which {INDEX} places in {ONE}" in refusal(sharded)


def test_a_broken_shard_is_named(sharded):
    os.truncate(sharded / TWO, 100)
    assert f"{TWO} is not a valid safetensors file" in refusal(sharded)


def test_pipes_and_folders_do_not_hang(sharded):
    for make in (os.mkfifo, os.mkdir):
        for name in (TWO, INDEX):
            kept = (sharded / name).rename(sharded / "kept")
            make(sharded / name)
            assert "not a regular file" in refusal(sharded)
            (sharded / name).unlink() if make is os.mkfifo else (sharded / name).rmdir()
            kept.rename(sharded / name)
    open_folder(sharded, allow_pickle_format=False).close()


@pytest.mark.parametrize("name", [TWO, INDEX])
def test_links(name, sharded, tmp_path):
    """Inside the folder they are files like others; what leads out, or nowhere, is refused."""
    inside = (sharded / name).rename(sharded / "moved")
    (sharded / name).symlink_to("moved")
    open_folder(sharded, allow_pickle_format=False).close()
    outside = inside.rename(tmp_path / "moved")
    for target in (outside, "../moved"):
        (sharded / name).unlink()
        (sharded / name).symlink_to(target)
        assert "link out of the folder" in refusal(sharded)
    outside.unlink()
    assert "nowhere" in refusal(sharded) or "is missing" in refusal(sharded)
    (sharded / name).unlink()
    (sharded / name).symlink_to(name)
    assert "nowhere" in refusal(sharded) or "is missing" in refusal(sharded)


def test_a_folder_that_is_a_link(sharded, tmp_path):
    (tmp_path / "link").symlink_to(sharded)
    open_folder(tmp_path / "link", allow_pickle_format=False).close()


def test_a_snapshot_of_the_hugging_face_cache(sharded, tmp_path):
    repository = tmp_path / "models--Qwen--X"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    open_folder(snapshot, allow_pickle_format=False).close()
    (repository / "blobs").rename(repository / "others")
    (repository / "blobs").symlink_to("others")
    assert "link out of the folder" in refusal(snapshot)
    (repository / "blobs").unlink()
    (repository / "others").rename(repository / "blobs")
    (repository / "snapshots").rename(repository / "files")
    assert "link out of the folder" in refusal(repository / "files" / "0123abcd")


def test_a_refused_folder_leaves_nothing_open(sharded):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    write_index(sharded, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    before = len(os.listdir(descriptors))
    refusal(sharded)
    assert len(os.listdir(descriptors)) == before
