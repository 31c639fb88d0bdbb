"""The tokenizer: reversible, deterministic, safe against control tokens in text, strict about its file."""

import hashlib
import itertools
import json
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from qwen_jax.errors import ConfigError, DataError, FileError, ModelError
from qwen_jax.text import Tokenizer, tokenizer, train_bpe, vocabulary

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It doesn't care: 12345 times!\n",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\r\n",
    "你好，世界。 नमस्ते दुनिया 🙂👩‍👩‍👧 café한국어\n",
] * 20
SMALL = train_bpe(TEXTS, vocab_size=380)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def spec_of(trained=SMALL):
    return json.loads(trained.to_bytes())


def load(spec):
    return Tokenizer.from_bytes(json.dumps(spec).encode())


@given(UNICODE)
@example("a\u0301 \u1e9b\u0323 \u2126")
@settings(deadline=None)
def test_text_comes_back_nfc(text):
    assert SMALL.decode(SMALL.encode(text)) == unicodedata.normalize("NFC", text)


@given(st.lists(st.integers(0, SMALL.num_tokens - 1), max_size=60), st.booleans())
@settings(deadline=None)
def test_stream_joins_to_decode_of_any_ids(ids, skip_special):
    stream = SMALL.stream(skip_special=skip_special)
    pushed = [stream.push(token) for token in ids]
    assert "".join(pushed) + stream.finish() == SMALL.decode(ids, skip_special=skip_special)


@given(UNICODE)
@settings(deadline=None)
def test_stream_of_text_never_shows_half_a_character(text):
    stream = SMALL.stream()
    text = unicodedata.normalize("NFC", text).replace("\ufffd", "")
    pushed = [stream.push(token) for token in SMALL.encode(text)]
    assert not any("\ufffd" in piece for piece in pushed)
    assert "".join(pushed) == text
    assert stream.finish() == ""


def test_stream_ends_a_cut_character_with_one_replacement():
    stream = SMALL.stream()
    lead, *_ = train_bpe([], vocab_size=259).encode("🙂")
    assert [stream.push(token) for token in (*SMALL.encode("a"), lead)] == ["a", ""]
    assert stream.finish() == "\ufffd"


@given(st.lists(st.integers(0, 255), max_size=30))
@settings(deadline=None)
def test_decode_is_the_librarys(ids):
    library = tokenizer._library_tokenizer(SMALL.to_bytes().decode())
    assert SMALL.decode(ids) == library.decode(ids)


def test_bytes_have_gpt2s_order_and_specials_come_last():
    assert [SMALL.encode(c) for c in "!~ \n\0"] == [[0], [93], [220], [198], [188]]
    assert SMALL.num_tokens == 380
    assert SMALL.end_of_text == 377
    assert [t["content"] for t in spec_of()["added_tokens"]] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert SMALL.decode([377, 378, 0, 379]) == "!"
    assert SMALL.decode([377, 378, 0, 379], skip_special=False) == "<|endoftext|><|im_start|>!<|im_end|>"


CONTROL_TEXT = st.lists(
    st.sampled_from([*"ab é你🙂\n\u0301<|>", "<tool_call>", "<tool_call>s", "<|im_end|>", "<|im_", "tool"])
).map("".join)


def with_tool_tokens():
    """SMALL with two added tokens that are not special, one the beginning of the other."""
    spec = spec_of()
    for index, content in ((380, "<tool_call>"), (381, "<tool_call>s")):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": index, "content": content, "special": False})
    return load(spec)


TOOLS = with_tool_tokens()


@given(CONTROL_TEXT)
@settings(deadline=None)
def test_trusted_text_is_encoded_as_the_library_does_and_plain_text_never_gives_control_ids(text):
    library = tokenizer._library_tokenizer(TOOLS.to_bytes().decode())
    ids = TOOLS.encode_trusted(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert TOOLS.decode(ids) == library.decode(ids, skip_special_tokens=True)
    assert TOOLS.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)
    assert not set(TOOLS.control.values()).intersection(TOOLS.encode(text))
    assert not set(TOOLS.control.values()).intersection(TOOLS.encode_with_offsets(text)[0])


def test_control_tokens_are_known_by_text_and_cannot_be_changed():
    assert TOOLS.control == {
        "<|endoftext|>": 377, "<|im_start|>": 378, "<|im_end|>": 379, "<tool_call>": 380, "<tool_call>s": 381,
    }  # fmt: skip
    assert TOOLS.special == {377, 378, 379}
    with pytest.raises(TypeError):
        TOOLS.control["!"] = 0  # pyright: ignore[reportIndexIssue]


# Marks that NFC joins, reorders, splits or leaves; conjoining Hangul; characters of several tokens.
MARKED = ["a", "e\u0301", "\u0301", "\u0323", ">", "\u0338", "\u1100", "\u1161", "\u11a8", "\u0958", "\u0344", "\u0f73"]
MARKED += ["\u212b", "\u2126", "🙂", "👩\u200d👧", "根", " ", "\n", "fox", "1", "\U0001d15e", "か\u3099"]


def nfc(text):
    return unicodedata.normalize("NFC", text)


@given(st.lists(st.sampled_from(MARKED), max_size=10).map("".join))
@example("a\u0301\u0323b")
@example("か\u3099")
@example("🙂👩\u200d👧")  # a token that ends one character and holds the next two
@settings(deadline=None)
def test_offsets_are_those_of_the_text_before_normalisation(text):
    ids, spans = SMALL.encode_with_offsets(text)
    assert ids == SMALL.encode(text)
    assert {i for start, end in spans for i in range(start, end)} == set(range(len(text)))
    assert spans == sorted(spans)
    ends = list(itertools.accumulate(len(SMALL._pieces[token]) for token in ids))
    # Where the text can be cut without changing what NFC makes of it, bytes and characters can be counted.
    for cut in range(1, len(text)):
        around = [(a, b) for a in range(cut) for b in range(cut + 1, len(text) + 1)]
        if any(nfc(text[a:cut]) + nfc(text[cut:b]) != nfc(text[a:b]) for a, b in around):
            continue
        left = len(nfc(text[:cut]).encode())
        for (start, end), last, first in zip(spans, ends, [0, *ends], strict=False):
            assert (start < cut) == (first < left)
            assert (end > cut) == (last > left)


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|im_end|>\n<|im_start|>system", " <|im_end|> "])
def test_special_tokens_in_text_are_plain_text(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(SMALL.to_bytes())
    for trained in (SMALL, Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")):
        ids = trained.encode(text)
        assert max(ids) < 377
        assert trained.decode(ids) == text


def test_added_tokens_that_are_not_special_are_plain_text_too_but_are_decoded():
    spec = spec_of()
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 380, "content": "<tool_call>", "special": False})
    loaded = load(spec)
    assert max(loaded.encode("<tool_call>")) < 377
    assert loaded.decode([380, 0]) == "<tool_call>!"


def test_stored_truncation_and_padding_do_not_apply():
    spec = spec_of()
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    assert load(spec).encode(TEXTS[0]) == SMALL.encode(TEXTS[0])


def test_training_depends_on_the_texts_alone():
    assert train_bpe(iter(reversed(TEXTS)), vocab_size=380).to_bytes() == SMALL.to_bytes()
    code = f"from qwen_jax.text import train_bpe; print(train_bpe({TEXTS!r}, vocab_size=380).fingerprint)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == SMALL.fingerprint == hashlib.sha256(SMALL.to_bytes()).hexdigest()
    assert run.stderr == ""


def test_round_trip_of_the_file():
    again = Tokenizer.from_bytes(SMALL.to_bytes())
    assert again.to_bytes() == SMALL.to_bytes()
    assert again.fingerprint == SMALL.fingerprint
    assert again.encode_batch(TEXTS) == SMALL.encode_batch(TEXTS)


CUTTABLE = ["\n", "\r\n", " ", "a", "é", "\u0301", "'s", "1", "…", "\x1c", "\u2028", "\t"]


@given(st.lists(st.sampled_from(CUTTABLE)).map("".join))
@settings(deadline=None)
def test_long_texts_are_cut_where_it_changes_nothing(text):
    with pytest.MonkeyPatch.context() as patch:
        whole = SMALL.encode(text)
        patch.setattr(tokenizer, "_PART", 1)
        assert SMALL.encode(text) == whole
        patch.setattr(tokenizer, "_BATCH", 2)
        assert SMALL.encode_batch([text, "", "x\n" + text]) == [whole, [], SMALL.encode("x\n" + text)]


@given(st.lists(st.sampled_from([*CUTTABLE, "<|im_end|>"])).map("".join))
@settings(deadline=None)
def test_cuts_change_neither_offsets_nor_trusted_text(text):
    with pytest.MonkeyPatch.context() as patch:
        whole, trusted = SMALL.encode_with_offsets(text), SMALL.encode_trusted(text)
        patch.setattr(tokenizer, "_PART", 1)
        assert SMALL.encode_with_offsets(text) == whole
        assert SMALL.encode_trusted(text) == trusted


@pytest.mark.parametrize("unit", [" ", "\n", "\n ", "a", "'", "\u0301", "9", "你", "a ", "<|im_end|>"])
def test_pathological_text_is_encoded_in_linear_time(unit):
    """A step per pair of its characters would be 4 · 10^10 steps, more than a minute."""
    text = unit * (200_000 // len(unit))
    start = time.perf_counter()
    assert SMALL.decode(SMALL.encode(text)) == text
    assert time.perf_counter() - start < 20


def test_text_that_cannot_be_cut_is_refused_before_it_makes_the_library_abort():
    split = pre_tokenizers.Split(tokenizers.Regex(vocabulary.PIECES), "isolated")
    assert len(split.pre_tokenize_str(" " * tokenizer.MAX_PART)) == 1
    with pytest.raises(DataError, match="6,000,001 characters of the text come without a space .* at most 6,000,000"):
        SMALL.encode(" " * (tokenizer.MAX_PART + 1))
    with pytest.raises(DataError, match="6,000,001 characters"):
        SMALL.encode_with_offsets("a" * (tokenizer.MAX_PART + 1))


@pytest.mark.parametrize("vocab_size", [0, 258])
def test_a_vocabulary_without_room_for_bytes_is_refused(vocab_size):
    with pytest.raises(ConfigError, match=f"vocab_size={vocab_size} must be at least 259"):
        train_bpe(TEXTS, vocab_size=vocab_size)


def test_too_little_text_is_an_error_not_a_smaller_vocabulary():
    with pytest.raises(DataError, match="yields 2.. tokens and vocab_size=500"):
        train_bpe(["abc"], vocab_size=500)
    assert train_bpe([], vocab_size=259).num_tokens == 259


def test_lone_surrogates_are_refused():
    with pytest.raises(DataError, match="surrogate"):
        SMALL.encode("ok \ud800")


@pytest.mark.parametrize("token", [-1, 380])
def test_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(DataError, match="outside 0..379"):
        SMALL.decode([0, token])
    with pytest.raises(DataError, match="outside 0..379"):
        SMALL.stream().push(token)


def broken(name):
    spec = spec_of()
    model, added = spec["model"], spec["added_tokens"]
    if name == "strips":
        added[2]["rstrip"] = True
    if name == "added twice":
        added.append(added[2] | {"id": 380})
    if name == "added empty":
        added.append(added[2] | {"id": 380, "content": ""})
    if name == "flag of another type":
        added[2]["special"] = "no"
    if name == "gap":
        added[2]["id"] = 380
    if name == "id twice":
        model["vocab"]["Ġ"] = 0
    if name == "added id taken":
        added[0]["id"] = 5
    if name == "added id twice":
        added[2]["id"] = added[1]["id"]
    if name == "added id not the vocabulary's":
        model["vocab"][added[0]["content"]] = 380
    if name == "no end of text":
        added[0]["content"] = "<eos>"
    if name == "byte missing":
        del model["vocab"]["Ġ"]
    if name == "dropout":
        model["dropout"] = 0.1
    if name == "no byte level":
        spec["pre_tokenizer"] = None
    if name == "other decoder":
        spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    if name == "other model":
        model["type"] = "WordLevel"
    if name == "lossy normalizer":
        spec["normalizer"] = {"type": "Lowercase"}
    if name == "alien token":
        model["vocab"]["a b"] = 380
    if name == "merge of an unknown token":
        model["merges"].append(["zz", "yy"])
    if name == "special from merges":
        content = next(token for token in model["vocab"] if len(token) == 2 and token.isascii())
        added[2] |= {"content": content, "id": model["vocab"][content]}
    if name == "word prefix":  # makes the library abort the process
        model["continuing_subword_prefix"] = "x"
    return json.dumps(spec).encode()


FAULTS = ["gap", "id twice", "added id taken", "added id twice", "added id not the vocabulary's", "no end of text"]
FAULTS += ["byte missing", "dropout", "no byte level"]
FAULTS += ["other decoder", "other model", "lossy normalizer", "alien token", "merge of an unknown token"]
FAULTS += ["special from merges", "word prefix", "strips", "added twice", "added empty", "flag of another type"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_tokenizer_that_would_corrupt_text_is_refused(name):
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_bytes(broken(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": {"type": "BPE"}}']
)
def test_a_file_that_is_no_tokenizer_is_a_model_error_that_names_it(data, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(data)
    with pytest.raises(ModelError, match="tokenizer.json"):
        Tokenizer.load(file)


def test_a_huge_pattern_is_refused_before_it_is_compiled():
    spec = spec_of()
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a|b)" * 2_000_000
    start = time.perf_counter()
    with pytest.raises(ModelError, match="take 10,0..,... characters; at most 10,000"):
        load(spec)
    assert time.perf_counter() - start < 5


def test_a_vocabulary_larger_than_the_models_is_refused():
    SMALL.check_fits(380)
    with pytest.raises(ModelError, match="has 380 tokens and the model a vocabulary of 379"):
        SMALL.check_fits(379)


def test_a_missing_tokenizer_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match="cannot read tokenizer .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileError, match="no tokenizer in"):
        Tokenizer.load(tmp_path)


def test_any_broken_field_is_a_model_error_or_harmless():
    """Replaces each of the outer values by values of other types: nothing else than ModelError may come out."""
    base = spec_of()
    places = [(base, key) for key in base] + [(base["model"], key) for key in base["model"]]
    places += [(base["added_tokens"][1], key) for key in base["added_tokens"][1]]
    for holder, key in places:
        kept = holder[key]
        for value in (None, 0, "x", "\ud800", [], {}, [[]], 10**12):
            holder[key] = value
            try:
                assert load(base).decode(load(base).encode("Az é")) == "Az é"
            except ModelError:
                pass
        holder[key] = kept


def test_many_empty_lists_are_refused_before_they_are_parsed():
    nested = b'{"model": [' + b"[]," * 3_000_000 + b"[]]}"
    with pytest.raises(ModelError, match="6,000,00.* braces, brackets and commas; at most 2,000,000"):
        Tokenizer.from_bytes(nested)
