"""What a sandbox service is: a program, tasks for it, limits, and one result per task.

Left out: the services (`rewards.sandbox.local`, `rewards.sandbox.remote`) and every judgement of a result. Expected
outputs have no field here, so no service can leak them to a program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

MIB = 1 << 20

Language = Literal["python", "cpp"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one task of a program may use. Defaults fit competitive-programming tests."""

    cpu_s: float = 5.0  # CPU seconds of each process (rounded up to whole seconds)
    wall_s: float = 10.0  # seconds from start to end, waiting included
    memory_bytes: int = 512 * MIB  # heap and mappings of each process, and resident memory of all together
    disk_bytes: int = 32 * MIB  # everything in the private temporary directory
    file_bytes: int = 16 * MIB  # one file
    output_bytes: int = 4 * MIB  # standard output; the same for standard error and for a returned value
    processes: int = 16  # processes and threads together, the program itself included
    open_files: int = 64  # file descriptors of each process


@dataclass(frozen=True, slots=True)
class Program:
    """Untrusted source text."""

    source: str
    language: Language = "python"


@dataclass(frozen=True, slots=True)
class StdinTask:
    """Run the program as a script with this standard input; its result is its standard output."""

    stdin: str


@dataclass(frozen=True, slots=True)
class CallTask:
    """Call the program's function (or `Solution`'s method) of this name; its result is the returned value."""

    function: str
    arguments: str  # JSON of a list in the encoding of `rewards.sandbox.inside.plain`


@dataclass(frozen=True, slots=True)
class EvaluateTask:
    """Evaluate expressions in the program's namespace, in order; its result is the list of their values."""

    imports: str  # Python source with import statements only, run after the program
    expressions: tuple[str, ...]
    roots: tuple[str, ...]  # names that the program itself must define


Task = StdinTask | CallTask | EvaluateTask


class RunStatus(Enum):
    """How a task ended."""

    OK = "ok"  # exit status 0
    COMPILE_ERROR = "compile_error"  # the compiler refused the program (or its limits ended it)
    RUNTIME_ERROR = "runtime_error"  # exception, signal, or non-zero exit status
    TIME_LIMIT = "time_limit"  # CPU or wall time
    MEMORY_LIMIT = "memory_limit"  # all processes together held more resident memory than allowed
    OUTPUT_LIMIT = "output_limit"  # standard output, standard error or a returned value too large


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came out of one task. Everything in it is under the program's control, except status and times."""

    status: RunStatus
    stdout: bytes = b""  # at most Limits.output_bytes
    stderr: str = ""  # the last 2,000 characters
    value: bytes | None = None  # JSON in the encoding of `inside.plain`; for calls and evaluations that returned
    exit_status: int = 0  # as in waitpid: exit code, or minus the signal that ended it
    cpu_s: float = 0.0
    wall_s: float = 0.0


class SandboxService(Protocol):
    """Where programs run. Implementations are safe to use from several threads."""

    def run(self, program: Program, tasks: Iterable[Task], limits: Limits) -> Iterator[RunResult]:
        """Run tasks one after another, lazily: a caller that stops early closes the iterator, and no further task runs.

        A program that does not compile gives one COMPILE_ERROR result and no more. Raises InfrastructureError when
        the service itself fails, ConfigError when the machine cannot provide the isolation that was asked for.
        """
        ...

    def close(self) -> None:
        """End every process that belongs to the service."""
        ...
