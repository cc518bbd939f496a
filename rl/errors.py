"""The exception hierarchy. Every error that a user can cause or encounter derives from `FledgeError`.

Each class is picklable (one message argument), because errors cross process boundaries, and also derives from the
standard error that it resembles, so that plain Python code can catch it. Left out: retry policy and logging.
"""


class FledgeError(Exception):
    """Base of all Fledge errors. The message says what happened, with numbers, and what to change."""

    exit_code = 1


class ConfigError(FledgeError, ValueError):
    """The configuration is wrong. Raised as early as possible, mostly before any process starts."""

    exit_code = 2


class DataError(FledgeError, ValueError):
    """A dataset is missing, a row is broken, or a ground truth cannot be used. Names the file and the line."""

    exit_code = 2


class RolloutError(FledgeError, RuntimeError):
    """A rollout engine failed and could not be replaced."""

    exit_code = 3


class EnginesLostError(RolloutError):
    """Rollout engines are lost and cannot be replaced, so that trying again would not help."""


class RewardError(FledgeError, RuntimeError):
    """A reward function is unusable: not found, of the wrong shape, or failing on too many samples."""

    exit_code = 4


class LearnerError(FledgeError, RuntimeError):
    """The learner failed: a non-finite loss, a lost rank, an unsupported model or layout."""

    exit_code = 5


class EmptyBatchesError(LearnerError):
    """Batches without a token to learn from, too many in a row. The learner itself is intact, and starting the run
    again would not help."""

    exit_code = 2


class WeightSyncError(FledgeError, RuntimeError):
    """The rollout workers do not hold the learner's weights. Names the version, engine and parameters where known."""

    exit_code = 6


class BrokenSyncError(WeightSyncError):
    """A transfer between GPUs broke off. The learner ranks may be in different collectives, so it cannot be repeated in
    this run; resume from the last checkpoint."""


class CheckpointError(FledgeError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another configuration."""

    exit_code = 7


class UnavailableError(FledgeError, RuntimeError):
    """What the run needs from outside is not there at the moment: a cluster that answers, or room on it."""

    exit_code = 8
