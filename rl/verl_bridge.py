"""verl's advantage estimators and policy losses as `verl:NAME`, including those that users register in verl.

verl is imported on first use, because that takes seconds. It works on padded matrices, and its losses return one
number; here samples are padded and unpadded, and the loss is taken apart into a loss per token, so that masks,
denominators and rollout weights are Fledge's own. What verl would compute wrongly here is refused. Left out: verl's
trainers, and Fledge's learner as verl's engine (`rl.verl_engine`). Written against verl 0.9.1.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rl.advantages.api import AdvantageInputs, Advantages, AdvantageSpec
from rl.errors import ConfigError, LearnerError
from rl.losses.api import Aggregation, LossInputs, PolicyLossOutput, PolicyLossSpec
from rl.plugins import unknown_name

# Options of verl's own losses: fields of its ActorConfig or PolicyLossConfig. `clip_ratio` is not offered, because it
# has no effect there (the low and the high bound have defaults of their own).
_CLIP = ("clip_ratio_low", "clip_ratio_high")
_LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    "vanilla": (*_CLIP, "clip_ratio_c"),
    "dppo_tv": (*_CLIP, "clip_ratio_c"),
    "dppo_kl": (*_CLIP, "clip_ratio_c"),
    "gspo": _CLIP,
    "sapo": ("tau_pos", "tau_neg"),
    "gpg": (),
    "clip_cov": (*_CLIP, "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"),
    "kl_cov": ("kl_cov_ratio", "ppo_kl_coef"),
    "geo_mean": _CLIP,
    "dro": ("dro_beta",),
    "cispo": _CLIP,
}
_ALL_LOSS_OPTIONS = tuple(sorted({option for options in _LOSS_OPTIONS.values() for option in options}))
_ACTOR_OPTIONS = (*_CLIP, "clip_ratio_c", "tau_pos", "tau_neg")

_REFUSED_LOSSES = {
    "bypass_mode": "it applies a rollout correction of its own, with rollout log-probabilities in place of the old "
    "ones; use algorithm.rollout_correction with the loss ppo_clip or reinforce",
}
# Losses that choose tokens, or take a mean, over whatever is in the micro-batch.
_LOOKS_ACROSS = frozenset({"geo_mean", "kl_cov", "clip_cov"})
_SEQUENCE_MEAN: tuple[Aggregation, ...] = ("sequence_mean_token_mean",)
# gspo's paper defines it with this aggregation; sapo and geo_mean ignore the one they are given.
_ALLOWED: dict[str, tuple[Aggregation, ...]] = {
    "gspo": _SEQUENCE_MEAN,
    "sapo": _SEQUENCE_MEAN,
    "geo_mean": _SEQUENCE_MEAN,
}

_NO_SQUARES = "it needs the sum of squared probabilities at every token, which the learner does not keep"
_REFUSED_ADVANTAGES = {
    "remax": "it needs the reward of a greedy response to every prompt (reward_baselines), which is not generated",
    "optimal_token_baseline": _NO_SQUARES,
    "tir_optimal_token_baseline": _NO_SQUARES,
}
# Parameters of verl's estimators that are data, not options.
_DATA = frozenset(
    {"token_level_rewards", "response_mask", "values", "index", "config", "kwargs", "non_tensor_batch", "batch"}
)
_DEFAULTS = {"gamma": 1.0, "lam": 1.0}  # AlgoConfig's, for estimators without defaults of their own
_CONFIG_FIELDS = frozenset({"gamma", "lam", "norm_adv_by_std_in_grpo", "gdpo_reward_keys", "gdpo_reward_weights"})
# Options that an estimator reads from `config`.
_CONFIG_OPTIONS: dict[str, tuple[str, ...]] = {
    "reinforce_plus_plus": ("gamma",),
    "grpo_passk": ("norm_adv_by_std_in_grpo",),
    "gdpo": ("gdpo_reward_keys", "gdpo_reward_weights"),
}
# Estimators that whiten over the mask, which must then be that of the loss. Others compute scores or lengths with it,
# in which a response that is not in the loss still counts.
_WHITENS = frozenset({"gae", "gdpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"})
# Parameters that an estimator takes but does not read.
_UNUSED_OPTIONS: dict[str, frozenset[str]] = {
    "gpg": frozenset({"alpha", "epsilon"}),
    **dict.fromkeys(("rloo", "rloo_vectorized", "opo", "reinforce_plus_plus_baseline"), frozenset({"epsilon"})),
}


@functools.cache
def core_algos() -> ModuleType:
    """verl's module of algorithms. The root logger, which `import verl` configures, is restored."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        import verl.trainer.ppo.core_algos as module
    except ImportError as error:
        raise ConfigError(f"verl:NAME needs verl, which cannot be imported: {error}") from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return module


def verl_policy_loss(name: str) -> PolicyLossSpec:
    """The loss that verl's registry calls `name`. Raises ConfigError if there is none, or if it cannot be right
    here."""
    registry: Mapping[str, Callable[..., Any]] = core_algos().POLICY_LOSS_REGISTRY
    if name not in registry:
        raise unknown_name("policy loss in verl", name, registry)
    if name in _REFUSED_LOSSES:
        raise ConfigError(f"verl:{name} is refused: {_REFUSED_LOSSES[name]}")
    allowed = _ALLOWED.get(name)
    return PolicyLossSpec(
        name=f"verl:{name}",
        function=_loss_function(name, registry[name]),
        default_aggregation=allowed[0] if allowed else "token_mean",
        allowed_aggregations=allowed,
        split_invariant=name not in _LOOKS_ACROSS,
    )


def _loss_function(name: str, function: Callable[..., Any]) -> Callable[..., PolicyLossOutput]:
    """A verl loss with the interface of Fledge's, and its options declared. A user's own is checked on its first
    batch."""
    checked = name in _LOSS_OPTIONS

    def loss(inputs: LossInputs, **options: Any) -> PolicyLossOutput:
        nonlocal checked
        rows = torch.nonzero(inputs.sequence_sum(torch.ones_like(inputs.logprobs)) > 0).flatten()
        if len(rows) == 0:  # verl would divide by the sum of the mask
            return PolicyLossOutput(0.0 * inputs.masked(inputs.logprobs))
        call = _LossCall(name, function, inputs, rows, options)
        if not checked:
            call.check_denominators()
            checked = True
        return call.per_token()

    options = [inspect.Parameter(o, inspect.Parameter.KEYWORD_ONLY) for o in _LOSS_OPTIONS.get(name, _ALL_LOSS_OPTIONS)]
    loss.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what `check_options` reads
        [inspect.Parameter("inputs", inspect.Parameter.POSITIONAL_OR_KEYWORD), *options]
    )
    return loss


class _LossCall:
    """One micro-batch in verl's layout: [rows, longest] with a float mask, without sequences that have no loss
    token."""

    def __init__(
        self, name: str, function: Callable[..., Any], inputs: LossInputs, rows: Tensor, options: Mapping[str, Any]
    ) -> None:
        self.name, self.function, self.inputs, self.options = name, function, inputs, options
        counts = torch.bincount(inputs.sequence_index, minlength=inputs.num_sequences)
        starts = torch.cumsum(counts, 0) - counts
        column = torch.arange(len(inputs.sequence_index), device=counts.device) - starts[inputs.sequence_index]
        row_of = torch.full_like(counts, -1)
        row_of[rows] = torch.arange(len(rows), device=counts.device)
        self.used = row_of[inputs.sequence_index] >= 0  # [T] whether a token has a place in the matrix
        self.place = (row_of[inputs.sequence_index][self.used], column[self.used])
        self.shape = (len(rows), int(column[self.used].max()) + 1)
        self.mask = self._pad(inputs.loss_mask.to(inputs.logprobs.dtype))

    def _pad(self, values: Tensor) -> Tensor:
        """[T] -> [rows, longest], 0 outside the loss mask and in the padding."""
        zeros = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        return zeros.index_put(self.place, self.inputs.masked(values)[self.used])

    def _total(self, weights: Tensor, denominator: int) -> tuple[Tensor, Mapping[str, Any]]:
        """What verl returns: a sum over tokens, or over sequences' means, divided by the denominator."""
        config = _actor_config(self.options)
        config.global_batch_info.update(
            dp_size=1, batch_num_tokens=denominator, global_batch_size=denominator, loss_scale_factor=1
        )
        total, metrics = self.function(
            old_log_prob=self._pad(self.inputs.old_logprobs),
            log_prob=self._pad(self.inputs.logprobs),
            advantages=self._pad(self.inputs.advantages),
            response_mask=self.mask,
            loss_agg_mode="token-mean",
            config=config,
            rollout_is_weights=weights,
        )
        return total, metrics

    def check_denominators(self) -> None:
        """Raise LearnerError if a user's loss divides by its own micro-batch instead of the global batch."""
        with torch.no_grad():
            whole, half = (self._total(torch.ones_like(self.mask), d)[0].item() for d in (1, 2))
        if abs(whole - 2.0 * half) > 1e-6 * max(1.0, abs(whole)):
            raise LearnerError(
                f"verl:{self.name} does not divide by config.global_batch_info (denominator 1 gives {whole:.6g}, 2 "
                f"gives {half:.6g}), so its result would depend on the split into micro-batches; let it end in "
                "verl's agg_loss(..., **config.global_batch_info)"
            )

    def per_token(self) -> PolicyLossOutput:
        """The loss of each token, from a function that returns their sum.

        verl multiplies each token's loss by its `rollout_is_weights` before summing. So the derivative of the sum with
        respect to a token's weight is that token's loss, and it can still be differentiated by the log-probabilities.
        The weights of the rollout correction are applied afterwards, as in every other loss.
        """
        weights = torch.ones_like(self.mask).requires_grad_()
        with torch.enable_grad():
            total, metrics = self._total(weights, 1)
            losses = None
            if total.requires_grad:
                (losses,) = torch.autograd.grad(total, weights, create_graph=True, allow_unused=True)
        if losses is None:
            raise LearnerError(
                f"verl:{self.name} ignores rollout_is_weights; multiply the matrix of losses by it before agg_loss, as "
                "verl's own losses do"
            )
        found, expected = losses.detach().sum().item(), total.item()
        if abs(found - expected) > 1e-4 * max(1.0, abs(expected)):
            raise LearnerError(
                f"verl:{self.name} is not a sum over tokens: its loss is {expected:.6g}, but its tokens add up to "
                f"{found:.6g}"
            )
        if self.name in ("sapo", "geo_mean"):  # undo their mean over a sequence, which the aggregation takes
            losses = losses * self.mask.sum(dim=1, keepdim=True)
        if self.name == "geo_mean":  # undo its mean over sequences too
            losses = losses * self.shape[0]
        flat = torch.zeros_like(self.inputs.logprobs)
        flat = flat.index_put((torch.nonzero(self.used).flatten(),), losses[self.place])
        token_metrics = {
            key.removeprefix("actor/"): torch.full_like(self.inputs.advantages, float(value))
            for key, value in metrics.items()
        }
        return PolicyLossOutput(self.inputs.weighted(flat), token_metrics)


def _actor_config(options: Mapping[str, Any]) -> Any:
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    actor = {name: value for name, value in options.items() if name in _ACTOR_OPTIONS}
    policy = {name: value for name, value in options.items() if name not in _ACTOR_OPTIONS}
    return ActorConfig(
        strategy="fledge",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(**policy),
        **actor,
    )


def verl_advantage(name: str) -> AdvantageSpec:
    """The estimator that verl's registry calls `name`. Raises ConfigError if there is none, or if it needs data that is
    not available."""
    registry: Mapping[str, Callable[..., Any]] = core_algos().ADV_ESTIMATOR_REGISTRY
    if name not in registry:
        raise unknown_name("advantage estimator in verl", name, registry)
    if name in _REFUSED_ADVANTAGES:
        raise ConfigError(f"verl:{name} is refused: {_REFUSED_ADVANTAGES[name]}")
    function = registry[name]
    parameters = inspect.signature(function).parameters
    left_out = _DATA | _UNUSED_OPTIONS.get(name, frozenset())
    options = [o for o in dict.fromkeys((*parameters, *_CONFIG_OPTIONS.get(name, ()))) if o not in left_out]
    missing = [
        o
        for o in options
        if o in parameters and parameters[o].default is inspect.Parameter.empty and o not in _DEFAULTS
    ]
    if missing:
        raise ConfigError(
            f"verl:{name} needs {', '.join(missing)}, which is neither in the batch nor an option with a default"
        )

    def estimator(inputs: AdvantageInputs, **chosen: Any) -> Advantages:
        return _advantages(name, function, inputs, {o: v for o, v in _DEFAULTS.items() if o in options} | chosen)

    estimator.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what `check_options` reads
        [
            inspect.Parameter("inputs", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(inspect.Parameter(o, inspect.Parameter.KEYWORD_ONLY) for o in options),
        ]
    )
    return AdvantageSpec(
        name=f"verl:{name}",
        function=estimator,
        needs_groups="index" in parameters,
        needs_critic="values" in parameters,
    )


def _advantages(
    name: str, function: Callable[..., Any], inputs: AdvantageInputs, options: Mapping[str, Any]
) -> Advantages:
    """Call verl on the padded valid samples; the others get 0.

    For an estimator that whitens, response_mask is the mask of the loss, so that tokens excluded by `mask_truncated` do
    not count. verl gives the only sample of a group its raw reward as advantage; for estimators that look at groups,
    such samples are left out here, as in Fledge's own estimators.
    """
    from verl.trainer.config import AlgoConfig

    parameters = inspect.signature(function).parameters
    use = inputs.valid.clone()
    if "index" in parameters:
        _, group, count = torch.unique(inputs.group_ids[use], return_inverse=True, return_counts=True)
        use[use.clone()] = count[group] > 1
    kept = torch.nonzero(use).flatten().tolist()
    mask_of = inputs.in_loss if name in _WHITENS else inputs.valid
    if int((inputs.lengths * mask_of)[use].sum()) < 2:  # verl's whitening would raise
        return Advantages(spread_zero(inputs), inputs.values if "values" in parameters else None)
    rewards = inputs.reward_to_tokens()
    data: dict[str, Any] = {
        "token_level_rewards": pad_sequence([rewards[i] for i in kept], batch_first=True),
        "response_mask": pad_sequence(
            [mask_of[i].to(rewards[i]).expand_as(rewards[i]) for i in kept], batch_first=True
        ),
        "index": inputs.group_ids[use].numpy(),
        "config": AlgoConfig(**{o: v for o, v in options.items() if o in _CONFIG_FIELDS}),
    }
    if "values" in parameters:
        if inputs.values is None:
            raise ConfigError(f"verl:{name} needs a critic's values, and the batch has none")
        data["values"] = pad_sequence([inputs.values[i] for i in kept], batch_first=True)
    if name == "gdpo":
        data |= _gdpo_data(inputs, use, data["response_mask"], options)
    arguments = {o: v for o, v in (data | dict(options)).items() if o in parameters}
    padded, returns = function(**arguments)

    def unpad(matrix: Tensor) -> tuple[Tensor, ...]:
        out = list(spread_zero(inputs))
        for row, i in enumerate(kept):
            out[i] = matrix[row, : int(inputs.lengths[i])].to(torch.float64)
        return tuple(out)

    return Advantages(unpad(padded), unpad(returns) if "values" in parameters else None)


def _gdpo_data(inputs: AdvantageInputs, use: Tensor, mask: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """The reward's parts, which gdpo normalises one by one. They must be named: without keys, verl falls back to
    GRPO."""
    keys = tuple(options.get("gdpo_reward_keys") or ())
    if not keys or any(key not in inputs.reward_parts for key in keys):
        raise ConfigError(
            "verl:gdpo needs advantage_options.gdpo_reward_keys to name parts of the reward's breakdown; it is "
            f"{list(keys)}, and the breakdown has {sorted(inputs.reward_parts)}"
        )
    parts = {key: inputs.reward_parts[key][use].numpy() for key in keys}
    return {
        "non_tensor_batch": parts,
        "batch": {"prompts": mask.new_zeros(len(mask), 0), "attention_mask": mask.long()},
    }


def spread_zero(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """N x [R] of zeros."""
    return tuple(torch.zeros(length, dtype=torch.float64) for length in inputs.lengths.tolist())
