"""What a source gives to be tokenised, whatever it is: documents, as plain text or in pieces of a format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qwen_jax.text import Tokenizer, chat
from qwen_jax.text.chat import Piece


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document.

    Attributes:
      origin: the file it is from, and its line there.
      text: all of it. Its hash decides the side that it falls on.
      pieces: what says which control tokens are meant, and what is trained; None for plain text, all of it trained.
      ends: whether the end of the text after it is trained as well.
    """

    origin: str
    text: str
    pieces: Sequence[Piece] | None = None
    ends: bool = True

    @property
    def plain(self) -> str:
        """What was there before the format: what a tokenizer is trained on."""
        if self.pieces is None:
            return self.text
        return "\n".join(piece.text for piece in self.pieces if not piece.trusted)


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[list[int], list[bool] | None]]:
    """Ids of each document, and for each id and the end of the text whether it is trained; None where all are.

    Raises ModelError for a control token that the tokenizer does not have.
    """
    documents = list(documents)
    plain = iter(tokenizer.encode_batch([document.text for document in documents if document.pieces is None]))
    for document in documents:
        if document.pieces is None:
            yield next(plain), None
            continue
        encoded = chat.encode(tokenizer, document.pieces)
        trained = [*encoded.mask, document.ends]
        yield encoded.ids, None if all(trained) else trained
