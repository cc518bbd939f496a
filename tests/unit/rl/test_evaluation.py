"""pass@k against its definition, and what a scored batch is summarised to."""

import itertools
import json
from dataclasses import replace

import pytest
from fakes import PROMPTS, rollout
from hypothesis import given
from hypothesis import strategies as st

from rl.batch import FinishReason, RewardStatus, RolloutBatch, Score, ScoredBatch
from rl.evaluation import eval_metrics, pass_at_k
from rl.samples import write_samples


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case):
    samples, correct, k = case
    subsets = list(itertools.combinations([i < correct for i in range(samples)], k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_more_than_the_samples_is_refused():
    with pytest.raises(ValueError, match="pass@3 of 1 correct in 2"):
        pass_at_k(2, 1, 3)


def scored(rewards_and_answers):
    rollouts = tuple(
        rollout(i, j, answer=f"sample {j} says {answer}")
        for i, group in enumerate(rewards_and_answers)
        for j, (_, answer) in enumerate(group)
    )
    scores = tuple(
        Score(0.0, status=RewardStatus.TIMEOUT) if reward is None else Score(reward, extracted=answer)
        for group in rewards_and_answers
        for reward, answer in group
    )
    return ScoredBatch(RolloutBatch(PROMPTS[: len(rewards_and_answers)], rollouts), scores)


def test_average_pass_and_majority():
    batch = scored([[(1.0, "4"), (0.0, "5"), (0.0, "5"), (1.0, "4")], [(0.0, "a"), (0.0, "a"), (1.0, "b"), (0.0, "a")]])
    metrics = eval_metrics("set", batch, (1, 2))
    assert metrics["eval/set/avg@4"] == pytest.approx((0.5 + 0.25) / 2)
    assert metrics["eval/set/pass@1"] == pytest.approx((0.5 + 0.25) / 2)
    assert metrics["eval/set/pass@2"] == pytest.approx((1 - 1 / 6 + 0.5) / 2)
    assert metrics["eval/set/maj@4"] == pytest.approx(0.5)  # the tie of the first prompt goes to its first answer


def test_an_unscored_sample_is_counted_and_left_out():
    batch = scored([[(1.0, "4"), (None, "")], [(0.0, "a"), (0.0, "b")]])
    metrics = eval_metrics("set", batch, (1, 2))
    assert metrics["eval/set/unscored_count"] == 1.0
    assert metrics["eval/set/avg@2"] == pytest.approx(0.5)  # a prompt counts as much as another
    assert metrics["eval/set/pass@1"] == pytest.approx(0.5)
    assert metrics["eval/set/pass@2"] == pytest.approx(0.0)  # only the second prompt has two samples left


def test_each_data_source_has_metrics_of_its_own_where_there_are_several():
    batch = scored([[(1.0, "4"), (0.0, "5")], [(0.0, "a"), (0.0, "b")], [(1.0, "c"), (1.0, "c")]])
    assert not [name for name in eval_metrics("set", batch, (1,)) if name.count("/") > 2]
    sources = ("openai/gsm8k", "", "openai/gsm8k")
    prompts = tuple(replace(p, data_source=s) for p, s in zip(batch.batch.prompts, sources, strict=True))
    metrics = eval_metrics("set", replace(batch, batch=replace(batch.batch, prompts=prompts)), (1, 2))
    assert metrics["eval/set/avg@2"] == pytest.approx(0.5)
    assert metrics["eval/set/openai/gsm8k/avg@2"] == pytest.approx(0.75)
    assert metrics["eval/set/openai/gsm8k/pass@2"] == 1.0
    assert metrics["eval/set/openai/gsm8k/prompts"] == 2.0
    assert metrics["eval/set/none/avg@2"] == 0.0


def test_nothing_scored_gives_no_score():
    metrics = eval_metrics("set", scored([[(None, ""), (None, "")]]), (1,))
    assert not any("@" in name for name in metrics)
    assert (metrics["eval/set/prompts"], metrics["eval/set/unscored_count"]) == (1.0, 2.0)
    metrics = eval_metrics("set", scored([[(None, "")], [(1.0, "4")]]), (1,))
    assert (metrics["eval/set/prompts"], metrics["eval/set/avg@1"]) == (2.0, 1.0)


def test_samples_without_an_answer_do_not_vote_and_without_any_there_is_no_vote():
    batch = scored([[(0.0, None), (0.0, None), (0.0, None), (1.0, "4")]])
    assert eval_metrics("set", batch, ())["eval/set/maj@4"] == 1.0
    for group in ([(0.0, None), (1.0, None)], [(1.0, "4")]):
        assert not any("maj" in name for name in eval_metrics("set", scored([group]), ()))


def test_lengths_and_truncation_are_of_all_responses():
    rollouts = (rollout(0, 0, length=2), rollout(0, 1, length=6, finish_reason=FinishReason.LENGTH), rollout(0, 2))
    batch = ScoredBatch(
        RolloutBatch(PROMPTS[:1], rollouts), (Score(1.0), Score(0.0, status=RewardStatus.TIMEOUT), Score(1.0))
    )
    metrics = eval_metrics("set", batch, ())
    assert metrics == {
        "eval/set/prompts": 1.0,
        "eval/set/unscored_count": 1.0,
        "eval/set/length_mean": pytest.approx(11 / 3),
        "eval/set/truncated_frac": pytest.approx(1 / 3),
        "eval/set/avg@3": 1.0,
    }


def test_shaping_and_weights_do_not_decide_what_is_solved():
    right = Score(0.55, unshaped_reward=0.9, passed=True, extracted="4")  # weighted 0.9, penalised for its length
    wrong = Score(0.1, unshaped_reward=0.4, passed=False, extracted="5")
    batch = ScoredBatch(RolloutBatch(PROMPTS[:1], (rollout(0, 0), rollout(0, 1))), (right, wrong))
    metrics = eval_metrics("set", batch, (1,))
    assert metrics["eval/set/pass@1"] == pytest.approx(0.5)
    assert metrics["eval/set/avg@2"] == pytest.approx(0.65)
    assert metrics["eval/set/maj@2"] == pytest.approx(0.9)


def test_a_lone_surrogate_reaches_the_sample_file_and_comes_back(tmp_path):
    batch = RolloutBatch(PROMPTS[:1], (rollout(0, 0, answer="\ud800"),))
    write_samples(tmp_path / "samples.jsonl", ScoredBatch(batch, (Score(1.0),)))
    assert json.loads((tmp_path / "samples.jsonl").read_text())["answer"] == "\ud800"
