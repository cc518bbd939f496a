"""A supervised run's checkpoints: every so many steps, at the end, and resumed from."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest

from rl.batch import UpdateResult
from rl.checkpoint import CheckpointStore
from rl.errors import CheckpointError, LearnerError
from rl.prompts import SftExample
from rl.supervised import SupervisedRun

TOKENS = np.arange(3, dtype=np.int32)
EXAMPLES = [SftExample(TOKENS, TOKENS + i) for i in range(7)]


class Silent:
    def message(self, text): ...
    def now(self, text): ...
    def step(self, step, metrics): ...


@dataclass
class Learners:
    """Remember what they were given."""

    seen: list = field(default_factory=list)
    interrupted_in: int = 0  # the update, of which it is
    is_updating: bool = False
    last_update: UpdateResult | None = None

    def update(self, batch):
        assert batch.num_loss_tokens == 3 * len(batch.samples)
        self.seen.append([int(sample.response_ids[0]) for sample in batch.samples])
        self.last_update = UpdateResult(len(self.seen), {"learner/loss": 1.0})
        if len(self.seen) == self.interrupted_in:
            self.is_updating = True
            raise KeyboardInterrupt
        return self.last_update

    def finish_update(self):
        self.is_updating = False
        return self.last_update

    def save_checkpoint(self, directory):
        (directory / "seen").write_text(str(len(self.seen)))
        return len(self.seen)

    def load_checkpoint(self, directory):
        self.seen = [None] * int((directory / "seen").read_text())


def run_in(directory, learners, every, examples=EXAMPLES, seed=1):
    return SupervisedRun(
        examples,
        learners,
        epochs=2,
        batch_size=3,
        seed=seed,
        checkpoints=CheckpointStore(directory, keep=5),
        checkpoint_every=every,
        display=Silent(),
    )


@pytest.mark.parametrize(("every", "steps"), [(0, [6]), (4, [4, 6]), (2, [2, 4, 6])])
def test_the_last_step_is_always_saved(tmp_path, every, steps):
    run_in(tmp_path, Learners(), every).execute(lambda done: nullcontext(lambda step, metrics: None))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{step:06d}" for step in steps]


def test_a_resumed_run_goes_on_with_the_same_batches(tmp_path):
    straight, cut, resumed = Learners(), Learners(), Learners()
    run_in(tmp_path / "straight", straight, 0).execute(lambda done: nullcontext(lambda step, metrics: None))
    assert sorted(i for batch in straight.seen[:3] for i in batch) == list(range(7))
    assert straight.seen[:3] != straight.seen[3:]
    other = Learners()
    run_in(tmp_path / "other", other, 0, seed=2).execute(lambda done: nullcontext(lambda step, metrics: None))
    assert other.seen != straight.seen

    class Sink:
        def write(self, step, metrics):
            if step == 5:
                raise LearnerError("lost")

        def close(self): ...

    with pytest.raises(LearnerError, match="lost"):
        run_in(tmp_path / "cut", cut, 2).execute(lambda done: nullcontext(Sink().write))
    again = run_in(tmp_path / "cut", resumed, 2)
    assert again.restore()
    again.execute(lambda done: nullcontext(lambda step, metrics: None))
    assert resumed.seen[4:] == straight.seen[4:]


def test_a_disk_that_fails_costs_no_step_that_was_learned(tmp_path):
    def record(step, metrics):
        if step == 3:
            raise OSError("Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        run_in(tmp_path, Learners(), 0).execute(lambda done: nullcontext(record))
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]


def test_an_interrupt_costs_no_step_that_was_learned(tmp_path):
    straight, cut, resumed = Learners(), Learners(interrupted_in=3), Learners()
    run_in(tmp_path / "straight", straight, 0).execute(lambda done: nullcontext(lambda step, metrics: None))
    rows = []
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "cut", cut, 0).execute(lambda done: nullcontext(lambda step, metrics: rows.append(step)))
    assert rows == [1, 2, 3]
    again = run_in(tmp_path / "cut", resumed, 0)
    assert again.restore()
    again.execute(lambda done: nullcontext(lambda step, metrics: rows.append(step)))
    assert rows == [1, 2, 3, 4, 5, 6]
    assert resumed.seen[3:] == straight.seen[3:]


def test_changed_examples_are_not_resumed_on(tmp_path):
    run_in(tmp_path, Learners(), 2).execute(lambda done: nullcontext(lambda step, metrics: None))
    with pytest.raises(CheckpointError, match="the worked examples changed since"):
        run_in(tmp_path, Learners(), 2, [*EXAMPLES[:-1], SftExample(TOKENS, TOKENS)]).restore()
