"""Trees through what users call: generate, stream, the door of transformers, tuned.json, and what is refused."""

import json

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from tiny_models import make_adapter, tiny_model
from transformers import GenerationConfig
from tree_samples import BRANCHING, DYNAMIC, TREES

from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import TunedChoice, read_tuned, weights_of, write_tuned
from pardec.decoding.kept_cache import KeptCache
from pardec.draft_tree import DraftTree, DynamicTree
from pardec.layout import full_blocks
from pardec.model import SelfSpeculativeModel

V, K, NEW = 61, 3, 20
ALL = TREES | DYNAMIC


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def references(llama):
    return [plain_generate(llama, row, NEW) for row in prompts(V)]


@pytest.fixture(scope="module")
def ours(llama):
    return SelfSpeculativeModel(llama, None, make_adapter(llama, K, lora_rank=2, head_width=6, shortlist=8))


@pytest.mark.parametrize("mode", [None, "fused", "two_pass"])
@pytest.mark.parametrize("use_head", [None, False])
@pytest.mark.parametrize("tree", ALL.values(), ids=ALL)
def test_generate_gives_generates_tokens(ours, references, tree, use_head, mode):
    out = ours.generate(prompts(V), max_new_tokens=NEW, tree=tree, use_head=use_head, mode=mode)
    assert out.token_ids == references
    assert all(drafted <= tree.num_speculative_tokens for one in out.counts for drafted in one.drafted)
    assert all(a <= d for one in out.counts for a, d in zip(one.accepted, one.drafted, strict=True))


def test_of_few_tokens_more_stand_on_a_tree_than_on_its_first_branch():
    base = tiny_model("llama", vocab_size=7)
    model = SelfSpeculativeModel(base, None, make_adapter(base, 2))
    wide = DraftTree((0, 0, 0, 1, 1, 2), (0, 1, 2, 0, 1, 0), (2,) * 7)
    lengths = [
        model.generate(prompts(7), max_new_tokens=60, tree=tree).stats.mean_acceptance_length
        for tree in (DraftTree.chain((2, 2, 2)), wide)
    ]
    chain = model.generate(prompts(7), max_new_tokens=60, num_speculative_tokens=2).stats.mean_acceptance_length
    assert lengths[0] == chain
    assert lengths[1] > 1.1 * chain


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_stream_gives_what_generate_gives(ours, mode):
    row = prompts(V)[0]
    stream = ours.stream(row, max_new_tokens=NEW, tree=BRANCHING, mode=mode)
    chunks = list(stream)
    out = ours.generate([row], max_new_tokens=NEW, tree=BRANCHING, mode=mode)
    assert [token for chunk in chunks for token in chunk.token_ids] == out.token_ids[0]


def test_what_a_stream_keeps_for_the_next_is_what_stood_of_its_trees():
    """Nodes off the first branch have moved to where the next call looks for them."""
    few = tiny_model("llama", vocab_size=7)
    model = SelfSpeculativeModel(few, None, make_adapter(few, 3, lora_rank=2))
    kept, prompt = KeptCache(), prompts(7)[0]
    for _ in range(3):
        stream = model.stream(prompt, max_new_tokens=9, tree=BRANCHING, kept=kept)
        ids = [token for chunk in stream for token in chunk.token_ids]
        # `generate` takes 0 for padding
        assert ids == model.generate([prompt], max_new_tokens=9, mode="plain").token_ids[0]
        prompt = [*prompt, *ids, 3, 1]
    assert kept.num_reused > 20


def test_the_door_of_transformers_takes_a_tree_and_its_processors_and_stops(llama, ours):
    row = torch.tensor([prompts(V)[0]])
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    expected = llama.generate(row, generation_config=config)
    assert torch.equal(llama.generate(row, generation_config=config, custom_generate=ours, tree=BRANCHING), expected)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, repetition_penalty=1.7)
    with pytest.warns(UserWarning, match="RepetitionPenalty"):
        found = llama.generate(row, generation_config=config, custom_generate=ours, tree=BRANCHING)
    assert torch.equal(found, llama.generate(row, generation_config=config))


def test_a_captured_call_and_its_engine_go_by_the_tree(ours):
    drafting = [ours.engines.drafting(None, None, None, None, tree=tree) for tree in ALL.values()]
    assert len(set(map(repr, (one.tree for one in drafting)))) == len(ALL)
    assert [one.block_lengths for one in drafting] == [full_blocks(t.num_speculative_tokens) for t in ALL.values()]


REFUSED = [
    ({"tree": BRANCHING, "mode": "plain"}, "tree: expected mode fused or two_pass, and no num_speculative_tokens"),
    ({"tree": BRANCHING, "num_speculative_tokens": 3}, "tree: expected mode fused or two_pass, and no num_speculative"),
    ({"tree": BRANCHING, "block_lengths": (1, 1)}, "block_lengths: expected (3, 3, 3, 3) beside a tree of depth 3, f"),
    ({"tree": (1, 2)}, "tree: expected a DraftTree or a DynamicTree, found (1, 2)"),
    (
        {"tree": DraftTree.chain((4,) * 5)},
        "tree: expected a depth of at most 3, the number of distinct mask tokens that the adapter was trained with, "
        "found 4",
    ),
    (
        {"tree": DraftTree((0,), (8,), (1, 1))},
        "tree: expected ranks below 8, the tokens on the sampler head's shortlist, found 8",
    ),
    (
        {"tree": DynamicTree((1,) * 10)},
        "tree: expected at most 8 nodes of the 8 tokens on the sampler head's shortlist, found 9",
    ),
    (
        {"tree": DynamicTree((1,) * 63), "use_head": False},
        "tree: expected at most 61 nodes of the 61 tokens of the vocabulary, found 62",
    ),
    (
        {"tree": DynamicTree((4,) * 5)},
        "tree: expected a depth of at most 3, the number of distinct mask tokens that the adapter was trained with, "
        "found 4",
    ),
    (
        {"tree": DraftTree((0,), (61,), (1, 1)), "use_head": False},
        "tree: expected ranks below 61, the tokens of the vocabulary, found 61",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_trees_that_cannot_be_drafted_are_refused_in_one_line(ours, options, message):
    with pytest.raises(ValueError) as error:
        ours.generate([[1, 2]], max_new_tokens=4, **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_tree_needs_an_adapter_and_shared_masks_go_to_any_depth(llama):
    with pytest.raises(ValueError, match="tree: expected an adapter that drafts its nodes, found none"):
        SelfSpeculativeModel(llama, None, None).generate([[1, 2]], max_new_tokens=4, tree=BRANCHING)
    shared = SelfSpeculativeModel(llama, None, make_adapter(llama, 2, mask_sharing="shared"))
    row = prompts(V)[0]
    out = shared.generate([row], max_new_tokens=NEW, tree=DraftTree.chain((5,) * 6))
    assert out.token_ids == [plain_generate(llama, row, NEW)]


# ---------------------------------------------------------------------- what tuning chose


def choice_of(directory, **values) -> TunedChoice:
    facts = {"device": "a card", "dtype": "float32", "compile": False, "block_lengths": (3, 3, 3, 3)}
    facts |= {"weights": weights_of(directory), "ms_per_step": 1.0, "predicted_tokens_per_second": 2.0}
    facts |= {"measured_tokens_per_second": 2.0, "plain_tokens_per_second": 1.0, "conditional_acceptance": [0.5]}
    return TunedChoice(**{**facts, **values})


@pytest.mark.parametrize("tree", [BRANCHING, DYNAMIC["dynamic"]], ids=["constant", "dynamic"])
def test_a_chosen_tree_is_kept_and_read_and_used(tmp_path, llama, ours, tree):
    save_adapter(ours.adapter, tmp_path / "one")
    choice = choice_of(tmp_path / "one", tree=tree)
    write_tuned(tmp_path / "one", choice)
    (found,) = read_tuned(tmp_path / "one", "a card", "float32")
    assert found == choice
    assert found is not None
    assert found.tree == tree
    model = SelfSpeculativeModel(llama, None, ours.adapter)
    model.tuned = found
    assert model.engines.drafting(None, None, None, None).tree == tree
    assert model.engines.drafting("fused", None, None, None).tree == tree
    assert model.engines.drafting("fused", 2, None, None).tree is None
    assert model.engines.drafting("two_pass", None, None, None).tree is None
    row = prompts(V)[0]
    assert model.generate([row], max_new_tokens=NEW).token_ids == [plain_generate(llama, row, NEW)]


def test_a_tree_in_a_file_that_is_none_is_told_with_the_files_name(tmp_path, ours):
    save_adapter(ours.adapter, tmp_path / "one")
    path = write_tuned(tmp_path / "one", choice_of(tmp_path / "one", tree=BRANCHING))
    content = json.loads(path.read_text())
    content["choices"][0]["tree"]["parents"][0] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tuned.json: .*expected a parent from 0 to 0 for node 1, found 5; remove it"):
        read_tuned(tmp_path / "one", "a card", "float32")
    path.write_text(json.dumps(content | {"choices": [content["choices"][0] | {"tree": {"runs": [3, "x", 1, 1]}}]}))
    with pytest.raises(ValueError, match=r"tuned.json: choices.0.tree.runs.1: expected .*, found 'x'; remove it"):
        read_tuned(tmp_path / "one", "a card", "float32")


def test_block_lengths_beside_a_tree_say_how_deep_it_is(tmp_path, ours):
    save_adapter(ours.adapter, tmp_path / "one")
    with pytest.raises(ValueError, match="block_lengths: expected those of the full chain as long as the tree is deep"):
        choice_of(tmp_path / "one", tree=BRANCHING, block_lengths=(2, 2, 2))
