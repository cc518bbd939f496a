"""What the judge has said before, and what that cost: SQLite, so that the processes of one machine can share it.

Left out: asking the judge (`rewards.judge`).
"""

from __future__ import annotations

import sqlite3
from pathlib import Path


class JudgeStore:
    """Verdicts by key, and the tokens used so far. In memory unless it gets a path."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(
            path or ":memory:", timeout=30.0, isolation_level=None, check_same_thread=False
        )
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL)")
        self._database.execute("CREATE TABLE IF NOT EXISTS usage (tokens INTEGER NOT NULL)")
        self._database.execute("INSERT INTO usage SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM usage)")

    def score(self, key: str) -> float | None:
        row = self._database.execute("SELECT score FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else float(row[0])

    def remember(self, key: str, score: float) -> None:
        self._database.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, score))

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens used so far, over all processes and runs that share the file."""
        return int(self._database.execute("SELECT tokens FROM usage").fetchone()[0])

    def spend(self, tokens: int) -> None:
        self._database.execute("UPDATE usage SET tokens = tokens + ?", (tokens,))

    def close(self) -> None:
        self._database.close()
