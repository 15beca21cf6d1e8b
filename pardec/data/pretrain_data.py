"""Python sources to what a base model is trained from scratch on: a tokenizer, sequences, held-out windows.

Knows files and tokenizers, no model. Legend: T tokens of a sequence.
"""

import math
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm

from pardec.data.python_sources import STDLIB, TEST, TRAIN, VALIDATION, python_sources, source_folder
from pardec.data.row_checks import DataError
from pardec.data.tokenising import Document

SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0
# what merges are learned from at most, so that a large folder costs minutes and not hours
TOKENIZER_CHARACTERS = 200_000_000
_FILES_PER_CALL = 256


@dataclass(frozen=True)
class PretrainCorpus:
    """Sequences to train on, all in memory, and documents of the other splits."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]


def read_sources(path: str, *, seed: int, max_characters: int | None = None) -> dict[str, list[str]]:
    """Texts by split, the training ones shuffled.

    Args:
        path: a folder, `python-stdlib` or `python-packages`.
        seed: of the order.
        max_characters: of training text; default all.

    Raises:
        DataError: if there is no folder, there are no sources, or there are none of a split.
    """
    folder = source_folder(path) or Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"data.path {path}: expected {STDLIB} or a folder of Python sources, found {found}")
    texts = {split: list(python_sources(folder, split)) for split in (TRAIN, VALIDATION, TEST)}
    total = sum(map(len, texts.values()))
    if not total:
        raise DataError(f"data.path {path}: expected Python sources of 200 B to 400 kB, found none")
    for split, found in texts.items():
        if not found:
            raise DataError(
                f"data.path {path}: expected files of every split (2 % are validation and 2 % test, by "
                f"the hash of their path), found none of {split} among {total}"
            )
    random.Random(seed).shuffle(texts[TRAIN])
    if max_characters is not None:
        texts[TRAIN] = first_texts(texts[TRAIN], max_characters)
        if not texts[TRAIN]:
            raise DataError(f"data.max_characters: expected room for at least one file, found {max_characters}")
    return texts


def first_texts(texts: list[str], max_characters: int) -> list[str]:
    """As many texts from the beginning as have together at most so many characters."""
    totals = accumulate(len(text) for text in texts)
    return texts[: sum(total <= max_characters for total in totals)]


def train_tokenizer(texts: list[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """Byte-level BPE with the separator as token 0; fewer tokens than asked for if the text gives no more."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    sample = first_texts(texts, TOKENIZER_CHARACTERS)
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return tokenizer


def encode(
    texts: list[str], tokenizer: Tokenizer, *, max_tokens: int | None = None, show_progress: bool = False
) -> list[Document]:
    """Documents that begin with the separator, ending with the one that completes `max_tokens`."""
    # a source that mentions the separator must not end a document; this setting is not saved with a tokenizer
    tokenizer.encode_special_tokens = True
    documents, held = [], 0
    with tqdm(total=len(texts), desc="tokenising", unit="file", disable=not show_progress, leave=False) as bar:
        for first in range(0, len(texts), _FILES_PER_CALL):
            for encoding in tokenizer.encode_batch(texts[first : first + _FILES_PER_CALL]):
                if max_tokens is not None and held >= max_tokens:
                    return documents
                documents.append(Document(np.array([SEPARATOR_ID, *encoding.ids], dtype=np.int32)))
                held += len(documents[-1].input_ids)
                bar.update()
    return documents


def example_order(num_sequences: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Indices of sequences for a whole run, in `shape`; each pass over them is a new permutation."""
    passes = math.ceil(math.prod(shape) / num_sequences)
    orders = [np.random.default_rng((seed, i)).permutation(num_sequences) for i in range(passes)]
    return np.concatenate(orders)[: math.prod(shape)].reshape(shape)


def held_out_windows(documents: list[Document], max_length: int, max_tokens: int) -> list[Tensor]:
    """Pieces of at most T tokens that overlap by one, so that each token but the first is predicted once.

    If there are more than `max_tokens` to predict, windows are taken evenly.
    """
    windows = [
        torch.from_numpy(document.input_ids[first : first + max_length].astype(np.int64))
        for document in documents
        for first in range(0, len(document.input_ids) - 1, max_length - 1)
    ]
    total = sum(len(window) - 1 for window in windows)
    if total > max_tokens:
        kept = max(1, len(windows) * max_tokens // total)
        windows = [windows[i * len(windows) // kept] for i in range(kept)]
    return windows
