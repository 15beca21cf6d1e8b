"""Text to training sequences and prompts: reading, validating, tokenising, packing, splitting.

Knows files and tokenizers, no model. Errors about a row's form name file and line.
Legend: T tokens of a sequence, N anchors per sequence.
"""

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pardec.errors import first_line

STDLIB = "python-stdlib"
PACKAGES = "python-packages"
TRAIN, VALIDATION, TEST = "train", "validation", "test"
PROMPT_TOKENS = 128
PROMPT_STRIDE_TOKENS = 4000
_TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
_JSONL_SUFFIXES = (".jsonl", ".json")
# without a validation file, one document in this many is held out
_HELD_OUT_ONE_IN = 20


class DataError(ValueError):
    """Data that cannot be used; the message names where, what was expected and what was found."""


@dataclass(frozen=True)
class Document:
    """Token ids with, where not all of them are to be learned, the mask of those that are.

    Attributes:
        input_ids: shape [n], int32.
        loss_mask: shape [n], bool; None if every token counts and the document may be packed with others.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray | None = None


# ---------------------------------------------------------------------- Python's own library


def python_files(folder: Path) -> list[Path]:
    """Python sources below `folder`, 200 B to 400 kB, without `encodings` and `site-packages`, sorted."""
    return sorted(
        path
        for path in folder.rglob("*.py")
        if not {"encodings", "site-packages", "__pycache__"} & set(path.relative_to(folder).parts[:-1])
        and path.is_file()
        and 200 <= path.stat().st_size <= 400_000
    )


def split_of(relative_path: str) -> str:
    """The split of a source file by the hash of its path: about 4 % are held out, half validation, half test."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    if digest[0] >= 10:
        return TRAIN
    return VALIDATION if digest[1] % 2 == 0 else TEST


def python_sources(folder: Path, split: str) -> Iterator[str]:
    """Texts of a split of the Python sources below `folder`; files that are not UTF-8 are left out."""
    for path in python_files(folder):
        if split_of(path.relative_to(folder).as_posix()) == split:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def stdlib_folder() -> Path:
    """The library of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_folder(path: str) -> Path | None:
    """The folder behind `python-stdlib`, or behind `python-packages`, what is installed for the running interpreter.

    Both are split by the hash of each file's path. None for any other path.
    """
    if path == STDLIB:
        return stdlib_folder()
    return Path(sysconfig.get_paths()["purelib"]) if path == PACKAGES else None


# ---------------------------------------------------------------------- reading


def read_rows(path: str, format: str, split: str = TRAIN, subset: str | None = None) -> list[dict[str, Any]]:
    """Validated rows with `text`, `conversations` or `input_ids` and `loss_mask`; of the last two, `where` they stand.

    Args:
        path: file, folder of text files, or dataset that `datasets` loads.
        format: `auto`, `text`, `jsonl` or `hub`.
        split: of a dataset that `datasets` loads.
        subset: its configuration.

    Raises:
        DataError: if there is nothing there, or a row is malformed (names file and line).
    """
    where = Path(path)
    if format == "auto":
        format = _format_of(where)
    if format == "hub":
        rows = _hub_rows(path, split, subset)
    elif not where.exists():
        raise DataError(f"data: expected a file or folder, found nothing at {path}")
    elif format == "jsonl":
        rows = _jsonl_rows(where)
    else:
        rows = _text_rows(where)
    if not rows:
        raise DataError(f"{path}: expected at least one row of data, found none")
    return rows


def training_rows(
    path: str, format: str = "auto", split: str = TRAIN, subset: str | None = None
) -> list[dict[str, Any]]:
    """Rows as from `read_rows`, or of the Python sources' training split, without what `load_corpus` holds out.

    Raises:
        DataError: for data that cannot be used.
    """
    folder = source_folder(path)
    if folder is not None:
        return [{"text": text} for text in python_sources(folder, TRAIN)]
    rows = read_rows(path, format, split, subset)
    return hold_out(rows)[0] if len(rows) > 1 or rows[0].get("text") else rows


def _format_of(where: Path) -> str:
    if where.is_dir() and any(where.rglob("*.parquet")):
        return "hub"
    if where.is_dir() or where.suffix in _TEXT_SUFFIXES:
        return "text"
    if where.suffix in _JSONL_SUFFIXES:
        return "jsonl"
    if where.exists():
        known = ", ".join((*_TEXT_SUFFIXES, *_JSONL_SUFFIXES))
        raise DataError(f"{where}: expected a file ending in {known} or data.format, found {where.suffix!r}")
    return "hub"


def _text_rows(where: Path) -> list[dict[str, Any]]:
    files = [where] if where.is_file() else _text_files(where)
    rows = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None
        if text.strip():
            rows.append({"text": text})
    return rows


def _text_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in _TEXT_SUFFIXES and path.is_file())


def _jsonl_rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file}: expected a JSONL file, found a folder")
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{file}:{number}: expected one JSON object, found {error}") from None
            rows.append(check_row(row, f"{file}:{number}"))
    return rows


def _hub_rows(path: str, split: str, subset: str | None) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"data {path!r}: expected the package datasets for hub data, found it missing") from None
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # datasets raises many kinds, all of them about the data's place or form
        raise DataError(f"data {path!r}: expected a file, folder or hub dataset, found {first_line(error)}") from None
    return [check_row(row, f"{path}:{split}:{number}") for number, row in enumerate(rows, start=1)]


def check_row(row: Any, where: str) -> dict[str, Any]:
    """The row, if it is one that can be trained on; it remembers `where` if tokenising can still find fault with it.

    Raises:
        DataError: otherwise, beginning with `where`.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if row.get("conversations") is None and row.get("messages") is not None:
        row = {**row, "conversations": row["messages"]}
    if row.get("input_ids") is not None:
        _check_ids(row, where)
        row = {**row, "where": where}
    elif row.get("conversations") is not None:
        row = {**row, "conversations": _checked_turns(row["conversations"], where), "where": where}
    elif not isinstance(row.get("text"), str) or not row["text"].strip():
        keys = ", ".join(map(str, row)) or "no keys"
        raise DataError(
            f"{where}: expected non-empty 'text', 'conversations' or 'input_ids' with 'loss_mask', found {keys}"
        )
    else:
        _check_unicode(row["text"], where)
    return row


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: expected Unicode text, found half of a surrogate pair") from None


def _check_ids(row: dict[str, Any], where: str) -> None:
    ids, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(ids, list) or not ids or not all(type(t) is int and 0 <= t < 2**31 for t in ids):
        raise DataError(f"{where}: expected input_ids as a list of token ids, found {str(ids)[:60]}")
    if not isinstance(mask, list) or len(mask) != len(ids):
        found = len(mask) if isinstance(mask, list) else mask
        raise DataError(f"{where}: expected a loss_mask of {len(ids)} entries, found {found}")
    if not all(type(entry) in (int, bool) and entry in (0, 1) for entry in mask):
        raise DataError(f"{where}: expected a loss_mask of 0 and 1, found {str(mask)[:60]}")
    if not any(mask):
        raise DataError(f"{where}: expected a loss_mask with at least one token to learn, found all 0")


def _checked_turns(turns: Any, where: str) -> list[dict[str, str]]:
    """Turns as {role, content}; {from, value} of older datasets is understood."""
    roles = {"human": "user", "gpt": "assistant"}
    checked = []
    for turn in turns if isinstance(turns, list) else [turns]:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{where}: expected turns with role and content, found {str(turn)[:60]}")
        _check_unicode(content, where)
        checked.append({"role": roles.get(role, role), "content": content})
    if not any(turn["role"] == "assistant" for turn in checked):
        raise DataError(f"{where}: expected at least one assistant turn, found none")
    return checked


# ---------------------------------------------------------------------- tokenising


def tokenise(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data") -> Document:
    """A row as token ids; text gets the document separator in front, conversations the assistant's loss mask.

    Raises:
        DataError: for a row that cannot be used, beginning with its own `where` or else the one given.
    """
    where = row.get("where", where)
    if row.get("input_ids") is not None:
        if max(row["input_ids"]) >= len(tokenizer):
            raise DataError(
                f"{where}: expected token ids below {len(tokenizer)}, those of the tokenizer, "
                f"found {max(row['input_ids'])}"
            )
        mask = np.array(row["loss_mask"], dtype=bool)
        return Document(np.array(row["input_ids"], dtype=np.int32), mask)
    if row.get("conversations") is not None:
        return _tokenise_conversation(row["conversations"], tokenizer, where)
    ids = tokenizer(row["text"], verbose=False).input_ids
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if separator is not None and ids[:1] != [separator]:
        ids = [separator, *ids]
    return Document(np.array(ids, dtype=np.int32))


def _tokenise_conversation(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> Document:
    """Assistant spans are found by rendering the conversation up to and including each assistant turn."""
    text = render_conversation(tokenizer, turns, where)
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = render_conversation(tokenizer, turns[:i], where, add_generation_prompt=True)
        through = render_conversation(tokenizer, turns[: i + 1], where)
        if not text.startswith(before) or not text.startswith(through) or not through.startswith(before):
            raise DataError(
                f"{where}: expected a chat template that renders a conversation's beginning as the beginning of "
                f"its rendering, found {through[-200:]!r} inside {text[:400]!r}"
            )
        spans.append((len(before), len(through)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [any(start < b and a < end for start, end in spans) for a, b in encoded["offset_mapping"]]  # type: ignore[misc]
    if not any(mask) or all(mask):
        share = "0 %" if not any(mask) else "100 %"
        raise DataError(
            f"{where}: expected some of the rendered tokens to be the assistant's, found {share} of {text[:400]!r}"
        )
    return Document(np.array(encoded["input_ids"], dtype=np.int32), np.array(mask))


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], where: str, *, add_generation_prompt: bool = False
) -> str:
    """A conversation as the text that the model sees; empty without turns.

    Raises:
        DataError: if there is no chat template or it refuses these turns, beginning with `where`.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{where}: expected a tokenizer with a chat template for conversations, found none")
    if not turns:
        return ""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)  # type: ignore[return-value]
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{where}: expected turns that the chat template renders, found {roles}: {first_line(error)}"
        ) from None


# ---------------------------------------------------------------------- sequences, prompts


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and is measured on.

    Attributes:
        train: sequences of at most max_length tokens.
        validation: documents that prompts are taken from to choose checkpoints.
        test: documents that prompts are taken from to report; empty if there are none.
    """

    train: list[Document]
    validation: list[Document]
    test: list[Document]


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
        max_tokens: no more training text than this is tokenised.
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
            rows[name] = held_out_rows(held_out, name)
    random.Random(seed).shuffle(rows[TRAIN])
    bar = tqdm(rows[TRAIN], "tokenising", unit="document", disable=not show_progress)
    train = pack(tokenise_until(bar, tokenizer, max_tokens, path), max_length)
    bar.close()
    if not train:
        if any(row.get("text") for row in rows[TRAIN]):
            raise DataError(f"{path}: expected at least {max_length} tokens (data.max_length) of text, found fewer")
        raise DataError(f"{path}: expected a token to learn among the first {max_length} (data.max_length), found none")
    held_out = [
        [tokenise(row, tokenizer, validation_path or path) for row in rows[name]] for name in (VALIDATION, TEST)
    ]
    return Corpus(train, *held_out)


def held_out_rows(path: str, split: str) -> list[dict[str, Any]]:
    """Rows of a data file, or those of a split of `python-stdlib` or `python-packages`.

    Raises:
        DataError: for data that cannot be used.
    """
    folder = source_folder(path)
    return read_rows(path, "auto") if folder is None else [{"text": t} for t in python_sources(folder, split)]


def hold_out(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, validation rows); a single text is cut near its end."""
    if len(rows) == 1 and rows[0].get("text"):
        text = rows[0]["text"]
        cut = len(text) - len(text) // _HELD_OUT_ONE_IN
        return [{"text": text[:cut]}], [{"text": text[cut:]}]
    if len(rows) < 2:
        raise DataError("data: expected at least 2 rows or data.validation_path, found 1 row")
    chosen = range(0, len(rows), min(_HELD_OUT_ONE_IN, len(rows)))
    validation = [rows[i] for i in chosen]
    return [row for i, row in enumerate(rows) if i not in chosen], validation


def tokenise_until(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, where: str
) -> Iterator[Document]:
    """Documents, ending with the one that completes `max_tokens`."""
    total = 0
    for row in rows:
        document = tokenise(row, tokenizer, where)
        yield document
        total += len(document.input_ids)
        if max_tokens is not None and total >= max_tokens:
            return


def pack(documents: Iterable[Document], max_length: int) -> list[Document]:
    """Training sequences: text is concatenated and cut into pieces of T tokens; masked documents stay alone."""
    sequences, stream, held = [], [], 0
    for document in documents:
        if document.loss_mask is not None:
            ids, mask = document.input_ids[:max_length], document.loss_mask[:max_length]
            if mask[2:].any():  # the first mask token behind an anchor predicts the token two further on
                sequences.append(Document(ids, mask))
            continue
        stream.append(document.input_ids)
        held += len(document.input_ids)
        if held >= max_length:
            joined = np.concatenate(stream)
            whole = held // max_length * max_length
            sequences += [Document(piece) for piece in joined[:whole].reshape(-1, max_length)]
            stream, held = [joined[whole:]], held - whole
    return sequences


def standard_prompts(
    documents: Sequence[Document],
    prompt_tokens: int = PROMPT_TOKENS,
    stride_tokens: int = PROMPT_STRIDE_TOKENS,
    num_prompts: int | None = None,
) -> list[list[int]]:
    """Prompts that everyone can take again: the first tokens at every stride of the split's stream.

    Documents with a loss mask give the tokens before the first one to be learned. With `num_prompts`, so many are
    taken evenly, from a denser stride if need be.

    Raises:
        DataError: if there is not enough held-out text for one prompt.
    """
    masked = [d for d in documents if d.loss_mask is not None]
    if masked:
        prompts = [d.input_ids[: max(1, int(d.loss_mask.argmax()))].tolist() for d in masked]  # type: ignore[union-attr]
    else:
        stream = np.concatenate([d.input_ids for d in documents]) if documents else np.empty(0, dtype=np.int32)
        if num_prompts is not None and len(stream) < num_prompts * stride_tokens:
            stride_tokens = max(prompt_tokens, len(stream) // num_prompts)
        starts = range(0, len(stream) - prompt_tokens + 1, stride_tokens)
        prompts = [stream[start : start + prompt_tokens].tolist() for start in starts]
    if not prompts:
        raise DataError(f"held-out data: expected at least {prompt_tokens} tokens for a prompt, found fewer")
    if num_prompts is not None and len(prompts) > num_prompts:
        prompts = [prompts[i * len(prompts) // num_prompts] for i in range(num_prompts)]
    return prompts


def held_out_prompts(
    tokenizer: PreTrainedTokenizerBase, split: str, path: str = STDLIB, num_prompts: int | None = None
) -> list[list[int]]:
    """Standard prompts of a split of `python-stdlib` or `python-packages`, or of a data file.

    Raises:
        DataError: for data that cannot be used.
    """
    rows = held_out_rows(path, split)
    return standard_prompts([tokenise(row, tokenizer, path) for row in rows], num_prompts=num_prompts)


class AnchoredSequences(Dataset):
    """Training examples in their final order: example c is a sequence with its anchors, the same in every run.

    Each epoch is a new permutation; anchors are drawn anew each time a sequence comes up.
    """

    def __init__(self, sequences: Sequence[Document], num_examples: int, anchors_per_sequence: int, seed: int):
        """`num_examples` = all examples of the run, so that resuming is starting further on."""
        self.sequences = sequences
        self.num_examples = num_examples
        self.anchors_per_sequence = anchors_per_sequence
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, example: int) -> dict[str, Tensor]:
        epoch, place = divmod(example, len(self.sequences))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.sequences))
        document = self.sequences[self._order[place]]
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        mask = torch.ones(len(ids), dtype=torch.bool)
        if document.loss_mask is not None:
            mask = torch.from_numpy(document.loss_mask)
        candidates = mask[2:].nonzero().squeeze(1)  # anchor s is useful where its first target, s + 2, counts
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + example)
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[: self.anchors_per_sequence]]
        # anchors at the last token have no targets: they fill up where there are fewer candidates, behind the others,
        # since token dropping goes by this order, which must be random
        fill = torch.full((self.anchors_per_sequence - len(chosen),), len(ids) - 1)
        return {"input_ids": ids, "loss_mask": mask, "anchors": torch.cat([chosen, fill])}


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, sequences padded on the right with tokens that no loss counts."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([e["input_ids"] for e in examples], batch_first=True),
        "loss_mask": pad([e["loss_mask"] for e in examples], batch_first=True),
        "anchors": torch.stack([e["anchors"] for e in examples]),
    }
