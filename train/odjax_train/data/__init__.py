"""Data: sources, tokenizers, packing, and feeding a mesh. The order is a function of (seed, step) alone."""

from odjax_train.data.bpe import BpeTokenizer
from odjax_train.data.datasets import Images, Pairs, Text
from odjax_train.data.examples import Examples, batches, evaluation_batches
from odjax_train.data.feeding import Feed, feed, local_rows
from odjax_train.data.sources import open_source
from odjax_train.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "Examples",
    "Feed",
    "HuggingFaceTokenizer",
    "Images",
    "Pairs",
    "Text",
    "Tokenizer",
    "batches",
    "evaluation_batches",
    "feed",
    "load_tokenizer",
    "local_rows",
    "open_source",
]
