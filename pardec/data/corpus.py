"""Rows to what a run needs: training sequences, and held-out prompts.

Knows tokenizers, no model.
Legend: T tokens of a sequence.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pardec.data.fitting import RowCounts, fitted, prompt_of, without_long_prompts
from pardec.data.python_sources import STDLIB, TEST, TRAIN, VALIDATION, python_sources, source_folder
from pardec.data.reading import DataError, held_out_rows, hold_out, read_rows
from pardec.data.tokenising import Document, tokenise

PROMPT_TOKENS = 128
PROMPT_STRIDE_TOKENS = 4000


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and is measured on.

    Attributes:
        train: sequences of at most max_length tokens.
        validation: documents that prompts are taken from to choose checkpoints.
        test: documents that prompts are taken from to report; empty if there are none.
        counts: of the rows that `train` is made of.
    """

    train: list[Document]
    validation: list[Document]
    test: list[Document]
    counts: RowCounts = field(default_factory=RowCounts)

    def digest(self) -> str:
        """SHA-256 of every token to be learned or held out for validation, with what tells them apart."""
        digest = hashlib.sha256()
        for documents in (self.train, self.validation):
            for one in documents:
                mask = b"" if one.loss_mask is None else one.loss_mask.tobytes()
                digest.update(f"{len(one.input_ids)} {len(mask)} ".encode() + one.input_ids.tobytes() + mask)
            digest.update(b"|")
        return digest.hexdigest()


def load_corpus(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    subset: str | None = None,
    split: str = TRAIN,
    validation_path: str | None = None,
    test_path: str | None = None,
    max_length: int,
    max_tokens: int | None = None,
    min_kept_share: float = 0.0,
    seed: int = 0,
    show_progress: bool = False,
) -> Corpus:
    """Reads, validates, splits and tokenises data.

    Args:
        path: see `read_rows`, `python-stdlib` or `python-packages`.
        tokenizer: of the base.
        format: see `read_rows`.
        subset: see `read_rows`.
        split: see `read_rows`.
        validation_path: default a held-out part of `path`; of the last two their validation split.
        test_path: default none, but for the two of these; their test split.
        max_length: T.
        max_tokens: no more training text than this is tokenised; tokens that T cuts off do not count.
        min_kept_share: data are refused if something is learned of a smaller share of the rows than this.
        seed: of the order of documents.
        show_progress: a progress bar while training text is tokenised.

    Raises:
        DataError: for data that cannot be used.
    """
    folder = source_folder(path)
    if folder is not None:
        rows = {s: [{"text": t} for t in python_sources(folder, s)] for s in (TRAIN, VALIDATION, TEST)}
    else:
        rows = {TRAIN: read_rows(path, format, split, subset), VALIDATION: [], TEST: []}
        if validation_path is None:
            rows[TRAIN], rows[VALIDATION] = hold_out(rows[TRAIN])
    for name, held_out in ((VALIDATION, validation_path), (TEST, test_path)):
        if held_out is not None:
            rows[name] = held_out_rows(held_out, name, format)
    random.Random(seed).shuffle(rows[TRAIN])
    bar = tqdm(rows[TRAIN], "tokenising", unit="row", disable=not show_progress)
    counts = RowCounts(available=len(rows[TRAIN]))
    train = pack(tokenise_until(bar, tokenizer, max_length, max_tokens, path, counts), max_length)
    bar.close()
    if not train:
        if any(row.get("text") for row in rows[TRAIN]):
            raise DataError(f"{path}: expected at least {max_length} tokens (data.max_length) of text, found fewer")
        raise DataError(
            f"{path}: expected a token to learn among the first {max_length} (data.max_length), found none: "
            f"{counts.told(max_length)}"
        )
    counts.check(min_kept_share, max_length, path)
    where = validation_path or path
    validation, test = ([one for row in rows[s] for one in tokenise(row, tokenizer, where)] for s in (VALIDATION, TEST))
    return Corpus(train, validation, test, counts)


def tokenise_until(
    rows: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_tokens: int | None,
    where: str,
    counts: RowCounts,
) -> Iterator[Document]:
    """Documents that can be learned from, ending with those of the row that completes `max_tokens`.

    Masked ones are cut at T tokens, and what is cut off or dropped is no part of the budget. `counts` is added to.
    """
    total = 0
    for row in rows:
        documents = counts.add(tokenise(row, tokenizer, where), max_length)
        yield from documents
        total += sum(len(one.input_ids) for one in documents)
        if max_tokens is not None and total >= max_tokens:
            return


def pack(documents: Iterable[Document], max_length: int) -> list[Document]:
    """Training sequences: text is concatenated and cut into pieces of T tokens; masked documents stay alone."""
    sequences, stream, held = [], [], 0
    for document in documents:
        if document.loss_mask is not None:
            one = fitted(document, max_length)
            if one is not None:
                sequences.append(one)
            continue
        stream.append(document.input_ids)
        held += len(document.input_ids)
        if held >= max_length:
            joined = np.concatenate(stream)
            whole = held // max_length * max_length
            sequences += [Document(piece) for piece in joined[:whole].reshape(-1, max_length)]
            stream, held = [joined[whole:]], held - whole
    return sequences


def standard_prompts(documents: Sequence[Document], num_prompts: int | None = None) -> list[list[int]]:
    """Prompts that everyone can take again: the first tokens at every stride of the split's stream.

    Documents with a loss mask give the tokens before the first one to be learned. With `num_prompts`, so many are
    taken evenly, from a denser stride if need be.

    Raises:
        DataError: if there is not enough held-out text for one prompt.
    """
    masked = [d for d in documents if d.loss_mask is not None]
    if masked:
        prompts = [prompt_of(document).tolist() for document in masked]
    else:
        stream = np.concatenate([d.input_ids for d in documents]) if documents else np.empty(0, dtype=np.int32)
        stride = PROMPT_STRIDE_TOKENS
        if num_prompts is not None and len(stream) < num_prompts * stride:
            stride = max(PROMPT_TOKENS, len(stream) // num_prompts)
        starts = range(0, len(stream) - PROMPT_TOKENS + 1, stride)
        prompts = [stream[start : start + PROMPT_TOKENS].tolist() for start in starts]
    if not prompts:
        raise DataError(f"held-out data: expected at least {PROMPT_TOKENS} tokens for a prompt, found fewer")
    if num_prompts is not None and len(prompts) > num_prompts:
        prompts = [prompts[i * len(prompts) // num_prompts] for i in range(num_prompts)]
    return prompts


def prompts_with_room(
    documents: Sequence[Document],
    num_prompts: int | None,
    *,
    max_new_tokens: int,
    max_positions: int | None,
    where: str,
) -> tuple[list[list[int]], list[Document]]:
    """Standard prompts of the documents whose prompts the base can continue, and the documents left out.

    Args:
        documents: held out.
        num_prompts: see `standard_prompts`.
        max_new_tokens: behind each prompt.
        max_positions: of the base; None leaves nothing out.
        where: named in errors.

    Raises:
        DataError: if more than half would be left out, there is not enough for one prompt, or the base cannot continue
            prompts of text.
    """
    room = None if max_positions is None else max_positions - max_new_tokens
    fitting, too_long = without_long_prompts(documents, room, where)
    prompts = standard_prompts(fitting, num_prompts)
    longest = max(map(len, prompts))
    if max_positions is not None and longest + max_new_tokens > max_positions:
        raise DataError(
            f"eval.max_new_tokens: expected at most {max_positions - longest} behind validation prompts of up to "
            f"{longest} tokens, as the base has {max_positions} positions, found {max_new_tokens}"
        )
    return prompts, too_long


def held_out_prompts(
    tokenizer: PreTrainedTokenizerBase, split: str, path: str = STDLIB, num_prompts: int | None = None
) -> list[list[int]]:
    """Standard prompts of a split of `python-stdlib` or `python-packages`, or of a data file.

    Raises:
        DataError: for data that cannot be used.
    """
    rows = held_out_rows(path, split)
    return standard_prompts([one for row in rows for one in tokenise(row, tokenizer, path)], num_prompts)
