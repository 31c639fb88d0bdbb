"""Documents: which, in which order, and what happens to broken ones."""

import gzip
import json
import os
import sysconfig

import pytest

from qwen_jax.errors import ConfigError, DataError, FileError
from train.data import PythonStdlib, Text, sources
from train.data.sources import Tally


@pytest.fixture
def read(tmp_path):
    """A function: reads tmp_path (or a path or pattern below it) to ([(origin, text)], tally, reports)."""

    def read(path="", *, bad=0.0, field="text", pattern=""):
        reports = []
        source = Text(path=str(tmp_path / path), field=field, pattern=pattern)
        files, tally = sources.find_files(source, reports.append), Tally(bad)
        found = list(sources.documents(files, field=field, tally=tally))
        return [(origin.removeprefix(f"{tmp_path}/"), text) for origin, text in found], tally, reports

    return read


def lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_directory_is_read_recursively_in_name_order(tmp_path, read):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", "B.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    found, tally, reports = read()
    assert found == [(name, f"text of {name}") for name in sorted(["B.txt", "a.txt", "a/b/c.txt", "a/z.md", "b.txt"])]
    assert str(tally) == "5 documents"
    assert reports == []


@pytest.mark.parametrize(
    ("path", "pattern", "names"),
    [
        ("", "**/*.py", ["a.py", "d/b.py", "d/e/c.py"]),
        ("", "*.py", ["a.py"]),
        ("", "d/**", ["d/b.py", "d/e/c.py", "d/n.txt"]),
        ("", "**/e/*", ["d/e/c.py"]),
        ("**/*.py", "", ["a.py", "d/b.py", "d/e/c.py"]),
        ("d/*", "", ["d/b.py", "d/n.txt"]),
        ("*/[a-n]*.txt", "", ["d/n.txt"]),
        ("d/**/?.py", "", ["d/b.py", "d/e/c.py"]),
        ("a.py", "", ["a.py"]),
    ],
)
def test_patterns_and_globs(tmp_path, read, path, pattern, names):
    (tmp_path / "d/e").mkdir(parents=True)
    for name in ("a.py", "d/b.py", "d/e/c.py", "d/n.txt"):
        (tmp_path / name).write_text("x")
    assert [origin for origin, _ in read(path, pattern=pattern)[0]] == names


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path, read):
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("other")
    assert read("a[1].txt")[0] == [("a[1].txt", "one")]


@pytest.mark.parametrize("path", ["nowhere", "*.nothing", "nowhere/**/*.txt"])
def test_nothing_found_is_a_file_error_that_names_it(read, path):
    with pytest.raises(FileError, match=path.replace("*", r"\*")):
        read(path)


def test_a_pattern_that_cannot_apply_is_refused(tmp_path, read):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="limits a directory"):
        read("a.txt", pattern="*.py")
    with pytest.raises(ConfigError, match="glob already"):
        read("*.txt", pattern="*.py")


def test_json_lines_plain_and_zipped(tmp_path, read):
    records = lines({"text": "one\r\ntwo", "id": 3}, {"text": "你好 🙂\u2028x"})
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + records.replace(b"\n", b"\r\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(records[:40]) + gzip.compress(records[40:]))
    (tmp_path / "c.json").write_bytes(records.rstrip(b"\n"))
    found, _, _ = read()
    texts = ["one\r\ntwo", "你好 🙂\u2028x"]
    assert found == [(f"{name}:{i}", t) for name in ("a.jsonl", "b.jsonl.gz", "c.json") for i, t in enumerate(texts, 1)]


def test_another_field(tmp_path, read):
    (tmp_path / "a.jsonl").write_bytes(lines({"content": "c", "text": "t"}))
    assert read(field="content")[0] == [("a.jsonl:1", "c")]


def test_text_keeps_crlf_and_loses_its_byte_order_mark(tmp_path, read):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfzipped"))
    assert read()[0] == [("a.txt", "one\r\ntwo\r\n"), ("b.txt.gz", "zipped")]


BAD_LINES = {
    "broken": b'{"text": "abc',
    "array": b'[{"text": "a"}]',
    "not utf-8": b'{"text": "\xff"}',
    "utf-16": '{"text": "a"}'.encode("utf-16"),
    "nul": b'{"text": "a\\u0000b"}',
    "surrogate": b'{"text": "\\ud800"}',
    "no field": b'{"txt": "a"}',
    "null": b'{"text": null}',
    "number": b'{"text": 3}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "huge number": b'{"text": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_may_be_skipped(tmp_path, read, name):
    good = lines({"text": "good"})
    (tmp_path / "a.jsonl").write_bytes(good + BAD_LINES[name] + b"\n" + good * 2)
    with pytest.raises(DataError, match=r"a\.jsonl:2: ") as caught:
        read()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    found, tally, _ = read(bad=0.25)
    assert [text for _, text in found] == ["good"] * 3
    assert (tally.documents, tally.bad) == (3, 1)
    assert "a.jsonl:2" in str(tally)
    with pytest.raises(DataError, match="1 of 4 documents are unreadable"):
        read(bad=0.2)


@pytest.mark.parametrize("content", [b"caf\xe9", b"a\0b", b"\x89PNG\r\n\x1a\n"])
def test_a_text_file_that_is_no_text_is_named(tmp_path, read, content):
    (tmp_path / "bad.txt").write_bytes(content)
    (tmp_path / "good.txt").write_bytes(b"good")
    with pytest.raises(DataError, match=r"bad\.txt: "):
        read()
    assert read(bad=0.5)[0] == [("good.txt", "good")]


def test_empty_documents_are_skipped_and_counted(tmp_path, read):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n\t\r\n")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": ""}\n\n{"text": "x"}\n  \n')
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b""))
    found, tally, _ = read()
    assert found == [("c.jsonl:3", "x")]
    assert (tally.documents, tally.empty, tally.bad) == (1, 6, 0)
    assert "6 empty" in str(tally)


def test_a_broken_gzip_file_is_an_error_whatever_is_allowed(tmp_path, read):
    whole = gzip.compress(lines(*({"text": os.urandom(20).hex()} for _ in range(50))))
    for broken in (whole[: len(whole) // 2], whole[:-3], b"no gzip at all", whole[:30] + b"\xff" * 30 + whole[60:]):
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz is a broken gzip file"):
            read(bad=0.9)


def test_documents_over_the_limit_are_errors(tmp_path, read, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 50)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x"}, {"text": "x" * 60}))
    with pytest.raises(DataError, match=r"a\.jsonl:2 is a document of over 50 bytes"):
        read("a.jsonl", bad=0.9)
    (tmp_path / "b.txt").write_bytes(b"x" * 51)
    with pytest.raises(DataError, match=r"b\.txt is a document of over 50 bytes"):
        read("b.txt")
    (tmp_path / "b.txt").write_bytes(b"x" * 50)
    assert len(read("b.txt")[0]) == 1
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 51))
    with pytest.raises(DataError, match="over 50 bytes"):
        read("c.txt.gz")


def test_a_gzip_bomb_is_an_error(tmp_path, read, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines({"text": "x"}) * 10_000))
    with pytest.raises(DataError, match="unpacks to over 100 times its size"):
        read()


def test_links_loops_and_devices(tmp_path, read):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("a")
    (tmp_path / "d/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "link.txt").symlink_to(tmp_path / "d/a.txt")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / ".git").mkdir()
    os.mkfifo(tmp_path / "fifo")
    found, _, reports = read()
    assert found == [("d/a.txt", "a"), ("link.txt", "a")]
    assert len(reports) == 1
    assert "skipped 6 entries" in reports[0]
    with pytest.raises(FileError, match="fifo"):
        read("fifo")


def test_files_that_vanish_or_change_are_errors(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    files = sources.find_files(Text(path=str(tmp_path)), print)
    sources.check_unchanged(files)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match="changed while it was read"):
        sources.check_unchanged(files)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(FileError, match=r"cannot read .*a\.txt"):
        list(sources.documents(files, field="text", tally=Tally(0.0)))


def test_fingerprints_see_names_sizes_and_bytes_but_not_places(tmp_path):
    def prints(folder, files):
        for name, text in files.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(text)
        found = sources.find_files(Text(path=str(tmp_path / folder)), print)
        return sources.fingerprint(found, content=False), sources.fingerprint(found, content=True)

    listing, content = prints("one", {"a": "1", "b": "2"})
    assert prints("moved", {"a": "1", "b": "2"}) == (listing, content)
    assert prints("bytes", {"a": "1", "b": "3"})[0] == listing
    assert prints("bytes", {"a": "1", "b": "3"})[1] != content
    assert prints("names", {"a": "1", "c": "2"})[0] != listing
    assert prints("sizes", {"a": "11", "b": "2"})[0] != listing


def test_the_standard_library_is_there_without_packages():
    files = sources.find_files(PythonStdlib(), print)
    names = [file.name for file in files]
    assert {"os.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert not any("site-packages" in name or not name.endswith(".py") for name in names)
    assert sum(file.size for file in files) > 5e6


def test_the_standard_librarys_broken_files_are_skipped_and_counted(tmp_path, monkeypatch):
    for name, content in {
        "a.py": b"x = 1\n", "test/bad.py": b"\xe9", "site-packages/p.py": b"y", "__pycache__/c.py": b"z", "n.txt": b"n"
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    tally = sources.new_tally(PythonStdlib(), 0.0)
    found = list(sources.documents(sources.find_files(PythonStdlib(), print), field="", tally=tally))
    assert found == [(str(tmp_path / "a.py"), "x = 1\n")]
    assert tally.bad == 1


@pytest.mark.parametrize(("name", "remedy"), [("a.jsonl.zst", "unpack it"), ("A.PARQUET", "write it as JSON lines")])
def test_a_form_that_is_not_read_is_named_with_what_makes_it_one_that_is(tmp_path, read, name, remedy):
    (tmp_path / name).write_bytes(b"PAR1")
    (tmp_path / "b.txt").write_text("read")
    with pytest.raises(DataError, match=rf"{name} is no text and no JSON lines.*{remedy}"):
        read()
    assert read(pattern="*.txt")[0] == [("b.txt", "read")]
