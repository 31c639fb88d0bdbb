"""Code as Qwen2.5-Coder reads it: files with their middle at the end, and the files of a repository as one document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from qwen_jax.text import chat
from qwen_jax.text.chat import Piece
from qwen_jax.text.fim import fill_in_the_middle, repository
from train.data.config import FillInTheMiddle, Text
from train.data.documents import Document
from train.data.sources import SourceFile

# A larger repository is several documents.
MAX_REPOSITORY_CHARACTERS = 10_000_000


def control_tokens(source: Text) -> tuple[str, ...]:
    """The control tokens that the documents of a source have."""
    holes = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>") if source.fim else ()
    return holes + (("<|repo_name|>", "<|file_sep|>") if source.repositories else ())


def documents(
    texts: Iterable[tuple[str, str]], files: Sequence[SourceFile], source: Text, *, seed: int
) -> Iterator[Document]:
    """The texts (origin, text) of `files`, formatted as `source` says.

    Files in a folder of the source are of the repository of that name; the last of them may have its middle at the end.
    """
    names = {str(file.path): file.name for file in files}

    def repository_of(text: tuple[str, str]) -> tuple[str, str]:
        """The name of a repository, or the origin of what is in none."""
        folder, slash, _ = names.get(text[0], "").partition("/")
        return ("repository", folder) if source.repositories and slash else ("file", text[0])

    for (kind, name), group in groupby(texts, key=repository_of):
        if kind == "file":
            yield from (_file(origin, text, source, seed) for origin, text in group)
            continue
        some: list[tuple[str, str]] = []
        for origin, text in group:
            if some and sum(len(text) for _, text in some) + len(text) > MAX_REPOSITORY_CHARACTERS:
                yield _repository(name, some, names, source, seed)
                some = []
            some.append((origin, text))
        yield _repository(name, some, names, source, seed)


def _repository(
    name: str, texts: Sequence[tuple[str, str]], names: dict[str, str], source: Text, seed: int
) -> Document:
    paths = [names[origin].removeprefix(f"{name}/") for origin, _ in texts]
    *files, (last, text) = zip(paths, (text for _, text in texts), strict=True)
    pieces = repository(name, files, last=(last, _pieces(last, text, source.fim, seed)))
    return _document(texts[0][0], chat.text_of(pieces), pieces)


def _file(origin: str, text: str, source: Text, seed: int) -> Document:
    return _document(origin, text, _pieces(origin, text, source.fim, seed))


def _document(origin: str, text: str, pieces: list[Piece]) -> Document:
    plain = len(pieces) == 1
    return Document(origin=origin, text=text, pieces=None if plain else [replace(p, trained=True) for p in pieces])


def _pieces(name: str, text: str, how: FillInTheMiddle | None, seed: int) -> list[Piece]:
    """The text, or with the chances that its config gives its prefix, suffix and middle."""
    if how is None or (how.extensions and not name.lower().endswith(how.extensions)):
        return [Piece(text=text)]
    digest = hashlib.blake2b(text.encode(), digest_size=32, key=f"fim {seed}".encode()).digest()
    chosen, order, *cuts = (int.from_bytes(digest[i : i + 8], "little") / 2**64 for i in range(0, 32, 8))
    if chosen >= how.rate:
        return [Piece(text=text)]
    start, end = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    prompt = fill_in_the_middle(text[:start], text[end:], suffix_first=order < how.spm)
    return [*prompt, Piece(text=text[start:end])]
