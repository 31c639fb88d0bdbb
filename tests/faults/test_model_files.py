"""Model files that are damaged, or made to break their reader, through the command that people run.

Each is refused in one line, in less than a second, and nothing of it is executed, written or left behind. One by one
the ways to break a file are tried where it is read; these are the places, and what is added here:

  safetensors            weights/test_safetensors.py; memory
  indices, links         weights/test_folder.py; side files too
  PyTorch's .bin         weights/test_torch_bin.py; memory, a folder with both
  config.json            weights/test_hf_config.py; memory
  weights that are not those of the config        weights/test_hf.py, weights/test_convert.py
  quantised weights      weights/test_quantized.py, weights/test_hf_config.py; types of arrays
  tokenizers             text/test_tokenizer.py; against the rows of the embedding
  conversions that are killed, targets, memory    test_conversion.py, weights/test_convert.py
  the hub, its names     weights/test_hub.py; names in folders
  checkpoints            weights/test_checkpoint_faults.py; those that are made to mislead
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.command import run_command
from qwen_jax.errors import FileError
from qwen_jax.weights import convert, verify
from qwen_jax.weights.manifest import FILE_NAME, Manifest
from qwen_jax.weights.source import open_model
from tests.faults.conftest import CONFIG
from tests.published import publish, save_safetensors, tiny_tokenizer
from tests.weights.quantized import AWQ

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Spoil = Callable[[Path], object]


@pytest.fixture
def refuse(tmp_path, capfd):
    """Converts a folder, which must be refused: returns the line that says why."""

    def run(source: Path, *options: str, code: int = 3) -> str:
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        start = time.process_time()
        assert run_command("convert", lambda: convert.main([str(source), str(tmp_path / "out"), *options])) == code
        assert time.process_time() - start < 1
        return checked(before, capfd.readouterr().err)

    def checked(before: list[Path], written: str) -> str:
        assert sorted(tmp_path.rglob("*")) == before
        [line] = written.splitlines()
        assert line.startswith("convert: error: ") and line.isprintable() and len(line) < 1500
        return line

    return run


def cases(**spoils: tuple[Spoil, str]):
    return pytest.mark.parametrize(("spoil", "words"), spoils.values(), ids=[name.replace("_", " ") for name in spoils])


def fields(file: str, **changes: object) -> Spoil:
    """Changes fields of a JSON file; ... takes one away."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return spoil


def contents(file: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def place(tensor: str, file: object) -> Spoil:
    """Has the index say that a tensor is in a file."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][tensor] = file
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def moved_out(file: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / file).rename(folder.parent / "outside")
        (folder / file).symlink_to("../outside")

    return spoil


def replaced(file: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return spoil


def sparse(size: int) -> Callable[[Path], object]:
    return lambda path: (path.touch(), os.truncate(path, size))


@cases(
    empty=(contents(ONE, lambda data: b""), "0 bytes"),
    length_beyond_the_file=(contents(ONE, lambda data: struct.pack("<Q", 2**63) + data[8:]), "9223372036854775808"),
    no_json=(contents(ONE, lambda data: data[:8] + b"x" + data[9:]), "malformed at character 0"),
    dtype=(contents(ONE, lambda data: data.replace(b'"F32"', b'"F3?"', 1)), "dtype 'F3?'"),
    shape=(contents(ONE, lambda data: data.replace(b'"shape":[260,', b'"shape":[261,')), "takes 33408 bytes"),
    cut=(contents(TWO, lambda data: data[:-1]), "bytes of data and the file has"),
    longer=(contents(TWO, lambda data: data + b"x"), "bytes of data and the file has"),
)
def test_safetensors(folder, refuse, spoil, words):
    spoil(folder)
    assert words in refuse(folder)


@cases(
    parent=(place("model.norm.weight", "../x.safetensors"), "not a plain name"),
    absolute=(place("model.norm.weight", "/etc/x.safetensors"), "not a plain name"),
    null_character=(place("model.norm.weight", "x\0.safetensors"), r"'x\x00.safetensors'"),
    escape=(place("model.norm.weight", "\x1b[2J.safetensors"), r"'\x1b[2J.safetensors'"),
    two_lines=(place("a\nb", ONE), r"does not hold 'a\nb'"),
    right_to_left=(place("a\u202eb", ONE), r"does not hold 'a\u202eb'"),
    emoji=(place("😀", ONE), "does not hold '😀'"),
    long=(place("model.norm.weight", "x" * 300 + ".safetensors"), "not a plain name"),
    long_in_bytes=(place("model.norm.weight", "é" * 180 + ".safetensors"), "is missing"),
    missing=(place("model.norm.weight", "x.safetensors"), "x.safetensors is missing"),
    wrong_file=(place("model.norm.weight", ONE), f"holds 'model.norm.weight', which {INDEX} places in {ONE}"),
    link=(moved_out(TWO), "link out of the folder"),
    link_of_the_index=(moved_out(INDEX), "link out of the folder"),
    pipe=(replaced(TWO, os.mkfifo), "not a regular file"),
    no_index=(lambda folder: (folder / INDEX).unlink(), f"{ONE} and {TWO}, and one is wanted"),
)
def test_indices_and_names(folder, refuse, spoil, words):
    spoil(folder)
    assert words in refuse(folder)


@pytest.mark.parametrize("name", ["a\nb.safetensors", "\x1b[31m.safetensors", "a b.safetensors", "-rf.safetensors"])
def test_the_only_file_has_a_plain_name(tmp_path, refuse, name):
    publish(tmp_path / "model", CONFIG, "qwen2")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model" / name)
    assert f"weights are in {name!r}; rename it to model.safetensors" in refuse(tmp_path / "model")


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (moved_out, "link out of the folder"),
        (lambda name: replaced(name, lambda path: path.symlink_to("nowhere")), "link that leads nowhere"),
        (lambda name: replaced(name, os.mkfifo), "not a regular file"),
        (lambda name: replaced(name, os.mkdir), "not a regular file"),
        (lambda name: replaced(name, sparse(100 * 2**20)), "104857600 bytes"),
    ],
    ids=["link out", "link to nothing", "pipe", "folder", "huge"],
)
def test_side_files(folder, refuse, name, spoil, words):
    (folder / name).touch()
    spoil(name)(folder)
    line = refuse(folder)
    assert words in line and name in line


def test_side_files_of_a_cached_snapshot_are_links(folder, tmp_path):
    repository = tmp_path / "models--Qwen--X"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    folder.rename(repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert convert.main([str(snapshot), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_settings_file_that_is_no_json(folder, refuse, name):
    (folder / name).write_bytes(b'{"a": 1, "a": 2}')
    assert f"{folder / name}: the key 'a' appears twice" in refuse(folder, "--to", "hf")


def test_a_length_without_limit_as_transformers_writes_it(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    assert convert.main([str(folder), str(tmp_path / "out"), "--to", "hf"]) == 0


def pickled(data: bytes, method: int = zipfile.ZIP_STORED, top: str = "archive") -> Spoil:
    """Puts a .bin, around any pickle, in the place of the weights."""

    def spoil(folder: Path) -> None:
        for file in (ONE, TWO, INDEX):
            (folder / file).unlink(missing_ok=True)
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w", method) as archive:
            archive.writestr(f"{top}/data.pkl", data)

    return spoil


SYSTEM = b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85R."


@cases(
    call=(pickled(SYSTEM), "'os system', which is not allowed"),
    getattr=(pickled(b"\x80\x02c__builtin__\ngetattr\n(tR."), "getattr"),
    bomb=(pickled(b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 65_000 + b"."), "over 250000 opcodes"),
    compressed=(pickled(SYSTEM, zipfile.ZIP_DEFLATED), "compressed"),
    entry_outside=(pickled(SYSTEM, top="archive/.."), "does not need"),
    legacy=(both(pickled(b""), contents("pytorch_model.bin", lambda _: SYSTEM)), "before 1.6"),
)
def test_pickles(folder, tmp_path, monkeypatch, refuse, spoil, words):
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    assert words in refuse(folder, "--allow-pickle-format")
    assert "--allow-pickle-format" in refuse(folder)
    assert not (tmp_path / "canary").exists()


def test_a_pickle_beside_safetensors_is_not_opened(tmp_path):
    publish(tmp_path / "model", CONFIG, "qwen2")
    os.mkfifo(tmp_path / "model/pytorch_model.bin")
    assert convert.main([str(tmp_path / "model"), str(tmp_path / "out"), "--allow-pickle-format"]) == 0


@cases(
    missing=(fields("config.json", hidden_size=...), "hidden_size is missing"),
    null=(fields("config.json", hidden_size=None), "hidden_size is missing"),
    text=(fields("config.json", num_hidden_layers="3"), "num_hidden_layers is '3'"),
    negative=(fields("config.json", num_attention_heads=-4), "num_attention_heads is -4"),
    zero=(fields("config.json", num_key_value_heads=0), "num_key_value_heads is 0"),
    too_many_layers=(fields("config.json", num_hidden_layers=10**9), "a whole number from 1 to 1000"),
    too_many_tokens=(fields("config.json", vocab_size=10**12), "vocab_size is 1000000000000"),
    other_family=(fields("config.json", model_type="llama"), "'qwen2', 'qwen2_moe', 'qwen3', 'qwen3_moe' are read"),
    no_family=(fields("config.json", model_type={"a": [1]}), "model_type is"),
    escapes=(fields("config.json", hidden_act="\x1b[2J\n"), r"hidden_act is '\x1b[2J\n'"),
    unknown=(fields("config.json", attention_sink="\n"), "attention_sink"),
    list=(contents("config.json", lambda _: b"[]"), "not an object"),
    empty=(contents("config.json", lambda _: b""), "malformed at character 0"),
    deep=(contents("config.json", lambda _: b'{"a":' * 100_000), "nested too deeply"),
    twice=(contents("config.json", lambda data: b'{"vocab_size": 1,' + data[1:]), "'vocab_size' appears twice"),
)
def test_config_json(folder, refuse, spoil, words):
    spoil(folder)
    line = refuse(folder)
    assert words in line and f"{folder / 'config.json'}" in line


def test_code_beside_a_model_is_neither_run_nor_kept(folder, tmp_path, monkeypatch):
    (folder / "modeling_x.py").write_text("open('canary', 'w')")
    fields("config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})(folder)
    monkeypatch.chdir(tmp_path)
    assert convert.main([str(folder), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert not (tmp_path / "canary").exists() and not list((tmp_path / "out").glob("*.py"))


def weights(change: Callable[[dict[str, np.ndarray]], object], **config: object) -> Spoil:
    """Changes the tensors, in one file, and the config."""

    def spoil(folder: Path) -> None:
        with open_model(folder) as model:
            tensors = {name: model.files.read(name) for name in model.files.tensors}
        change(tensors)
        for file in (ONE, TWO, INDEX):
            (folder / file).unlink()
        save_safetensors(folder / "model.safetensors", tensors)
        fields("config.json", **config)(folder)

    return spoil


def quantised(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.1.mlp.up_proj"
    del tensors[f"{name}.weight"]
    tensors[f"{name}.qweight"] = np.zeros((4, 40), np.float32)


@cases(
    untied_without_a_head=(weights(lambda t: t.pop("lm_head.weight")), "tie_word_embeddings: true"),
    tied_with_another_head=(weights(lambda t: None, tie_word_embeddings=True), "lm_head.weight differs from"),
    a_bias_is_missing=(
        weights(lambda t: t.pop("model.layers.1.self_attn.k_proj.bias")), "missing: model.layers.1.self_attn.k_proj.b"
    ),
    another_family=(
        weights(lambda t: None, model_type="qwen3", architectures=["Qwen3ForCausalLM"]), "is model_type right?"
    ),
    another_width=(weights(lambda t: None, intermediate_size=48), "wrong shape: "),
    more_layers=(weights(lambda t: None, num_hidden_layers=4), "missing: model.layers.3."),
    names_with_escapes=(weights(lambda t: t.update({"a\x1b[2J\nb": np.zeros(2, np.float32)})), r"known: a\x1b[2J\nb"),
    gptq=(weights(quantised, quantization_config={"quant_method": "gptq", "bits": 4}), "group_size is missing"),
    awq=(weights(quantised, quantization_config=AWQ), "is no multiple of group_size 16"),
    quantised_unsaid=(weights(quantised), "quantised, and config.json has no quantization_config"),
)  # fmt: skip
def test_weights_that_are_not_those_of_the_config(folder, refuse, spoil, words):
    spoil(folder)
    assert words in refuse(folder)


def test_old_buffers_are_left_out(folder, tmp_path):
    weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}))(folder)
    assert convert.main([str(folder), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert verify.main([str(folder), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("dtype", [b'"I32"', b'"U32"'])
def test_integers_are_no_weights(folder, refuse, dtype):
    contents(TWO, lambda data: data.replace(b'"F32"', dtype))(folder)
    assert "take the unquantised model" in refuse(folder, "--dtype", "bfloat16")


def regex(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def tokens(change: Callable[[dict], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        values = json.loads(tiny_tokenizer().to_bytes())
        change(values)
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return spoil


@cases(
    missing=(lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer in"),
    no_json=(contents("tokenizer.json", lambda data: data[:-9]), "not a tokenizer.json"),
    an_id_twice=(tokens(lambda t: t["model"]["vocab"].update({"Ab": 65})), "gives id 65 to two tokens"),
    a_gap=(tokens(lambda t: t["added_tokens"][-1].update(id=400)), "without a gap"),
    more_tokens_than_rows=(
        weights(lambda t: t.update({name: t[name][:-1] for name in t if t[name].shape[0] == 260}), vocab_size=259),
        "260 tokens and the model a vocabulary of 259",
    ),
    huge_pattern=(tokens(lambda t: t["pre_tokenizer"].update(pretokenizers=[regex("(a|b)" * 10**6)])), "at most"),
    bad_pattern=(tokens(lambda t: t["pre_tokenizer"].update(pretokenizers=[regex("(\n")])), "not a tokenizer.json: "),
    escapes=(tokens(lambda t: t["added_tokens"].append({"id": 260, "content": "\x1b[2J\n", "lstrip": True})), "lstrip"),
)  # fmt: skip
def test_tokenizers(folder, refuse, spoil, words):
    spoil(folder)
    assert words in refuse(folder, code=4 if words == "no tokenizer in" else 3)


@pytest.fixture
def checkpoint(folder, tmp_path):
    assert convert.main([str(folder), str(tmp_path / "checkpoint")]) == 0
    return tmp_path / "checkpoint"


def resealed(folder: Path, **meta: object) -> None:
    """Gives a checkpoint a manifest that its files agree with."""
    old = Manifest.read(folder)
    (folder / FILE_NAME).unlink()
    Manifest.seal(folder, step=old.step, meta={"published": old.meta["published"] | meta}, arrays=old.arrays)


@pytest.mark.parametrize(
    "change",
    [
        lambda layout: {"../evil.safetensors": layout[ONE], TWO: layout[TWO]},
        lambda layout: {"/tmp/evil.safetensors": layout[ONE], TWO: layout[TWO]},
        lambda layout: {"evil.sh": layout[ONE], TWO: layout[TWO]},
        lambda layout: {ONE: layout[ONE]},
        lambda layout: layout | {"x.safetensors": layout[ONE]},
        lambda layout: layout | {ONE: {"metadata": None, "tensors": ["a.rotary_emb.inv_freq"]}},
        lambda layout: layout | {ONE: {"metadata": [1], "tensors": layout[ONE]["tensors"]}},
        lambda layout: layout | {ONE: layout[ONE]["tensors"]},
        lambda layout: layout | {ONE: {"metadata": None, "tensors": [[], {}]}},
        lambda layout: [ONE, TWO],
    ],
)
def test_a_checkpoint_cannot_choose_what_is_written(checkpoint, refuse, change):
    resealed(checkpoint, layout=change(Manifest.read(checkpoint).meta["published"]["layout"]))
    line = refuse(checkpoint)
    assert f"{checkpoint / FILE_NAME}: " in line


def test_a_checkpoint_of_an_unknown_family(checkpoint, refuse):
    resealed(checkpoint, model_type=["qwen9"])
    assert "model_type is ['qwen9']" in refuse(checkpoint)


def test_a_checkpoint_whose_arrays_are_not_those_of_its_model(checkpoint, refuse, capfd):
    values = json.loads((checkpoint / "model.json").read_text())
    (checkpoint / "model.json").write_text(json.dumps(values | {"mlp_width": 24}))
    resealed(checkpoint)
    assert run_command("verify", lambda: verify.main([str(checkpoint), str(checkpoint)])) == 3
    assert "is float32[3, 40, 32], and the model has float32[3, 24, 32]" in capfd.readouterr().err


@pytest.mark.parametrize("reference", ["x" * 5000, "nothing", "~nobody-of-this-name/model", "/dev/null/x"])
def test_models_that_are_not_there(reference):
    with pytest.raises(FileError):
        open_model(reference)


def test_time_and_memory(folder, tmp_path, forks):
    """Files that are large, or become large when read, are refused before they are."""
    many = b"{%s}" % b",".join(
        b'"%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(10**6)
    )
    header = lambda text: contents(ONE, lambda _: struct.pack("<Q", len(text)) + text)
    spoils: dict[str, Spoil] = {
        "a million tensors": header(many),
        "150,000 tensors": header(many[: 2**23]),
        "a header of wide characters": header('{"😀'.encode() + b"x" * 10_000_000 + b'":0}'),
        "a pickle of 8 MB": pickled(b"\x80\x02}" + b"X\x00\x00\x08\x00" + b"x" * 2**19 * 15),
        "a pickle of a million opcodes": pickled(b"\x80\x02]" + b"]" * 10**6 + b"."),
        "a config of 100 MB": replaced("config.json", sparse(100 * 2**20)),
        "a config of 60 MB": replaced("config.json", sparse(60 * 2**20)),
        "a config of many values": contents("config.json", lambda _: b'{"a":[' + b"{}," * 10**6 + b"{}]}"),
        "files of 60 MB": both(*(replaced(name, sparse(30 * 2**20)) for name in ("LICENSE", "NOTICE", "vocab.json"))),
    }
    idle = forks.run("convert", folder, folder)
    assert idle.code == 2
    for name, spoil in spoils.items():
        source = shutil.copytree(folder, tmp_path / name)
        spoil(source)
        done = forks.run("convert", source, tmp_path / "out", "--allow-pickle-format")
        assert done.code == 3 and len(done.lines) == 1, (name, done)
        assert done.cpu_seconds < 1 and done.memory - idle.memory < 200 * 2**20, (name, done)
