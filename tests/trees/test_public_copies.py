"""Trees with copied tokens beside them through what users call: exact in every form of call, tuned, refused."""

import pytest
import torch
from data_samples import REPEATING
from greedy_oracle import plain_generate
from tiny_models import make_adapter
from transformers import GenerationConfig
from tree_samples import BRANCHING, DYNAMIC, TREES

from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import TunedChoice, read_tuned, weights_of, write_tuned
from pardec.decoding.kept_cache import KeptCache
from pardec.draft_tree import AnyTree
from pardec.layout import full_blocks
from pardec.model import SelfSpeculativeModel
from pardec.tuning.choice import Way, tree_way, with_copies
from pardec.tuning.report import describe

K, L, NEW = 3, 6, 40
SOME = {name: {**TREES, **DYNAMIC}[name] for name in ("branching", "crooked", "chain", "dynamic")}


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text).input_ids for text in REPEATING]


@pytest.fixture(scope="module")
def expected(tiny_base, prompts):
    return [plain_generate(tiny_base, prompt, NEW) for prompt in prompts]


@pytest.fixture(scope="module")
def ours(tiny_base, tokenizer):
    return SelfSpeculativeModel(tiny_base, tokenizer, make_adapter(tiny_base, K, lora_rank=2, head_width=6))


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
@pytest.mark.parametrize("tree", SOME.values(), ids=SOME)
def test_ragged_batches_give_generates_tokens_and_copies_are_counted_apart(ours, prompts, expected, tree, mode):
    out = ours.generate(prompts, max_new_tokens=NEW, tree=tree, mode=mode, copy_tokens=L)
    assert out.token_ids == expected
    assert out.stats.num_accepted_copies > NEW / 2
    per_step = 2 if mode == "two_pass" else 1
    for counts in out.counts:
        assert all(a <= c for a, c in zip(counts.accepted_copies, counts.copied, strict=True))
        assert all(a <= d <= tree.num_speculative_tokens for a, d in zip(counts.accepted, counts.drafted, strict=True))
        emitted = 1 + sum(counts.accepted_in_all) + per_step * len(counts.accepted)
        assert NEW <= emitted <= NEW + max(K, L) + per_step
    alone = ours.generate(prompts, max_new_tokens=NEW, tree=tree, mode=mode)
    assert out.stats.mean_acceptance_length > alone.stats.mean_acceptance_length


@pytest.mark.parametrize("behind", [(), (2, 0, 1), (2,) * L])
@pytest.mark.parametrize("tree", SOME.values(), ids=SOME)
def test_drafts_behind_copies_are_asked_for_by_their_numbers(ours, prompts, expected, tree, behind):
    blocks = (*full_blocks(tree.num_speculative_tokens), *behind)
    out = ours.generate(prompts, max_new_tokens=NEW, tree=tree, copy_tokens=L, block_lengths=blocks)
    assert out.token_ids == expected
    drafted = {
        after
        for counts in out.counts
        for copies, after in zip(counts.accepted_copies, counts.drafted[1:], strict=False)
        if copies
    }
    assert drafted
    assert drafted <= ({*behind, 0} if len(behind) < L else {2})


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
@pytest.mark.parametrize("tree", SOME.values(), ids=SOME)
def test_several_sequences_of_a_prompt_are_those_of_one(ours, prompts, expected, tree, mode):
    asked = {"max_new_tokens": NEW, "mode": mode, "tree": tree, "copy_tokens": L}
    out = ours.generate(prompts[:2], num_return_sequences=2, **asked)
    assert out.token_ids == [tokens for tokens in expected[:2] for _ in range(2)]


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
@pytest.mark.parametrize("tree", SOME.values(), ids=SOME)
def test_a_stream_brings_what_generate_brings_and_tells_copies_from_drafts(ours, prompts, tree, mode):
    asked = {"max_new_tokens": NEW, "mode": mode, "tree": tree, "copy_tokens": L}
    out = ours.generate(prompts[1], **asked)
    chunks = list(ours.stream(prompts[1], **asked))
    assert [token for chunk in chunks for token in chunk.token_ids] == out.token_ids[0]
    assert [chunk.num_accepted_tokens for chunk in chunks[1:-1]] == out.counts[0].accepted[:-1]
    assert [chunk.num_copied_tokens for chunk in chunks[1:-1]] == out.counts[0].accepted_copies[:-1]
    assert sum(chunk.num_copied_tokens for chunk in chunks) > 10


def test_what_a_stream_keeps_for_the_next_is_what_stood_of_trees_and_copies(ours, prompts, tiny_base):
    kept, prompt = KeptCache(), prompts[1]
    for _ in range(3):
        stream = ours.stream(prompt, max_new_tokens=9, tree=BRANCHING, copy_tokens=L, kept=kept)
        ids = [token for chunk in stream for token in chunk.token_ids]
        assert ids == plain_generate(tiny_base, prompt, 9)
        prompt = [*prompt, *ids, *prompts[1][:4]]
    assert kept.num_reused > 20


def test_the_door_of_transformers_takes_both_and_its_processors(tiny_base, ours, prompts):
    ids = torch.tensor([prompts[1]])
    asked = {"custom_generate": ours, "tree": BRANCHING, "copy_tokens": L}
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    expected = tiny_base.generate(ids, generation_config=config)
    assert torch.equal(tiny_base.generate(ids, generation_config=config, **asked), expected)
    config = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0, repetition_penalty=1.2)
    with pytest.warns(UserWarning, match="row by row"):
        found = tiny_base.generate(ids, generation_config=config, **asked)
    assert torch.equal(found, tiny_base.generate(ids, generation_config=config))


def test_eos_among_copies_ends_a_text(ours, tiny_base, prompts, expected):
    for eos in dict.fromkeys(expected[1][3:9]):
        tiny_base.generation_config.eos_token_id = eos
        try:
            cut = plain_generate(tiny_base, prompts[1], NEW, eos_token_id=eos)
            for tree in SOME.values():
                assert ours.generate(prompts[1], max_new_tokens=NEW, tree=tree, copy_tokens=L).token_ids == [cut]
        finally:
            tiny_base.generation_config.eos_token_id = 0


REFUSED = [
    ({"copy_tokens": 129}, "copy_tokens: expected an integer from 0 to 128, found 129"),
    (
        {"block_lengths": (1, 1)},
        "block_lengths: expected (3, 3, 3, 3) beside a tree of depth 3, found (1, 1)",
    ),
    (
        {"copy_tokens": 2, "block_lengths": (3, 3, 3, 3, 4, 0)},
        "block_lengths: expected (3, 3, 3, 3) beside a tree of depth 3 and up to 2 numbers from 0 to 3 behind its "
        "copied tokens, found (3, 3, 3, 3, 4, 0)",
    ),
    ({"copy_tokens": 1, "block_lengths": (3, 3, 3, 3, 0, 0)}, "block_lengths: expected (3, 3, 3, 3) beside a tree of"),
    ({"copy_tokens": 1, "block_lengths": 3}, "block_lengths: expected (3, 3, 3, 3) beside a tree of depth 3 and up to"),
    (
        {"mode": "two_pass", "copy_tokens": 1, "block_lengths": (3, 3, 3, 3, 1)},
        "block_lengths: expected (3, 3, 3, 3) beside a tree of depth 3, found (3, 3, 3, 3, 1)",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_copied_beside_a_tree_is_refused_in_one_line(ours, options, message):
    with pytest.raises(ValueError) as error:
        ours.generate([[1, 2]], max_new_tokens=4, tree=BRANCHING, **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- what tuning chose


def choice_of(directory, tree: AnyTree, **values) -> TunedChoice:
    facts = {"device": "a card", "dtype": "float32", "compile": False, "block_lengths": (3,) * 4}
    facts |= {"weights": weights_of(directory), "ms_per_step": 1.0, "predicted_tokens_per_second": 2.0}
    facts |= {"measured_tokens_per_second": 2.0, "plain_tokens_per_second": 1.0, "conditional_acceptance": [0.5]}
    return TunedChoice(**{**facts, "tree": tree, **values})


@pytest.mark.parametrize("tree", [BRANCHING, DYNAMIC["dynamic"]], ids=["constant", "dynamic"])
@pytest.mark.parametrize(("mode", "behind"), [("fused", (0, 0)), ("fused", (3, 3)), ("two_pass", ())])
def test_a_chosen_tree_with_copies_is_kept_and_read_and_used(tmp_path, ours, prompts, expected, tree, mode, behind):
    save_adapter(ours.adapter, tmp_path / "one")
    choice = choice_of(tmp_path / "one", tree, mode=mode, copy_tokens=2, block_lengths=(*(3,) * 4, *behind))
    write_tuned(tmp_path / "one", choice)
    (found,) = read_tuned(tmp_path / "one", "a card", "float32")
    assert found == choice
    model = SelfSpeculativeModel(ours.base_model, None, ours.adapter)
    model.tuned = found
    for asked, copies, blocks in (
        ({}, 2, (*(3,) * 4, *behind)),
        ({"copy_tokens": 2}, 2, (*(3,) * 4, *behind)),
        ({"copy_tokens": 0}, 0, (3,) * 4),
        ({"copy_tokens": 4}, 4, (*(3,) * 4, *(0,) * (4 if mode == "fused" else 0))),
    ):
        drafting = model.engines.drafting(None, None, None, None, **asked)
        assert (drafting.mode, drafting.tree, drafting.copy_tokens) == (mode, tree, copies)
        assert drafting.block_lengths == blocks
    assert model.engines.drafting("fused", 2, None, None, copy_tokens=2).tree is None
    assert model.generate(prompts, max_new_tokens=NEW).token_ids == expected
    assert "2 copied tokens" in describe(found)
    assert ("3 drafts behind each" in describe(found)) == (behind == (3, 3))


def test_block_lengths_of_a_chosen_tree_count_its_copies(tmp_path, ours):
    save_adapter(ours.adapter, tmp_path / "one")
    with pytest.raises(ValueError, match=r"block_lengths: expected K \+ 1 \+ 2 numbers from 0 to K"):
        choice_of(tmp_path / "one", BRANCHING, copy_tokens=2)
    with pytest.raises(ValueError, match="block_lengths: expected those of the full chain as long as the tree is deep"):
        choice_of(tmp_path / "one", BRANCHING, copy_tokens=2, block_lengths=(3, 3, 1, 3, 0, 0))


@pytest.mark.parametrize("tree", [BRANCHING, DYNAMIC["dynamic"]], ids=["constant", "dynamic"])
def test_a_way_with_copies_has_the_rows_that_its_steps_have(ours, tree):
    fused, two_pass = tree_way("fused", tree), tree_way("two_pass", tree)
    for way, rows in (
        (with_copies(fused, 4), tree.num_rows + 4),
        (with_copies(fused, 4, 2), tree.num_rows + 4 + 8),
        (with_copies(two_pass, 4), 1 + 3 + 1 + tree.num_nodes + 4),
        (with_copies(Way("two_pass", (3,) * 4), 4), 1 + 3 + 1 + 3 + 4),
    ):
        assert way.num_rows == rows
        assert way.num_rows_without_copies == replaced(way).num_rows
        blocks = way.block_lengths if way.mode == "fused" else None
        drafting = ours.engines.drafting(
            way.mode, 3 if way.tree is None else None, blocks, None, copy_tokens=4, tree=way.tree
        )
        assert drafting.block_lengths == way.block_lengths


def replaced(way: Way) -> Way:
    """The way without its copies."""
    return Way(way.mode, way.block_lengths[:4], way.use_head, 0, way.tree)
