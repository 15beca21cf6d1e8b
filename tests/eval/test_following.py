"""Texts decoded again on paper, by one shape and by shapes that follow: by hand, and against the decoder itself."""

import following
import pytest
from programs import run
from timing.shape_replay import PlayedText, cost_of_rows, emitted, fixed
from timing.shape_replay import following as followed

import pardec
from pardec.data.corpus import held_out_prompts


def test_a_row_for_every_shape_and_set_and_a_page(adapters, tmp_path):
    ended = run(following.main, adapters / "embeddings", "--quick", "--output", tmp_path / "found")
    assert ended.code == 0, ended.err[-2000:]
    rows = [row for row in ended.result["rows"] if row["law"] == "greedy"]
    names = [row["way"] for row in rows]
    assert {"plain", "4 copies", "in hindsight", *(f"following: {name}" for name in following.SETS)} <= set(names)
    shapes = [row for row in rows if "following" not in row["way"]]
    in_hindsight = next(row["beside_best"] for row in shapes if row["way"] == "in hindsight")
    assert in_hindsight == max(row["beside_best"] for row in shapes)  # one shape may be the best of every text
    assert 1 in [row["beside_best"] for row in shapes if row["way"] != "in hindsight"]
    assert next(row for row in rows if row["way"] == "plain")["ratio_to_plain"] == 1
    page = (tmp_path / "found.md").read_text()
    assert "| in hindsight | " in page


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 8)])
def test_greedy_texts_take_the_steps_that_the_decoder_takes(adapters, shape):
    model = pardec.load(adapters / "embeddings")
    prompts = [following.Prompt(ids, "code", "") for ids in held_out_prompts(model.tokenizer, "test", num_prompts=2)]
    asked = following.argparse.Namespace(max_new_tokens=48, head="auto")
    K, L = shape
    for text, prompt in zip(following.played_texts(model, prompts, {}, asked), prompts, strict=True):
        out = model.generate([prompt.token_ids], max_new_tokens=48, num_speculative_tokens=K, copy_tokens=L)
        steps = fixed(text, shape, lambda shape, found: 1.0)
        # copies behind wrong drafts aside, which no step accepts
        assert steps == out.stats.num_steps


def test_steps_emit_drafts_then_copies_and_have_none_behind_copies():
    text = PlayedText("code", drafts=[1, 2, 0, 0, 0, 0, 0, 0], copies=[-1, 3, 5, 0, -1, 0, 0, 0])
    assert emitted(text, 1, (0, 4), 0) == (1, False, 0)
    assert emitted(text, 2, (0, 4), 0) == (4, True, 0)
    assert emitted(text, 1, (1, 4), 1) == (5, True, 0)
    assert emitted(text, 2, (1, 0), 1) == (2, False, 1)
    assert emitted(text, 2, (2, 4), 1) == (6, True, 0)
    assert emitted(text, 7, (0, 4), 0) == (1, True, 0)


def test_shapes_that_follow_leave_one_that_brings_nothing_a_step_later():
    cost = cost_of_rows(1.0, {4: 1.5, 9: 2.0}, {5: 1.25})
    assert [cost((0, 0), False), cost((0, 4), True), cost((0, 4), False), cost((2, 0), False)] == [1, 1.25, 1, 2]
    assert cost((1, 4), True) == pytest.approx(1.5 + 0.5 * 4 / 5)
    text = PlayedText("code", [0] * 6, [-1] * 6)
    # the first two steps begin with K = 1, as the host knows what a step brought when the next has been launched
    assert followed(text, [(1, 0), (0, 0)], cost, 0.5) == 2 * 1.5 + 3 * 1.0
    assert fixed(text, (1, 0), cost) == 5 * 1.5
