"""Texts of a file of responses, as studies of recorded drafts take them: all of one length, answers at one place."""

import numpy as np
import torch
from torch import Tensor

from pardec.data.rows import open_rows
from pardec.data.shards import shards_folder


def responses(path: str | None, num_texts: int) -> tuple[Tensor, int]:
    """Token ids of the first rows that are as long as the longest, shape [S, T], and where their answers begin.

    Raises:
        ValueError: without a file, for rows without token ids, or too few of them.
    """
    if path is None:
        raise ValueError("responses: expected a file to train heads on, or --steps 0, found neither")
    rows = open_rows(path, "jsonl", "train", None, shards_folder())
    if rows[0].get("input_ids") is None or rows[0].get("loss_mask") is None:
        raise ValueError(f"{path}: expected rows with input_ids and loss_mask, found {', '.join(rows[0])}")
    longest, first = len(rows[0]["input_ids"]), int(np.argmax(rows[0]["loss_mask"]))
    kept = []
    for number in range(len(rows)):
        row = rows[number]
        if (len(row["input_ids"]), int(np.argmax(row["loss_mask"]))) == (longest, first):
            kept.append(row["input_ids"])
        if len(kept) == num_texts:
            return torch.tensor(kept), first
    raise ValueError(f"{path}: expected {num_texts} rows of {longest} tokens, as the first one is, found {len(kept)}")
