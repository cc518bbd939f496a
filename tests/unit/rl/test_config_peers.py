"""Keys of verl, TRL and OpenRLHF: errors say what they are called here, and nothing that is not so."""

import re

import pytest

from rl.config import SftConfig, TrainConfig
from rl.config.loading import _model_in, load_config
from rl.config.peers import PEER_KEYS, PEER_VALUES
from rl.errors import ConfigError


def keys_of(schema, prefix=""):
    """Every dotted key, those of list items and of sections that may be null included."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        if (section := _model_in(field.annotation)) is not None:
            yield from keys_of(section, f"{prefix}{name}.")


@pytest.mark.parametrize("keys", sorted({keys for keys, _ in PEER_KEYS.values() if keys}))
def test_every_key_that_is_named_exists(keys):
    for alternative, schema in zip(keys.split(" or "), (TrainConfig, SftConfig), strict=False):
        known = set(keys_of(schema))
        for key in alternative.split(", "):
            assert key in known or key.rpartition(".")[0] in ("algorithm.loss_options",), key


@pytest.mark.parametrize("name", sorted(PEER_KEYS))
def test_no_key_of_ours_is_taken_for_a_peers(name):
    for schema in (TrainConfig, SftConfig):
        assert not [key for key in keys_of(schema) if f".{key}".endswith(f".{name}")]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: some/model}\ndata: {train: {path: data.jsonl}}\n")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.n=5", "unknown key rollout.n; here it is rollout.group_size"),
        ("learner.ppo_mini_batch_size=256", "here it is learner.mini_batches (the number of optimizer steps"),
        ("actor_rollout_ref.actor.ppo_epochs=2", "actor_rollout_ref; ppo_epochs: here it is learner.epochs"),
        ("trainer.total_epochs=3", "unknown key trainer; total_epochs: here it is total_epochs; docs"),
        ("algorithm.kl_ctrl.kl_coef=1", "kl_coef: here it is algorithm.kl.coefficient (with a kl.placement)"),
        ("logging.wandb_entity=me", "there is none here: set WANDB_ENTITY"),
        ("algorithm.aggregation=token-mean", "; what other libraries call token-mean is token_mean here"),
        ("rollout.group_sise=4", "did you mean group_size?"),
        ("learner.optimizer.beta=0.9", "unknown key learner.optimizer.beta; did you mean betas?"),
        ("learner.mini_batch_size=4", "here it is learner.mini_batches"),
        ("evaluation.n=4", "here it is evaluation.samples_per_prompt"),
        ("evaluation.max_new_tokens=4", "here it is evaluation.max_response_tokens"),
        ("critic={learning_rate: 1}", "unknown key critic.learning_rate; here it is critic.optimizer.lr"),
        ("critic={optimizer: {grad_clip: 1}}", "here it is critic.optimizer.max_grad_norm"),
        ("actor_rollout_ref.rollout.val_kwargs.n=16", "val_kwargs: here it is evaluation; docs"),
        ("actor_rollout_ref.rollout.n=16", "n: here it is rollout.group_size; docs"),
        ("actor_rollout_ref.actor.optim.lr=1", "lr: here it is learner.optimizer.lr or critic.optimizer.lr"),
        ("warmup_steps=10", "did you mean learner.optimizer.warmup_steps or "),
        ("checkpoint.every=-1", "greater than or equal to 0 (steps between checkpoints; 0 saves only when"),
        ("ray={rollout_resources: {node: -1}}", "ray.rollout_resources.node is -1: input should be greater"),
        ("deepspeed=zero3.json", "unknown key deepspeed; there is none here: learners are data-parallel, with ZeRO-3"),
        ("remote_rm_url=x", "here it is reward.functions (a function of yours that asks it"),
        ("logging_steps=1", "there is none here: every step is logged"),
        ("eps_clip_low_high=[0.2,0.3]", "here it is algorithm.loss_options.clip_low, algorithm.loss_options.clip_high"),
        ("use_kl_estimator_k3=true", "here it is algorithm.kl.estimator"),
        ("sync.n=1", "unknown key sync.n; known keys here"),
        ("algoritm.kl.beta=1", "unknown key algoritm; did you mean algorithm?"),
    ],
)
def test_a_peers_key_is_told_its_name_here(config_file, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(config_file, [override], TrainConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_train_epochs=2", "unknown key num_train_epochs; here it is epochs"),
        ("train_batch_size=8", "here it is batch_size"),
        ("data.max_prompt_length=9", "here it is data.max_tokens"),
        ("learner.max_epochs=2", "here it is epochs"),
        ("eval_steps=2", "here it is evaluation.every"),
    ],
)
def test_a_supervised_run_has_its_own_names(config_file, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(config_file, [override], SftConfig)


def test_nobody_is_sent_to_a_key_that_the_command_has_not(config_file):
    with pytest.raises(ConfigError) as error:
        load_config(config_file, ["n_samples_per_prompt=2", "max_steps=3"], SftConfig)
    assert "here it is" not in str(error.value)


@pytest.mark.parametrize("override", ["model.attention=kl", "algorithm.kl.placement=kl"])
def test_values_are_told_only_where_they_are_allowed(config_file, override):
    with pytest.raises(ConfigError) as error:
        load_config(config_file, [override], TrainConfig)
    assert "elsewhere" not in str(error.value)


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
