"""Caches against a dictionary of slots, and against autograd over plain concatenation."""

import re
import shutil

import pytest
import torch

from pardec.target.cache import SlotCache
from pardec.target.prefix_cache import PrefixCache

H, D, LAYERS, SLOTS = 2, 4, 2, 24


def random_states(generator, batch, rows):
    """Keys and values as attention passes them: not contiguous, one head dimension swapped to the front."""
    shape = (batch, rows, H, D)
    return tuple(torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(2))


def buffer_of(oracle, batch):
    """The dictionary {(b, slot): [H, D]} as a tensor; slots that were never written are zero."""
    expected = torch.zeros(batch, H, SLOTS, D)
    for (b, slot), vector in oracle.items():
        expected[b, :, slot] = vector
    return expected


def write(oracle, states, slots):
    for b, row_slots in enumerate(slots):
        for row, slot in enumerate(row_slots):
            oracle[b, slot] = states[b, :, row].clone()


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_fills_the_first_slots_and_returns_the_rows_alone(batch):
    generator = torch.Generator().manual_seed(batch)
    cache = SlotCache(LAYERS, SLOTS)
    for layer in range(LAYERS):
        keys, values = random_states(generator, batch, 5)
        returned = cache.update(keys, values, layer)
        for states, out, name in zip((keys, values), returned, ("keys", "values"), strict=True):
            oracle = {}
            write(oracle, states, [range(5)] * batch)
            assert torch.equal(out, states)
            assert torch.equal(getattr(cache.layers[layer], name), buffer_of(oracle, batch))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_ragged_slots_are_written_per_row(batch, seed):
    generator = torch.Generator().manual_seed(100 * batch + seed)
    cache = SlotCache(LAYERS, SLOTS)
    oracles = [({}, {}) for _ in range(LAYERS)]
    prompt = random_states(generator, batch, 6)
    for layer, oracle in enumerate(oracles):
        cache.update(*prompt, layer)
        for states, written in zip(prompt, oracle, strict=True):
            write(written, states, [range(6)] * batch)
    lengths = torch.randint(3, 6, (batch,), generator=generator)
    for _ in range(4):
        rows = int(torch.randint(1, 8, (1,), generator=generator))
        cache.slots = lengths[:, None] + torch.arange(rows)
        for layer, oracle in enumerate(oracles):
            states = random_states(generator, batch, rows)
            returned = cache.update(*states, layer)
            for new, written, out in zip(states, oracle, returned, strict=True):
                write(written, new, cache.slots.tolist())
                assert torch.equal(out, buffer_of(written, batch))
        lengths += torch.randint(0, 4, (batch,), generator=generator)  # ragged acceptance, overwriting what is stale


@pytest.mark.parametrize("batch", [1, 3])
def test_slots_need_not_be_contiguous_or_in_order(batch):
    generator = torch.Generator().manual_seed(7)
    cache = SlotCache(1, SLOTS)
    cache.update(*random_states(generator, batch, 3), 0)
    before = cache.layers[0].keys.clone()
    cache.slots = torch.stack([torch.randperm(SLOTS, generator=generator)[:6] for _ in range(batch)])
    keys, values = random_states(generator, batch, 6)
    whole_keys, whole_values = cache.update(keys, values, 0)
    for b in range(batch):
        for slot in range(SLOTS):
            where = (cache.slots[b] == slot).nonzero().flatten().tolist()
            expected = keys[b, :, where[0]] if where else before[b, :, slot]
            assert torch.equal(whole_keys[b, :, slot], expected)
            if where:
                assert torch.equal(whole_values[b, :, slot], values[b, :, where[0]])


def test_slot_cache_returns_its_own_buffers_and_reports_their_length():
    generator = torch.Generator().manual_seed(0)
    cache = SlotCache(1, SLOTS)
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    cache.update(*random_states(generator, 1, 5), 0)
    cache.slots = torch.tensor([[5, 6]])
    assert cache.get_mask_sizes(2, 0) == (SLOTS, 0)
    keys, values = cache.update(*random_states(generator, 1, 2), 0)
    assert keys.data_ptr() == cache.layers[0].keys.data_ptr()
    assert values.data_ptr() == cache.layers[0].values.data_ptr()
    assert keys.shape == values.shape == (1, H, SLOTS, D)


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_is_given_the_used_slots_and_all_slots_are_written(batch):
    """Rows behind the used slots, such as those of a sequence that is done, must not be lost or shifted."""
    generator = torch.Generator().manual_seed(4)
    cache = SlotCache(1, SLOTS)
    cache.update(*random_states(generator, batch, 6), 0)
    for num_used in (8, SLOTS, 7, 1):
        before = [cache.layers[0].keys.clone(), cache.layers[0].values.clone()]
        cache.num_used = num_used
        cache.slots = torch.stack([torch.tensor([6 + b, 7 + b, SLOTS - 1]) for b in range(batch)])
        states = random_states(generator, batch, 3)
        returned = cache.update(*states, 0)
        assert cache.get_mask_sizes(3, 0) == (num_used, 0)
        for old, new, out, name in zip(before, states, returned, ("keys", "values"), strict=True):
            for b in range(batch):
                old[b, :, cache.slots[b]] = new[b]
            assert torch.equal(getattr(cache.layers[0], name), old)
            assert torch.equal(out, old[:, :, :num_used])
            assert out.data_ptr() == getattr(cache.layers[0], name).data_ptr()


def test_room_for_more_sequences_than_the_first_forward_has():
    generator = torch.Generator().manual_seed(5)
    cache = SlotCache(1, SLOTS, num_sequences=4)
    prompt = random_states(generator, 2, 5)
    returned = cache.update(*prompt, 0)
    assert all(torch.equal(out, states) for out, states in zip(returned, prompt, strict=True))
    keys = cache.layers[0].keys
    assert keys.shape == (4, H, SLOTS, D)
    assert torch.equal(keys[:2, :, :5], prompt[0])
    assert not keys[2:].any()
    assert not keys[:, :, 5:].any()
    cache.slots = torch.tensor([[5], [3]])  # a later chunk of the same two prompts
    chunk = random_states(generator, 2, 1)
    assert cache.update(*chunk, 0)[0].shape == (2, H, SLOTS, D)
    assert torch.equal(keys[0, :, 5], chunk[0][0, :, 0])
    assert torch.equal(keys[1, :, 3], chunk[0][1, :, 0])
    cache.slots = torch.tensor([[5], [5], [0], [7]])
    step = random_states(generator, 4, 1)
    assert cache.update(*step, 0)[0].shape == (4, H, SLOTS, D)
    assert torch.equal(keys[torch.arange(4), :, cache.slots[:, 0]], step[0][:, :, 0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize(("batch", "num_sequences"), [(1, 1), (2, 3)])
def test_compiled_code_writes_the_slots_alone_and_makes_no_buffer_anew(batch, num_sequences):
    """At several gigabytes a step copies of the whole cache would cost more than the forward."""
    from torch._inductor.utils import run_and_get_code

    generator = torch.Generator().manual_seed(8)
    prompt, rows = random_states(generator, batch, 3), random_states(generator, batch, 2)
    caches = [SlotCache(1, SLOTS, num_sequences) for _ in range(2)]
    for cache in caches:
        cache.update(*prompt, 0)
        cache.slots, cache.num_used = torch.tensor([[3, 4], [7, 2]])[:batch], 16

    def attend(keys, values, cache):
        return torch.nn.functional.scaled_dot_product_attention(keys, *cache.update(keys, values, 0))

    torch._dynamo.reset()
    with torch.no_grad():
        expected = attend(*rows, caches[0])
        found, code = run_and_get_code(torch.compile(attend, dynamic=False), *rows, caches[1])
    torch.testing.assert_close(found, expected)
    for one, other in zip(caches[1].buffers, caches[0].buffers, strict=True):
        assert torch.equal(one, other)
    made = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", "".join(code))
    assert not [shape for shape in made if str(SLOTS) in shape.split(", ")]
    loops = re.findall(r"< ?static_cast<int64_t>\((\d+)L\)", "".join(code))
    assert max(map(int, loops)) < SLOTS * H * D


@pytest.mark.parametrize("source", [[0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0], [0]], ids=str)
def test_prompts_are_spread_to_the_sequences_that_continue_them(source):
    generator = torch.Generator().manual_seed(6)
    cache = SlotCache(LAYERS, SLOTS, num_sequences=4)
    for layer in range(LAYERS):
        cache.update(*random_states(generator, 2, 9), layer)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache.spread(source, 6)
    for layer, buffers in zip(cache.layers, before, strict=True):
        for found, old in zip((layer.keys, layer.values), buffers, strict=True):
            for b in range(4):
                for slot in range(SLOTS):
                    moved = b < len(source) and slot < 6
                    assert torch.equal(found[b, :, slot], old[source[b] if moved else b, :, slot])


@pytest.mark.parametrize("is_new", [True, False])
def test_rows_are_taken_from_a_shorter_cache_into_chosen_places(is_new):
    generator = torch.Generator().manual_seed(7)
    cache, other = SlotCache(LAYERS, SLOTS, num_sequences=4), SlotCache(LAYERS, 5, num_sequences=2)
    for layer in range(LAYERS):
        other.update(*random_states(generator, 2, 5), layer)
        if not is_new:
            cache.update(*random_states(generator, 4, 9), layer)
    before = [buffer.clone() for buffer in cache.buffers] or [0.0] * 2 * LAYERS
    cache.take(other, torch.tensor([3, 1]))
    for found, old, theirs in zip(cache.buffers, before, other.buffers, strict=True):
        expected = torch.zeros_like(found) + old
        expected[3, :, :5], expected[1, :, :5] = theirs[0], theirs[1]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_slots_never_written_cannot_poison_masked_attention(batch, monkeypatch):
    """A NaN in a masked value slot reaches the output, so unwritten memory must not be handed out."""

    def poisoned(self, *shape, **options):
        return torch.full(shape, torch.nan, dtype=self.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan))
    generator = torch.Generator().manual_seed(1)
    cache = SlotCache(1, SLOTS)
    cache.update(*random_states(generator, batch, 3), 0)
    cache.slots = torch.full((batch, 1), 3)
    keys, values = cache.update(*random_states(generator, batch, 1), 0)
    visible = (torch.arange(SLOTS) <= 3).expand(batch, 1, 1, SLOTS)
    query = torch.randn(batch, H, 1, D, generator=generator)
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
    assert not out.isnan().any()
    short = torch.nn.functional.scaled_dot_product_attention(query, keys[:, :, :4], values[:, :, :4])
    torch.testing.assert_close(out, short)


def test_prefix_cache_keeps_only_what_came_first():
    generator = torch.Generator().manual_seed(2)
    cache = PrefixCache(LAYERS)
    prefixes = []
    for layer in range(LAYERS):
        prefix = random_states(generator, 2, 5)
        returned = cache.update(*prefix, layer)
        assert all(torch.equal(out, states) for out, states in zip(returned, prefix, strict=True))
        prefixes.append(prefix)
    for rows in (3, 1, 6):
        assert cache.get_seq_length() == 5
        assert cache.get_mask_sizes(rows, 0) == (5 + rows, 0)
        for layer in range(LAYERS):
            new = random_states(generator, 2, rows)
            returned = cache.update(*new, layer)
            for out, prefix, states in zip(returned, prefixes[layer], new, strict=True):
                assert out.shape == (2, H, 5 + rows, D)
                assert torch.equal(out[:, :, :5], prefix)
                assert torch.equal(out[:, :, 5:], states)


def test_empty_prefix_cache_has_no_length():
    cache = PrefixCache(1)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(4, 0) == (4, 0)


def test_two_forwards_against_one_prefix_can_both_run_backward():
    """Both graphs are alive at once, as with gradient accumulation over chunks of anchors."""
    generator = torch.Generator().manual_seed(3)
    attend = torch.nn.functional.scaled_dot_product_attention
    prefix = random_states(generator, 1, 5)
    inputs = [torch.randn(1, H, 3, D, generator=generator) for _ in range(2)]
    scale = torch.ones(D, requires_grad=True)
    cache = PrefixCache(1)
    cache.update(*prefix, 0)
    losses = []
    for x in inputs:
        rows = x * scale
        losses.append(attend(rows, *cache.update(rows, rows.sin(), 0)).square().sum())
    for loss in losses:
        loss.backward()

    reference = torch.ones(D, requires_grad=True)
    for x in inputs:
        rows = x * reference
        keys, values = torch.cat([prefix[0], rows], dim=2), torch.cat([prefix[1], rows.sin()], dim=2)
        attend(rows, keys, values).square().sum().backward()
    torch.testing.assert_close(scale.grad, reference.grad)
    assert reference.grad.abs().min() > 0
    assert cache.layers[0].keys is prefix[0]


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
def test_what_a_call_has_cached_is_freed_with_it_and_not_when_cycles_are_collected(mode, monkeypatch):
    """Otherwise a loop of calls holds the caches of many of them: gigabytes."""
    import gc
    import weakref

    from tiny_models import make_adapter, tiny_model

    from pardec.model import SelfSpeculativeModel

    made, begin = [], SlotCache.__init__

    def noted(self, *args):
        begin(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(SlotCache, "__init__", noted)
    base = tiny_model("llama")
    model = SelfSpeculativeModel(base, None, make_adapter(base, 2, lora_rank=2))
    gc.disable()
    try:
        model.generate([[1, 2, 3]], max_new_tokens=6, mode=mode)
        for _ in model.stream([1, 2, 3], max_new_tokens=6, mode=mode):
            pass
        assert len(made) >= 2
        assert [cache() for cache in made] == [None] * len(made)
    finally:
        gc.enable()


def written(batch: int, seed: int, **options):
    """A cache whose first slots hold random states, and what they are."""
    generator = torch.Generator().manual_seed(seed)
    cache = SlotCache(LAYERS, SLOTS, **options)
    for layer in range(LAYERS):
        cache.update(*random_states(generator, batch, 12), layer)
    return cache, [buffer.clone() for buffer in cache.buffers]


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_slots_move_at_once_wherever_they_overlap(batch, side_by_side):
    kinds = written(1, 0)[0].kinds if side_by_side else None
    cache, before = written(batch, 1, kinds=kinds)
    source, target = torch.tensor([[3, 5, 9], [4, 4, 4], [11, 1, 3]])[:batch], torch.tensor([[2, 3, 5]] * batch)
    cache.move(source, target)
    for buffer, old in zip(cache.buffers, before, strict=True):
        expected = old.clone()
        for b in range(batch):
            for origin, place in zip(source[b].tolist(), target[b].tolist(), strict=True):
                expected[b, :, place] = old[b, :, origin]
        assert torch.equal(buffer, expected)


def test_fewer_sequences_than_there_is_room_for_move_alone():
    cache, before = written(2, 1, num_sequences=4)
    cache.move(torch.tensor([[3], [4]]), torch.tensor([[1], [0]]))
    assert torch.equal(cache.layers[0].keys[2:], before[0][2:])
    assert torch.equal(cache.layers[0].keys[1, :, 0], before[0][1, :, 4])


def test_buffers_of_one_kind_lie_side_by_side_where_another_cache_shows_how_many_there_are():
    alone, beside = written(2, 1)[0], written(2, 1, kinds=written(1, 0)[0].kinds)[0]
    assert len({buffer.untyped_storage().data_ptr() for buffer in alone.buffers}) == 2 * LAYERS
    assert len({buffer.untyped_storage().data_ptr() for buffer in beside.buffers}) == 1
    assert all(torch.equal(a, b) for a, b in zip(alone.buffers, beside.buffers, strict=True))
    assert beside.buffers[0].untyped_storage().nbytes() == sum(buffer.nbytes for buffer in beside.buffers)


def test_layers_of_several_kinds_lie_with_their_own():
    def states(heads: int):
        return torch.ones(1, heads, 2, D), torch.ones(1, heads, 2, 2 * D)

    cache = SlotCache(3, 2)
    for _ in range(2):
        cache = SlotCache(3, SLOTS, 1, kinds=cache.kinds)
        for layer, heads in enumerate((1, 2, 1)):
            cache.update(*states(heads), layer)
    assert len({buffer.untyped_storage().data_ptr() for buffer in cache.buffers}) == 4
    cache.move(torch.tensor([[1]]), torch.tensor([[5]]))
    assert all(bool((buffer[:, :, 5] == 1).all()) for buffer in cache.buffers)
