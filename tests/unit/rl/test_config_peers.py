"""Keys of verl, TRL and OpenRLHF: errors say what they are called here, and nothing that is not so."""

import re

import pytest

from rl.config import SftConfig, TrainConfig
from rl.config.loading import load_config
from rl.config.peers import PEER_KEYS, PEER_VALUES
from rl.errors import ConfigError

OPTIONS = {"clip_low", "clip_high", "dual_clip"}  # of losses


def has(schema: object, key: str) -> bool:
    for part in key.split("."):
        fields = getattr(schema, "model_fields", {})
        if part not in fields:
            return "dict[" in str(schema) and part in OPTIONS
        annotation = fields[part].annotation
        models = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        schema = models[0] if models else annotation
    return True


@pytest.mark.parametrize("key", sorted({key for key, _ in PEER_KEYS.values() if key}))
def test_every_key_that_is_named_exists(key):
    assert all(has(TrainConfig, part) for part in key.split(", ")), key


@pytest.mark.parametrize("name", sorted(PEER_KEYS))
def test_no_key_of_ours_is_taken_for_a_peers(name):
    assert name not in TrainConfig.model_fields and name not in SftConfig.model_fields
    assert all(name not in getattr(field.annotation, "model_fields", {}) for field in TrainConfig.model_fields.values())


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: some/model}\ndata: {train: {path: data.jsonl}}\n")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.n=5", "unknown key rollout.n; here it is rollout.group_size"),
        ("learner.ppo_mini_batch_size=256", "here it is learner.mini_batches (it is the number of optimizer steps"),
        ("actor_rollout_ref.actor.ppo_epochs=2", "actor_rollout_ref; ppo_epochs: here it is learner.epochs"),
        ("trainer.total_epochs=3", "unknown key trainer; docs/configuration.md ends with verl's keys"),
        ("algorithm.kl_ctrl.kl_coef=1", "kl_coef: here it is algorithm.kl.coefficient (with a kl.placement)"),
        ("logging.wandb_entity=me", "there is none here: set WANDB_ENTITY"),
        ("algorithm.aggregation=token-mean", "; what is token-mean elsewhere is token_mean here"),
        ("rollout.group_sise=4", "did you mean group_size?"),
    ],
)
def test_a_peers_key_is_told_its_name_here(config_file, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(config_file, [override], TrainConfig)


@pytest.mark.parametrize(("theirs", "ours"), PEER_VALUES.items())
def test_every_value_that_is_named_is_allowed(config_file, theirs, ours):
    keys = {
        "algorithm.aggregation": [f"algorithm.aggregation={ours}"],
        "algorithm.kl.estimator": [f"algorithm.kl={{placement: loss, coefficient: 1, estimator: {ours}}}"],
        "learner.optimizer.schedule": [f"learner.optimizer.schedule={ours}"],
    }
    accepted = []
    for key, overrides in keys.items():
        try:
            load_config(config_file, overrides, TrainConfig)
            accepted.append(key)
        except ConfigError:
            continue
    assert len(accepted) == 1
