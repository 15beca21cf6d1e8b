"""The program that makes a fine-tune: what it leaves is a model like any, another one than it began with."""

import fine_tune
import pytest
import torch
from data_samples import code_text
from programs import run

from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import fingerprint, shape_difference


def test_a_fine_tune_is_a_base_of_the_same_shape(tiny_base, tokenizer, tmp_path):
    (tmp_path / "code.txt").write_text(code_text(300))
    output = tmp_path / "tuned"
    few = ("--data", tmp_path / "code.txt", "--steps", 12, "--batch-size", 2, "--max-length", 64)
    ended = run(fine_tune.main, "tiny-python", "--output", output, *few, "--learning-rate", "3e-3")
    assert ended.code == 0, ended.err[-2000:]
    assert ended.result["loss"]["last"] < ended.result["loss"]["first"]
    before, after = fingerprint(tiny_base, tokenizer), fingerprint(load_base(str(output)), load_tokenizer(str(output)))
    assert shape_difference(before, after) is None
    assert before.embedding_rows != after.embedding_rows
    assert before.tokenizer == after.tokenizer
    again = run(fine_tune.main, "tiny-python", "--output", output, *few)
    assert again.error.endswith("expected a folder that is not there yet, found one")


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_learned_depends_on_the_seed_alone(seed, tmp_path):
    (tmp_path / "code.txt").write_text(code_text(300))
    few = ("--data", tmp_path / "code.txt", "--steps", 1, "--batch-size", 1, "--max-length", 32, "--seed", seed)
    for name in ("one", "two"):
        assert run(fine_tune.main, "tiny-python", "--output", tmp_path / name, *few).code == 0
    one, two = (load_base(str(tmp_path / name)).get_input_embeddings().weight for name in ("one", "two"))
    assert torch.equal(one, two)
