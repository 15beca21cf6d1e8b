"""Data to what a run needs: training sequences, and held-out prompts.

Knows tokenizers, no model.
Legend: T tokens of a sequence.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from pardec.data.fitting import RowCounts, prompt_of, without_long_prompts
from pardec.data.python_sources import STDLIB, TEST, TRAIN, VALIDATION, source_folder
from pardec.data.reading import format_of, held_out_format
from pardec.data.row_checks import DataError
from pardec.data.rows import Rows, hold_out_rows, open_rows
from pardec.data.shards import shards_folder
from pardec.data.streaming import TokenisedStream, streamed_rows
from pardec.data.tokenised import TokenisedRows, Tokenising, tokenised
from pardec.data.tokenising import Document, tokenise

PROMPT_TOKENS = 128
PROMPT_STRIDE_TOKENS = 4000
# held-out rows that are tokenised for each prompt that is asked for: a row may have none, or be too long for the base
_ROWS_PER_PROMPT = 64


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and is measured on.

    Attributes:
        train: sequences of at most max_length tokens, tokenised when they are asked for.
        validation: documents that prompts are taken from to choose checkpoints.
        test: documents that prompts are taken from to report; empty if there are none.
    """

    train: TokenisedRows | TokenisedStream
    validation: list[Document]
    test: list[Document]

    @property
    def counts(self) -> RowCounts:
        """Of the rows that have been tokenised for `train`."""
        return self.train.counts

    def digest(self) -> str:
        """SHA-256 of what sequences are made of, and of every token held out for validation."""
        digest = hashlib.sha256(self.train.digest.encode())
        for one in self.validation:
            mask = b"" if one.loss_mask is None else one.loss_mask.tobytes()
            digest.update(f"{len(one.input_ids)} {len(mask)} ".encode() + one.input_ids.tobytes() + mask)
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
    num_embeddings: int | None = None,
    num_prompts: int | None = None,
    min_kept_share: float = 0.0,
    seed: int = 0,
    streamed: bool = False,
    cache: str | None = None,
    show_progress: bool = False,
) -> Corpus:
    """Reads, validates and splits data, and tokenises the first of them; the rest is when it is asked for.

    Args:
        path: see `read_rows`, `python-stdlib` or `python-packages`.
        tokenizer: of the base.
        format: see `read_rows`.
        subset: see `read_rows`.
        split: see `read_rows`.
        validation_path: default a held-out part of `path`; of the last two their validation split.
        test_path: default none, but for the two of these; their test split.
        max_length: T.
        num_embeddings: of the base; default only the tokenizer limits the token ids of rows.
        num_prompts: how many held-out prompts will be asked for; default all held-out rows are tokenised.
        min_kept_share: data are refused if something is learned of a smaller share of the rows than this.
        seed: of the order of examples; which sequences there are does not depend on it.
        streamed: a hub dataset is read as training comes to it; then a `validation_path` is needed.
        cache: folder where tokenised sequences are kept; default `tokenised` in the user's cache.
        show_progress: a progress bar while training text is tokenised.

    Raises:
        DataError: for data that cannot be used.
    """
    kept = Path(cache) if cache is not None else shards_folder()
    tokenising = Tokenising(tokenizer, max_length, num_embeddings, path)
    own: dict[str, Rows | None] = {VALIDATION: None, TEST: None}
    if streamed:
        train = _stream(path, format, subset, split, validation_path, tokenising, kept, show_progress)
    else:
        rows = open_rows(path, format, split, subset, kept, show_progress=show_progress)
        if source_folder(path) is not None:
            own = {name: open_rows(path, format, name, subset, kept) for name in own}
        elif validation_path is None:
            rows, own[VALIDATION] = hold_out_rows(rows)
        train = tokenised(rows, tokenising, kept, show_progress=show_progress)
    for name, held_out in ((VALIDATION, validation_path), (TEST, test_path)):
        if held_out is not None:
            own[name] = open_held_out(held_out, name, format, kept)
    _check_first(train, seed, min_kept_share, path)
    where = validation_path or path
    validation, test = (
        [] if one is None else held_out_documents(one, tokenizer, num_prompts, where) for one in own.values()
    )
    return Corpus(train, validation, test)


def _stream(
    path: str,
    format: str,
    subset: str | None,
    split: str,
    validation_path: str | None,
    tokenising: Tokenising,
    kept: Path,
    show_progress: bool,
) -> TokenisedStream:
    found = format_of(Path(path)) if format == "auto" and source_folder(path) is None else format
    if found != "hub":
        raise DataError(f"data.streamed: expected a hub dataset, found {path}")
    if validation_path is None:
        raise DataError("data.streamed: expected data.validation_path beside a stream, of which no row is held out")
    return streamed_rows(path, subset, split, tokenising, kept, show_progress=show_progress)


def _check_first(train: TokenisedRows | TokenisedStream, seed: int, min_kept_share: float, path: str) -> None:
    """Tokenises until there is a sequence, and refuses what is wrong with the rows of that.

    Faults of rows that come later stop no run: these are left out and named.
    """
    T = train.tokenising.max_length
    for shard in train.shards(seed, 0):
        opened = train.opened(shard)
        if opened.faults:
            raise DataError(opened.faults[0])
        if len(opened):
            return train.counts.check(min_kept_share, T, path)
    if train.counts.kept:
        raise DataError(f"{path}: expected at least {T} tokens (data.max_length) of text, found fewer")
    raise DataError(f"{path}: expected a token to learn, found none: {train.counts.told(T)}")


def open_held_out(path: str, split: str, format: str, checked: Path) -> Rows:
    """Held-out rows of a file or folder, or of a split of the Python sources; see `held_out_rows`.

    Raises:
        DataError: for data that cannot be used.
    """
    return open_rows(path, held_out_format(path, format), split, None, checked)


def held_out_documents(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, num_prompts: int | None, where: str
) -> list[Document]:
    """Held-out rows as token ids; of very many, where few prompts are asked for, 64 a prompt, taken evenly.

    Raises:
        DataError: for a row that cannot be used.
    """
    most = len(rows) if num_prompts is None else min(len(rows), num_prompts * _ROWS_PER_PROMPT)
    return [one for i in range(most) for one in tokenise(rows[i * len(rows) // most], tokenizer, where)]


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
    rows = open_held_out(path, split, "auto", shards_folder())
    return standard_prompts(held_out_documents(rows, tokenizer, num_prompts, path), num_prompts)
