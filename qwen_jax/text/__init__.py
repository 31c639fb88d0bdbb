"""Text to token ids and back."""

from qwen_jax.text.tokenizer import StreamDecoder, Tokenizer, train_bpe

__all__ = ["StreamDecoder", "Tokenizer", "train_bpe"]
