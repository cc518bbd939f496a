"""What is proven about a loaded model before it is trained: its log-probabilities do not depend on the layout.

Two short sequences run alone through the plain model, and together through the layout and the chunked head. That finds
attention across packed sequences, positions that do not restart, and models that change the logits after their output
head. Left out: the layouts themselves (`rl.layouts`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.batching import Layout
from rl.errors import LearnerError
from rl.layouts import TokenSequence, collate
from rl.logprobs import LogprobHead

# Mean |difference| in nats. A leak between sequences moves log-probabilities by 0.1 to 4, rounding by 1e-6 or 0.003.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@torch.no_grad()
def check_layout(engine: Any, head: LogprobHead, layout: Layout, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raise LearnerError unless the layout is exact with this model and its attention. A collective.

    Every rank runs the same tokens. Lengths exceed a short sliding window, and differ, so that the buckets are padded.
    """
    model = engine.module
    generator = np.random.default_rng(0)
    vocabulary = min(model.config.vocab_size, 4096)
    sequences = [
        TokenSequence(
            generator.integers(0, vocabulary, prompt).astype(np.int32),
            generator.integers(0, vocabulary, response).astype(np.int32),
        )
        for prompt, response in ((5, 19), (3, 12))
    ]
    engine.eval()
    together = collate(sequences, layout, model_config=model.config, device=device, dtype=dtype)
    with head.query(together.positions, together.targets, temperature=1.0):
        found = together.split(engine(**together.model_inputs).logits[0])
    differences = [
        (values - _alone(engine, sequence, device, dtype)).abs().mean()
        for values, sequence in zip(found, sequences, strict=True)
    ]
    worst = float(torch.stack(differences).max())
    if not worst <= _TOLERANCE[dtype]:
        raise LearnerError(
            f"the {layout} layout is not exact for {type(model).__name__} with {model.config._attn_implementation} "
            f"attention: log-probabilities differ from those of one sequence at a time by {worst:.2e} in the mean "
            f"(allowed {_TOLERANCE[dtype]:.0e}). Set learner.layout to bucketed, or model.attention to another one; if "
            "the layout is bucketed already, the model is not supported"
        )


def _alone(engine: Any, sequence: TokenSequence, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[R] log-probabilities from the model's own logits of this sequence."""
    micro = collate([sequence], "bucketed", model_config=engine.module.config, device=device, dtype=dtype)
    logits = engine(**micro.model_inputs).logits[0, micro.positions].float()
    return logits.log_softmax(-1).gather(-1, micro.targets[:, None]).squeeze(-1)
