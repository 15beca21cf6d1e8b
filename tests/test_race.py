"""Races: turns go by the time that each has used, and what comes out is what `generate` gives."""

import pytest

from pardec import race as race_module
from pardec.model import SelfSpeculativeModel
from pardec.race import Lane, race

OPTIONS = {"max_new_tokens": 12}


@pytest.fixture
def model(tiny_base, tokenizer, packaged_adapter):
    return SelfSpeculativeModel(tiny_base, tokenizer, packaged_adapter(2, lora_rank=2))


class TimedLane:
    """Makes so many steps that take so long each."""

    def __init__(self, seconds_per_step: float, num_steps: int):
        self.seconds, self.is_closed = 0.0, False
        self._seconds_per_step, self._left = seconds_per_step, num_steps

    def step(self):
        if not self._left:
            return None
        self._left -= 1
        self.seconds += self._seconds_per_step
        return self.seconds

    def close(self):
        self.is_closed = True


def test_whoever_has_used_least_time_makes_the_next_step():
    slow, fast = TimedLane(3.0, 2), TimedLane(1.0, 5)
    order = ["slow" if lane is slow else "fast" for lane, _ in race([slow, fast])]
    assert order == ["slow", "fast", "fast", "fast", "slow", "fast", "fast"]


def test_a_race_that_is_left_early_gives_back_what_it_has_lent():
    lanes = [TimedLane(1.0, 5), TimedLane(1.0, 5)]
    running = race(lanes)
    next(running)
    running.close()
    assert all(lane.is_closed for lane in lanes)


@pytest.mark.parametrize("mode", ["two_pass", "fused"])
def test_each_lane_ends_with_what_generate_gives_and_its_own_seconds(model, mode):
    prompt = "def main():"
    lanes = [Lane(model, prompt, one, OPTIONS) for one in ("plain", mode)]
    emitted = {id(lane): [] for lane in lanes}
    for lane, chunk in race(lanes):
        emitted[id(lane)] += chunk.token_ids
        assert lane.num_tokens == len(emitted[id(lane)])
    for lane in lanes:
        alone = model.generate(prompt, mode=lane.mode, **OPTIONS)
        assert lane.out.token_ids == alone.token_ids == [emitted[id(lane)]]
        assert lane.out.text == alone.text
        assert lane.out.counts == alone.counts
        assert lane.out.stats.seconds == lane.seconds


def test_the_clock_of_a_lane_stands_while_the_other_runs(model, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(race_module.time, "perf_counter", lambda: now[0])
    lanes = [Lane(model, "def main():", mode, OPTIONS) for mode in ("plain", "fused")]
    for _ in race(lanes):
        now[0] += 1.0  # what is done with a chunk, such as drawing it
    assert [lane.seconds for lane in lanes] == [0.0, 0.0]
    assert lanes[0].out.stats.seconds == 0.0
