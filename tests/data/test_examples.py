"""The order of examples and their anchors, against loops from the definitions."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_samples import masked, text

from pardec.data.examples import AnchoredSequences, ExampleOrder, OneShard, collate, collate_used
from pardec.data.row_checks import DataError


def make_sequences(count=7, length=20):
    """Sequence n consists of token n; every other one has a loss mask."""
    source = np.random.default_rng(0)
    documents = []
    for n in range(count):
        mask = source.random(length) < 0.3
        mask[length // 2] = True
        documents.append(masked([n] * length, mask) if n % 2 else text([n] * length))
    return documents


def test_examples_do_not_depend_on_the_order_they_are_asked_for():
    sequences = make_sequences()
    forwards, backwards = (AnchoredSequences(sequences, 30, 4, seed=3) for _ in range(2))
    assert len(forwards) == 30
    there = [forwards[c] for c in range(30)]
    back = [backwards[c] for c in reversed(range(30))][::-1]
    for one, other in zip(there, back, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("input_ids", "loss_mask", "anchors"))


def test_another_seed_gives_other_examples():
    sequences = make_sequences()
    one, other = ([AnchoredSequences(sequences, 14, 4, seed=seed)[c] for c in range(14)] for seed in (3, 4))
    assert [e["input_ids"][0].item() for e in one] != [e["input_ids"][0].item() for e in other]
    assert [e["anchors"].tolist() for e in one] != [e["anchors"].tolist() for e in other]


def test_every_epoch_is_a_permutation_of_its_own():
    examples = AnchoredSequences(make_sequences(), 7 * 6, 4, seed=0)
    order = [examples[c]["input_ids"][0].item() for c in range(7 * 6)]
    epochs = [order[i : i + 7] for i in range(0, len(order), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_anchors_are_drawn_anew_each_time():
    examples = AnchoredSequences([text(range(100))], 10, 5, seed=0)
    assert len({tuple(examples[c]["anchors"].tolist()) for c in range(10)}) == 10
    examples = AnchoredSequences([text(range(100))] * 10, 10, 5, seed=0)
    assert len({tuple(examples[c]["anchors"].tolist()) for c in range(10)}) == 10


@pytest.mark.parametrize("num_anchors", [1, 4, 30])
def test_the_first_target_of_an_anchor_counts_or_the_anchor_is_filling(num_anchors):
    """Anchor s trains the token at s + 2 first, behind a bonus token; filling sits where no target is left."""
    for example in (AnchoredSequences(make_sequences(), 21, num_anchors, seed=1)[c] for c in range(21)):
        ids, mask, anchors = example["input_ids"], example["loss_mask"], example["anchors"].tolist()
        assert len(anchors) == num_anchors
        useful = [s for s in range(len(ids) - 2) if mask[s + 1] and mask[s + 2]]
        chosen = [s for s in anchors if s != len(ids) - 1]
        assert set(chosen) <= set(useful)
        assert len(set(chosen)) == len(chosen) == min(num_anchors, len(useful))
        assert anchors[: len(chosen)] == chosen  # filling comes last


def test_anchors_come_in_random_order_so_that_the_first_are_any():
    """Token dropping keeps the first ones longest."""
    examples = AnchoredSequences([text(range(50))], 400, 8, seed=0)
    first, last = ([examples[c]["anchors"][place].item() for c in range(400)] for place in (0, -1))
    assert abs(sum(first) / 400 - sum(last) / 400) < 5  # means of 400 numbers from 0..47: standard error 0.7


def test_every_useful_anchor_is_chosen_sooner_or_later():
    sequences = [masked([1] * 12, [0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1])]
    examples = AnchoredSequences(sequences, 60, 1, seed=0)
    assert {examples[c]["anchors"].item() for c in range(60)} == {2, 5, 6}


@pytest.mark.parametrize("num_prompt_tokens", [1, 7, 18])
def test_anchors_lie_in_the_models_own_part_or_right_before_it(num_prompt_tokens):
    """As in decoding, where the first block stands behind the prompt's last token and drafts behind the bonus token."""
    T = 20
    sequences = [masked([1] * T, [0] * num_prompt_tokens + [1] * (T - num_prompt_tokens))]
    examples = AnchoredSequences(sequences, 200, 4, seed=0)
    seen = {anchor for c in range(200) for anchor in examples[c]["anchors"].tolist()}
    assert seen - {T - 1} == set(range(num_prompt_tokens - 1, T - 2))


def test_examples_carry_the_tokens_and_the_mask_of_their_sequence():
    sequences = [text([1, 2, 3, 4]), masked([5, 6, 7], [0, 0, 1])]
    examples = AnchoredSequences(sequences, 2, 1, seed=0)
    found = {tuple(e["input_ids"].tolist()): e["loss_mask"].tolist() for e in (examples[0], examples[1])}
    assert found == {(1, 2, 3, 4): [True] * 4, (5, 6, 7): [False, False, True]}
    assert all(
        e["input_ids"].dtype == torch.int64 and e["loss_mask"].dtype == torch.bool for e in (examples[0], examples[1])
    )


def test_a_batch_is_padded_on_the_right_with_what_no_loss_counts():
    sequences = [text([1, 2, 3, 4, 5]), masked([6, 7, 8], [0, 1, 1])]
    examples = AnchoredSequences(sequences, 2, 2, seed=0)
    pair = sorted((examples[0], examples[1]), key=lambda e: e["input_ids"][0].item())
    batch = collate(pair)
    assert batch["input_ids"][:, :3].tolist() == [[1, 2, 3], [6, 7, 8]]
    assert batch["input_ids"].shape == (2, 5)
    assert batch["loss_mask"].tolist() == [[True] * 5, [False, True, True, False, False]]
    assert torch.equal(batch["anchors"], torch.stack([e["anchors"] for e in pair]))
    assert batch["anchors"][1].tolist() == [0, 2]  # one useful anchor, one filled in at the own last token
    for b, anchors in enumerate(batch["anchors"].tolist()):
        for anchor in anchors:
            for target in range(anchor + 2, batch["input_ids"].shape[1]):
                counted = bool(batch["loss_mask"][b, target])
                assert not counted or target < len(pair[b]["input_ids"])


@pytest.mark.parametrize("lengths", [(6, 5), (12, 5), (3, 3), (1, 2)])
def test_a_batch_of_used_anchors_lacks_those_that_only_fill_up(lengths):
    examples = AnchoredSequences([text([1] * length) for length in lengths], 2, 8, seed=0)
    pair = [examples[0], examples[1]]
    whole, used = collate(pair), collate_used(pair)
    assert used["anchors"].shape[1] == max(1, max(lengths) - 2 if max(lengths) < 10 else 8)
    assert torch.equal(used["anchors"], whole["anchors"][:, : used["anchors"].shape[1]])
    for one, rest in zip(pair, whole["anchors"][:, used["anchors"].shape[1] :], strict=True):
        assert (rest == len(one["input_ids"]) - 1).all()
    assert torch.equal(used["input_ids"], whole["input_ids"])


# ---------------------------------------------------------------------- the order


class Shards:
    """Sequences as (shard, place), with the shards of an epoch in an order of its own."""

    def __init__(self, *lengths):
        self.all = [np.array(one, dtype=np.int64) for one in lengths]
        self.asked = []

    def shards(self, seed, epoch):
        return np.random.default_rng((seed, epoch)).permutation(len(self.all)).tolist()

    def lengths(self, shard):
        self.asked.append(shard)
        return self.all[shard]

    def sequence(self, shard, place):
        return text([shard * 1000 + place] * int(self.all[shard][place]))


def random_shards(*sizes, seed=0):
    source = np.random.default_rng(seed)
    return Shards(*(np.exp(source.normal(4, 1, size)).astype(np.int64) + 3 for size in sizes))


@pytest.mark.parametrize("step", [1, 4, 7])
def test_an_epoch_has_every_sequence_of_every_shard_once(step):
    sequences = random_shards(40, 0, 301, 5)
    order = ExampleOrder(sequences, seed=2, examples_per_step=step)
    everything = {(shard, place) for shard, lengths in enumerate(sequences.all) for place in range(len(lengths))}
    epochs = [[order.at(example) for example in range(346 * e, 346 * (e + 1))] for e in range(3)]
    assert all(set(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("step", [1, 4, 7])
def test_an_example_does_not_depend_on_what_was_asked_before(step):
    sequences = random_shards(40, 301, 5)
    whole = ExampleOrder(sequences, seed=2, examples_per_step=step)
    expected = [whole.at(example) for example in range(3 * 346)]
    jumping = ExampleOrder(sequences, seed=2, examples_per_step=step)
    for example in np.random.default_rng(0).permutation(3 * 346).tolist():
        assert jumping.at(example) == expected[example]
        if example % 50 == 0:
            assert ExampleOrder(sequences, seed=2, examples_per_step=step).at(example) == expected[example]


def test_shards_are_asked_for_when_their_examples_are():
    sequences = random_shards(50, 50, 50)
    order = ExampleOrder(sequences, seed=0, examples_per_step=4)
    first, second, third = sequences.shards(0, 0)
    order.at(0), order.at(49)
    assert sequences.asked == [first]
    order.at(50)
    assert sequences.asked == [first, second]
    order.at(100)
    assert sequences.asked == [first, second, third]


def padded_share(order, sequences, step, num_examples):
    """Of the tokens of batches of a step, those that are padding."""
    real = padded = 0
    for first in range(0, num_examples, step):
        lengths = [int(sequences.all[s][p]) for s, p in map(order.at, range(first, first + step))]
        real, padded = real + sum(lengths), padded + max(lengths) * step
    return 1 - real / padded


def test_a_step_has_examples_of_similar_length_and_steps_of_all_lengths_are_mixed():
    sequences, step = random_shards(4096), 8
    order = ExampleOrder(sequences, seed=0, examples_per_step=step)
    shuffled = ExampleOrder(sequences, seed=0)
    assert padded_share(shuffled, sequences, step, 4096) > 0.5
    assert padded_share(order, sequences, step, 4096) < 0.1
    means = [np.mean([sequences.all[s][p] for s, p in map(order.at, range(a, a + step))]) for a in range(0, 4096, step)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # 512 steps: standard error 0.04


def test_steps_begin_at_multiples_of_their_size_in_every_epoch():
    """70 sequences and steps of 8: the second epoch begins in the middle of a step."""
    sequences, step = random_shards(70), 8
    order = ExampleOrder(sequences, seed=0, examples_per_step=step)
    for first in range(72, 136, step):  # whole steps of the second epoch
        ranks = np.argsort(np.argsort(sequences.all[0], kind="stable"))
        own = sorted(int(ranks[place]) for _, place in map(order.at, range(first, first + step)))
        assert own == list(range(own[0], own[0] + step))


def test_sequences_of_one_length_are_left_in_random_order():
    sequences = Shards([16] * 100)
    plain, by_step = ExampleOrder(sequences, seed=5), ExampleOrder(sequences, seed=5, examples_per_step=4)
    expected = np.random.default_rng((5, 0, 0)).permutation(100).tolist()
    assert [by_step.at(n)[1] for n in range(100)] == expected == [plain.at(n)[1] for n in range(100)]


def test_no_sequences_at_all_are_refused():
    with pytest.raises(DataError, match="data: expected a sequence to train on, found none"):
        ExampleOrder(OneShard([]), seed=0).at(0)


def test_another_split_of_a_step_has_the_same_examples():
    """Two processes of 4, one of 8 and one of 2 with 4 accumulated batches: batch i of a step goes to process i."""
    documents = [text([n] * length) for n, length in enumerate(random_shards(90).all[0].tolist())]
    examples = AnchoredSequences(documents, 48, 3, seed=1, examples_per_step=8)

    def seen(first):
        return Counter((int(e["input_ids"][0]), *e["anchors"].tolist()) for e in map(examples.__getitem__, first))

    for step in range(6):
        together = seen(range(8 * step, 8 * step + 8))
        for size in (4, 2):
            parts = [range(a, a + size) for a in range(8 * step, 8 * step + 8, size)]
            assert sum(map(seen, parts), Counter()) == together
