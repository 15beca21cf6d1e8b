"""Measurements whose batches are shared out over processes: the figures of one process."""

import pytest

from pardec.measures.acceptance import measure_acceptance
from pardec.measures.floor import measure_floor
from pardec.measures.ranks import measure_ranks
from pardec.measures.share import ALL_OF_IT, Share
from pardec.model import SelfSpeculativeModel

PROMPTS = [list(range(100 + 7 * n, 116 + 7 * n)) for n in range(5)]


class GatheringError(Exception):
    """A process waits for the others here."""


def by_processes(measure, of):
    """What the first of so many processes gets, the others' lists coming behind one another in the wrong order."""
    everything = []

    def gather(mine):
        everything[:0] = mine
        raise GatheringError

    for index in range(of):
        with pytest.raises(GatheringError):
            measure(Share(index, of, gather))
    assert len(everything) == 3  # batches of two prompts, none of them twice
    return measure(Share(0, of, lambda mine: everything))


@pytest.mark.parametrize("of", [2, 4], ids=["two", "more-than-batches"])
def test_every_process_gets_the_figures_of_one(tiny_base, packaged_adapter, of):
    model = SelfSpeculativeModel(tiny_base, None, packaged_adapter(lora_rank=2, head_width=8))

    def accepted(share):
        return measure_acceptance(
            model, PROMPTS, max_new_tokens=6, temperature=0.8, top_k=10, seed=3, batch_size=2, share=share
        )

    alone = accepted(ALL_OF_IT)
    assert by_processes(accepted, of).to_dict() == alone.to_dict()

    def ranked(share):
        return measure_ranks(model, PROMPTS, alone.token_ids, batch_size=2, share=share)

    assert by_processes(ranked, of) == ranked(ALL_OF_IT)

    def floors(share):
        return measure_floor(model, PROMPTS, temperature=0.8, top_k=10, seed=3, batch_size=2, share=share)

    assert by_processes(floors, of) == floors(ALL_OF_IT)
