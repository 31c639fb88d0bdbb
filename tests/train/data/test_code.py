"""Fill-in-the-middle and repositories: the same characters in another order, drawn by seed and text alone."""

import re

import pytest

from qwen_jax.errors import ConfigError
from qwen_jax.text import chat, train_bpe
from train.data import Conversations, Text, code, sources, tokenise
from train.data.config import FillInTheMiddle
from train.data.sources import Tally

FIM = re.compile(
    r"<\|fim_prefix\|>(?P<prefix>.*)<\|fim_suffix\|>(?P<suffix>.*)<\|fim_middle\|>(?P<middle>.*)", re.DOTALL
)
SPM = re.compile(r"<\|fim_prefix\|><\|fim_suffix\|>(?P<suffix>.*)<\|fim_middle\|>(?P<rest>.*)", re.DOTALL)


@pytest.fixture
def read(tmp_path):
    def read(seed=0, **how):
        source = Text(path=str(tmp_path), **how)
        files, tally = sources.find_files(source, print), Tally(0.0)
        texts = sources.documents(files, field="text", tally=tally)
        return list(code.documents(texts, files, source, seed=seed))

    return read


def written(document):
    return document.text if document.pieces is None else chat.text_of(document.pieces)


def test_a_middle_at_the_end_is_the_same_text(tmp_path, read):
    for i in range(60):
        (tmp_path / f"{i:02}.py").write_text(f"def f{i}(x):\n    return 'é你🙂' * {i}\n")
    (tmp_path / "notes.txt").write_text("notes")
    psm, spm = (read(fim=FillInTheMiddle(rate=1.0, spm=share)) for share in (0.0, 1.0))
    for before, after in zip(psm, spm, strict=True):
        if before.origin.endswith(".txt"):
            assert before.pieces is None
            continue
        parts, suffix_first = FIM.fullmatch(written(before)), SPM.fullmatch(written(after))
        assert parts["prefix"] + parts["middle"] + parts["suffix"] == before.text
        assert suffix_first["rest"] + suffix_first["suffix"] == before.text
        assert suffix_first["suffix"] == parts["suffix"] and all(piece.trained for piece in before.pieces)
    half = read(fim=FillInTheMiddle(rate=0.5))
    assert 15 < sum(document.pieces is not None for document in half) < 45
    assert [written(d) for d in half] == [written(d) for d in read(fim=FillInTheMiddle(rate=0.5))]
    assert [written(d) for d in half] != [written(d) for d in read(1, fim=FillInTheMiddle(rate=0.5))]
    assert all(d.pieces for d in read(fim=FillInTheMiddle(rate=1.0, extensions=())))


def test_the_files_of_a_repository_are_one_document(tmp_path, read, monkeypatch):
    for name in ("a/x.py", "a/b/y.py", "a-c/z.py", "alone.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    found = [written(document) for document in read(repositories=True)]
    assert found == [
        "<|repo_name|>a-c\n<|file_sep|>z.py\n# a-c/z.py\n",
        "<|repo_name|>a\n<|file_sep|>b/y.py\n# a/b/y.py\n\n<|file_sep|>x.py\n# a/x.py\n",
        "# alone.py\n",
    ]
    last = [written(d) for d in read(repositories=True, fim=FillInTheMiddle(rate=1.0))][1]
    assert last.startswith("<|repo_name|>a\n<|file_sep|>b/y.py\n# a/b/y.py\n\n<|file_sep|>x.py\n<|fim_prefix|>")
    monkeypatch.setattr(code, "MAX_REPOSITORY_CHARACTERS", 12)
    assert len(read(repositories=True)) == 4


def test_a_tokenizer_without_the_tokens_is_refused_and_can_be_trained_with_them():
    source = Text(path="x", fim=FillInTheMiddle(), repositories=True)
    reading = tokenise.Reading(config=None, chat=None, seed=0, report=print)
    tokens = code.control_tokens(source)
    plain = train_bpe(["some text " * 20], vocab_size=262)
    with pytest.raises(ConfigError, match=r"no token <\|fim_prefix\|>.*extra_tokens = \('<\|fim_prefix"):
        tokenise.check_tokens(source, reading, plain)
    own = train_bpe(["some text " * 20], vocab_size=267, extra_tokens=tokens)
    tokenise.check_tokens(source, reading, own)
    assert own.num_tokens == 267 and own.decode([own.control["<|file_sep|>"]]) == "<|file_sep|>"
    assert own.encode("<|file_sep|>") != [own.control["<|file_sep|>"]], "text never gives a control token"
    tokenise.check_tokens(Conversations(path="x"), reading, plain)
