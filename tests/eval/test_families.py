"""The matrix of families: a sample of it, what is refused, and that something wrong is found out."""

import json

import families
import pytest
from matrix import family_check, planting
from matrix.tiny_configs import VOCAB, tiny_config
from programs import run

# layers behind a latent cache, rows read by a head, layers that scale, mix, cap or run several times
WORK = ["bert", "cohere2", "minicpm3", "ministral3", "gemma4_text without embeddings per layer", "qwen2 with windows"]
REFUSED = {
    "mamba": "layers of kind linear_attention",
    "gpt_neo": "found",  # its windows stand in a mask of its own
    "doge": "found keep_window_size 8",
    "xlnet": "found",
    "musicgen": "found an encoder-decoder",
    "gemma3n": "timm",  # a package that is not there
}


@pytest.mark.parametrize("family", WORK)
def test_families_work(family):
    row = families.check(family)
    assert row.result == "works", row.reason
    sequences = (1 + len(family_check.PROMPT_LENGTHS)) * (len(family_check.MODES) + 2)
    assert row.num_tokens == sequences * family_check.NEW_TOKENS
    assert row.mean_acceptance_length > 2
    assert row.num_lora_modules >= 16


@pytest.mark.parametrize("family", REFUSED)
def test_families_are_refused_with_a_line_that_says_why(family):
    row = families.check(family)
    assert row.result == "refused", row.reason
    assert REFUSED[family] in row.reason
    assert "\n" not in row.reason
    assert "/tmp" not in row.reason


def test_every_family_of_transformers_has_a_tiny_configuration():
    assert len(families.FAMILIES) > 150
    configs = {family: tiny_config(family) for family in families.FAMILIES}
    decoders = {name: one.get_text_config(decoder=True) for name, one in configs.items() if not one.is_encoder_decoder}
    assert {getattr(config, "vocab_size", VOCAB) for config in decoders.values()} == {VOCAB}
    assert all(getattr(config, "hidden_size", 64) <= 64 for config in decoders.values())


def test_a_family_that_works_for_one_sequence_at_a_time_says_so():
    """Its queries are scaled by the length of the cache, which sequences share."""
    row = families.check("llama4_text")
    assert row.result == "works", row.reason
    assert row.num_tokens == 5 * family_check.NEW_TOKENS
    assert "expected at most 12 for several sequences at once" in row.batches
    assert "| works, one sequence at a time: prompt and new tokens" in families.table_of([row]).markdown()


def test_tokens_that_differ_are_a_failure_and_end_with_exit_code_1(monkeypatch, tmp_path):
    real = family_check.generated
    wrong = lambda base, prompt: [*real(base, prompt)[:-1], 0]  # noqa: E731
    monkeypatch.setattr(family_check, "generated", wrong)
    ended = run(families.main, "--families", "llama,mamba", "--output", tmp_path / "some")
    assert ended.code == 1
    rows = {row["family"]: row for row in ended.result["rows"]}
    assert rows["llama"]["result"] == "fails"
    assert (
        "plain, batch 1: expected generate's tokens, found others from token 23 of row 0 on" in rows["llama"]["reason"]
    )
    assert rows["mamba"]["result"] == "refused"
    assert "| mamba | linear | refused: layers of kind linear_attention" in (tmp_path / "some.md").read_text()
    assert json.loads((tmp_path / "some.json").read_text()) == ended.result


def test_a_gate_that_does_not_serve_what_was_trained_is_a_failure(monkeypatch):
    class Closed(family_check.LoraGate):
        def _make_hook(self, *args):
            return lambda *args: None

    monkeypatch.setattr(family_check, "LoraGate", Closed)
    row = families.check("llama")
    assert (row.result, row.reason) == (
        "fails",
        "WrongResultError: LoRA: expected the gate to give the logits of PEFT's layers, found others",
    )


def test_drafts_that_are_not_those_of_training_are_a_failure(monkeypatch):
    real = family_check.measure_ranks

    def of_other_masks(model, *texts):
        model.adapter.mask_embeddings.mul_(-1)
        return real(model, *texts)

    monkeypatch.setattr(family_check, "measure_ranks", of_other_masks)
    row = families.check("gemma2")
    assert row.result == "fails"
    assert row.reason.startswith("WrongResultError: drafts: expected [")


def test_a_family_that_takes_too_long_is_a_failure(monkeypatch):
    monkeypatch.setattr(families, "SECONDS_FOR_ONE", 1)
    monkeypatch.setattr(families, "check_family", lambda folder: time_passes())
    row = families.check("llama")
    assert row.reason == "TimeoutError: expected an end within 1 seconds, found none"


def time_passes() -> None:
    while True:
        pass


def test_planted_drafts_are_the_references_tokens_mostly_and_never_by_chance():
    planted = planting.Planted([[5, 6, 7, 8], [9, 10, 11, 12]], 3, 61)
    drafts = [planted.draft([1, 2]) for _ in range(200)]
    right = [[6, 7, 8], [11, 12, 0]]
    shares = sum((draft == draft.new_tensor(right)).float() for draft in drafts) / len(drafts)
    assert ((shares > 0.7) & (shares < 0.9)).all()


def test_unknown_families_are_one_line():
    ended = run(families.main, "--families", "llama,lama")
    assert "families: expected model types of causal language models, found 'lama'" in ended.error
