"""The file of responses: its plan, its growth, and what is left of it after a kill or on a full disk."""

import json
import resource
from contextlib import contextmanager

import pytest

from pardec.data.reading import read_rows
from pardec.data.responses.response_file import (
    Batch,
    Prompt,
    about_file,
    append_rows,
    by_length,
    count_rows,
    keep_whole_batches,
    longest_row,
    one_turn,
    plan_batches,
    read_about,
    response_row,
    two_turns,
    write_about,
)

PROMPTS = [Prompt([10 + n] * (2 + n % 3)) for n in range(7)]
BATCHES = [Batch(0, 3, False), Batch(3, 2, True), Batch(5, 2, False)]


def rows_of(batch):
    return [
        response_row(n, batch.greedy, PROMPTS[n], one_turn([n + 1] * (n + 1)))
        for n in range(batch.first, batch.first + batch.size)
    ]


@pytest.fixture
def whole(tmp_path):
    file = tmp_path / "whole.jsonl"
    for batch in BATCHES:
        append_rows(file, rows_of(batch))
    return file


# ---------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("num_responses", "batch_size", "share", "num_greedy"),
    [
        (8192, 64, 0.25, 2048),
        (10, 4, 0.3, 3),
        (7, 100, 0.5, 4),
        (5, 1, 0.4, 2),
        (9, 2, 0, 0),
        (9, 2, 1, 9),
        (1, 8, 0.2, 0),
    ],
)
def test_every_response_is_in_one_batch_and_the_share_of_greedy_ones_is_exact(
    num_responses, batch_size, share, num_greedy
):
    batches = plan_batches(num_responses, batch_size, share)
    covered = [n for batch in batches for n in range(batch.first, batch.first + batch.size)]
    assert covered == list(range(num_responses))
    assert sum(batch.size for batch in batches if batch.greedy) == num_greedy
    for greedy in (True, False):
        sizes = [batch.size for batch in batches if batch.greedy == greedy]
        assert all(size == batch_size for size in sizes[:-1])
        assert all(0 < size <= batch_size for size in sizes)


def test_greedy_batches_stand_evenly_between_sampled_ones():
    """Whatever part of the file is there already, its share of greedy responses is off by at most one batch."""
    done = greedy = 0
    for batch in plan_batches(6400, 64, 0.3):
        done += batch.size
        greedy += batch.size * batch.greedy
        assert abs(greedy - 0.3 * done) <= 64


def test_prompts_of_a_batch_are_of_similar_length_and_every_stretch_has_its_own():
    """In a stretch of eight batches of 4 lengths rise; equal ones stay as they were drawn, and none is lost."""
    prompts = [Prompt([n] * (1 + n * 7 % 10)) for n in range(100)]
    ordered = by_length(prompts, 4)
    for start in range(0, 100, 32):
        drawn, found = prompts[start : start + 32], ordered[start : start + 32]
        keys = [(len(prompt.input_ids), prompt.input_ids[0]) for prompt in found]
        assert keys == sorted(keys)
        assert sorted(prompt.input_ids for prompt in found) == sorted(prompt.input_ids for prompt in drawn)
    assert [len(prompt.input_ids) for prompt in ordered[:4]] == [1] * 4


# ---------------------------------------------------------------------- rows


def test_a_row_is_read_by_training_and_only_the_models_own_tokens_are_learned(whole):
    rows = read_rows(str(whole), "auto")
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["greedy"] for row in rows] == [False, False, False, True, True, False, False]
    for n, row in enumerate(rows):
        learned = [token for token, own in zip(row["input_ids"], row["loss_mask"], strict=True) if own]
        assert learned == [n + 1] * (n + 1)
        assert row["input_ids"] == PROMPTS[n].input_ids + learned


def test_counts_are_those_of_a_loop(whole):
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert count_rows(rows) == {
        "responses": 7,
        "greedy": 2,
        "short": 2,  # of 1 and 2 tokens
        "prompt_tokens": sum(len(prompt.input_ids) for prompt in PROMPTS),
        "response_tokens": 1 + 2 + 3 + 4 + 5 + 6 + 7,
    }
    assert count_rows([]) == {}


CHATS = [
    Prompt([5, 6], "questions"),
    Prompt([7], "code", [{"role": "user", "content": "x"}], "Now shorter."),
    Prompt([8], "code", [{"role": "user", "content": "y"}], "Why?"),
]


def chat_rows():
    """The last has a follow-up that was not answered."""
    answers = (one_turn([1]), two_turns([1, 2], [3, 4, 5], [6]), one_turn([1, 2, 3]))
    return [response_row(n, True, CHATS[n], answer) for n, answer in enumerate(answers)]


def test_rows_of_a_mix_name_their_kind_and_are_counted_by_it():
    rows = chat_rows()
    assert rows[1] == {
        "index": 1, "greedy": True, "kind": "code", "input_ids": [7, 1, 2, 3, 4, 5, 6],
        "loss_mask": [0, 1, 1, 0, 0, 0, 1],
    }  # fmt: skip
    assert count_rows(rows) == {
        "responses": 3, "greedy": 3, "short": 1, "prompt_tokens": 2 + 4 + 1, "response_tokens": 1 + 3 + 3,
        "questions": 1, "code": 2, "follow_ups": 1,
    }  # fmt: skip


def test_rows_of_a_mix_are_continued_and_measured(tmp_path):
    file = tmp_path / "mix.jsonl"
    append_rows(file, chat_rows())
    assert keep_whole_batches(file, [Batch(0, 3, True)], CHATS) == (1, count_rows(chat_rows()))
    assert longest_row(file) == 7


@pytest.mark.parametrize(
    "mask", [[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1], [0, 1, 1, 0, 2, 0, 1], [0, 1, 1, 0, 0, 1]]
)
def test_a_second_answer_stands_behind_the_first_and_ends_the_row(tmp_path, mask):
    file, rows = tmp_path / "mix.jsonl", chat_rows()
    append_rows(file, [rows[0], {**rows[1], "loss_mask": mask}, rows[2]])
    with pytest.raises(ValueError, match=r"mix\.jsonl:2: expected the greedy response 1 to its prompt"):
        keep_whole_batches(file, [Batch(0, 3, True)], CHATS)


# ---------------------------------------------------------------------- continuing


def test_a_file_cut_at_any_byte_keeps_its_whole_batches(whole, tmp_path):
    """An oracle from the rows themselves: a batch stays if the last byte of its last row is there."""
    content = whole.read_bytes()
    ends, rows = [0], []
    for batch in BATCHES:
        ends.append(ends[-1] + sum(len(json.dumps(row, separators=(",", ":"))) + 1 for row in rows_of(batch)))
    assert ends[-1] == len(content)
    file = tmp_path / "cut.jsonl"
    for length in range(len(content) + 1):
        file.write_bytes(content[:length])
        kept, counts = keep_whole_batches(file, BATCHES, PROMPTS)
        assert kept == sum(end <= length for end in ends[1:])
        assert file.read_bytes() == content[: ends[kept]]
        rows = [row for batch in BATCHES[:kept] for row in rows_of(batch)]
        assert counts == count_rows(rows)


def test_a_file_that_does_not_exist_keeps_nothing(tmp_path):
    assert keep_whole_batches(tmp_path / "new.jsonl", BATCHES, PROMPTS) == (0, {})
    assert not (tmp_path / "new.jsonl").exists()


FOREIGN = {
    "no JSON": "not json",
    "half a row": '{"index":4,"greedy":true,"inp',
    "a list": "[1, 2]",
    "text": '{"text": "hello"}',
    "another index": json.dumps(response_row(5, True, PROMPTS[4], one_turn([1]))),
    "another kind": json.dumps(response_row(4, False, PROMPTS[4], one_turn([1]))),
    "another prompt": json.dumps(response_row(4, True, Prompt([99] * len(PROMPTS[4].input_ids)), one_turn([1]))),
    "a kind": json.dumps({**response_row(4, True, PROMPTS[4], one_turn([1])), "kind": "code"}),
    "two answers": json.dumps(response_row(4, True, PROMPTS[4], two_turns([1], [2], [3]))),
    "no response": json.dumps(response_row(4, True, PROMPTS[4], one_turn([]))),
    "another mask": json.dumps(
        {**response_row(4, True, PROMPTS[4], one_turn([1])), "loss_mask": [1] * (len(PROMPTS[4].input_ids) + 1)}
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_row_that_is_no_response_to_its_prompt_is_named_and_left(whole, case):
    lines = whole.read_text().splitlines()
    lines[4] = FOREIGN[case]
    whole.write_text("\n".join(lines) + "\n")
    before = whole.read_bytes()
    with pytest.raises(ValueError, match=r"whole\.jsonl:5: expected the greedy response 4 to its prompt, found b'"):
        keep_whole_batches(whole, BATCHES, PROMPTS)
    assert whole.read_bytes() == before


def test_more_rows_than_the_recipe_has_are_refused(whole):
    append_rows(whole, rows_of(BATCHES[0])[:1])
    with pytest.raises(ValueError, match="expected the 7 responses of this recipe, found more lines"):
        keep_whole_batches(whole, BATCHES, PROMPTS)


@contextmanager
def file_size_limit(num_bytes: int):
    """No file of this process may grow beyond it: writes become short and then fail, as on a full disk.

    Not a fixture: what reports on tests may write to a file as well, before fixtures end.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_room_nothing_of_a_batch_stays(whole):
    content = whole.read_bytes()
    expected = r"whole\.jsonl: expected room for 3 more responses, found: File too large"
    with pytest.raises(OSError, match=expected), file_size_limit(len(content) + 50):
        append_rows(whole, rows_of(BATCHES[0]))
    assert whole.read_bytes() == content


# ---------------------------------------------------------------------- what is told beside it


RECIPE = {"base": "tiny-python", "output": "a.jsonl", "data": {"path": "x"}, "seed": 0}


def test_what_is_told_is_read_back_by_the_same_recipe_wherever_the_file_lies(whole):
    write_about(whole, {"recipe": RECIPE, "counts": {"short": 0}})
    assert read_about(whole, {**RECIPE, "output": "b.jsonl"}) == {"recipe": RECIPE, "counts": {"short": 0}}
    assert about_file(whole).name == "whole.jsonl.json"
    assert {file.name for file in whole.parent.iterdir()} == {"whole.jsonl", "whole.jsonl.json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "expected seed = 1 as in this recipe, found responses with seed = 0"),
        ({"data": {"path": "y"}}, "data"),
    ],
)
def test_another_recipe_is_refused(whole, change, message):
    write_about(whole, {"recipe": RECIPE})
    with pytest.raises(ValueError, match=message):
        read_about(whole, RECIPE | change)


@pytest.mark.parametrize("content", [None, b""])
def test_where_there_are_no_rows_anything_may_begin(tmp_path, content):
    file = tmp_path / "new.jsonl"
    if content is not None:
        file.write_bytes(content)
    write_about(file, {"recipe": {**RECIPE, "seed": 5}})
    assert read_about(file, RECIPE) is None


def test_rows_of_unknown_origin_and_folders_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match=r"found one without whole\.jsonl\.json"):
        read_about(whole, RECIPE)
    with pytest.raises(ValueError, match="expected no file or responses to continue, found a folder"):
        read_about(tmp_path, RECIPE)
    for broken in ("{", "[]", "{}"):
        about_file(whole).write_text(broken)
        with pytest.raises(ValueError, match=r"whole\.jsonl\.json: expected JSON with the recipe, found"):
            read_about(whole, RECIPE)
