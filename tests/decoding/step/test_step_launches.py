"""What a step asks of a device, proved without one: kernel launches, no wait, nothing from the host, aligned masks.

Steps run on tensors without numbers, on the device `meta`, in bfloat16 and the way that a CUDA device takes: keys in
parts, weights packed or, for want of memory, as they are with the LoRA through hooks. Every operation that reaches a
backend is a launch unless it is a view or an allocation (`timing.launches`). What a layer launches is the difference
between models of few and of more layers.
"""

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from covering import every_pair
from recorded_steps import sampled
from timing.launches import StepCount, counted_step
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError, FakeTensorMode
from tree_samples import BRANCHING, DYNAMIC
from without_numbers import tiny_decoder, tiny_state

from pardec.decoding.sampling import TokenLaw
from pardec.target.cache import BufferKind

FUSED_WITH_HEAD = "fused with head"
# launches for each layer, and beside the layers, of a greedy step with one id that ends a text; a head's for K = 3.
# A fused layer makes keys and values of mask rows finite, 2 launches more than a plain one, and where heads share keys
# it copies its queries, as no view has them side by side; where they do not, it does so for several sequences. Parts of
# the keys are weighed by 4 launches: softmax, product, sum and conversion, which leaves nothing to copy where heads
# share keys. Lower these where launches go
BUDGETS = {
    "llama": {"plain": (44, 39), "two_pass": (92, 82), "fused": (47, 54), FUSED_WITH_HEAD: (47, 85)},
    "gemma3-mixed-windows": {"plain": (88, 68), "two_pass": (180, 140), "fused": (91, 83), FUSED_WITH_HEAD: (91, 115)},
    "gpt2": {"plain": (24, 24), "two_pass": (50, 52), "fused": (26, 39), FUSED_WITH_HEAD: (26, 70)},
}
# a product with B for each linear layer, and one with A for each input: q, k and v share theirs, and so do gate and up
LORA_LAUNCHES_A_LAYER = {"llama": 11, "gemma3-mixed-windows": 11, "gpt2": 8}
# of layers that share an input three products become one, and two become one; A rides along, B is one for each input
PACKED_SAVES, PACKED_LORA_LAUNCHES = 3, 4
# enough for every kind of layer
NUM_LAYERS = {"llama": (1, 2), "gemma3-mixed-windows": (2, 4), "gpt2": (1, 2)}
BATCH_SIZES = (1, 2)
# finding what is copied, and telling it from drafts; as many for any number of copies. In several texts it takes more,
# as many for any number of texts
COPY_LAUNCHES, COPY_LAUNCHES_OF_MANY = 38, 48


LAWS = {"greedy": TokenLaw(greedy=True), "sampled": TokenLaw(False, sampled().processors)}


@cache
def counted(
    family: str, mode: str, num_layers: int, batch_size: int, *, law: str = "greedy", num_sources: int = 1, **options
) -> StepCount:
    """Of one step; for reading only."""
    options |= {"law": LAWS[law], "head": mode == FUSED_WITH_HEAD}
    decoder = tiny_decoder(family, mode.split()[0], num_layers, **options)
    # a tree's steps move keys and values, which lie side by side in the engine's cache
    kinds = None if decoder.tree is None else kinds_of_buffers(family, num_layers)
    with torch.no_grad(), decoder.attached():
        state = tiny_state(decoder, batch_size, kinds=kinds, num_sources=num_sources)
        decoder.step(state)  # the first allocates
        with counted_step() as count:
            decoder.step(state)
    return count


@cache
def kinds_of_buffers(family: str, num_layers: int) -> Mapping[BufferKind, int]:
    decoder = tiny_decoder(family, "plain", num_layers)
    state = tiny_state(decoder, 1)
    decoder.step(state)
    return state.cache.kinds


@cache
def launches(family: str, mode: str, batch_size: int, **options) -> tuple[float, float]:
    """For each layer, and beside the layers."""
    few, more = NUM_LAYERS[family]
    at_few, at_more = (counted(family, mode, n, batch_size, **options).num_launches for n in (few, more))
    each = (at_more - at_few) / (more - few)
    return each, at_few - few * each


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize(("family", "mode"), [(family, mode) for family, modes in BUDGETS.items() for mode in modes])
def test_a_step_keeps_within_its_budget_of_launches(family, mode, batch_size):
    each, beside = launches(family, mode, batch_size)
    budget = BUDGETS[family][mode]
    assert each <= budget[0]
    assert beside <= budget[1]


# beside the layers of the chain of the same depth: the walk looks up where nodes have parents and takes what a path
# leads over; candidates are sorted out, not only the best; one gather and one scatter move all layers' keys and values.
# A dynamic tree besides finds its likeliest paths depth by depth, and from their parents who sees whom
TREE_LAUNCHES = 6
DYNAMIC_TREE_LAUNCHES = 52


@pytest.mark.parametrize(
    ("family", "mode", "batch_size"), every_pair(list(BUDGETS), ["two_pass", "fused", FUSED_WITH_HEAD], BATCH_SIZES)
)
def test_a_tree_launches_little_more_than_the_chain_and_nothing_more_in_a_layer(family, mode, batch_size):
    chain = launches(family, mode, batch_size)
    for tree, more in ((BRANCHING, TREE_LAUNCHES), (DYNAMIC["dynamic"], DYNAMIC_TREE_LAUNCHES)):
        each, beside = launches(family, mode, batch_size, tree=tree)
        assert each == chain[0]
        assert chain[1] < beside <= chain[1] + more


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("family", BUDGETS)
def test_a_lora_launches_its_products_and_nothing_beside_the_layers(family, batch_size):
    without, with_lora = launches(family, "fused", batch_size), launches(family, "fused", batch_size, lora=True)
    assert without[0] < with_lora[0] <= without[0] + LORA_LAUNCHES_A_LAYER[family]
    assert with_lora[1] == without[1]


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows"])
def test_packed_weights_save_products_and_make_a_lora_one_for_each_input(family, batch_size):
    for mode in ("plain", "fused"):
        own, packed = (launches(family, mode, batch_size, packed=packed) for packed in (False, True))
        assert packed == (own[0] - PACKED_SAVES, own[1])
    with_lora = launches(family, "fused", batch_size, packed=True, lora=True)
    assert packed[0] < with_lora[0] <= packed[0] + PACKED_LORA_LAUNCHES
    assert with_lora[1] == packed[1]
    assert launches(family, "plain", batch_size, packed=True, lora=True) == launches(
        family, "plain", batch_size, packed=True
    )


@pytest.mark.parametrize(
    ("family", "mode", "batch_size"), every_pair(list(BUDGETS), ["two_pass", "fused"], BATCH_SIZES)
)
def test_copies_take_launches_beside_the_layers_that_do_not_grow_with_their_number(family, mode, batch_size):
    without, few, many = (launches(family, mode, batch_size, copy_tokens=n) for n in (0, 1, 9))
    assert few == many
    assert few[0] == without[0]
    assert without[1] < few[1] <= without[1] + COPY_LAUNCHES
    of_two, of_eight = (launches(family, mode, batch_size, copy_tokens=9, num_sources=n) for n in (2, 8))
    assert of_two == of_eight
    assert few[1] < of_two[1] <= without[1] + COPY_LAUNCHES_OF_MANY


# beside a tree they are told from nodes by looking where the walk has led, and drafting goes on where they end; a
# dynamic tree besides says of every row in every step who sees whom
COPY_LAUNCHES_BESIDE_TREES = {"constant": 54, "dynamic": 57}


@pytest.mark.parametrize(
    ("family", "mode", "kind"), every_pair(list(BUDGETS), ["two_pass", "fused"], list(COPY_LAUNCHES_BESIDE_TREES))
)
def test_copies_beside_a_tree_take_launches_that_do_not_grow_with_their_number(family, mode, kind):
    tree, budget = BRANCHING if kind == "constant" else DYNAMIC["dynamic"], COPY_LAUNCHES_BESIDE_TREES[kind]
    without, few, many = (launches(family, mode, 2, tree=tree, copy_tokens=n) for n in (0, 4, 9))
    assert few == many
    assert few[0] == without[0]
    assert without[1] < few[1] <= without[1] + budget
    of_eight = launches(family, mode, 2, tree=tree, copy_tokens=9, num_sources=8)
    assert few[1] < of_eight[1] <= without[1] + budget + COPY_LAUNCHES_OF_MANY - COPY_LAUNCHES


OPTIONS = {
    "drafts": {},
    "copies": {"copy_tokens": 4},
    "tree": {"tree": BRANCHING},
    "dynamic": {"tree": DYNAMIC["dynamic"]},
    "tree with copies": {"tree": BRANCHING, "copy_tokens": 4},
    "dynamic with copies": {"tree": DYNAMIC["dynamic"], "copy_tokens": 4},
}


# plain steps have neither drafts nor what stands beside them
WAYS = [(mode, name) for mode in BUDGETS["llama"] for name in OPTIONS if mode != "plain" or name == "drafts"]


@pytest.mark.parametrize(
    ("way", "family", "batch_size", "law"), every_pair(WAYS, list(BUDGETS), BATCH_SIZES, list(LAWS))
)
def test_a_step_waits_for_no_value_and_brings_nothing_from_the_host(way, family, batch_size, law):
    mode, options = way
    given = {**OPTIONS[options], **({"lora": True} if mode == "fused" else {})}
    count = counted(family, mode, NUM_LAYERS[family][0], batch_size, law=law, **given)
    assert count.num_launches
    assert count.asked == []
    assert count.on_host == []


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
@pytest.mark.parametrize("family", BUDGETS)
def test_masks_are_as_attention_kernels_take_them(family, mode, batch_size):
    num_layers = NUM_LAYERS[family][0]
    count = counted(family, mode, num_layers, batch_size)
    assert len(count.masks) == num_layers * (2 if mode == "two_pass" else 1)
    for mask, query in zip(count.masks, count.queries, strict=True):
        assert mask is not None
        assert mask.shape[0] == query.shape[0] == 4  # parts of 64 slots
        assert mask.dtype == query.dtype == torch.bfloat16
        # the memory-efficient kernel pads a mask, in every layer, unless rows begin at multiples of 8 numbers
        *strides, last = mask.stride()
        assert last == 1
        assert not any(stride % 8 for stride in strides)
        assert mask.storage_offset() % 8 == 0


@pytest.mark.parametrize("mode", BUDGETS["llama"])
@pytest.mark.parametrize("family", BUDGETS)
def test_a_step_over_two_devices_is_refused(family, mode):
    """By fakes of the two devices for which torch is at home on any machine."""
    few, has_head = NUM_LAYERS[family][0], mode == FUSED_WITH_HEAD
    decoder = tiny_decoder(family, mode.split()[0], few, lora=mode == "fused", head=has_head, device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), decoder.attached():
        state = tiny_state(decoder, 1, "cpu")
        decoder.step(state)
        assert isinstance(state.bonus, FakeTensor)
        with pytest.raises(FakeTensorDeviceMismatchError, match="found at least two devices"):
            decoder.step(tiny_state(decoder, 1, "meta"))
