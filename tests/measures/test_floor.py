"""The floor against exact enumeration of all futures of a model of few tokens, by full forwards without a cache."""

import itertools

import pytest
import torch
from tiny_models import make_adapter, tiny_model

import pardec.measures.floor
from pardec.adapters.gated_lora import LoraGate
from pardec.measures.barycentre import barycentre
from pardec.measures.floor import Overlaps, measure_overlaps
from pardec.model import SelfSpeculativeModel
from pardec.target.hidden import HiddenTap

K, V = 3, 5
CONTEXT = [3, 1, 4, 1, 0, 2, 2]
TEMPERATURE = 3.0  # flat enough that futures differ


def model_of(family: str = "llama", **adapter) -> SelfSpeculativeModel:
    base = tiny_model(family, vocab_size=V)
    return SelfSpeculativeModel(base, None, make_adapter(base, K, **adapter))


def law(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    scores = logits.double() / TEMPERATURE
    if top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    return scores.softmax(dim=-1)


@torch.no_grad()
def mask_rows(model: SelfSpeculativeModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and hidden states of the K mask rows behind the context."""
    base, n = model.base_model, len(CONTEXT)
    embeds = base.get_input_embeddings()(torch.tensor([CONTEXT]))
    embeds = torch.cat([embeds, model.adapter.mask_embeddings.double()[None]], dim=1)
    gate, tap = LoraGate(base, model.adapter.lora), HiddenTap(base)
    with tap.attached(), gate.attached(), gate.open(slice(n, n + K), 1, n + K):
        logits = base(inputs_embeds=embeds).logits[0, n:]
        return logits, tap.hidden[0, n:]


def head_scores(model: SelfSpeculativeModel, logits, hidden, previous: int) -> torch.Tensor:
    base, weights = model.base_model, {name: w.double() for name, w in model.adapter.head.items()}
    both = (hidden, base.get_input_embeddings().weight[previous])
    unit = [x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt() for x in both]
    inner = weights["inner.weight"] @ torch.cat(unit) + weights["inner.bias"]
    vector = weights["outer.weight"] @ (inner * torch.sigmoid(inner))
    return logits + base.get_output_embeddings().weight @ vector  # the shortlist holds the whole vocabulary


@torch.no_grad()
def exact(model: SelfSpeculativeModel, top_k: int | None) -> dict[str, list[float]]:
    """Every figure by depth, as a sum over all futures."""

    def law_behind(future: tuple[int, ...]) -> torch.Tensor:
        return law(model.base_model(torch.tensor([[*CONTEXT, *future]])).logits[0, -1], top_k)

    logits, hidden = mask_rows(model)
    found = {"blind": [], "behind_one": [], "drafted": [], "with_head": [], "blind_length": 0, "behind_one_length": 0}
    reached = {name: dict.fromkeys(((v,) for v in range(V)), 1.0) for name in ("blind", "behind_one")}
    first = law_behind(())  # of the bonus token
    probability = {(v,): float(first[v]) for v in range(V)}
    for depth in range(K):
        laws = {future: law_behind(future) for future in probability}
        futures = list(probability)
        weights = torch.tensor([probability[future] for future in futures], dtype=torch.float64)
        best, q = barycentre(torch.stack([laws[future] for future in futures]), weights)
        found["blind"].append(best)
        drafts = {"blind": dict.fromkeys(futures, q), "behind_one": {}}
        behind = 0.0
        for _, group in itertools.groupby(sorted(futures, key=lambda one: one[-1:]), key=lambda one: one[-1:]):
            group = list(group)
            own = torch.tensor([probability[future] for future in group], dtype=torch.float64)
            if own.sum() > 0:
                best, q = barycentre(torch.stack([laws[future] for future in group]), own / own.sum())
                behind += float(own.sum()) * best
                drafts["behind_one"] |= dict.fromkeys(group, q)
        found["behind_one"].append(behind)
        q, overlap, overlap_of_head = law(logits[depth], top_k), 0.0, 0.0
        for future in futures:
            overlap += probability[future] * float(laws[future].minimum(q).sum())
            q_of_head = law(head_scores(model, logits[depth], hidden[depth], future[-1]), top_k)
            overlap_of_head += probability[future] * float(laws[future].minimum(q_of_head).sum())
        found["drafted"].append(overlap)
        found["with_head"].append(overlap_of_head)
        for name, q_of in drafts.items():
            for future in q_of:
                accepted = probability[future] * reached[name].get(future, 0.0)  # 0: such a future has no probability
                found[f"{name}_length"] += accepted * float(laws[future].minimum(q_of[future]).sum())
                for v in range(V):
                    ratio = float(q_of[future][v] / laws[future][v]) if laws[future][v] > 0 else 1.0
                    reached[name][(*future, v)] = reached[name].get(future, 0.0) * min(1.0, ratio)
        probability = {
            (*future, v): probability[future] * float(laws[future][v]) for future in futures for v in range(V)
        }
    return found


def estimated(model: SelfSpeculativeModel, N: int, top_k: int | None, repeats: int, P: int = 4) -> Overlaps:
    options = {"num_futures": N, "num_predecessors": P, "temperature": TEMPERATURE, "top_k": top_k}
    return measure_overlaps(model, [CONTEXT] * repeats, **options)


@pytest.mark.parametrize(("family", "top_k"), [("llama", None), ("llama", 3), ("qwen3-mixed-windows", None)])
def test_estimates_stand_on_both_sides_of_the_exact_floor(family, top_k):
    """On average: the most is overestimated, what is shown is not, and figures of drafts are those of enumeration."""
    model, repeats = model_of(family, lora_rank=2, head_width=6), 200
    expected = exact(model, top_k)
    found = estimated(model, 8, top_k, repeats)
    for name, shown in (("blind", "blind_shown"), ("behind_one", "behind_one_shown")):
        for depth in range(K):
            above, below = (getattr(found, one)[:, depth] for one in (name, shown))
            slack = 3 * float(torch.cat([above, below]).std()) / repeats**0.5 + 1e-6  # laws are float32
            assert float(above.mean()) > expected[name][depth] - slack
            assert float(below.mean()) < expected[name][depth] + slack
    for name in ("drafted", "with_head"):
        values = getattr(found, name)
        slack = 4 * values.std(dim=0) / repeats**0.5 + 1e-5
        assert bool(((values.mean(dim=0) - torch.tensor(expected[name])).abs() < slack).all()), name


def test_more_futures_close_in_on_the_exact_floor():
    model = model_of(lora_rank=2, head_width=6)
    expected, gaps = exact(model, None), {}
    assert expected["blind"][2] < expected["behind_one"][2] < 1  # there is something to find
    for N in (8, 32, 128):
        found = estimated(model, N, None, 6400 // N // 8, P=8)
        for name in ("blind", "behind_one"):
            shown = getattr(found, f"{name}_shown")[:, 2].mean()
            gaps[name, N] = float(getattr(found, name)[:, 2].mean() - shown)
            if N == 128:
                assert float(getattr(found, name)[:, 2].mean()) == pytest.approx(expected[name][2], abs=0.02)
                assert float(shown) == pytest.approx(expected[name][2], abs=0.02)
                length = float(getattr(found, f"{name}_length").mean())
                assert length == pytest.approx(expected[f"{name}_length"], abs=0.05)
                assert max(expected[name]) < length < sum(expected[name])
    for name in ("blind", "behind_one"):
        assert gaps[name, 8] > 2 * gaps[name, 32] > 4 * gaps[name, 128]


def test_nothing_limits_a_draft_that_sees_all_that_is_between():
    found = estimated(model_of(lora_rank=2, head_width=6), 4, None, 3)
    for values in (found.behind_one[:, 0], found.behind_one_shown[:, 0]):
        torch.testing.assert_close(values, torch.ones_like(values))
    assert float(found.blind_shown[:, 0].max()) < 1  # mask rows do not see the bonus token


def test_the_overlap_is_what_the_decoder_accepts():
    """Of many first steps behind the same context, the share whose first draft is accepted."""
    model, repeats = model_of(lora_rank=2, head_width=6), 1500
    found = estimated(model, 64, None, 8)
    for use_head, values in ((False, found.drafted), (True, found.with_head)):
        options = {"max_new_tokens": K + 1, "temperature": TEMPERATURE, "use_head": use_head, "seed": 0}
        counts = model.generate([CONTEXT] * repeats, **options).counts
        firsts = [one.accepted[0] >= 1 for one in counts]
        rate = sum(firsts) / len(firsts)
        assert float(values[:, 0].mean()) == pytest.approx(rate, abs=4 * (0.25 / repeats) ** 0.5)


def test_contexts_in_parts_have_the_figures_of_all(monkeypatch):
    """But for the draws, which are shared out anew."""
    model, contexts = model_of(lora_rank=2, head_width=6), [CONTEXT, CONTEXT[:2], [1, 1, 2]]
    options = {"num_futures": 4, "num_predecessors": 2}
    whole = measure_overlaps(model, contexts, **options)
    monkeypatch.setattr(pardec.measures.floor, "_LOGITS_PER_FORWARD", 1)
    told = []
    parts = measure_overlaps(model, contexts, **options, on_batch=told.append)
    assert told == [1, 1, 1]
    assert whole.drafted.shape == parts.drafted.shape == (3, K)
    assert float((whole.drafted - parts.drafted).abs().max()) < 0.3
    monkeypatch.undo()
    alone = measure_overlaps(model, contexts[:1], **options)
    torch.testing.assert_close(alone.blind, parts.blind[:1])  # the draws of the first part are the same


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_futures": 7}, "num_futures: expected an even number from 4 on, found 7"),
        ({"num_predecessors": 10}, "num_predecessors: expected an even number from 2 to 8, found 10"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        measure_overlaps(model_of(), [CONTEXT], **{"num_futures": 8, "num_predecessors": 4, **options})
