"""Training: the prefix-cached forward is the naive joint one, whatever the number of processes or chunks."""

import math

import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from pardec.layout import nested_block_lengths, training_layout
from pardec.training.comparison import target_law
from pardec.training.first_embeddings import mean_embedding
from pardec.training.module import METRICS, Drafter, MaskTokenTrainer
from pardec.training.objective import Objective
from pardec.training.peft_lora import inject_lora

K, T, N = 3, 20, 4
TRAINED = (
    "llama",
    "qwen3-mixed-windows",
    "mistral-window",
    "gemma3-mixed-windows",
    "gemma2-eager",
    "gpt2",
    "phi3-window",
)


def make_batch(vocab_size: int = 61, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (batch, T), generator=generator)
    anchors = torch.stack([torch.randperm(T - 1, generator=generator)[:N] for _ in range(batch)])
    anchors[0, 0] = T - 2  # a block that runs beyond the end
    mask = torch.rand(batch, T, generator=generator) > 0.2
    return {"input_ids": ids, "loss_mask": mask, "anchors": anchors}


def make_trainer(
    family: str,
    lora: bool = False,
    objective: Objective | None = None,
    keep: tuple[float, float] = (1.0, 0.0),
    **drafter,
) -> MaskTokenTrainer:
    model = tiny_model(family)
    if lora:
        torch.manual_seed(7)
        inject_lora(model, r=2, alpha=4, target_modules="all-linear")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.3
    what = Drafter(K, has_lora=lora, **drafter)
    trainer = MaskTokenTrainer(model, what, objective or Objective(), keep_ratio=keep[0], keep_floor=keep[1])
    torch.manual_seed(8)
    for name, parameter in trainer.named_parameters():
        if name.startswith(("mask_embeddings", "head.")):
            parameter.data = torch.randn_like(parameter, dtype=torch.float64)
    return trainer


def naive_joint_loss(trainer: MaskTokenTrainer, batch: dict[str, torch.Tensor], weights: list[float], lengths=None):
    """One forward over real tokens and all mask rows, mask and loss written out as loops.

    Blocks that are shorter than K still have all their rows here; the loss leaves out those that do not exist.
    """
    base, ids = trainer.base, batch["input_ids"]
    B, M = ids.shape[0], N * K
    config = base.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    positions = torch.zeros(B, T + M, dtype=torch.long)
    visible = torch.zeros(B, T + M, T + M, dtype=torch.bool)
    rows = []  # (batch, row, anchor, j)
    for b in range(B):
        for s in range(T):
            positions[b, s] = s
            visible[b, s, : s + 1] = True
        for n, anchor in enumerate(batch["anchors"][b].tolist()):
            for j in range(1, K + 1):
                row = T + n * K + j - 1
                positions[b, row] = anchor + j
                visible[b, row, : anchor + 1] = True
                visible[b, row, T + n * K : row + 1] = True
                if lengths is None or j <= lengths[n]:
                    rows.append((b, row, anchor, j))
    near = positions[:, :, None] - positions[:, None, :] < (window or 10**9)

    def form(seen):
        if config._attn_implementation == "eager":
            additive = torch.zeros(seen.shape, dtype=torch.float64)
            return additive.masked_fill(~seen, torch.finfo(torch.float64).min)[:, None]
        return seen[:, None]

    if kinds and len(set(kinds)) > 1:
        mask = {"full_attention": form(visible), "sliding_attention": form(visible & near)}
    else:
        mask = form(visible & near if window else visible)
    is_mask_row = (torch.arange(T + M) >= T).double()[None, :, None]
    handles = [
        module.register_forward_hook(lambda m, a, out: out * is_mask_row)
        for name, module in base.named_modules()
        if name.endswith("lora_A.default")
    ]
    embeds = base.get_input_embeddings()(ids)
    masks = trainer.mask_embeddings.repeat(N, 1).expand(B, -1, -1)
    if trainer.drafter.has_lora:
        from pardec.training.peft_lora import lora_enabled

        with lora_enabled(base):
            logits = base(
                inputs_embeds=torch.cat([embeds, masks], 1), position_ids=positions, attention_mask=mask
            ).logits
    else:
        logits = base(inputs_embeds=torch.cat([embeds, masks], 1), position_ids=positions, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, row, anchor, j in rows:
        target = anchor + j + 1
        if target >= T or not batch["loss_mask"][b, target]:
            continue
        if trainer.objective.loss == "kl":
            p = logits[b, anchor + j].detach().log_softmax(-1)
            loss = (p.exp() * (p - logits[b, row].log_softmax(-1))).sum()
        else:
            loss = -logits[b, row].log_softmax(-1)[ids[b, target]]
        total, count = total + weights[j - 1] * loss, count + 1
    return total, count


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("objective", ["kl", "cross_entropy"])
@pytest.mark.parametrize("family", TRAINED)
def test_prefix_cached_gradients_equal_a_naive_joint_forward(family, objective, lora):
    weights = [1.0, 0.5, 0.25]
    assert_gradients_are_naive(make_trainer(family, lora, Objective(objective, weights)), lora, weights)


@pytest.mark.parametrize("family", ["llama", "qwen3-mixed-windows", "gemma2-eager", "gpt2"])
def test_dropped_mask_tokens_are_as_if_they_had_never_been(family):
    keep = (0.6, 0.3)
    lengths = nested_block_lengths(N, K, *keep)
    assert lengths == (3, 2, 1, 1)
    trainer = make_trainer(family, True, Objective("kl", [1.0, 1.0, 1.0]), keep)
    assert_gradients_are_naive(trainer, True, [1.0, 1.0, 1.0], lengths)


@pytest.mark.parametrize("family", ["llama", "gemma2-eager"])
@pytest.mark.parametrize("depth", [1, 2])
def test_shorter_blocks_are_as_if_deeper_mask_tokens_had_never_been(family, depth):
    trainer = make_trainer(family, True, Objective("kl", [1.0, 0.5, 0.25]))
    assert_gradients_are_naive(trainer, True, [1.0, 0.5, 0.25], (depth,) * N, max_depth=depth)
    assert not trainer.mask_embeddings.grad[depth:].any()  # so that AdamW leaves them where they are


def assert_gradients_are_naive(trainer, lora, weights, lengths=None, **options):
    batch = make_batch()
    loss, count, _ = trainer(**batch, **options)
    loss.backward()
    parameters = {n: p for n, p in trainer.named_parameters() if p.requires_grad}
    assert len(parameters) > (1 if lora else 0)
    found = {name: p.grad.clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    expected_loss, expected_count = naive_joint_loss(trainer, batch, weights, lengths)
    expected_loss.backward()
    assert int(count) == expected_count >= N
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    for name, parameter in parameters.items():
        scale = parameter.grad.abs().max().clamp_min(1e-3)
        assert float((found[name] - parameter.grad).abs().max() / scale) < 1e-5, name
    assert found["mask_embeddings"].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3-mixed-windows", "mistral-window", "phi3-window", "gpt2", "granite"])
@pytest.mark.parametrize("keep", [(1.0, 0.0), (0.6, 0.3)])
def test_the_route_of_blocks_gives_the_models_own_attention(family, keep):
    """With every key masked one by one, as sdpa has it, against each block by itself."""
    found = {}
    for takes_blocks in (True, False):
        trainer = make_trainer(family, True, keep=keep)
        trainer(**make_batch())
        assert trainer.mask_pass.takes_blocks  # the probe finds that each of these families may take it
        trainer.mask_pass.takes_blocks = takes_blocks
        loss, _, metrics = trainer(**make_batch(), with_metrics=True)
        loss.backward()
        gradients = {n: p.grad for n, p in trainer.named_parameters() if p.grad is not None}
        found[takes_blocks] = (loss.detach(), metrics, gradients)
    torch.testing.assert_close(found[True][:2], found[False][:2])
    for name, expected in found[False][2].items():
        torch.testing.assert_close(found[True][2][name], expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("rule", ["expected_length", "prefix_product"])
def test_weights_that_follow_acceptance_are_those_of_each_block_by_itself(rule, monkeypatch):
    """Overlaps of the rows' own logits, put through the products by hand."""
    trainer = make_trainer("llama", objective=Objective("cross_entropy", rule))
    batch = make_batch(batch=1)
    (call,) = seen_by_the_objective(monkeypatch, trainer, batch)
    loss, layout, counts, scaled, p = (call[name] for name in ("loss", "layout", "counts", "logits", "p"))
    overlap = torch.minimum(scaled.softmax(-1), p).sum(-1) * counts
    total = 0.0
    for row, (n, depth) in enumerate(zip(layout.blocks.tolist(), layout.depths.tolist(), strict=True)):
        a = [overlap[i].item() for i in range(len(overlap)) if layout.blocks[i] == n]
        prefix = 1.0
        for value in a[:depth]:
            prefix *= value
        expected = prefix
        if rule == "expected_length":
            expected, product = 0.0, prefix
            for value in a[depth:]:
                product *= value
                expected += product
        one = 0.0
        if counts[row]:
            token = batch["input_ids"][0, layout.targets[0, row]]
            one = expected * float(-scaled[row].log_softmax(-1)[token])
        assert call["weighted"][row].item() == pytest.approx(one, rel=1e-5, abs=1e-8)
        total += one
    assert loss == pytest.approx(total, rel=1e-5)


def seen_by_the_objective(monkeypatch, trainer, batch) -> list[dict]:
    """What a forward in one part hands over, once without and once with a head, what comes back, and its loss."""
    original, calls = Objective.weighted_losses, []
    trainer.most_rows = 10**6

    def spy(self, logits, law, ids, counts, layout, K, **options):
        weighted, found = original(self, logits, law, ids, counts, layout, K, **options)
        told = {"logits": logits, "p": law.probs, "ids": ids, "weighted": weighted, "counts": counts}
        calls.append({"layout": layout, **{name: tensor.detach() for name, tensor in told.items()}})
        return weighted, found

    monkeypatch.setattr(Objective, "weighted_losses", spy)
    loss, _, _ = trainer(**batch)
    return [{**call, "loss": float(loss.detach())} for call in calls]


@pytest.mark.parametrize("keep", [(1.0, 0.0), (0.6, 0.3)])
def test_the_expected_length_is_that_of_each_block_along_the_data(keep, monkeypatch):
    """-log sum_k (prod_{i<k} min(1, q(x_i) / p(x_i))) sum min(p, q) by hand, with a head and without."""
    trainer = make_trainer("llama", True, Objective("accepted_length"), keep, head_width=6)
    batch, total = make_batch(), 0.0
    calls = seen_by_the_objective(monkeypatch, trainer, batch)
    assert len(calls) == 2
    for call in calls:
        layout, q, p = call["layout"], call["logits"].softmax(-1), call["p"]
        M = len(layout.depths)
        for b in range(2):
            for n in range(N):
                rows = [b * M + i for i in range(M) if layout.blocks[i] == n]
                before, length, reached = 1.0, 0.0, []
                for row in rows:
                    target = int(layout.targets[b, row - b * M])
                    if target >= T or not batch["loss_mask"][b, target]:
                        break
                    token = batch["input_ids"][b, target]
                    length += before * float(torch.minimum(p[row], q[row]).sum())
                    before *= min(1.0, float(q[row, token] / p[row, token]))
                    reached.append(row)
                expected = [-math.log(length)] * len(reached) if reached else []
                assert [float(call["weighted"][row]) for row in reached] == pytest.approx(expected, rel=1e-4, abs=1e-5)
                total += sum(expected)
    assert calls[0]["loss"] == pytest.approx(total, rel=1e-4)


def test_the_head_is_trained_on_the_token_before_and_leaves_the_rest_alone():
    """Loss of the head from its definition, over all tokens; without `joint` it has no gradient below itself."""
    plain, headed = make_trainer("llama", True), make_trainer("llama", True, head_width=6)
    batch = make_batch()
    for trainer in (plain, headed):
        trainer(**batch)[0].backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(dict(headed.named_parameters())[name].grad, parameter.grad)
    for name in ("inner.weight", "inner.bias", "outer.weight"):
        assert headed.head.get_parameter(name).grad.abs().max() > 1e-3
    joint = make_trainer("llama", True, head_width=6, joint_head=True)
    joint(**batch)[0].backward()
    assert (joint.mask_embeddings.grad - plain.mask_embeddings.grad).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3-mixed-windows"])
def test_the_heads_loss_is_its_definition(family):
    trainer = make_trainer(family, head_width=6, objective=Objective("cross_entropy"))
    batch = make_batch(batch=1)
    seen = {}
    run = trainer.mask_pass.hidden

    def spy(inputs, layout, on_host, cache):
        seen["layout"], seen["hidden"] = layout, run(inputs, layout, on_host, cache)
        seen["logits"] = trainer.own_head.logits(seen["hidden"][0])[None]
        return seen["hidden"]

    trainer.mask_pass.hidden = spy
    _, _, metrics = trainer(**batch)
    layout, ids, base = seen["layout"], batch["input_ids"][0], trainer.base
    expected = torch.zeros(K, dtype=torch.float64)
    for row, (position, target) in enumerate(
        zip(layout.positions[0].tolist(), layout.targets[0].tolist(), strict=True)
    ):
        if target >= T or not batch["loss_mask"][0, target]:
            continue
        hidden, before = seen["hidden"][0, row], base.get_input_embeddings()(ids[position])
        both = torch.cat([hidden / hidden.pow(2).mean().sqrt(), before / before.pow(2).mean().sqrt()])
        inner = torch.nn.functional.silu(trainer.head.inner.weight @ both + trainer.head.inner.bias)
        vector = trainer.head.outer.weight @ inner
        scores = seen["logits"][0, row] + base.get_output_embeddings().weight @ vector
        expected[layout.depths[row]] += torch.nn.functional.cross_entropy(scores[None], ids[target][None]).detach()
    torch.testing.assert_close(metrics[METRICS.index("head_loss")].double(), expected, rtol=1e-4, atol=1e-4)


def test_noise_rows_hold_embeddings_of_random_tokens_and_learn_nothing():
    trainer = make_trainer("gemma3-mixed-windows", True, draft_input="uniform_noise")
    layout = training_layout(make_batch()["anchors"], (K,) * N, T)
    torch.manual_seed(0)
    rows = trainer._mask_inputs(layout)
    table = trainer.base.get_input_embeddings()(torch.arange(61))
    which = (rows[:, :, None] == table).all(-1).nonzero()[:, 2]
    assert len(which) == rows.shape[0] * rows.shape[1]  # each is exactly one token's
    assert len(set(which.tolist())) > 10
    trainer(**make_batch())[0].backward()
    assert trainer.mask_embeddings is None
    assert all("lora_" in name for name, p in trainer.named_parameters() if p.grad is not None)


def test_the_law_that_is_followed_is_that_of_the_objective(monkeypatch):
    trainer = make_trainer("llama", objective=Objective("kl", temperature=0.5, top_k=3))
    batch = make_batch()
    (call,) = seen_by_the_objective(monkeypatch, trainer, batch)
    logits, rows = trainer.base(batch["input_ids"]).logits, call["layout"].positions.clamp_max(T - 1)
    expected = target_law(torch.cat([logits[b, rows[b]] for b in range(2)]), 0.5, 3)
    torch.testing.assert_close(call["p"], expected.probs)


@pytest.mark.parametrize("objective", ["kl", "tv", "accepted_length"])
def test_parts_of_the_anchors_add_up_to_all_of_them(objective):
    batch = make_batch()
    whole = make_trainer("llama", objective=Objective(objective))
    loss, count, metrics = whole(**batch, with_metrics=True)
    loss.backward()
    parts = make_trainer("llama", objective=Objective(objective))
    sums = [parts(**batch, first_anchor=first, num_anchors=3, with_metrics=True) for first in (0, 3)]
    for part_loss, _, _ in sums:
        part_loss.backward()
    assert float(sum(s[0].detach() for s in sums)) == pytest.approx(float(loss.detach()))
    assert int(sum(s[1] for s in sums)) == int(count)
    torch.testing.assert_close(sum(s[2] for s in sums), metrics)
    torch.testing.assert_close(parts.mask_embeddings.grad, whole.mask_embeddings.grad)


def test_the_base_gets_no_gradient_and_stays_in_eval_mode():
    trainer = make_trainer("gpt2")  # has dropout
    trainer.train()
    assert not trainer.base.training
    trainer(**make_batch())[0].backward()
    assert [n for n, p in trainer.named_parameters() if p.grad is not None] == ["mask_embeddings"]


def test_shared_mask_embeddings_are_one_vector():
    trainer = make_trainer("llama", mask_sharing="shared")
    trainer(**make_batch())[0].backward()
    assert trainer.mask_embeddings.grad.shape == (1, 32)


def test_models_that_scale_their_input_embeddings_in_place_can_be_trained():
    from transformers import CTRLConfig, CTRLLMHeadModel

    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=61, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4)
    trainer = MaskTokenTrainer(CTRLLMHeadModel(config).eval().requires_grad_(False), Drafter(K), Objective())
    before = trainer.mask_embeddings.detach().clone()
    loss, count, _ = trainer(**make_batch())
    (loss / count).backward()
    assert torch.equal(trainer.mask_embeddings, before)
    assert float(trainer.mask_embeddings.grad.abs().sum()) > 0


def test_mask_rows_that_overflow_leave_the_law_that_is_followed_as_it_is():
    """Real tokens are run without them: whatever they hold, the loss is not finite and nothing else is touched."""
    trainer, batch = make_trainer("llama"), make_batch()
    trainer(**batch)
    hidden = trainer._prefix.hidden
    with torch.no_grad():
        trainer.mask_embeddings.fill_(float("nan"))
    loss, _, _ = trainer(**batch)
    assert not bool(loss.isfinite())
    assert torch.equal(trainer._prefix.hidden, hidden)
    assert all(bool(layer.keys.isfinite().all()) for layer in trainer._prefix.cache.layers)


def test_gradient_checkpointing_is_refused():
    model = tiny_model("llama")
    model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing off, found it on"):
        MaskTokenTrainer(model, Drafter(K))


def test_mean_embedding_is_the_mean_of_the_modules_outputs():
    from pardec.target.forward import TargetModel

    model = tiny_model("gemma3-mixed-windows")  # scales its embeddings
    expected = torch.stack([model.get_input_embeddings()(torch.tensor([i]))[0] for i in range(61)]).mean(0)
    torch.testing.assert_close(mean_embedding(TargetModel.wrap(model), 10)[0], expected.float())


def test_layout_and_trainer_agree_on_what_counts():
    batch = make_batch()
    layout = training_layout(batch["anchors"], (K,) * N, T)
    counts = sum(int(t < T and batch["loss_mask"][b, t]) for b in range(2) for t in layout.targets[b].tolist())
    assert int(make_trainer("llama")(**batch)[1]) == counts


def test_every_family_of_the_decoder_tests_can_be_wrapped_for_training():
    for family in FAMILIES:
        loss, count, _ = make_trainer(family)(**make_batch())
        assert torch.isfinite(loss)
        assert int(count) > 0


@pytest.mark.parametrize("family", ["llama", "gemma2-eager", "gemma3-mixed-windows", "qwen3"])
def test_a_step_learns_the_same_behind_slices(family):
    found = {}
    for num_slices in (1, 3):
        trainer = make_trainer(family, lora=True)
        trainer.prefix_slices = num_slices
        batch, both = make_batch(), torch.zeros((), dtype=torch.float64)
        for first in (0, 2):  # the second part reads what the first has left
            loss, _, _ = trainer(**batch, first_anchor=first, num_anchors=2)
            both = both + loss
        both.backward()
        found[num_slices] = both.detach(), {n: p.grad for n, p in trainer.named_parameters() if p.grad is not None}
    # eager attention rounds its softmax to float32
    near = {"rtol": 1e-4, "atol": 1e-5} if family.endswith("eager") else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(found[3], found[1], **near)


def test_sequences_of_fewer_tokens_than_slices_are_as_they_are():
    """All processes of a sharded base run as many forwards, however short what one of them has is."""
    found, forwards, counts = {}, [], []
    for num_slices in (1, 40):
        trainer = make_trainer("llama")
        trainer.own_head.body.register_forward_hook(lambda *args: forwards.append(1))
        trainer.prefix_slices = num_slices
        forwards.clear()
        loss, count, _ = trainer(**make_batch())
        loss.backward()
        found[num_slices] = loss.detach(), count, trainer.mask_embeddings.grad
        counts.append(len(forwards))
    assert counts[1] - counts[0] == 39
    torch.testing.assert_close(found[40], found[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_run_twice_learn_the_same(family, share):
    found = {}
    for wanted in (0.0, share):
        trainer = make_trainer(family, lora=True, head_width=6)
        trainer.run_layers_twice(wanted)
        batch, both = make_batch(), torch.zeros((), dtype=torch.float64)
        for first in (0, 2):
            loss, _, _ = trainer(**batch, first_anchor=first, num_anchors=2)
            both = both + loss
        both.backward()
        assert all("forward" not in vars(layer) for layer in trainer.mask_pass.run_twice)
        found[wanted] = both.detach(), {n: p.grad for n, p in trainer.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[share], found[0.0], rtol=0, atol=0)
