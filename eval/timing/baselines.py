"""The ways of decoding that a speed table compares: pardec's modes and what transformers offers.

Each is a function from prompts to tokens and counts. Knows no clock and no table.
Legend: B prompts, P tokens of the longest prompt, K num_speculative_tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CompileConfig, PreTrainedModel

from pardec.draft_tree import AnyTree
from pardec.layout import full_blocks
from pardec.model import SelfSpeculativeModel
from pardec.target.base import eos_token_ids, pad_token_id
from pardec.tuning.choice import Way as Shape

# as Spec-Bench runs prompt lookup: github.com/hemingkx/Spec-Bench, evaluation/inference_pld.py
PROMPT_LOOKUP_TOKENS = 10
FUSED_K = (1, 2, 4)  # and what the adapter was trained with
# behind one draft, and alone; what is tuned may have others
COPY_TOKENS = 8
NO_TUNED_CHOICE = "nothing tuned for this device, dtype and compile setting: `pardec tune` does that"
BATCH_1_ONLY = "transformers' assisted decoding takes one prompt at a time, with the dynamic cache"
NOT_ASKED_FOR = "left out by --without"
# what every table has: ratios and exactness are told by them
ALWAYS = ("plain", "generate")
CUDA_ONLY = "transformers compiles the static cache's forward on CUDA only"


@dataclass(frozen=True)
class Setting:
    """How tokens are chosen and how many.

    Attributes:
        name: `greedy` or `sampled`.
        max_new_tokens: limit per prompt.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; None when greedy.
    """

    name: str
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None


@dataclass(frozen=True)
class Decoded:
    """What one call gave.

    Attributes:
        token_ids: new tokens of each prompt, EOS included.
        num_steps: rounds of the call, which are those of its longest sequence.
        num_rows: rows that the target ran in these rounds, for one sequence.
        num_drafts: rounds that verified a draft, summed over sequences.
        num_accepted_tokens: accepted tokens, drafted or copied, summed over sequences.
    """

    token_ids: list[list[int]]
    num_steps: int
    num_rows: int
    num_drafts: int = 0
    num_accepted_tokens: int = 0

    @property
    def num_new_tokens(self) -> int:
        """Emitted tokens, summed over sequences."""
        return sum(map(len, self.token_ids))


@dataclass(frozen=True)
class Way:
    """One way to decode.

    Attributes:
        name: as tables print it.
        decode: takes the token ids of B prompts and a seed.
        model_bytes: weights that it needs, adapters aside.
        adapter: label of the adapter, empty without one.
        num_speculative_tokens: K; None where nothing is drafted by mask tokens.
        block_lengths: mask tokens behind each real row, where a tuned choice says so.
        tree: of drafts, where a tuned choice says so.
    """

    name: str
    decode: Callable[[list[list[int]], int], Decoded]
    model_bytes: int = 0
    adapter: str = ""
    num_speculative_tokens: int | None = None
    block_lengths: tuple[int, ...] | None = None
    tree: AnyTree | None = None


def ways_for(
    models: dict[str, SelfSpeculativeModel],
    asked_k: list[int] | None,
    assistant: PreTrainedModel | None,
    setting: Setting,
    batch_size: int,
    *,
    tuned_only: bool = False,
    without: Collection[str] = (),
) -> tuple[list[Way], list[dict[str, str]]]:
    """What is timed, and what is left out: its way, adapter and reason; `tuned_only` leaves untuned drafts out.

    Ways whose names are in `without` are left out too.
    """
    first = next(iter(models.values()))
    base = first.base_model
    ways, left_out = [pardec_way(first, setting, name="plain", mode="plain")], []
    if not tuned_only:
        ways.append(
            pardec_way(first, setting, name="copies", mode="fused", num_speculative_tokens=0, copy_tokens=COPY_TOKENS)
        )
    for label, model in models.items():
        assert model.adapter is not None
        facts = model.adapter.metadata
        trained = facts.num_speculative_tokens
        own = partial(pardec_way, model, setting, adapter=label)
        if not tuned_only:
            ways.append(own(name="two_pass", mode="two_pass", num_speculative_tokens=trained))
        ks = asked_k or sorted({*(k for k in FUSED_K if k <= trained), trained})
        for k in [] if tuned_only else ks:
            if k > trained and facts.mask_sharing != "shared":
                reason = f"{label} has {trained} mask tokens"
                left_out.append({"way": f"fused, K = {k}", "adapter": label, "reason": reason})
            else:
                ways.append(own(name="fused", mode="fused", num_speculative_tokens=k))
        if not tuned_only:
            ways.append(own(name="fused + copies", mode="fused", num_speculative_tokens=1, copy_tokens=COPY_TOKENS))
        choice = model.tuned_for(batch_size, is_greedy=setting.temperature == 0)
        if choice is None:
            left_out.append({"way": "tuned", "adapter": label, "reason": NO_TUNED_CHOICE})
        else:
            mode, blocks = choice.mode, tuple(choice.block_lengths)
            copies = " + copies" if choice.copy_tokens else ""
            shape = {"block_lengths": blocks, "copy_tokens": choice.copy_tokens, "tree": choice.tree}
            ways.append(own(name=f"{mode}{copies} tuned", mode=mode, **shape))
    ways.append(generate_way(base, setting, name="generate"))
    if base.device.type == "cuda":
        ways.append(generate_way(base, setting, name="generate static", static_cache=True))
    else:
        left_out.append({"way": "generate static", "adapter": "", "reason": CUDA_ONLY})
    assisted = {"prompt lookup": None} | ({"assistant": assistant} if assistant is not None else {})
    for name, drafter in assisted.items():
        if batch_size == 1:
            ways.append(assisted_way(base, setting, name=name, assistant=drafter))
        else:
            left_out.append({"way": name, "adapter": "", "reason": BATCH_1_ONLY})
    kept = [way for way in ways if way.name not in without]
    left_out += [{"way": w.name, "adapter": w.adapter, "reason": NOT_ASKED_FOR} for w in ways if w not in kept]
    return kept, left_out


def pardec_way(
    model: SelfSpeculativeModel,
    setting: Setting,
    *,
    name: str,
    mode: Literal["plain", "two_pass", "fused"],
    adapter: str = "",
    num_speculative_tokens: int | None = None,
    block_lengths: tuple[int, ...] | None = None,
    copy_tokens: int | None = None,
    tree: AnyTree | None = None,
) -> Way:
    """One of pardec's modes; other arguments as in `Way`.

    Args:
        model: with the adapter; plain mode uses none.
        setting: how tokens are chosen.
        mode: `plain`, `two_pass` or `fused`.
        num_speculative_tokens: K; None in plain mode, or with block_lengths.
        block_lengths: of the tuned choice, which its mode makes by itself where no K is asked for, as it does the head.
        copy_tokens: behind the drafts; None for none, with block_lengths those of the tuned choice.
        tree: of the tuned choice, as block_lengths are.
    """
    blocks = block_lengths or full_blocks(num_speculative_tokens or 0)
    K, L = max(blocks), copy_tokens or 0
    if mode == "fused":
        blocks = (*blocks, *(0,) * (K + 1 + L - len(blocks)))
    # a round of two_pass is a drafting and a verifying forward
    rows_per_step = Shape(mode, blocks, copy_tokens=L, tree=tree).num_rows

    def decode(prompts: list[list[int]], seed: int) -> Decoded:
        out = model.generate(
            prompts,
            max_new_tokens=setting.max_new_tokens,
            temperature=setting.temperature,
            top_k=setting.top_k,
            seed=seed,
            mode=mode,
            num_speculative_tokens=num_speculative_tokens,
            copy_tokens=copy_tokens,
        )
        steps = max(one.num_steps for one in out.stats.sequences)
        stats = out.stats
        accepted = stats.num_accepted_tokens + stats.num_accepted_copies
        return Decoded(out.token_ids, steps, steps * rows_per_step, stats.num_drafts, accepted)

    shown = None if mode == "plain" else K
    blocks = block_lengths if mode == "fused" and tree is None else None
    return Way(name, decode, model_bytes(model.base_model), adapter, shown, blocks, tree)


def generate_way(base: PreTrainedModel, setting: Setting, *, name: str, static_cache: bool = False) -> Way:
    """`model.generate` on batches padded on the left.

    Args:
        base: the frozen model.
        setting: see `Setting`.
        name: see `Way`.
        static_cache: instead of the dynamic one; on CUDA transformers then compiles the forward, here for every shape
            that it meets, as pardec does: its default would reuse slower code of unknown shape at the next batch size.
    """
    options: dict[str, Any] = {}
    if static_cache:
        options = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}

    def decode(prompts: list[list[int]], seed: int) -> Decoded:
        token_ids = _generate(base, setting, prompts, seed, options)
        steps = max(map(len, token_ids)) - 1  # prefill emits the first token
        return Decoded(token_ids, steps, steps)

    return Way(name, decode, model_bytes(base))


def generated_alone(base: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy new tokens of `model.generate` for each prompt by itself: what every way must give."""
    way = generate_way(base, Setting("greedy", max_new_tokens), name="generate")
    return [way.decode([prompt], 0).token_ids[0] for prompt in prompts]


def assisted_way(
    base: PreTrainedModel, setting: Setting, *, name: str, assistant: PreTrainedModel | None = None
) -> Way:
    """transformers' assisted decoding, one prompt at a time: an assistant drafts, or, without one, prompt lookup.

    How much an assistant drafts is left to transformers' defaults. The first forward verifies a draft behind the
    prompt, so every forward of the target counts as a round.
    """
    options: dict[str, Any] = {"assistant_model": assistant}
    if assistant is None:
        options = {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}

    def decode(prompts: list[list[int]], seed: int) -> Decoded:
        with _rows_of_forwards(base) as rows:
            token_ids = _generate(base, setting, prompts, seed, options)
        rows[0] -= len(prompts[0]) - 1
        num_accepted = len(token_ids[0]) - len(rows)  # each forward emits one token besides the accepted ones
        return Decoded(token_ids, len(rows), sum(rows), sum(n > 1 for n in rows), num_accepted)

    return Way(name, decode, model_bytes(base) + (model_bytes(assistant) if assistant is not None else 0))


def check_assistant(base: PreTrainedModel, assistant: PreTrainedModel) -> None:
    """Refuses an assistant that does not speak the base's token ids.

    Raises:
        ValueError: naming both vocabularies.
    """
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (base, assistant)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"assistant: expected the base's vocabulary of {sizes[0]} tokens, found {sizes[1]}")


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters; tied ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, P]: `generate` continues the last column."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ones = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, pad_id, "left"), pad_sequence(ones, True, 0, "left")


def _generate(
    base: PreTrainedModel, setting: Setting, prompts: list[list[int]], seed: int, options: dict[str, Any]
) -> list[list[int]]:
    """New tokens of each prompt up to its first EOS, from `base.generate` with these options besides."""
    ids, mask = (tensor.to(base.device) for tensor in left_padded(prompts, pad_token_id(base)))
    law: dict[str, Any] = {"do_sample": False}
    if setting.temperature:
        torch.manual_seed(seed)  # `generate` takes no generator
        law = {"do_sample": True, "temperature": setting.temperature, "top_k": setting.top_k, "top_p": 1.0}
    output = base.generate(ids, attention_mask=mask, max_new_tokens=setting.max_new_tokens, **law, **options)  # type: ignore[operator]
    eos_ids = eos_token_ids(base)
    return [_up_to_eos(row, eos_ids) for row in output[:, ids.shape[1] :].tolist()]


def _up_to_eos(token_ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    for index, token in enumerate(token_ids):
        if token in eos_ids:
            return token_ids[: index + 1]
    return token_ids


@contextmanager
def _rows_of_forwards(base: PreTrainedModel) -> Iterator[list[int]]:
    """A list that grows by the number of rows of each forward of `base`."""
    rows: list[int] = []

    def count(module: torch.nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        rows.append(inputs["input_ids"].shape[1])

    handle = base.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()
