"""A response ends where the chat template ends an assistant's turn, also with a base model's generation config."""

import pytest

from rl.config import EvaluationConfig, RolloutConfig
from rl.learner_checkpoint import with_end_of_turn
from rollout.pool import evaluation_parameters, sampling_parameters

END_OF_TEXT, END_OF_TURN = 7, 9


@pytest.mark.parametrize(
    ("known", "exported"),
    [
        (END_OF_TEXT, [END_OF_TEXT, END_OF_TURN]),
        ([END_OF_TEXT, 8], [END_OF_TEXT, 8, END_OF_TURN]),
        (None, [END_OF_TURN]),
        (END_OF_TURN, END_OF_TURN),
        ([END_OF_TURN, END_OF_TEXT], [END_OF_TURN, END_OF_TEXT]),
    ],
)
def test_the_exported_model_ends_its_turns(known, exported):
    assert with_end_of_turn(known, END_OF_TURN) == exported


def test_training_and_evaluation_stop_there():
    training = sampling_parameters(RolloutConfig(top_p=0.9, max_response_tokens=50, stop=("###",)), END_OF_TURN)
    evaluation = evaluation_parameters(training, EvaluationConfig())
    assert training.stop_token_ids == evaluation.stop_token_ids == (END_OF_TURN,)
    assert (evaluation.temperature, evaluation.top_p, evaluation.max_tokens, evaluation.stop) == (
        0.0,
        1.0,
        50,
        ("###",),
    )
    longer = evaluation_parameters(training, EvaluationConfig(temperature=0.6, top_k=20, max_response_tokens=80))
    assert (longer.max_tokens, longer.temperature, longer.top_k) == (80, 0.6, 20)


def test_the_training_rollouts_distribution_is_not_the_evaluations():
    training = sampling_parameters(RolloutConfig(top_k=5, min_p=0.1, temperature=0.7), END_OF_TURN)
    evaluation = evaluation_parameters(training, EvaluationConfig())
    assert (evaluation.top_k, evaluation.min_p, evaluation.temperature) == (0, 0.0, 0.0)
