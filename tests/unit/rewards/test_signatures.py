"""Every known signature, sync and async, runs unchanged; unknown ones and wrong options are refused at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

import pytest

from rewards.api import GroundTruthError, RewardInput, RewardOutput
from rewards.signatures import adapt
from rewards.trl_columns import TrlFunction, reads_messages
from rl.errors import ConfigError, RewardError


def sample(response: str = "42", **fields: Any) -> RewardInput:
    defaults: dict[str, Any] = {"prompt": "6 x 7?", "answer": response, "ground_truth": "42", "data_source": "toy"}
    return RewardInput(response=response, **{**defaults, **fields})


def plain(sample: RewardInput, *, bonus: float = 0.0) -> float:
    return float(sample.answer == sample.ground_truth) + bonus


async def plain_async(sample: RewardInput, bonus: float = 0.0) -> RewardOutput:
    await asyncio.sleep(0)
    return RewardOutput(1.0 + bonus, {"part": 0.5})


def batched(samples: Sequence[RewardInput], bonus: float = 0.0) -> list[float]:
    return [float(s.answer == s.ground_truth) + bonus for s in samples]


def untyped_batch(samples):  # type: ignore[no-untyped-def]
    return [len(samples)] * len(samples)


class Batched:
    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    def score_batch(self, samples: Sequence[RewardInput]) -> list[float]:
        return [self.bonus] * len(samples)


class AsyncCallable:
    async def __call__(self, sample: RewardInput) -> float:
        return 1.0


def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):  # type: ignore[no-untyped-def]
    assert data_source == "toy"
    return {"score": float(solution_str == ground_truth) + bonus, "acc": True, "pred": solution_str, **extra_info}


def short_compute_score(solution_str, ground_truth, method="strict"):  # type: ignore[no-untyped-def]
    return solution_str == ground_truth


def batch_compute_score(data_sources, solution_strs, ground_truths, extra_infos):  # type: ignore[no-untyped-def]
    return [float(a == b) for a, b in zip(solution_strs, ground_truths)]


def trl_text(completions, **kwargs):  # type: ignore[no-untyped-def]
    return [float(len(c)) for c in completions]


def trl_messages(completions, solution, **kwargs):  # type: ignore[no-untyped-def]
    return [1.0 if c[0]["content"] == s else 0.0 for c, s in zip(completions, solution)]


def trl_everything(prompts, completions, completion_ids, level, log_extra=None, log_metric=None):  # type: ignore[no-untyped-def]
    log_extra("ids", [len(ids) for ids in completion_ids])
    log_metric("size", len(prompts))
    return [None if one == "skip" else 1.0 for one in level]


def test_the_state_of_trls_trainer_is_not_taken_for_a_column() -> None:
    def asks(completions, trainer_state, **kwargs):  # type: ignore[no-untyped-def]
        return [0.0 for _ in completions]

    with pytest.raises(RewardError, match="asks for trainer_state, the state of TRL's trainer, which there is not"):
        TrlFunction(asks, {})
    TrlFunction(asks, {"trainer_state": None})


def values(function: Any, samples: list[RewardInput], **options: Any) -> list[Any]:
    """Raw results of a sync reward."""
    reward = adapt("x", function, options)
    return [reward.call(one) for one in samples] if reward.mode == "sample" else list(reward.call(samples))


@pytest.mark.parametrize("function", [plain, batched, compute_score, short_compute_score, batch_compute_score])
def test_right_and_wrong(function: Any) -> None:
    def number(value: Any) -> float:
        return float(value["score"] if isinstance(value, dict) else value)

    assert [number(v) for v in values(function, [sample("42"), sample("41")])] == [1.0, 0.0]


@pytest.mark.parametrize("function", [plain, batched, compute_score])
def test_options_reach_the_function(function: Any) -> None:
    [value] = values(function, [sample()], bonus=0.5)
    assert value == 1.5 or value["score"] == 1.5


def test_async_functions_and_objects() -> None:
    for target, mode in ((plain_async, "sample"), (AsyncCallable(), "sample")):
        reward = adapt("x", target, {})
        assert reward.is_async and reward.mode == mode
    assert asyncio.run(adapt("x", plain_async, {"bonus": 1.0}).call(sample())).reward == 2.0


def test_batches_are_recognised_by_annotation_name_or_method() -> None:
    assert [adapt("x", f, {}).mode for f in (batched, untyped_batch, Batched(), plain)] == ["batch"] * 3 + ["sample"]
    assert values(untyped_batch, [sample(), sample()]) == [2, 2]


def test_verl_extra_info_is_the_nested_field_or_the_whole_row() -> None:
    nested = values(compute_score, [sample(extra={"extra_info": {"index": 3}, "other": 1})])[0]
    assert nested["index"] == 3 and "other" not in nested
    assert values(compute_score, [sample(extra={"index": 4})])[0]["index"] == 4


def test_trl_completions_are_messages_where_the_function_reads_messages() -> None:
    def annotated(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
        return [float(len(c)) for c in completions]

    def annotated_text(completions: list[str], **kwargs: Any) -> list[float]:
        return [float("content" in c) for c in completions]

    def by_helper(completions: Any, **kwargs: Any) -> list[float]:
        return trl_messages(completions, ["42"])

    seen = [reads_messages(f) for f in (trl_text, trl_messages, annotated, annotated_text, by_helper)]
    assert seen == [False, True, True, False, True]


def test_trl_columns() -> None:
    rows = [sample("42", extra={"solution": "42"}), sample("41", extra={"solution": "42"})]
    assert values(trl_messages, rows) == [1.0, 0.0]
    assert values(trl_messages, [sample("42")]) == [1.0]  # no such column: the ground truth
    mixed = [sample("42"), sample("41", extra={"solution": "41"})]
    assert values(trl_messages, mixed) == [1.0, 1.0]  # row by row, so that a sample's reward is its own
    assert values(trl_text, rows) == [2.0, 2.0]
    rows = [sample(extra={"level": "skip"}, token_ids=(1, 2)), sample(extra={"level": "easy"}, token_ids=(1,))]
    assert values(trl_everything, rows) == [None, RewardOutput(1.0, {"ids": 1.0, "size": 2.0})]


def test_trl_missing_columns_are_named() -> None:
    def two(completions: Any, level: Any, topic: Any) -> list[float]:
        return []

    with pytest.raises(KeyError, match="needs the column level, topic; the rows have subject, ground_truth"):
        values(two, [sample(extra={"subject": "algebra"})])
    with pytest.raises(KeyError, match="needs the column topic; the rows have level, toppic, ground_truth"):
        values(two, [sample(extra={"level": 1, "toppic": "algebra"})])  # not the ground truth in its place

    def own_and_truth(completions: Any, ground_truth: Any, level: Any) -> list[float]:
        return []

    with pytest.raises(KeyError, match="needs the column level"):
        values(own_and_truth, [sample()])


def test_trl_rows_must_hold_every_column_when_they_load() -> None:
    """In a batch the others' columns would be there, or not, as the draw has it."""

    def two(completions: Any, level: Any, topic: Any, note: Any = None) -> list[float]:
        return []

    def one(completions: Any, solution: Any) -> list[float]:
        return []

    check = adapt("x", two, {}).validate_ground_truth
    assert check is not None
    check("42", {"level": None, "topic": "algebra"})
    with pytest.raises(GroundTruthError, match="needs the column topic; the row has level, data_source"):
        check("42", {"level": 1, "data_source": ""})
    check = adapt("x", two, {"topic": "algebra"}).validate_ground_truth
    assert check is not None
    check("42", {})  # one column, for which the ground truth stands
    check = adapt("x", one, {}).validate_ground_truth
    assert check is not None
    check("42", {})


def test_trl_none_abstains_and_ours_may_not() -> None:
    reward = adapt("x", trl_everything, {})
    assert reward.may_abstain and not adapt("x", plain, {}).may_abstain


def test_a_function_of_trl_itself() -> None:
    trl = pytest.importorskip("trl.rewards.format_rewards")
    assert values(trl.think_format_reward, [sample("<think>a</think>b"), sample("b")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (plain, {"bonsu": 1}, r"does not take the option 'bonsu'; did you mean bonus\? it takes bonus"),
        (plain, {"bonus": "lots"}, r"option bonus is 'lots': input should be a valid number"),
        (batched, {"samples": []}, r"does not take the option 'samples'"),
        (compute_score, {"ground_truth": "1"}, r"does not take the option 'ground_truth'; it takes bonus"),
        (short_compute_score, {"metod": "x"}, r"did you mean method\?"),
        (trl_text, {"completions": []}, r"completions come from the sample and cannot be options"),
        (Batched().score_batch, {"x": 1}, r"it takes no options"),
    ],
)
def test_wrong_options_are_refused(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt("x", function, options)


def test_what_could_not_score_one_sample_is_refused() -> None:
    async def yielding(sample: RewardInput) -> Any:
        yield 1.0

    with pytest.raises(RewardError, match="is an asynchronous generator; return the results"):
        adapt("x", yielding, {})
    wrong = AsyncCallable()
    wrong.max_concurrent = "many"  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="max_concurrent 'many'; it must be a whole number"):
        adapt("x", wrong, {})


def test_a_missing_option_is_named() -> None:
    def needs(sample: RewardInput, threshold: float) -> float:
        return threshold

    with pytest.raises(ConfigError, match="needs the option threshold; it takes threshold"):
        adapt("x", needs, {})


def test_options_are_converted_to_their_annotation() -> None:
    def typed(sample: RewardInput, *, pair: tuple[int, int], mode: Literal["a", "b"] = "a") -> Any:
        return pair, mode

    assert adapt("x", typed, {"pair": [1, 2]}).call(sample()) == ((1, 2), "a")
    with pytest.raises(ConfigError, match=r"option mode is 'c': input should be 'a' or 'b'"):
        adapt("x", typed, {"pair": [1, 2], "mode": "c"})


@pytest.mark.parametrize("target", [lambda: 1.0, 7, object()])
def test_unknown_forms_are_refused_with_the_known_ones(target: Any) -> None:
    with pytest.raises(RewardError, match=r"compute_score\(data_source, solution_str"):
        adapt("x", target, {})
