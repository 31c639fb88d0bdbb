"""Prompts of Qwen2.5-Coder: code with a hole, and whole repositories."""

from __future__ import annotations

from collections.abc import Iterable

from qwen_jax.text.chat import Piece

# What ends a completion: the end of the document, or the start of another part of it.
STOP_TOKENS = (
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)


def fill_in_the_middle(prefix: str, suffix: str, *, suffix_first: bool = False) -> list[Piece]:
    """The prompt whose completion belongs between `prefix` and `suffix`: prefix, suffix, middle, as published.

    With `suffix_first` it goes on with the prefix (SPM as it is trained beside PSM, arXiv 2207.14255).
    """
    if suffix_first:
        return [
            _token("fim_prefix"),
            _token("fim_suffix"),
            Piece(text=suffix),
            _token("fim_middle"),
            Piece(text=prefix),
        ]
    return [_token("fim_prefix"), Piece(text=prefix), _token("fim_suffix"), Piece(text=suffix), _token("fim_middle")]


def repository(
    name: str, files: Iterable[tuple[str, str]], *, last: tuple[str, list[Piece]] | None = None
) -> list[Piece]:
    """A repository's (path, text) files in one prompt, whose completion goes on with the last file.

    `last` is the path of one more file and its pieces, such as those of `fill_in_the_middle`.
    """
    pieces = [_token("repo_name"), Piece(text=name)]
    contents = [(path, [Piece(text=text)]) for path, text in files] + ([last] if last else [])
    for path, content in contents:
        pieces += [_line(), _token("file_sep"), Piece(text=path), _line(), *content]
    return pieces


def _token(name: str) -> Piece:
    return Piece(text=f"<|{name}|>", trusted=True)


def _line() -> Piece:
    return Piece(text="\n", trusted=True)
