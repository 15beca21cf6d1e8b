"""What greedy tokens must be: those of `model.generate` for each prompt alone.

Knows the base and its own loop; no adapter.
"""

from collections.abc import Sequence

from timing.baselines import generated_alone
from timing.calls import Timed
from transformers import PreTrainedModel

from pardec.data.benchmarks import Prompt
from pardec.measures.divergence import Divergence, divergence_from


class References:
    """Tokens of `generate` by prompt, run where they are not known yet."""

    def __init__(self, base: PreTrainedModel, max_new_tokens: int):
        self._base, self._max_new_tokens = base, max_new_tokens
        self._known: dict[tuple[int, ...], list[int]] = {}

    def take(self, timed: Sequence[Timed], batches: Sequence[list[list[int]]]) -> None:
        """Learns from greedy calls of `generate` on batches of one prompt, in the order of these."""
        generate = next(one for one in timed if one.way.name == "generate")
        for (ids,), call in zip(batches, generate.calls, strict=False):  # a pass behind another gives the same
            self._known[tuple(ids)] = call.decoded.token_ids[0]

    def compare(self, prompt: Prompt, token_ids: list[int]) -> Divergence | None:
        """Where new tokens of a prompt leave those of `generate`; None if they do not."""
        ids = prompt.token_ids
        if tuple(ids) not in self._known:
            self._known[tuple(ids)] = generated_alone(self._base, [ids], self._max_new_tokens)[0]
        return divergence_from(self._base, prompt.name, ids, token_ids, self._known[tuple(ids)])
