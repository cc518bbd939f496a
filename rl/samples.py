"""Write prompts, responses and rewards to disk, one JSONL file per step. Left out: choosing what to show people."""

from __future__ import annotations

import json
from pathlib import Path

from rl.batch import ScoredBatch


def write_samples(path: Path, scored: ScoredBatch, *, limit: int | None = None) -> None:
    """Write the first `limit` samples (None: all) to `path`, one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(scored.batch.rollouts, scored.scores, strict=True))[:limit]
    # A lone surrogate is not valid UTF-8, but it can be written and read as a JSON escape.
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
