"""What a source gives to be tokenised, whatever it is: documents, as plain text or in pieces of a format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qwen_jax.text import Tokenizer, chat
from qwen_jax.text.chat import Piece

# What a shard keeps of a token, in bits: whether it is trained, and where something is judged, as what.
TRAINED, IS_BAD, IS_GOOD = 1, 2, 4


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document.

    Attributes:
      origin: the file it is from, and its line there.
      text: all of it.
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

    @property
    def decides(self) -> str:
        """The text whose hash decides whether it is held out."""
        return self.text

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[int] | None]:
        """Ids, and for each and the end of the text its marks; None where all are trained.

        Raises ModelError for a control token that the tokenizer does not have.
        """
        assert self.pieces is not None, "plain texts are encoded many at a time"
        encoded = chat.encode(tokenizer, self.pieces)
        trained = [*encoded.mask, self.ends]
        return encoded.ids, None if all(trained) else [TRAINED * flag for flag in trained]


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[list[int], list[int] | None]]:
    """What `Document.encode` gives of each."""
    documents = list(documents)
    plain = iter(tokenizer.encode_batch([document.text for document in documents if document.pieces is None]))
    for document in documents:
        yield (next(plain), None) if document.pieces is None else document.encode(tokenizer)
