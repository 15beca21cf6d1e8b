"""Data files that are changed by rule: each is refused in one line that names it, or read as what it says."""

import json

import pytest
from malformed import UNFIT, damaged_files, is_one_line, keys_of, with_text, without

from pardec.data.prompt_files import read_prompts
from pardec.data.reading import read_rows
from pardec.data.row_checks import DataError

ROWS = {
    "text": {"text": "x = 1"},
    "conversations": {"conversations": {"role": "assistant", "content": "hi"}},
    "ids": {"input_ids": [1, 2], "loss_mask": [0, 1]},
    "prompt": {"prompt": "x"},
}


def read(kind, path):
    return read_prompts(None, None, str(path)) if kind == "prompt" else read_rows(str(path), "jsonl")


def refused_or_read(kind, path):
    """Whether a file is refused; asserts that it is in one line."""
    try:
        read(kind, path)
    except ValueError as error:
        found = error
    else:
        return "read"
    assert isinstance(found, DataError) or kind == "prompt"
    assert is_one_line(found), str(found)[:1000]
    assert str(path) in str(found)
    return "refused"


@pytest.mark.parametrize("kind", ROWS)
def test_rows_whose_keys_are_missing_or_have_unfit_values(tmp_path, kind):
    path, wrong, outcomes = tmp_path / "rows.jsonl", {}, []
    for keys in keys_of(ROWS[kind]):
        lines = {done: with_text(ROWS[kind], keys, text) for done, text in UNFIT.items()}
        lines |= {f"only {done}": text for done, text in UNFIT.items()}
        for done, line in (lines | {"missing": without(ROWS[kind], keys)}).items():
            path.write_text(json.dumps(ROWS[kind]) + "\n" + line + "\n")
            try:
                outcomes.append(refused_or_read(kind, path))
            except Exception as error:  # all of them are to be seen
                wrong[(*keys, done)] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not wrong, wrong
    assert outcomes.count("refused") > len(outcomes) // 2


@pytest.mark.parametrize("kind", ROWS)
def test_damaged_files(tmp_path, kind):
    content = (json.dumps(ROWS[kind]) + "\n").encode() * 3
    wrong = {}
    for done, damage in damaged_files(content).items():
        path = tmp_path / f"{done}.jsonl"
        path.write_bytes(content)
        damage(path)
        try:
            refused_or_read(kind, path)
        except Exception as error:
            wrong[done] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not wrong, wrong
