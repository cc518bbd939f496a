"""The order of training prompts: a seeded shuffle per epoch, and a position that resumes exactly.

Left out: loading (`rl.prompts.load`), and choosing prompts by difficulty (`rl.prompts.curriculum`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rl.batch import Prompt
from rl.errors import CheckpointError, DataError

_UINT64 = 2**64


class PromptSource:
    """An endless sequence of prompts, drawn in batches of any size.

    Each epoch is a permutation of all prompts that depends only on (seed, epoch). So every prompt is drawn exactly once
    per epoch, whatever the batch sizes; a batch may span two epochs (or more, if it is larger than the dataset).

    Example: prompts a, b, c, drawn two at a time without shuffling: ab, ca, bc, ab, ...

    The whole state is one number, the count of prompts drawn so far.
    """

    def __init__(self, prompts: Sequence[Prompt], *, shuffle: bool, seed: int) -> None:
        """Raises DataError for an empty dataset."""
        if not prompts:
            raise DataError("the dataset holds no prompts; check data.train")
        self._prompts = tuple(prompts)
        self._shuffle = shuffle
        self._seed = seed
        self._num_drawn = 0
        self._order_epoch = -1
        self._order: npt.NDArray[np.int64] = np.arange(len(self._prompts))
        self._fingerprint = fingerprint(self._prompts)

    def draw(self, count: int) -> tuple[Prompt, ...]:
        """The next `count` prompts."""
        drawn: list[Prompt] = []
        while len(drawn) < count:
            epoch, position = divmod(self._num_drawn, len(self._prompts))
            indices = self._epoch_order(epoch)[position : position + count - len(drawn)]
            drawn.extend(self._prompts[i] for i in indices)
            self._num_drawn += len(indices)
        return tuple(drawn)

    @property
    def num_drawn(self) -> int:
        """Prompts drawn so far."""
        return self._num_drawn

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; after `load_state_dict`, a source over the same dataset continues with the next prompt."""
        return {
            "num_drawn": self._num_drawn,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_prompts": len(self._prompts),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the saved position.

        Raises:
            CheckpointError: the dataset, the seed or the shuffle setting differs from when the state was saved.
        """
        own = self.state_dict()
        if state["fingerprint"] != own["fingerprint"]:
            raise CheckpointError(
                f"the training data changed since the checkpoint: it had {state['num_prompts']} prompts with "
                f"fingerprint {state['fingerprint']}, now {own['num_prompts']} with {own['fingerprint']}; "
                "restore the data (and data.max_prompt_tokens, data.eval and data.train_on_eval_prompts, on which it "
                "depends), or start a new run from the exported weights"
            )
        for key, setting in (("seed", "seed"), ("shuffle", "data.shuffle")):
            if state[key] != own[key]:
                raise CheckpointError(
                    f"the checkpoint was saved with {setting}={state[key]}, but the config says {own[key]}; the order "
                    f"of prompts depends on it: set {setting}={state[key]} to resume"
                )
        self._num_drawn = int(state["num_drawn"])

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._shuffle and epoch != self._order_epoch:
            bits = np.random.Philox(key=np.array([self._seed % _UINT64, epoch], dtype=np.uint64))
            self._order = np.random.Generator(bits).permutation(len(self._prompts))
            self._order_epoch = epoch
        return self._order


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A digest of all prompts in order, with every field except the token ids, which depend on the model."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        asked = (prompt.prompt_id, prompt.text, prompt.ground_truth, prompt.data_source, prompt.reward)
        digest.update(repr((*asked, sorted(prompt.extra.items()))).encode())
    return digest.hexdigest()
