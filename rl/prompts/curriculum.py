"""A prompt source that mostly skips prompts which are always or never solved.

Left out: the order (`rl.prompts.source`) and the pass rates (`rl.data_shaping`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rl.batch import Prompt
from rl.data_shaping import PassRateCurriculum
from rl.prompts.source import PromptSource


class CurriculumSource:
    """Walks `source` and keeps each prompt with the probability that `curriculum` gives it at that moment.

    Every pass over the data still reaches each prompt once; a prompt of weight w is kept in a share w of the passes.
    The draw depends only on (seed, position) and the pass rates, and the state holds both, so resuming is exact.

    Args:
        source: gives the order of the prompts.
        curriculum: updated by whoever scores the groups (`rl.data_shaping.StepGroups`).
        seed: the run's seed.
    """

    def __init__(self, source: PromptSource, curriculum: PassRateCurriculum, *, seed: int) -> None:
        self._source = source
        self._curriculum = curriculum
        self._seed = seed % 2**64

    def draw(self, count: int) -> tuple[Prompt, ...]:
        """The next `count` prompts that are kept. In the worst case this visits `count / floor` prompts on average."""
        kept: list[Prompt] = []
        while len(kept) < count:
            chance = self._chance(self._source.num_drawn)
            (prompt,) = self._source.draw(1)
            if chance < self._curriculum.weight(prompt.prompt_id):
                kept.append(prompt)
        return tuple(kept)

    def _chance(self, position: int) -> float:
        """A uniform number in [0, 1); the counter keeps its stream apart from those of the source's permutations."""
        key = np.array([self._seed, position], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1])).random()

    def state_dict(self) -> dict[str, Any]:
        """The source's state and the pass rates."""
        return {**self._source.state_dict(), "pass_rates": dict(self._curriculum.rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the source and the pass rates; a state saved without a curriculum has none, so all start unknown."""
        self._source.load_state_dict(state)
        self._curriculum.rates.clear()
        self._curriculum.rates.update(state.get("pass_rates", {}))
