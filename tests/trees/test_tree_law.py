"""Sampled trees follow the target's law exactly: by enumeration of whole steps, and by chi-square."""

from collections import Counter

import pytest
from covering import every_pair
from sampling_oracle import (
    PROMPT,
    WARPERS,
    Z_LIMIT,
    V,
    assert_same_law,
    chi_square_z,
    extended,
    joint_law,
    thin_model,
)
from tiny_models import make_adapter, tiny_model
from tree_laws import BONUS, law_of_step
from tree_samples import random_tree

from pardec.draft_tree import AnyTree, DraftTree, DynamicTree
from pardec.model import SelfSpeculativeModel

# widths and depths of 1 to 3, all mask tokens everywhere
SHAPES = {
    f"{width} wide, {depth} deep": random_tree(7 * width + depth, min(width * depth, 7), width, depth)
    for width in (1, 2, 3)
    for depth in (1, 2, 3)
}


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=V, seed=3)


@pytest.mark.parametrize(("shape", "warper", "is_dynamic"), every_pair(list(SHAPES), list(WARPERS), [False, True]))
def test_a_fused_step_of_a_tree_emits_the_targets_law(toy, shape, warper, is_dynamic, monkeypatch):
    tree, options = SHAPES[shape], WARPERS[warper]
    K, prefix = tree.num_speculative_tokens, [*PROMPT, BONUS]
    expected = joint_law(toy, prefix, K + 1, options)
    for draft_length in range(K + 1):
        law = law_of_step(toy, tree, "fused", options, draft_length, monkeypatch, is_dynamic=is_dynamic)
        assert max(map(len, law)) == draft_length + 1
        assert_same_law(extended(toy, law, prefix, K + 1, options), expected)


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("shape", ["1 wide, 2 deep", "2 wide, 3 deep", "3 wide, 2 deep"])
def test_a_two_pass_round_of_a_tree_emits_the_targets_law(toy, shape, is_dynamic, monkeypatch):
    tree, options, exact = SHAPES[shape], WARPERS["all"], 1
    K, prefix = tree.num_speculative_tokens, [*PROMPT, BONUS]
    law = law_of_step(toy, tree, "two_pass", options, K, monkeypatch, exact=exact, is_dynamic=is_dynamic)
    expected = joint_law(toy, [*prefix, exact], K + 1, options)
    assert_same_law(
        extended(toy, law, prefix, K + 2, options), {(exact, *tokens): share for tokens, share in expected.items()}
    )


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("eos", range(V))
def test_a_walk_that_meets_eos_emits_nothing_behind_it_and_keeps_its_law(toy, eos, is_dynamic, monkeypatch):
    tree, options, prefix = SHAPES["3 wide, 3 deep"], WARPERS["temperature"], [*PROMPT, BONUS]
    K = tree.num_speculative_tokens
    found: dict[tuple[int, ...], float] = {}
    law = law_of_step(toy, tree, "fused", options, K, monkeypatch, eos=[eos], is_dynamic=is_dynamic)
    for tokens, share in law.items():
        rest = {(): 1.0} if eos in tokens else joint_law(toy, prefix + list(tokens), K + 1 - len(tokens), options)
        for more, probability in rest.items():
            whole = (*tokens, *more)
            key = whole[: whole.index(eos) + 1] if eos in whole else whole
            found[key] = found.get(key, 0.0) + share * probability
    expected: dict[tuple[int, ...], float] = {}
    for tokens, share in joint_law(toy, prefix, K + 1, options).items():
        key = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        expected[key] = expected.get(key, 0.0) + share
    assert_same_law(found, expected)


# ---------------------------------------------------------------------- the public API, by chi-square


SAMPLES = 6000
DEEP = DraftTree((0, 0, 1, 1, 2), (0, 1, 0, 1, 2), (2, 1, 2, 0, 2, 1))
DRAWN = DynamicTree((2, 1, 2, 0, 2, 1))


@pytest.fixture(scope="module")
def thin():
    return thin_model()


def sample_counts(model, mode: str, warper: dict, tree: AnyTree = DEEP) -> Counter:
    out = model.generate(
        [PROMPT], max_new_tokens=4, mode=mode, seed=0, num_return_sequences=SAMPLES, tree=tree, **warper
    )
    return Counter(tuple(tokens) for tokens in out.token_ids)


@pytest.mark.parametrize("tree", [DEEP, DRAWN], ids=["constant", "dynamic"])
@pytest.mark.parametrize("head_width", [0, 4])
@pytest.mark.parametrize("mode", ["two_pass", "fused"])
@pytest.mark.parametrize("warper", ["temperature", "all"])
def test_generate_with_a_tree_samples_the_targets_law(thin, mode, warper, head_width, tree):
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, 2, lora_rank=2, head_width=head_width, shortlist=V))
    counts = sample_counts(ours, mode, WARPERS[warper], tree)
    assert chi_square_z(counts, joint_law(thin, PROMPT, 4, WARPERS[warper])) < Z_LIMIT


def test_the_chi_square_notices_a_tree_that_is_chosen_by_what_was_drawn(thin, monkeypatch):
    """Where nodes follow the draws, the law is lost: a walk must not accept what it was made for."""
    from pardec.trees import tree_steps

    walk = tree_steps.walk

    def lossy(tables, target_tokens, node_tokens, draft_length):
        # where the first node was not drawn, it is taken all the same
        return walk(tables, target_tokens.where(target_tokens > 1, node_tokens[:, :1]), node_tokens, draft_length)

    monkeypatch.setattr(tree_steps, "walk", lossy)
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, 2, lora_rank=2))
    counts = sample_counts(ours, "fused", WARPERS["temperature"])
    assert chi_square_z(counts, joint_law(thin, PROMPT, 4, WARPERS["temperature"])) > 2 * Z_LIMIT
