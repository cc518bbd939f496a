"""A supervised run's checkpoints: every so many steps, at the end, and resumed from."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest

from rl.batch import UpdateResult
from rl.checkpoint import CheckpointStore
from rl.errors import CheckpointError, LearnerError
from rl.prompts import SftExample
from rl.supervised import SupervisedPlan, SupervisedRun

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
    scored: list = field(default_factory=list)
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

    def score_logprobs(self, pairs):
        """The more updates, the likelier; and every example differs."""
        self.scored.append([response[0] for _, response in pairs])
        return [-np.asarray(response, dtype=np.float32) / (1 + len(self.seen)) for _, response in pairs]

    def finish_update(self):
        self.is_updating = False
        return self.last_update

    def save_checkpoint(self, directory):
        (directory / "seen").write_text(str(len(self.seen)))
        return len(self.seen)

    def load_checkpoint(self, directory):
        self.seen = [None] * int((directory / "seen").read_text())


def run_in(directory, learners, every, *, examples=EXAMPLES, seed=1, held_out=(), evaluate_every=0):
    return SupervisedRun(
        SupervisedPlan(epochs=2, batch_size=3, seed=seed, checkpoint_every=every, evaluate_every=evaluate_every),
        examples,
        learners,
        checkpoints=CheckpointStore(directory, keep=5),
        display=Silent(),
        held_out=held_out,
    )


@pytest.mark.parametrize(("every", "measured"), [(0, [0, 6]), (4, [0, 4, 6]), (3, [0, 3, 6])])
def test_the_loss_of_held_out_examples_is_their_mean_over_tokens(tmp_path, every, measured):
    learners, rows = Learners(), {}
    held_out = [*EXAMPLES[:4], SftExample(TOKENS, np.arange(5, dtype=np.int32))]
    run = run_in(tmp_path, learners, 0, held_out=held_out, evaluate_every=every)
    last = run.execute(lambda done: nullcontext(rows.__setitem__))
    assert [step for step, row in rows.items() if "eval/loss" in row] == measured
    whole = (3 + 6 + 9 + 12 + 10) / (4 * 3 + 5)
    assert [rows[step]["eval/loss"] for step in measured] == pytest.approx([whole / (1 + step) for step in measured])
    assert last["eval/loss"] == rows[6]["eval/loss"]
    assert learners.scored[:2] == [[0, 1, 2], [3, 0]], "in batches"


def test_an_interrupted_or_resumed_run_evaluates_no_more_than_it_must(tmp_path):
    learners = Learners(interrupted_in=3)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, learners, 0, held_out=EXAMPLES[:1], evaluate_every=1).execute(
            lambda done: nullcontext(lambda step, metrics: None)
        )
    assert len(learners.scored) == 3, "before the first step and after the first two; then people wait for the end"
    resumed = Learners()
    run = run_in(tmp_path, resumed, 0, held_out=EXAMPLES[:1])
    assert run.restore()
    run.execute(lambda done: nullcontext(lambda step, metrics: None))
    assert len(resumed.scored) == 1


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
        run_in(tmp_path, Learners(), 2, examples=[*EXAMPLES[:-1], SftExample(TOKENS, TOKENS)]).restore()
