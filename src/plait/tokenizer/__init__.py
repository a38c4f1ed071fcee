"""Text to token ids and back: what formats ask for, a fixed list of texts, and tokenizers of Hugging Face (`fast`)."""

from plait.tokenizer.base import Tokenizer, Vocabulary
from plait.tokenizer.fixed import FixedTokenizer

__all__ = ["FixedTokenizer", "Tokenizer", "Vocabulary"]
