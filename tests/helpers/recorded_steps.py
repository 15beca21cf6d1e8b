"""Recorders of steps for machines without a GPU, and decoders whose steps they record."""

import dataclasses
import weakref
from collections.abc import Callable

import torch
from tiny_models import make_adapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pardec.adapters.gated_lora import LoraGate
from pardec.adapters.noise import NoiseTokens
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.output import counts_of
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.decoding.verify import Verification
from pardec.draft_tree import AnyTree
from pardec.target.forward import TargetModel
from pardec.target.survey import survey

K, V = 3, 61


def rerun(run: Callable[[], None], generator, pool) -> Callable[[], None]:
    """A recorder that records nothing: replaying runs the step again."""
    return run


class _Tape(TorchDispatchMode):
    """Every operation on tensors inside, in order."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class _Outside:
    """A tensor that a tape reads and did not make: kept alive by others, or not at all, as with a CUDA graph."""

    def __init__(self, tensor: Tensor):
        self.ref = weakref.ref(tensor)

    def tensor(self) -> Tensor:
        tensor = self.ref()
        assert tensor is not None, "a graph would read memory that has been freed"
        return tensor


class _Made:
    """A tensor that a tape makes, by the place where it is made."""

    def __init__(self, index: int):
        self.index = index


def tape(run: Callable[[], None], generator, pool) -> Callable[[], None]:
    """A recorder that replays the operations on tensors and nothing else: no Python, no value of the host's.

    As in a CUDA graph, numbers and tensors are those of the recording; only what tensors hold may differ.
    """
    with _Tape() as recorded:
        run()
    made: dict[int, _Made] = {}
    calls = []

    def name(x):
        if isinstance(x, list | tuple):
            return [name(one) for one in x]
        return (made.get(id(x)) or _Outside(x)) if isinstance(x, Tensor) else x

    for func, args, kwargs, out in recorded.calls:
        named = name(args)
        if func is torch.ops.aten.lift_fresh.default:  # a number that has become a tensor, on a CPU only
            named = list(args)
        outputs = [made.setdefault(id(x), _Made(len(made))).index for x in tree_leaves(out) if isinstance(x, Tensor)]
        calls.append((func, named, {key: name(x) for key, x in kwargs.items()}, outputs))

    def replay() -> None:
        values: dict[int, Tensor] = {}

        def value(x):
            if isinstance(x, _Made):
                return values[x.index]
            if isinstance(x, _Outside):
                return x.tensor()
            if isinstance(x, list):
                return [value(one) for one in x]
            return x.clone() if isinstance(x, Tensor) else x

        with torch.no_grad():
            for func, args, kwargs, outputs in calls:
                out = func(*value(args), **{key: value(x) for key, x in kwargs.items()})
                found = [out] if isinstance(out, Tensor) else [x for x in tree_leaves(out) if isinstance(x, Tensor)]
                values.update(zip(outputs, found, strict=True))
        values.clear()  # nothing is kept alive until the next replay

    return replay


def sampled(seed: int = 0, **options) -> TokenLaw:
    warpers = {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "min_p": 0.01} | options
    return TokenLaw(False, tuple(make_warpers(**warpers)), torch.Generator().manual_seed(seed))


def decoder_for(
    model,
    mode: str,
    law: TokenLaw,
    *,
    new_tokens: int = 12,
    eos=(),
    head_width: int = 0,
    noise: bool = False,
    verification: Verification = "token",
    tree: AnyTree | None = None,
    copy_tokens: int = 0,
) -> Decoder:
    target, adapter = TargetModel.wrap(model), make_adapter(model, K, lora_rank=2, head_width=head_width)
    group = survey(target).query_group
    eos_ids = torch.tensor(list(eos), dtype=torch.long, device=target.device)
    if mode == "plain":
        return Decoder(RowForward(target, query_group=group), mode, 0, law, new_tokens, eos_ids)
    masks, gate = adapter.mask_embeddings.to(target.device, target.dtype), LoraGate(model, adapter.lora)
    head, tokens = HeadDrafter.of(adapter, target), NoiseTokens.of(V, target.device) if noise else None
    depth = K if tree is None else tree.num_speculative_tokens
    masks = None if noise else masks[:depth]
    forward = RowForward(target, masks, gate, query_group=group, noise=tokens, tap=head and head.tap)
    parts = {"head": head, "verification": verification, "copy_tokens": copy_tokens, "tree": tree}
    return Decoder(forward, mode, depth, law, new_tokens, eos_ids, **parts)


def assert_kept_as_plain_steps_write(model, state: DecodeState, rows: list[list[int]], new_tokens: int) -> None:
    """The cache holds of the committed tokens what plain steps behind the same prompts write."""
    plain = decoder_for(model, "plain", TokenLaw(greedy=True), new_tokens=new_tokens)
    expected = plain.prefill(rows)
    with torch.no_grad():
        while not expected.done.all():
            plain.step(expected)
    for mine, theirs in zip(state.cache.buffers, expected.cache.buffers, strict=True):
        for b, row in enumerate(rows):
            committed = len(row) + new_tokens - 1
            # eager attention takes its softmax in float32
            torch.testing.assert_close(mine[b, :, :committed], theirs[b, :, :committed], rtol=1e-5, atol=1e-5)


def tensors_of(state: DecodeState) -> dict[str, Tensor]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def results(decoder: Decoder, state: DecodeState) -> list:
    """What decoding has brought, for each sequence."""
    counts = counts_of(state, decoder.mode, state.lengths.shape[0])
    outputs = [row[:n] for row, n in zip(state.output.tolist(), state.num_new.tolist(), strict=True)]
    return [(output, one.accepted, one.drafted) for output, one in zip(outputs, counts, strict=True)]
