"""Files to documents: HTML, encodings, fields, and what cannot be read."""

from __future__ import annotations

import gzip
from dataclasses import replace

import pytest

from qwen_jax.errors import DataError
from tests.train.data.corpus.conftest import published, write_lines
from train.data.config import Text
from train.data.corpus import read
from train.data.corpus.config import Corpus
from train.data.corpus.run import run
from train.data.sources import SourceFile

PAGE = """<!DOCTYPE html><html><head><meta charset="ENCODING"><title>A page</title><style>p {{}}</style>
<script>let hidden = 1;</script></head><body><nav><ul><li><a href="/">Home</a></li><li><a href="/b">Shop</a></li>
</ul></nav>
<article><h1>Bees of the valley</h1><p>Fünf bees &amp; a café were seen by the river, where the grass is high.</p>
<p>They came back in the evening, and nobody knew why they had left in the first place.</p></article>
<footer>Copyright</footer></body></html>"""


def corpus(folder, **how):
    config = Corpus(**{"source": Text(path=str(folder / "raw")), "output": str(folder / "out"), "workers": 1} | how)
    report = run(config, "")
    return {document.id: document for document in published(config)}, report


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


def test_html_becomes_the_text_a_reader_sees(raw, tmp_path):
    pytest.importorskip("resiliparse")
    (raw / "latin.html").write_bytes(PAGE.replace("ENCODING", "iso-8859-1").encode("latin-1"))
    (raw / "utf.htm.gz").write_bytes(gzip.compress(PAGE.replace("ENCODING", "utf-8").encode()))
    write_lines(raw / "a.jsonl", {"text": PAGE, "url": "u", "other": 1}, {"text": "a < b and <html> is a tag"})
    (raw / "empty.html").write_text("<html><body><script>x</script></body></html>")
    (raw / "deep.html").write_text("<html>" + "<div>" * 600 + "deep down there is a word or two")
    found, report = corpus(tmp_path)
    texts = {found[name].text for name in ("latin.html", "utf.htm.gz", "a.jsonl:1")}
    assert len(texts) == 1
    (text,) = texts
    assert "Bees of the valley" in text and "Fünf bees & a café were seen by the river" in text
    assert not any(word in text for word in ("<p>", "hidden", "Shop", "Copyright"))
    assert found["a.jsonl:1"].notes == {"url": "u"} and found["a.jsonl:2"].text == "a < b and <html> is a tag"
    assert all(words in report for words in ("HTML without text", "HTML nested too deeply", "5  HTML"))


def test_depth_is_that_of_tags_that_nest():
    assert read.depth("<html><body><p>a<p>b<br><img src=x><li>c<li>d<div><b>e</b></div><div></div></body></html>") == 4
    assert read.depth("<html><script>if (a<b) { c<d }</script><!-- <i><i><i> --></html>") == 1
    assert read.depth("</b></b><b>") == 1


def test_plain_text_needs_no_package(raw, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "resiliparse.extract.html2text", None)
    (raw / "a.txt").write_text("\ufeffplain\r\ntext ")
    assert corpus(tmp_path)[0]["a.txt"].text == "plain\r\ntext "
    (raw / "b.txt").write_text(PAGE)
    with pytest.raises(Exception, match=r"pip install 'qwen-jax\[corpus\]'"):
        corpus(tmp_path)


def test_a_file_that_changes_meanwhile_is_an_error(raw, tmp_path, monkeypatch):
    (raw / "a.txt").write_text("one")
    monkeypatch.setattr(read, "write", lambda *rest: (raw / "a.txt").write_text("two, and longer"))
    with pytest.raises(DataError, match=r"a\.txt changed while it was read"):
        corpus(tmp_path)


def test_shards_are_files_in_order():
    files = [SourceFile(None, str(i), size * 1_000_000, 0) for i, size in enumerate([3, 3, 9, 2, 1, 1])]
    assert [[file.name for file in shard] for shard in read.shard_files(files, 4)] == [
        ["0"],
        ["1"],
        ["2"],
        ["3", "4", "5"],
    ]
    assert read.shard_files([], 4) == []


def test_a_broken_gzip_file_is_an_error_and_a_deep_line_is_counted(raw, tmp_path):
    (raw / "a.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n" + '{"text": "fine"}\n' * 3)
    found, report = corpus(tmp_path, max_bad_fraction=0.5)
    assert len(found) == 3 and "JSON nested too deeply" in report
    (raw / "b.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(DataError, match=r"b\.txt\.gz is a broken gzip file"):
        corpus(tmp_path, max_bad_fraction=0.5)


def test_languages_are_told_apart(raw, tmp_path):
    pytest.importorskip("py3langid")
    from train.data.corpus.config import Language

    (raw / "en.txt").write_text("All human beings are born free and equal in dignity and rights. " * 3)
    (raw / "de.txt").write_text("Alle Menschen sind frei und gleich an Würde und Rechten geboren. " * 3)
    (raw / "x.txt").write_text("213-484-0480")
    config = dict(language=Language(keep=("en", "de")))
    found, report = corpus(tmp_path, **config)
    assert {name: document.notes["language"] for name, document in found.items()} == {"en.txt": "en", "de.txt": "de"}
    found, report = corpus(tmp_path, language=replace(config["language"], keep=("en",)))
    assert set(found) == {"en.txt"} and "de.txt (de)" in report
    with pytest.raises(Exception, match="language.keep has"):
        corpus(tmp_path, language=Language(keep=("xx",)))
