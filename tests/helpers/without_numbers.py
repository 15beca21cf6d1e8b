"""Decoders and states whose tensors have shapes, strides and a device, and no numbers."""

from collections.abc import Mapping

import torch
from tiny_models import FAMILIES, make_adapter, tiny_model

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.prepack import PackedLinears
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.draft_tree import AnyTree, DynamicTree
from pardec.target.attention import query_group
from pardec.target.cache import BufferKind, SlotCache
from pardec.target.forward import TargetModel
from pardec.target.survey import survey

K = 3
NUM_SLOTS, CAPACITY = 256, 32  # a bucket of slots on CUDA


def tiny_decoder(
    family: str,
    mode: str,
    num_layers: int,
    *,
    lora: bool = False,
    head: bool = False,
    packed: bool = False,
    copy_tokens: int = 0,
    law: TokenLaw | None = None,
    device: str = "meta",
    tree: AnyTree | None = None,
) -> Decoder:
    """A decoder of a tiny model in bfloat16 as it is put together on CUDA, where attention is grouped.

    Args:
        family: whose attention is sdpa; where it mixes kinds of layers, these take turns.
        mode: of the decoder.
        num_layers: of the model.
        lora: on every linear layer.
        head: draws the drafts.
        copy_tokens: verified behind the drafts.
        packed: layers that share an input are one, as where there is memory for it.
        law: default the greedy one.
        device: `meta`, or one that has numbers.
        tree: of drafts; default the full chain.
    """
    values = FAMILIES[family][1]
    layers = "n_layer" if "n_layer" in values else "num_hidden_layers"
    kinds = values.get("layer_types", [])
    changes = {"layer_types": [kinds[i % 2] for i in range(num_layers)]} if kinds else {}
    model = tiny_model(family, dtype=torch.bfloat16, **{layers: num_layers}, **changes)
    adapter = make_adapter(model, K, lora_rank=2 if lora else 0, head_width=8 if head else 0)
    siblings = survey(TargetModel.wrap(model)).siblings
    model.to(device)  # type: ignore[arg-type]
    target, group, law = TargetModel.wrap(model), query_group(model), law or TokenLaw(greedy=True)
    eos = torch.zeros(1, dtype=torch.long, device=device)
    gate = None if adapter.lora is None else LoraGate(model, adapter.lora)
    linears = PackedLinears(siblings, gate)
    if packed:
        linears.refresh()
    if mode == "plain":
        return Decoder(RowForward(target, linears=linears, query_group=group), mode, 0, law, CAPACITY, eos)
    assert adapter.mask_embeddings is not None
    masks = adapter.mask_embeddings.to(device, target.dtype)
    drafter = HeadDrafter.of(adapter, target)
    forward = RowForward(target, masks, gate, linears, group, tap=drafter and drafter.tap)
    depth = K if tree is None else tree.num_speculative_tokens
    return Decoder(forward, mode, depth, law, CAPACITY, eos, head=drafter, copy_tokens=copy_tokens, tree=tree)


def tiny_state(
    decoder: Decoder,
    batch_size: int,
    device: str = "meta",
    kinds: Mapping[BufferKind, int] | None = None,
    num_sources: int = 1,
) -> DecodeState:
    """What prefill leaves; the numbers, where there are any, are whatever they are.

    Args:
        kinds: as in `SlotCache`.
        num_sources: texts that each row copies from, where tokens are copied.
    """
    lengths = torch.empty(batch_size, dtype=torch.long, device=device)
    drafts = lengths.new_empty(batch_size, decoder.num_drafts)
    vocabulary = decoder.target.vocab_size
    return DecodeState.begin(
        SlotCache(decoder.target.num_layers, NUM_SLOTS, batch_size, kinds),
        lengths[:, None],
        lengths,
        decoder.eos_token_ids,
        room=lengths,
        drafts=drafts,
        draft_length=decoder.num_speculative_tokens,
        draft_probs=None
        if decoder.law.greedy or decoder.tree is not None
        else torch.empty(*drafts.shape, vocabulary, device=device),
        parents=torch.empty_like(drafts) if isinstance(decoder.tree, DynamicTree) else None,
        width=decoder.tokens_per_step,
        capacity=CAPACITY,
        sources=torch.empty(batch_size, num_sources, dtype=torch.long, device=device) if decoder.copy_tokens else None,
    )
