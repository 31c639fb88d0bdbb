"""The published forms of one vocabulary: the same ids from each, and every damaged file named with its line."""

from __future__ import annotations

import base64
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import FileError, ModelError
from qwen_jax.text import Tokenizer, train_bpe, vocabulary

TEXTS = ["The quick brown fox, the lazy dog: 1234 times!\n", "你好，世界 def f(x):\n    return x\n", "    " * 9] * 20
SMALL = train_bpe(TEXTS, vocab_size=310)
SPEC = json.loads(SMALL.to_bytes())
VOCAB = SPEC["model"]["vocab"]
DECODER = {str(token["id"]): token for token in SPEC["added_tokens"]}
IDS = {token["content"]: token["id"] for token in SPEC["added_tokens"]}


def write_vocab(folder, *, merges=None):
    merges = [" ".join(pair) for pair in SPEC["model"]["merges"]] if merges is None else merges
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def write_config(folder, decoder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))


def ranks() -> list[bytes]:
    tokens = sorted(VOCAB, key=VOCAB.__getitem__)
    as_bytes = (bytes(vocabulary.BYTE_OF[character] for character in token) for token in tokens)
    return [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(as_bytes)]


def tiktoken(folder, lines) -> Tokenizer:
    (folder / "qwen.tiktoken").write_bytes(b"\n".join([*lines, b""]))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The vocabulary from a folder of each form."""
    folders = {
        name: tmp_path_factory.mktemp("form") for name in ("tokenizer.json", "decoder", "added_tokens", "tiktoken")
    }
    (folders["tokenizer.json"] / "tokenizer.json").write_bytes(SMALL.to_bytes())
    write_vocab(folders["decoder"])
    write_config(folders["decoder"], DECODER)
    write_vocab(folders["added_tokens"])
    (folders["added_tokens"] / "added_tokens.json").write_text(json.dumps(IDS))
    tiktoken(folders["tiktoken"], ranks())
    return {name: Tokenizer.load(folder) for name, folder in folders.items()}


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" abe\u0301\n你"), max_size=40))
@settings(deadline=None)
def test_every_form_gives_the_same_ids(forms, text):
    for name, tokenizer in forms.items():
        assert tokenizer.encode(text) == SMALL.encode(text), name


def test_every_form_knows_its_control_tokens(forms):
    for name in ("tokenizer.json", "decoder", "added_tokens"):
        assert forms[name].control == IDS
        assert forms[name].special == set(IDS.values())
        assert forms[name].num_tokens == 310
    first = forms["tiktoken"]
    assert first.num_tokens == len(VOCAB) + 208
    assert list(first.control) == [*IDS, *(f"<|extra_{n}|>" for n in range(205))]
    assert list(first.control.values()) == sorted(first.special) == list(range(len(VOCAB), len(VOCAB) + 208))


def test_merges_derived_from_ranks_are_the_learnt_ones(forms):
    assert json.loads(forms["tiktoken"].to_bytes())["model"]["merges"] == SPEC["model"]["merges"]


def test_what_to_bytes_gives_is_a_tokenizer_json_for_other_tools(forms):
    text = "<|im_start|>user\nThe fox e\u0301 你<|im_end|>\n"
    for name, tokenizer in forms.items():
        library = tokenizers.Tokenizer.from_str(tokenizer.to_bytes().decode())
        ids = library.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode_trusted(text), name
        assert ids[0] == tokenizer.control["<|im_start|>"]
        assert library.get_vocab_size() == tokenizer.num_tokens
        assert Tokenizer.from_bytes(tokenizer.to_bytes()).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "qwen.tiktoken"])
def test_a_file_may_be_named_instead_of_its_folder(name, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(SMALL.to_bytes())
    write_vocab(tmp_path)
    write_config(tmp_path, DECODER)
    tiktoken(tmp_path, ranks())
    assert Tokenizer.load(tmp_path / name).encode(TEXTS[0]) == SMALL.encode(TEXTS[0])
    assert Tokenizer.load(tmp_path).to_bytes() == SMALL.to_bytes()


def test_flags_of_added_tokens_are_kept_and_others_dropped(tmp_path):
    write_vocab(tmp_path)
    tool = {"__type": "AddedToken", "content": "<tool_call>", "special": False}
    write_config(tmp_path, {"310": tool} | DECODER)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.control["<tool_call>"] == 310
    assert 310 not in loaded.special
    assert json.loads(loaded.to_bytes())["added_tokens"][-1] == {
        "id": 310, "content": "<tool_call>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (DECODER | {"307": DECODER["307"] | {"content": "<x>"}}, "'<x>' is configured with id 307, its .* lacks it"),
        ({"7": DECODER["309"]}, r"'<\|im_end\|>' is configured with id 7, its tokenizer says 309"),
        ({"310": {"content": "<new>"}}, "'<new>' is configured with id 310, its tokenizer lacks it"),
        ({"seven": {"content": "<x>"}}, "tokenizer_config.json: added tokens cannot be read: ValueError"),
        ({"310": {"special": True}}, "tokenizer_config.json: added tokens cannot be read: KeyError: 'content'"),
        ([1], "tokenizer_config.json: added tokens cannot be read: AttributeError"),
    ],
)
def test_a_config_that_contradicts_its_tokenizer_is_refused(decoder, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(SMALL.to_bytes())
    write_config(tmp_path, decoder)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(tmp_path)
    write_config(tmp_path, {"308": DECODER["308"]})
    assert Tokenizer.load(tmp_path).control == IDS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"*** 300", "qwen.tiktoken:301: .* is not `base64 rank`"),
        (b"YQ= 300", "qwen.tiktoken:301: .* is not `base64 rank`"),
        (b"YWJj", "qwen.tiktoken:301: .* is not `base64 rank`"),
        (b"", "qwen.tiktoken:301: .* is not `base64 rank`"),
        (b"eHl6eHl6 299", "qwen.tiktoken:301: rank '299', expected 300"),
        (b"eHl6eHl6 301", "qwen.tiktoken:301: rank '301', expected 300"),
        (b"eHl6eHl6 3e2", "qwen.tiktoken:301: rank '3e2', expected 300"),
        (b"IQ== 300", "qwen.tiktoken:301: token b'!' is empty or has rank 0 already"),
        (b" 300", "qwen.tiktoken:301: token b'' is empty"),
        (b"cXpqeHY= 300", "qwen.tiktoken:301: b'qzjxv' is left in 5 parts by the ranks before; want 2"),
    ],
)
def test_a_damaged_tiktoken_file_is_refused_with_its_line(line, message, tmp_path):
    lines = ranks()
    with pytest.raises(ModelError, match=message):
        tiktoken(tmp_path, [*lines[:300], line, *lines[301:]])


def test_a_tiktoken_file_without_some_byte_is_refused(tmp_path):
    with pytest.raises(ModelError, match="1 of the 256 bytes have no token"):
        tiktoken(tmp_path, ranks()[:255])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Ġ", "merges.txt:2: 'Ġ' does not merge two tokens of vocab.json"),
        ("q zz", "merges.txt:2: 'q zz' does not merge two tokens of vocab.json"),
        ("! !", "merges.txt:2: '! !' does not merge two tokens of vocab.json"),
        ("t h e", "merges.txt:2: 't h e' does not merge two tokens of vocab.json"),
        ("", "merges.txt:2: '' does not merge two tokens of vocab.json"),
        (" ".join(SPEC["model"]["merges"][-1]), "merges.txt:53: .* comes twice"),
    ],
)
def test_a_damaged_merges_file_is_refused_with_its_line(line, message, tmp_path):
    write_vocab(tmp_path, merges=[line, *(" ".join(pair) for pair in SPEC["model"]["merges"])])
    write_config(tmp_path, DECODER)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(tmp_path)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(FileError, match="no tokenizer in .*; give tokenizer.json, vocab.json with merges.txt, or qwen"):
        Tokenizer.load(tmp_path)
    write_vocab(tmp_path)
    with pytest.raises(ModelError, match="vocab.json has no control tokens with it; give its tokenizer_config.json"):
        Tokenizer.load(tmp_path)
    write_config(tmp_path, DECODER)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileError, match="merges.txt: No such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"[1]", "vocab.json holds a list; want an object"),
        ("vocab.json", b"{", "vocab.json is not JSON"),
        ("vocab.json", b"[" * 100_000, "vocab.json is not JSON: RecursionError"),
        ("vocab.json", b'{"\xff": 0}', "vocab.json is not UTF-8"),
        ("vocab.json", b"{}", "merges.txt:2"),
        ("vocab.json", b'{"a": null}', "merges.txt:2"),
        ("merges.txt", b"\xff", "merges.txt is not UTF-8"),
        ("tokenizer_config.json", b"null", "tokenizer_config.json holds a NoneType"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused(name, content, message, tmp_path):
    write_vocab(tmp_path)
    write_config(tmp_path, DECODER)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_refused_unread(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(vocabulary.MAX_BYTES + 1)
    with pytest.raises(ModelError, match="has 50,000,001 bytes, more than the 50,000,000"):
        Tokenizer.load(tmp_path)
