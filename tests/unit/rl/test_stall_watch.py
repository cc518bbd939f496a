"""When ranks count as hung, with a clock and answers of the test's own."""

from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from rl import stall_watch
from rl.errors import LearnerError
from rl.progress import Position, Work
from rl.stall_watch import StallWatch


class Ranks:
    """Two ranks that begin a piece of work every `piece_s`, and answer after `delay_s`; stands for Ray too."""

    def __init__(self, piece_s=(1.0, 1.0), delay_s=(0.0, 0.0)):
        self.now, self.piece_s, self.delay_s = 1000.0, piece_s, delay_s
        self.told = []

    def worker(self, rank):
        def position():
            return Position(int((self.now - 1000.0) / self.piece_s[rank]), f"piece of {rank}")

        return SimpleNamespace(
            position=SimpleNamespace(remote=lambda: (self.now + self.delay_s[rank], position())),
            report=SimpleNamespace(remote=lambda: (self.now + self.delay_s[rank], (position(), "in update"))),
        )

    def wait(self, calls, *, num_returns, timeout):
        assert num_returns == len(calls)
        self.now += min(timeout, max(max(at for at, _ in calls) - self.now, 0.0))
        return [call for call in calls if call[0] <= self.now], [call for call in calls if call[0] > self.now]

    def get(self, call):
        return call[1]


@pytest.fixture
def watch(monkeypatch):
    def make(ranks, limit_s=600.0):
        monkeypatch.setattr(stall_watch, "ray", ranks)
        monkeypatch.setattr(stall_watch, "time", SimpleNamespace(monotonic=lambda: ranks.now))
        return StallWatch([ranks.worker(0), ranks.worker(1)], limit_s, "learner.hang_timeout_s", ranks.told.append)

    return make


def look_for(watch, ranks, seconds, every=5.0):
    end = ranks.now + seconds
    while ranks.now < end:
        watch.look()
        ranks.now += every


@pytest.mark.parametrize(("limit_s", "piece_s"), [(5, 0.1), (5, 1), (600, 0.1), (600, 1), (600, 30), (600, 599)])
def test_ranks_that_move_are_never_hung(watch, piece_s, limit_s):
    ranks = Ranks((piece_s, piece_s), delay_s=(0.2, 3.0))
    look_for(watch(ranks, limit_s), ranks, 5000)
    assert "piece of" in ranks.told[-1]


def test_a_driver_that_was_stopped_itself_asks_again_before_it_judges(watch):
    ranks = Ranks((30.0, 30.0))
    watched = watch(ranks)
    for _ in range(50):
        look_for(watched, ranks, 17)
        ranks.now += 700  # Ctrl-Z, and some time later `fg`
        watched.look()


def test_ranks_that_stand_still_are_told_of_in_time_with_those_that_are_behind_first(watch):
    ranks = Ranks((10_000.0, 900.0))
    ranks.now += 950  # one is a piece of work ahead
    watched = watch(ranks)
    with pytest.raises(LearnerError) as found:
        look_for(watched, ranks, 850, every=5.0)
    assert 1950 + 600 <= ranks.now <= 1950 + 640
    assert "ranks [0] are at piece of 0 (piece of work 0); ranks [1] are at piece of 1 (piece of work 1). If" in str(
        found.value
    )
    assert found.value.__notes__ == ["learner rank 0 is in:\nin update", "learner rank 1 is in:\nin update"]


def test_a_rank_that_does_not_answer_is_told_of_without_a_place(watch):
    ranks = Ranks((10_000.0, 10_000.0), delay_s=(0.0, 1e9))
    with pytest.raises(LearnerError) as found:
        look_for(watch(ranks), ranks, 800)
    assert "s (learner.hang_timeout_s): ranks [0] are at piece of 0 (piece of work 0); ranks [1] do not answer" in str(
        found.value
    )
    assert len(found.value.__notes__) == 1


def test_a_lost_rank_is_left_to_its_own_call(watch):
    ranks = Ranks()
    watched = watch(ranks)
    ranks.get = lambda call: (_ for _ in ()).throw(RayActorError(None, "gone"))
    look_for(watched, ranks, 100)


def test_a_stack_is_that_of_the_thread_that_works():
    work = Work()
    assert work.position == Position(0, "its start") and work.stack() == ""
    work.begin("a test")
    assert work.position == Position(1, "a test")
    assert "test_a_stack_is_that_of_the_thread_that_works" in work.stack()
