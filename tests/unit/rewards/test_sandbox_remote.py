"""The remote sandbox against a stub of SandboxFusion's documented interface that runs programs in plain processes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rewards.api import InfrastructureError, RewardInput, RewardOutput
from rewards.code import CodeReward
from rewards.sandbox import remote
from rewards.sandbox.api import Limits, Program, RunStatus, StdinTask


def run_code(request: dict[str, Any]) -> dict[str, Any]:
    """POST /run_code as its reference describes it, for Python, with C++ that never compiles."""
    assert set(request) <= {
        "compile_timeout", "run_timeout", "memory_limit_MB", "code", "stdin", "language", "files", "fetch_files",
    }  # fmt: skip
    answer: dict[str, Any] = {"message": "", "compile_result": None, "run_result": None, "files": {}}
    if request["language"] == "cpp":
        failed = {"status": "Finished", "execution_time": 0.1, "return_code": 1, "stdout": "", "stderr": "error: no"}
        return answer | {"status": "Failed", "compile_result": failed}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in request["files"].items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(base64.b64decode(content))
        (Path(folder) / "main.py").write_text(request["code"])
        result: dict[str, Any] = {"status": "Finished", "execution_time": 0.1}
        try:
            done = subprocess.run(
                [sys.executable, "-S", "main.py"],
                cwd=folder,
                input=request.get("stdin", ""),
                capture_output=True,
                text=True,
                timeout=request["run_timeout"],
                check=False,
            )
            result |= {"return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        except subprocess.TimeoutExpired:
            result["status"] = "TimeLimitExceeded"
        for name in request["fetch_files"]:
            if (Path(folder) / name).exists():
                answer["files"][name] = base64.b64encode((Path(folder) / name).read_bytes()).decode()
    return answer | {"status": "Success" if result.get("return_code") == 0 else "Failed", "run_result": result}


class Handler(BaseHTTPRequestHandler):
    replies: list[tuple[int, Any]] = []  # noqa: RUF012 - said before the real ones, shared by the test and the server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/run_code"
        status, answer = self.replies.pop(0) if self.replies else (200, None)
        data = json.dumps(answer if answer is not None else run_code(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    Handler.replies.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_every_form_of_tests_goes_over_the_wire(url: str) -> None:
    reward = CodeReward(score="share", sandbox=url, slots=2, limits={"wall_s": 60})
    add = "def f(a, b):\n    return a + b\n"
    io = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3", "7"]}
    samples = [
        RewardInput("", "", f"```python\n{program}\n```", truth)
        for program, truth in (
            ("print(sum(map(int, input().split())))", io),
            ("print(3)", io),
            (add, {"fn_name": "f", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}),
            (add, ["assert f(1, 2) == 3", "assert abs(f(1, 2) - 3) < 1e-9", "assert f(1, 2) == 4"]),
            ("raise SystemExit(1)", io),
        )
    ]
    outputs = list(reward.score_batch(samples))
    reward.close()
    assert [o.reward for o in outputs if isinstance(o, RewardOutput)] == [1.0, 0.5, 1.0, pytest.approx(2 / 3), 0.0]


def test_statuses_are_told_apart(url: str) -> None:
    sandbox = remote.RemoteSandbox(url)
    limits = Limits(wall_s=60.0, output_bytes=1000)

    def status(program: Program, limits: Limits = limits) -> RunStatus:
        (result,) = sandbox.run(program, [StdinTask("")], limits)
        return result.status

    assert status(Program("import time; time.sleep(60)"), Limits(wall_s=0.5)) is RunStatus.TIME_LIMIT
    assert status(Program("print('x' * 2000)")) is RunStatus.OUTPUT_LIMIT
    assert status(Program("1 / 0")) is RunStatus.RUNTIME_ERROR
    assert len(list(sandbox.run(Program("", "cpp"), [StdinTask("")] * 3, limits))) == 1
    assert status(Program("", "cpp")) is RunStatus.COMPILE_ERROR
    sandbox.close()


def test_a_failing_server_is_asked_again_and_then_is_an_infrastructure_error(url: str) -> None:
    sandbox = remote.RemoteSandbox(url)

    def ask() -> RunStatus:
        (result,) = sandbox.run(Program("print(1)"), [StdinTask("")], Limits())
        return result.status

    Handler.replies += [(500, {}), (200, {"status": "SandboxError", "message": "pod lost"})]
    assert ask() is RunStatus.OK
    Handler.replies += [(200, {"status": "SandboxError", "message": "pod lost"})] * 3
    with pytest.raises(InfrastructureError, match="in 3 tries: pod lost"):
        ask()
    Handler.replies += [(422, {"detail": "bad"})]
    with pytest.raises(InfrastructureError, match="in 1 tries: HTTP status 422"):
        ask()
    Handler.replies += [(200, {"status": "Success", "run_result": None})]
    with pytest.raises(InfrastructureError, match="unknown form"):
        ask()
    sandbox.close()
    nowhere = remote.RemoteSandbox("http://127.0.0.1:9")
    with pytest.raises(InfrastructureError, match="ConnectError"):
        list(nowhere.run(Program(""), [StdinTask("")], Limits()))
    nowhere.close()
