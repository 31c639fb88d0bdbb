"""A file of rows that a run was killed over: no row is lost, made twice, or taken for another's."""

from __future__ import annotations

import json

import pytest

from qwen_jax.errors import DataError, FileError
from qwen_jax.resumable import ResumableFile

PROMPTS = ["low", "newer\nwidé", "", "wider"]


def row(number):
    return {"index": number // 2, "sample": number % 2, "prompt": PROMPTS[number // 2]}


def opened(path, *, digest="d", overwrite=False, prompts=PROMPTS):
    head = lambda n: (json.dumps(row(n) | {"prompt": prompts[n // 2]}, ensure_ascii=False)[:-1] + ", ").encode()
    return ResumableFile(path, 2 * len(prompts), 2, head, digest=digest, overwrite=overwrite)


@pytest.fixture
def filled(tmp_path):
    """A file of rows that ended in another order than they have, and what it is once it is sorted."""
    with opened(tmp_path / "out") as file:
        for number in (3, 0, 7, 1, 2, 6, 4, 5):
            file.append(number, row(number) | {"completion": f"é{number}"})
        unsorted = (tmp_path / "out").read_bytes()
        file.sort()
    return unsorted, (tmp_path / "out").read_bytes()


def test_a_file_cut_anywhere_is_gone_on_with_from_its_last_whole_row(tmp_path, filled):
    unsorted, whole = filled
    assert [json.loads(line)["completion"] for line in whole.splitlines()] == [f"é{number}" for number in range(8)]
    path = tmp_path / "cut"
    for length in range(0, len(unsorted) + 1):
        path.write_bytes(unsorted[:length])
        with opened(path) as file:
            assert len(file.missing) == 8 - unsorted[:length].count(b"\n")
            for number in file.missing:
                file.append(number, row(number) | {"completion": f"é{number}"})
            file.sort()
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(digest="e"), "1: this row was made by another model, with another seed or other options"),
        (dict(prompts=["other", *PROMPTS[1:]]), "1: this row is for another input than number 0"),
        (dict(prompts=PROMPTS[:2]), "5: this row is for sample 0 of input 2, and there is none"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path, filled, change, message):
    with pytest.raises(DataError, match=f"{message}; choose another output, or --overwrite"):
        opened(tmp_path / "out", **change)
    assert (tmp_path / "out").read_bytes() == filled[1]
    with opened(tmp_path / "out", **change, overwrite=True) as file:
        assert len(file.missing) == 2 * len(change.get("prompts", PROMPTS))


def test_other_lines_and_rows_that_are_there_twice_are_refused(tmp_path, filled):
    for text, message in (
        (b"hello", "1: this row is none of such a file"),
        (filled[1] * 2, "9: this row is there twice"),
    ):
        (tmp_path / "text").write_bytes(text)
        with pytest.raises(DataError, match=message):
            opened(tmp_path / "text")
        assert (tmp_path / "text").read_bytes() == text


def test_a_file_has_one_writer(tmp_path):
    with opened(tmp_path / "out"), pytest.raises(FileError, match="being written by another process"):
        opened(tmp_path / "out")
