"""Sampled trees with copied tokens beside them follow the target's law: whole steps enumerated, and by chi-square."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from copying_oracle import copied
from covering import every_pair
from sampling_oracle import WARPERS, Z_LIMIT, V, chi_square_z, joint_law
from tiny_models import make_adapter, tiny_model
from tree_laws import BONUS, law_of_step
from tree_samples import random_tree, walked

from pardec.draft_tree import AnyTree, DraftTree, DynamicTree
from pardec.model import SelfSpeculativeModel
from pardec.trees import copied_branch

# "4 2" has been followed by 1 3 0, and "2 1" by 3 0 4; behind "0 2" nothing was
PROMPT = [4, 2, 1, 3, 0, 4]
PREFIX = [*PROMPT, BONUS]
SHAPES = {
    f"{width} wide, {depth} deep": random_tree(7 * width + depth, min(width * depth, 7), width, depth)
    for width in (1, 2, 3)
    for depth in (1, 2, 3)
}
# a path to its depth, and another child of the root
ALONG = DraftTree((0, 0, 1, 3), (1, 0, 0, 1), (3, 1, 2, 0, 1))


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=V, seed=3)


@pytest.fixture(scope="module")
def law_of(toy):
    """The target's law of so many tokens behind the prompt and the bonus token, worked out once."""
    found: dict[tuple[str, int], dict] = {}

    def law(warper: str, length: int) -> dict:
        if (warper, length) not in found:
            found[warper, length] = joint_law(toy, PREFIX, length, WARPERS[warper])
        return found[warper, length]

    return law


@pytest.mark.parametrize(("shape", "num_copies", "is_dynamic"), every_pair(list(SHAPES), [1, 2, 3], [False, True]))
def test_a_fused_step_of_a_tree_with_copies_emits_the_targets_law(
    toy, law_of, shape, num_copies, is_dynamic, monkeypatch
):
    tree, warper = SHAPES[shape], "all" if num_copies == 2 else "temperature"
    longest = max(tree.num_speculative_tokens, num_copies) + 1
    options = {"is_dynamic": is_dynamic, "prompt": PROMPT, "copy_tokens": num_copies}
    for draft_length in range(tree.num_speculative_tokens + 1):
        law = law_of_step(toy, tree, "fused", WARPERS[warper], draft_length, monkeypatch, **options)
        assert max(map(len, law)) == max(draft_length, num_copies) + 1
        assert_ends_as_the_target_would(law, law_of(warper, longest))


def assert_ends_as_the_target_would(found: dict[tuple[int, ...], float], expected: dict) -> None:
    """Steps that emit these tokens and no more do it as often as the target begins so, and each does one of it."""
    begins: Counter = Counter()
    for tokens, probability in expected.items():
        for end in range(1, len(tokens) + 1):
            begins[tokens[:end]] += probability
    assert not any(tokens[:end] in found for tokens in found for end in range(len(tokens)))
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    for tokens, probability in found.items():
        assert probability == pytest.approx(begins[tokens], abs=2e-6), tokens


@pytest.mark.parametrize(
    ("nodes", "is_dynamic", "warper"),
    every_pair([[1, 2, 3, 0], [1, 2, 3, 2], [1, 2, 0, 0], [2, 1, 3, 0]], [False, True], list(WARPERS)),
    ids=str,
)
def test_copies_that_are_nodes_as_well_keep_the_law_wherever_the_two_part(
    toy, law_of, nodes, is_dynamic, warper, monkeypatch
):
    copies = copied(PREFIX, 4)
    assert copies == [1, 3, 0, 4]
    target = [copies[depth] for depth in ALONG.depths]  # the target goes on with what is copied
    for draft_length, num_copies in itertools.product(range(4), (1, 2, 4)):
        given = {"is_dynamic": is_dynamic, "prompt": PROMPT, "copy_tokens": num_copies, "nodes": nodes}
        law = law_of_step(toy, ALONG, "fused", WARPERS[warper], draft_length, monkeypatch, **given)
        num_accepted = max(len(walked(ALONG, target, nodes, draft_length)) - 1, num_copies)
        assert tuple(copies[:num_accepted]) in {tokens[:-1] for tokens in law}
        assert_ends_as_the_target_would(law, law_of(warper, 5))


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("shape", ["1 wide, 2 deep", "2 wide, 3 deep", "3 wide, 2 deep"])
def test_a_two_pass_round_of_a_tree_with_copies_emits_the_targets_law(toy, shape, is_dynamic, monkeypatch):
    tree, options, exact, num_copies = SHAPES[shape], WARPERS["all"], 1, 3
    longest = max(tree.num_speculative_tokens, num_copies) + 1
    given = {"exact": exact, "is_dynamic": is_dynamic, "prompt": PROMPT, "copy_tokens": num_copies}
    assert copied([*PREFIX, exact], num_copies) == [3, 0, 4]
    law = law_of_step(toy, tree, "two_pass", options, tree.num_speculative_tokens, monkeypatch, **given)
    assert max(map(len, law)) == longest + 1
    expected = joint_law(toy, [*PREFIX, exact], longest, options)
    assert {tokens[0] for tokens in law} == {exact}
    assert_ends_as_the_target_would({tokens[1:]: share for tokens, share in law.items()}, expected)


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("eos", range(V))
def test_eos_among_nodes_or_copies_ends_a_step_and_keeps_its_law(toy, law_of, eos, is_dynamic, monkeypatch):
    tree, options, num_copies = SHAPES["2 wide, 2 deep"], WARPERS["temperature"], 3
    given = {"eos": [eos], "is_dynamic": is_dynamic, "prompt": PROMPT, "copy_tokens": num_copies}
    law = law_of_step(toy, tree, "fused", options, 2, monkeypatch, **given)
    assert any(tokens[-1] == eos and len(tokens) < 4 for tokens in law)
    assert not any(eos in tokens[:-1] for tokens in law)
    assert_ends_as_the_target_would(law, law_of("temperature", 4))


# ---------------------------------------------------------------------- the public API, by chi-square


SAMPLES = 4000
DEEP = DraftTree((0, 0, 1, 1, 2), (0, 1, 0, 1, 2), (2, 1, 2, 0, 2, 1))
DRAWN = DynamicTree((2, 1, 2, 0, 2, 1))


def sampled(model, mode: str, warper: str, tree: AnyTree, **options) -> tuple[Counter, int]:
    """Counts of four tokens, and accepted copies."""
    asked = {"max_new_tokens": 4, "mode": mode, "seed": 0, "num_return_sequences": SAMPLES, "tree": tree}
    out = model.generate([PROMPT], copy_tokens=3, **asked, **WARPERS[warper], **options)
    return Counter(map(tuple, out.token_ids)), out.stats.num_accepted_copies


@pytest.mark.parametrize(
    ("way", "warper", "is_dynamic"),
    every_pair([("fused", 0), ("fused", 4), ("two_pass", 4)], ["temperature", "all"], [False, True]),
)
def test_generate_with_a_tree_and_copies_samples_the_targets_law(toy, way, warper, is_dynamic):
    (mode, head_width), tree = way, DRAWN if is_dynamic else DEEP
    ours = SelfSpeculativeModel(toy, None, make_adapter(toy, 2, lora_rank=2, head_width=head_width, shortlist=V))
    blocks = {"block_lengths": (2, 2, 2, 1, 0, 2)} if head_width and mode == "fused" else {}
    counts, num_copied = sampled(ours, mode, warper, tree, **blocks)
    assert num_copied > 100
    assert chi_square_z(counts, joint_law(toy, PROMPT, 4, WARPERS[warper])) < Z_LIMIT


def test_the_chi_square_notices_a_copy_that_is_taken_unseen_beside_a_tree(toy, monkeypatch):
    verify = copied_branch.verify_copies

    def credulous(verdict, target_tokens, candidates, length):
        tokens, reached = verdict.tokens.clone(), (verdict.num_accepted == 0) & (length > 0)
        tokens[reached, 0] = candidates[reached, 0]
        return verify(replace(verdict, tokens=tokens), target_tokens, candidates, length)

    monkeypatch.setattr(copied_branch, "verify_copies", credulous)
    ours = SelfSpeculativeModel(toy, None, make_adapter(toy, 2, lora_rank=2))
    counts, _ = sampled(ours, "fused", "temperature", DEEP)
    assert chi_square_z(counts, joint_law(toy, PROMPT, 4, WARPERS["temperature"])) > 2 * Z_LIMIT
