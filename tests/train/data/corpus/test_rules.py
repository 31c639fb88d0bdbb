"""Every rule drops what it names, at its threshold and not below, and can be turned off."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import pytest

from qwen_jax.errors import ConfigError, FileError
from tests.train.data.corpus.conftest import prose
from train.data.corpus import rules
from train.data.corpus.config import C4, FineWeb, GopherQuality, GopherRepetition, Rules
from train.data.corpus.documents import Document

GOOD = "\n".join(
    f"The {noun} of the harbour was built in {year}, and it is said to have seen many a storm with patience."
    for year, noun in enumerate(["lighthouse", "customs office", "old crane", "fish market", "pier"], 1900)
)
LINE = "This is the very line that comes again and again. "


def reasons(text, **sections):
    found = list(rules.keep([Document(text, "")], Counter(), settings=Rules(**sections)))
    return found[0][1].partition(": ")[0]


GOPHER = {
    "min_words": "The word is not the end of it, and that is that.",
    "max_words": "the and " * 60_000,
    "min_word_length": "a b of to be i o u " * 20,
    "max_word_length": "the of incomprehensibilities counterrevolutionaries " * 20,
    "max_hashes": GOOD + " #" * 30,
    "max_ellipses": GOOD + " and so on…" * 20,
    "max_bullet_lines": GOOD.replace("The", "- The"),
    "max_ellipsis_lines": GOOD.replace("patience.", "patience…"),
    "min_alphabetic": GOOD + " 1999 2000" * 20,
    "min_stop_words": "harbour storm patience lighthouse crane market " * 20,
}


@pytest.mark.parametrize("name", GOPHER)
def test_gopher_quality_drops_what_it_names(name):
    text = GOPHER[name]
    assert reasons(text, gopher_quality=GopherQuality()) == f"gopher {name}"
    assert reasons(text, gopher_quality=replace(GopherQuality(), **{name: None})) != f"gopher {name}"


def test_every_rule_of_gopher_quality_was_tried():
    assert set(GOPHER) == {field.name for field in fields(GopherQuality)}


@pytest.mark.parametrize(
    "text, reason",
    [
        (f"{GOOD}\n" + "A line.\n" * 4, "lines"),
        ("\n\n".join([GOOD, *["A part."] * 2]), "paragraphs"),
        (f"{GOOD}\n" + f"{LINE * 4}\n" * 2, "line_characters"),
        ("\n\n".join([GOOD, *[LINE * 6] * 2]), "paragraph_characters"),
        (f"{prose(1, 40)} " + "harbour lighthouse " * 9, "top 2-gram"),
        (" ".join(f"{prose(i, 7)} in a stone harbour" for i in range(9)), "top 4-gram"),
        (f"{prose(1, 40)} {prose(2, 16)} {prose(3, 20)} {prose(2, 16)}", "repeated 5-grams"),
        (f"{prose(1, 60)} {prose(2, 13)} {prose(3, 11)} {prose(2, 13)}", "repeated 10-grams"),
    ],
)
def test_gopher_repetition_drops_what_it_names(text, reason):
    defaults, off = (
        GopherRepetition(),
        dict.fromkeys(("lines", "paragraphs", "line_characters", "paragraph_characters")),
    )
    off |= dict(top=(), repeated=())
    if reason in off:
        only, expected = {reason: getattr(defaults, reason)}, f"gopher repeated {reason}"
    else:
        kind, n = reason.split()[0], int(reason.split()[1].partition("-")[0])
        only, expected = {kind: tuple(pair for pair in getattr(defaults, kind) if pair[0] == n)}, f"gopher {reason}"
    assert reasons(text, gopher_repetition=GopherRepetition(**(off | only))) == expected
    assert reasons(text, gopher_repetition=GopherRepetition(**off)) == ""
    assert reasons(prose(5, 200), gopher_repetition=GopherRepetition(**(off | only))) == ""


def test_repeated_words_are_counted_once_however_many_ngrams_have_them():
    text = "a b c d e f g h " + "a b c d e f "
    limits = dict(lines=None, paragraphs=None, line_characters=None, paragraph_characters=None, top=())
    drop = lambda limit: reasons(text, gopher_repetition=GopherRepetition(**limits, repeated=((3, limit),)))
    assert drop(6 / 14 - 0.01) == "gopher repeated 3-grams"
    assert drop(6 / 14 + 0.01) == ""


def test_c4_takes_out_lines_and_counts_them():
    bad = {
        "terminal_punctuation": "Home | About us | Contact | More of it",
        "min_line_words": "Read more here.",
        "max_word_characters": f"The word {'x' * 1001} is too long.",
        "javascript": "You must enable JavaScript to view this page.",
        "policy": "By reading on you accept our privacy policy.",
    }
    document, counts = Document(f"{GOOD}[12]\n\n\n\n" + "\n".join(bad.values()), ""), Counter()
    found = list(rules.keep([document], counts, settings=Rules(c4=C4())))
    assert found[0][1] == "" and document.text == GOOD
    assert counts == {f"lines: c4 {name}": 1 for name in bad}
    off = dict.fromkeys(bad, False) | dict(min_line_words=None, max_word_characters=None, citations=False)
    kept = Document(f"{GOOD}\n\n" + "\n".join(bad.values()), "")
    assert list(rules.keep([kept], counts, settings=Rules(c4=C4(**off)))) == [(kept, "")]
    assert kept.text == f"{GOOD}\n\n" + "\n".join(bad.values())


def test_c4_drops_documents(tmp_path):
    (tmp_path / "bad.txt").write_text("Fish Market\n\nfoul\n")
    assert reasons(GOOD + "\nLorem ipsum dolor sit amet, said he.", c4=C4()) == "c4 lorem_ipsum"
    assert reasons(GOOD + "\nif (x) { return the end of it; }.", c4=C4()) == "c4 curly_bracket"
    assert reasons("\n".join(GOOD.split("\n")[:2]), c4=C4()) == "c4 min_sentences"
    assert reasons("nothing", c4=C4(min_sentences=None)) == "c4 no line left"
    assert reasons(GOOD, c4=C4(bad_words=str(tmp_path / "bad.txt"))) == "c4 bad_words"
    assert reasons(GOOD.replace("fish market", "foulness"), c4=C4(bad_words=str(tmp_path / "bad.txt"))) == ""
    with pytest.raises(FileError, match="bad_words"):
        reasons(GOOD, c4=C4(bad_words=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "name, text",
    [
        ("min_punctuated_lines", GOOD.replace(".", "")),
        ("max_short_lines", GOOD + "\nA short line." * 11 + "\nSo.\nAnd so on.\nYes."),
        ("max_repeated_characters", GOOD + "\n" + GOOD.split("\n")[0]),
        ("max_lines_per_word", "\n".join("Yes, it is." for _ in range(20))),
    ],
)
def test_fineweb_drops_what_it_names(name, text):
    off = dict.fromkeys([field.name for field in fields(FineWeb) if field.name != "short_line"])
    only = replace(FineWeb(), **{other: None for other in off if other != name})
    assert reasons(text, fineweb=only) == f"fineweb {name}"
    assert reasons(text, fineweb=FineWeb(**off)) == ""


def test_good_text_breaks_no_rule():
    every = dict(c4=C4(), gopher_quality=GopherQuality(), gopher_repetition=GopherRepetition(), fineweb=FineWeb())
    other = GOOD.replace("was built in", "has stood since").replace("seen many a storm", "outlived a mayor or two")
    assert reasons("\n".join(f"{i} {line}" for i, line in enumerate(GOOD.split("\n")[:2])), fineweb=FineWeb()) == ""
    assert reasons(prose(1, 80).replace(" of", ". Of") + ".", **{**every, "c4": None}) == ""
    assert reasons(other, c4=C4(), fineweb=FineWeb()) == ""


@pytest.mark.parametrize("text", ["", " \n ", "x", "\n\n\n", "🙂", "a" * 5000])
def test_odd_texts_divide_by_nothing(text):
    every = dict(gopher_quality=GopherQuality(), gopher_repetition=GopherRepetition(), c4=C4(), fineweb=FineWeb())
    for name, section in every.items():
        list(rules.keep([Document(text, "")], Counter(), settings=Rules(**{name: section})))


def test_other_languages_pass_and_are_counted():
    documents, counts = [Document("kurz", "", {"language": "de"}), Document("short", "", {"language": "en"})], Counter()
    found = list(rules.keep(documents, counts, settings=Rules(languages=("en",), gopher_quality=GopherQuality())))
    assert [reason.partition(":")[0] for _, reason in found] == ["", "gopher min_words"]
    assert counts == {"documents of other languages": 1}
    with pytest.raises(ConfigError, match="rules has none"):
        Rules()
