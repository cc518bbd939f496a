"""The sandbox service of a SandboxFusion server: the same interface as `rewards.sandbox.local`, over HTTP.

Each task is one `POST /run_code` (bytedance.github.io/SandboxFusion, API reference). What isolates the programs is the
server's business: expected outputs never leave this process. Left out: the server's own datasets and judges.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx

from rewards.api import InfrastructureError
from rewards.sandbox.api import (
    MIB,
    CallTask,
    EvaluateTask,
    Limits,
    Program,
    RunResult,
    RunStatus,
    SandboxService,
    StdinTask,
    Task,
)
from rewards.sandbox.inside import harness
from rl.errors import ConfigError

COMPILE_TIMEOUT_S = 60.0
ATTEMPTS = 3
FIRST_PAUSE_S = 0.5
_RESULT_FILE = "fledge_result.json"
_PACKAGE_FILES = ("__init__.py", "harness.py", "plain.py")
_CALLER = """
import base64, os, sys
sys.path.insert(0, os.getcwd())
from fledge_inside import harness
source = base64.b64decode({source!r}).decode("utf-8", "surrogatepass")
payload = base64.b64decode({payload!r})
result = os.open({result!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
harness.{entry}
"""


class RemoteSandbox(SandboxService):
    """Runs programs on a SandboxFusion server. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: the server's, e.g. http://sandbox:8080.
        """
        self._url = url.rstrip("/") + "/run_code"
        self._client = httpx.Client(timeout=None)

    def run(self, program: Program, tasks: Iterable[Task], limits: Limits) -> Iterator[RunResult]:
        """See SandboxService. Of the limits, the server takes wall time and memory; its settings decide the rest."""
        for task in tasks:
            started = time.monotonic()
            answer = self._post(_request(program, task, limits), limits)
            result = _result(answer, task, limits, time.monotonic() - started)
            yield result
            if result.status is RunStatus.COMPILE_ERROR:
                return

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _post(self, request: dict[str, Any], limits: Limits) -> dict[str, Any]:
        """The server's answer. Raises InfrastructureError when it has none after ATTEMPTS tries."""
        timeout = limits.wall_s + COMPILE_TIMEOUT_S + 30.0
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                response = self._client.post(self._url, json=request, timeout=timeout)
                if response.status_code == httpx.codes.OK:
                    answer = response.json()
                    if isinstance(answer, dict) and answer.get("status") in ("Success", "Failed"):
                        return answer
                    problem = str(answer.get("message", answer) if isinstance(answer, dict) else answer)[:500]
                else:
                    problem = f"HTTP status {response.status_code}: {response.text[:200]}"
                    if response.is_client_error and response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                        break
            except (httpx.HTTPError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise InfrastructureError(f"the sandbox server at {self._url} gave no result in {attempt + 1} tries: {problem}")


def _request(program: Program, task: Task, limits: Limits) -> dict[str, Any]:
    """The body of POST /run_code."""
    request: dict[str, Any] = {
        "compile_timeout": COMPILE_TIMEOUT_S,
        "run_timeout": limits.wall_s,
        "memory_limit_MB": limits.memory_bytes // MIB,
        "language": program.language,
        "code": program.source,
        "files": {},
        "fetch_files": [],
    }
    if isinstance(task, StdinTask):
        return request | {"stdin": task.stdin}
    if program.language != "python":
        raise ConfigError(
            f"{type(task).__name__} needs a Python program; C++ programs can only be tested through standard input"
        )
    if isinstance(task, CallTask):
        payload, entry = task.arguments, f"run_call(source, {task.function!r}, payload, harness.preload(), result)"
    else:
        assert isinstance(task, EvaluateTask)
        payload = json.dumps({"imports": task.imports, "expressions": task.expressions, "roots": task.roots})
        entry = "run_evaluate(source, payload, harness.preload(), result)"
    code = _CALLER.format(
        source=base64.b64encode(program.source.encode("utf-8", "surrogatepass")),
        payload=base64.b64encode(payload.encode()),
        result=_RESULT_FILE,
        entry=entry,
    )
    inside = Path(harness.__file__).parent
    files = {f"fledge_inside/{name}": _base64((inside / name).read_bytes()) for name in _PACKAGE_FILES}
    return request | {"code": code, "files": files, "fetch_files": [_RESULT_FILE]}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _result(answer: dict[str, Any], task: Task, limits: Limits, wall_s: float) -> RunResult:
    """The server's answer as a result. Raises InfrastructureError for an answer of another shape."""
    try:
        compiled: Any = answer.get("compile_result")
        ran: Any = answer.get("run_result")
        if compiled is not None and (compiled["status"] != "Finished" or compiled.get("return_code") != 0):
            return RunResult(RunStatus.COMPILE_ERROR, stderr=str(compiled.get("stderr") or "")[-2000:], wall_s=wall_s)
        stdout = (ran.get("stdout") or "").encode("utf-8", "surrogatepass")
        stderr = (ran.get("stderr") or "")[-2000:]
        exit_status = int(ran.get("return_code") or 0)
        value = base64.b64decode(answer.get("files", {}).get(_RESULT_FILE, ""))
        if ran["status"] == "TimeLimitExceeded":
            status = RunStatus.TIME_LIMIT
        elif max(len(stdout), len(value)) > limits.output_bytes:
            status = RunStatus.OUTPUT_LIMIT
        elif exit_status != 0 or ran["status"] != "Finished":
            status = RunStatus.RUNTIME_ERROR
        else:
            status = RunStatus.OK
        returned = value if status is RunStatus.OK and not isinstance(task, StdinTask) else None
        took = float(ran.get("execution_time") or wall_s)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InfrastructureError(f"the sandbox server's answer has an unknown form: {error!r}") from error
    return RunResult(status, stdout[: limits.output_bytes], stderr, returned, exit_status, 0.0, took)
