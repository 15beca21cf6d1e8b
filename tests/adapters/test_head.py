"""The sampler head's arithmetic and drafting in turn, against loops over the whole vocabulary."""

import math
from types import SimpleNamespace

import pytest
import torch
from sampling_oracle import WARPERS, warped
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import EpsilonLogitsWarper, EtaLogitsWarper, TypicalLogitsWarper

from pardec.adapters.head import SamplerHead
from pardec.decoding import drafting
from pardec.decoding.drafting import HeadDrafter, draft_from_pairs, draft_in_turn
from pardec.decoding.sampling import TokenLaw, make_warpers

B, K, V, H, D, W = 3, 4, 17, 6, 5, 7


def random_head(seed: int = 0) -> SamplerHead:
    head = SamplerHead(H, D, W).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return head


@pytest.fixture(params=[draft_in_turn, draft_from_pairs])
def draft(request):
    """Both ways to draft are held against the same loops."""
    return request.param


@pytest.fixture
def block():
    """Logits and hidden states of B blocks, bonus tokens, both tables of embeddings."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "logits": randn(B, K, V) * 2,
        "hidden": randn(B, K, H) * 50,
        "bonus": torch.tensor([3, 0, 16]),
        "inputs": randn(V, D) * 0.01,
        "outputs": randn(V, H),
    }


def run(draft, head, law, block, shortlist):
    embed, outputs = torch.nn.Embedding.from_pretrained(block["inputs"]), block["outputs"]
    return draft(head, law, block["logits"], block["hidden"], block["bonus"], embed, outputs, shortlist)


def correction(head, hidden: torch.Tensor, previous: torch.Tensor, output: torch.Tensor) -> float:
    """What the head adds to the logit of one token, number by number."""
    vectors = []
    for x in (hidden.tolist(), previous.tolist()):
        size = math.sqrt(sum(v * v for v in x) / len(x))
        vectors += [v / size for v in x]
    inner = []
    for weights, bias in zip(head.inner.weight.tolist(), head.inner.bias.tolist(), strict=True):
        z = sum(w * v for w, v in zip(weights, vectors, strict=True)) + bias
        inner.append(z / (1 + math.exp(-z)))
    outer = [sum(w * v for w, v in zip(weights, inner, strict=True)) for weights in head.outer.weight.tolist()]
    return sum(a * b for a, b in zip(outer, output.tolist(), strict=True))


def scores_of(head, block, b: int, j: int, previous: int, shortlist: int) -> list[float]:
    """The corrected logits of one mask row; -inf for tokens that are not on its shortlist."""
    logits = block["logits"][b, j].tolist()
    listed = sorted(range(V), key=lambda token: -logits[token])[:shortlist]
    added = [
        correction(head, block["hidden"][b, j], block["inputs"][previous], block["outputs"][token]) for token in listed
    ]
    scores = [-math.inf] * V
    for token, plus in zip(listed, added, strict=True):
        scores[token] = logits[token] + plus
    return scores


def test_a_new_head_corrects_nothing():
    head = SamplerHead(H, D, W)
    assert head(torch.randn(B, K, H), torch.randn(B, K, D)).abs().max() == 0
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_the_correction_is_that_of_two_layers_over_both_inputs(block):
    head, previous = random_head(), block["inputs"][block["bonus"]]
    vectors = head(block["hidden"][:, 0], previous)
    assert vectors.shape == (B, H)
    for b in range(B):
        for token in range(V):
            expected = correction(head, block["hidden"][b, 0], previous[b], block["outputs"][token])
            assert float(vectors[b] @ block["outputs"][token]) == pytest.approx(expected, rel=1e-6)


def test_both_inputs_count_whatever_their_scale(block):
    head, previous = random_head(), block["inputs"][block["bonus"]]
    usual = head(block["hidden"][:, 0], previous)
    torch.testing.assert_close(head(block["hidden"][:, 0] * 100, previous * 1000), usual, rtol=1e-5, atol=1e-5)
    assert (head(block["hidden"][:, 1], previous) - usual).abs().max() > 0.1
    assert (head(block["hidden"][:, 0], previous.roll(1, 0)) - usual).abs().max() > 0.1


@pytest.mark.parametrize("shortlist", [1, 3, V, V + 5])
def test_greedy_drafts_are_those_of_a_loop_over_the_vocabulary(block, shortlist, draft):
    head = random_head()
    tokens, q = run(draft, head, TokenLaw(greedy=True), block, shortlist)
    assert q is None
    for b in range(B):
        previous = int(block["bonus"][b])
        for j in range(K):
            scores = scores_of(head, block, b, j, previous, shortlist)
            previous = max(range(V), key=scores.__getitem__)
            assert int(tokens[b, j]) == previous
    if shortlist == 3:
        assert (tokens != block["logits"].argmax(dim=-1)).any()  # the head makes a difference


@pytest.mark.parametrize("shortlist", [1, 3, V])
@pytest.mark.parametrize("warper", list(WARPERS))
def test_sampled_drafts_come_with_the_law_that_they_were_drawn_from(block, warper, shortlist, draft):
    head, options = random_head(), WARPERS[warper]
    law = TokenLaw(False, tuple(make_warpers(**options)), torch.Generator().manual_seed(2))
    tokens, q = run(draft, head, law, block, shortlist)
    assert (q.shape, q.dtype) == ((B, K, V), torch.float32)
    for b in range(B):
        previous = int(block["bonus"][b])
        for j in range(K):
            expected = warped(torch.tensor(scores_of(head, block, b, j, previous, shortlist)), **options)
            assert q[b, j].tolist() == pytest.approx(expected, abs=1e-6)
            previous = int(tokens[b, j])
            assert expected[previous] > 0


def test_drafts_follow_their_law(block, draft):
    """The second draft given the first, over many rows of the same block."""
    head, law = random_head(), TokenLaw(False, (), torch.Generator().manual_seed(0))
    many = {name: tensor[:1].expand(4000, *tensor.shape[1:]) for name, tensor in block.items() if "puts" not in name}
    tokens, q = run(draft, head, law, block | many, shortlist=4)
    first = int(tokens[:, 0].mode().values)
    rows = tokens[:, 0] == first
    found = torch.bincount(tokens[rows, 1], minlength=V) / rows.sum()
    law_after = q[rows, 1].mean(dim=0)
    torch.testing.assert_close(q[rows, 1], law_after.expand_as(q[rows, 1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, law_after, rtol=0, atol=0.04)
    assert (q[:, 1] - law_after).abs().max() > 0.1  # another first draft, another law


@pytest.mark.parametrize("warper", list(WARPERS))
def test_both_ways_to_draft_draw_the_same_from_one_seed(block, warper):
    drawn = []
    for draft in (draft_in_turn, draft_from_pairs):
        law = TokenLaw(False, tuple(make_warpers(**WARPERS[warper])), torch.Generator().manual_seed(5))
        drawn.append(run(draft, random_head(), law, block, 6))
    (tokens, q), (others, law_of_others) = drawn
    assert torch.equal(tokens, others)
    torch.testing.assert_close(law_of_others, q, rtol=0, atol=1e-6)


class _Launches(TorchDispatchMode):
    """Counts operations that are more than a view."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += not func.is_view and "empty" not in func.__name__ and "_unsafe_view" not in func.__name__
        return func(*args, **(kwargs or {}))


def launches(draft, num_drafts: int, *, greedy: bool) -> int:
    """Of drafting on a device that is no CPU; a sampled law has a temperature."""
    head, law = random_head().to("meta"), TokenLaw(greedy, () if greedy else tuple(make_warpers(0.8, None, None, None)))
    logits, hidden = torch.empty(1, num_drafts, V, device="meta"), torch.empty(1, num_drafts, H, device="meta").double()
    block = {"logits": logits, "hidden": hidden, "bonus": torch.empty(1, dtype=torch.long, device="meta")}
    tables = {"inputs": torch.empty(V, D, device="meta").double(), "outputs": torch.empty(V, H, device="meta").double()}
    with torch.no_grad(), _Launches() as counted:
        run(draft, head, law, block | tables, 6)
    return counted.num


def test_from_pairs_a_further_draft_is_a_look_up_and_a_draw():
    """Greedily one launch, drawn five; in turn it is a forward of the head."""
    found = {
        (draft, greedy): [launches(draft, num_drafts, greedy=greedy) for num_drafts in (2, 3, 8)]
        for draft in (draft_in_turn, draft_from_pairs)
        for greedy in (True, False)
    }
    steps = {key: (b - a, (c - b) / 5) for key, (a, b, c) in found.items()}
    assert steps[draft_from_pairs, True] == (1, 1)
    assert steps[draft_from_pairs, False] == (5, 5)
    assert min(steps[draft_in_turn, True]) >= 10
    assert min(steps[draft_in_turn, False]) >= 16
    assert all(found[draft_from_pairs, greedy][0] <= found[draft_in_turn, greedy][0] for greedy in (True, False))


@pytest.mark.parametrize(
    ("device", "batch", "num_drafts", "in_turn"),
    [("cpu", 1, 4, True), ("meta", 1, 4, False), ("meta", 1, 1, True), ("meta", 32, 4, False), ("meta", 33, 4, True)],
)
def test_pairs_are_scored_where_arithmetic_costs_less_than_launches(device, batch, num_drafts, in_turn, monkeypatch):
    used = []
    for way in (draft_in_turn, draft_from_pairs):
        monkeypatch.setattr(drafting, way.__name__, lambda *args, name=way.__name__: used.append(name))
    drafter = HeadDrafter(SimpleNamespace(embed=None), None, SimpleNamespace(output_embeddings=None), 64)
    logits = torch.empty(batch, num_drafts, V, device=device)
    drafter.draft(TokenLaw(True), logits, logits, logits)
    assert used == ["draft_in_turn" if in_turn else "draft_from_pairs"]


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize(
    "warpers",
    [
        *[make_warpers(**options) for options in WARPERS.values()],
        make_warpers(1.0, 5, None, None),
        [TypicalLogitsWarper(0.7)],
        [EpsilonLogitsWarper(0.05)],
        [EtaLogitsWarper(0.1)],
    ],
    ids=[*WARPERS, "top_k_beyond_the_shortlist", "typical", "epsilon", "eta"],
)
def test_warpers_find_on_a_shortlist_what_they_find_on_the_whole_row(block, warpers, size):
    law, top = TokenLaw(False, tuple(warpers)), block["logits"].topk(size, dim=-1)
    whole = torch.full_like(block["logits"], -math.inf).scatter(2, top.indices, top.values)
    expected = law.probs(whole)
    found = torch.zeros_like(expected).scatter(2, top.indices, law.probs(top.values))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_in_the_targets_dtype_is_the_same_head(block, dtype):
    head = random_head()
    expected = head(block["hidden"], block["inputs"][:K])
    found = random_head().to(dtype)(block["hidden"].to(dtype), block["inputs"][:K].to(dtype))
    assert found.dtype == dtype
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)
    silent = random_head().to(dtype)(block["hidden"].to(dtype) * 0, block["inputs"][:K].to(dtype) * 0)
    assert silent.isfinite().all()
