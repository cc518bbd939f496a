"""Prompts, responses and rewards on disk, one JSONL file a step. Left out: choosing what to show people."""

from __future__ import annotations

import json
from pathlib import Path

from rl.batch import ScoredBatch


def write_samples(path: Path, scored: ScoredBatch, *, limit: int | None = None) -> None:
    """Write the first `limit` samples (all without one) to `path`, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(scored.batch.rollouts, scored.scores, strict=True))[:limit]
    # A lone surrogate is no UTF-8, but as a JSON escape it can be written and read.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for rollout, score in pairs:
            prompt = scored.batch.prompt_of(rollout)
            row = {
                "prompt_id": prompt.prompt_id,
                "prompt": prompt.text,
                "response": rollout.text,
                "answer": rollout.answer,
                "ground_truth": prompt.ground_truth,
                "extracted": score.extracted,
                "reward": score.reward if score.ok else None,
                "breakdown": dict(score.breakdown),
                "status": score.status.value,
                "error": score.error,
                "finish_reason": rollout.finish_reason.value,
                "num_tokens": rollout.length,
                "policy_version": rollout.policy_version,
                "sample_index": rollout.sample_index,
            }
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
