"""The process that runs math-verify: imports sympy once, then forks a child for each pair and kills it at a deadline.

Left out: every decision that needs no computer algebra; restarting this process (`rewards.mathematics.worker_pool`).
Run as `python -m rewards.mathematics.worker MEMORY_MIB`; requests and replies are JSON lines on standard input and
output. This process has one thread and no state but its imports, so the fork is safe, a pair costs no start-up, and
nothing that a pair leaves behind (caches, memory, a broken interpreter) outlives it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import resource
import select
import signal
import sys
import time
from typing import IO, Any

RANDOM_POINTS = 4
MIN_AGREEING_POINTS = 3
CLOCK_TO_CPU = 4  # a pair may take this many times as long by the clock as in CPU time, for busy machines
DIGITS = 30  # significant digits of the numeric checks
RELATIVE_ERROR = 1e-20  # of values evaluated to DIGITS
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests until standard input closes. Prints a ready line, or one that says why it cannot start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; this process ends with its input
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # a library that prints must not break the protocol
    memory_bytes = int(sys.argv[1]) * 2**20
    try:
        mend_percent_parsing()
        self_test()
    except Exception as error:  # noqa: BLE001  whatever is wrong, the parent reports it as a failed start
        _send(replies, {"ready": False, "error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    gc.collect()
    gc.freeze()  # the children share these pages for as long as nobody counts references in them
    _send(replies, {"ready": True})
    for line in sys.stdin:
        _send(replies, answer_in_child(json.loads(line), memory_bytes))


def answer_in_child(request: dict[str, Any], memory_bytes: int) -> dict[str, Any]:
    """The reply of a forked child, or {"lost": reason} when it died or passed its deadline.

    `request["deadline_s"]` counts CPU time, so that what is lost does not depend on how busy the machine is.
    """
    deadline_s = request["deadline_s"]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _limit_child(deadline_s, memory_bytes)
            os.write(writer, json.dumps(answer_request(request)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        return _read_reply(reader, deadline_s * CLOCK_TO_CPU)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """One reply: `equal` is True, False, or None when one of the two could not be read."""
    try:
        if request["op"] == "read":
            return {"equal": bool(_read(request["gold"]))}
        return {"equal": equal(request["gold"], request["answer"])}
    except MemoryError:
        raise  # the child dies of it and is reported as lost
    except Exception as error:  # noqa: BLE001  sympy raises nearly every exception there is on odd input
        return {"equal": None, "error": f"{type(error).__name__}: {error}"[:200]}


def equal(gold: str, answer: str) -> bool | None:
    """Whether two LaTeX expressions are equal: by their numeric values if they have any, else as math-verify says.

    Values come first because they are cheap and because math-verify errs both ways: it rounds to six decimals, so that
    it takes all tiny numbers for equal, and it says no where simplification gives up.
    """
    from math_verify import verify

    golds, answers = _read(gold), _read(answer)
    if not golds or not answers:
        return None
    agreed = [_agree_in_numbers(g, a) for g in golds for a in answers]
    if True in agreed:
        return True
    if None not in agreed:
        return False
    return bool(verify(golds, answers, timeout_seconds=None))


def mend_percent_parsing() -> None:
    """Give the parser the method that its converter calls before it looks at percentages.

    latex2sympy2_extended 1.11's antlr 4.9.3 parser lacks `FUNC_GAMMA`, so `28\\%` silently reads as 28. Delete this
    when `self_test` passes without it.
    """
    from latex2sympy2_extended.antlr_parser import PSParser

    if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
        PSParser.AtomContext.FUNC_GAMMA = lambda self: None


def self_test() -> None:
    """Raise RuntimeError when math-verify does not read what it must.

    The cases also warm this process up: no child repeats what they import or what the parser learns from them.
    """
    checks = [
        (r"28\%", r"\frac{28}{100}", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"x^2-1", r"(x-1)(x+1)", True),
        (r"\frac{1}{3}", r"\frac{1}{4}", False),
        (r"\sum_{n=1}^{\infty}\frac{1}{n^2}", r"\frac{\pi^2}{6}", True),
        (r"\int_0^1 x^2\,dx", r"\frac13", True),
        (r"\lim_{x\to 0}\frac{\sin x}{x}", "1", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", False),
        (r"(-\infty,2]\cup[3,\infty)", r"\{1,2\}", False),
        (r"\prod_{k=1}^{3} k", "6", True),
        (r"x\ge 2", r"x<2", False),
    ]
    for gold, answer, expected in checks:
        found = equal(gold, answer)
        if found is not expected:
            raise RuntimeError(
                f"math-verify's self-test says {found} to {gold} == {answer}, expected {expected}; "
                "install the pinned math-verify, latex2sympy2_extended and antlr4-python3-runtime"
            )


def _read(latex: str) -> list[Any]:
    """The sympy objects math-verify reads from one LaTeX expression, strings left out."""
    import sympy
    from math_verify import LatexExtractionConfig, parse

    text = f"${latex.replace('$', ' ').replace(chr(10), ' ')}$"
    read = parse(text, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return [_with_common_symbols(e) for e in read if isinstance(e, (sympy.Basic, sympy.MatrixBase))]


def _with_common_symbols(expression: Any) -> Any:
    """Make all symbols real, and i the imaginary unit, which math-verify reads as a symbol."""
    import sympy

    names = {s: sympy.I if s.name == "i" else sympy.Symbol(s.name, real=True) for s in expression.free_symbols}
    return expression.subs(names) if names else expression


def _agree_in_numbers(a: Any, b: Any) -> bool | None:
    """Whether two expressions have one value, or one value at each of some random points; None: numbers cannot say."""
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or a.free_symbols != b.free_symbols:
        return None
    if a.has(sympy.Float) or b.has(sympy.Float):
        return None
    generator = random.Random(0)
    divisor = 1 if a.has(sympy.Sum, sympy.Product) or b.has(sympy.Sum, sympy.Product) else 1009  # whole limits of sums
    agreed = 0
    for _ in range(RANDOM_POINTS if a.free_symbols else 1):
        numerators = {s: generator.randint(2, 12 if divisor == 1 else 3000) for s in sorted(a.free_symbols, key=str)}
        point = {s: sympy.Rational(numerator, divisor) for s, numerator in numerators.items()}
        x, y = _number(a, point), _number(b, point)
        if x is None or y is None:
            continue
        if abs(x - y) > RELATIVE_ERROR * max(abs(x), abs(y)):
            return False
        agreed += 1
    return True if agreed >= (MIN_AGREEING_POINTS if a.free_symbols else 1) else None


def _number(expression: Any, point: dict[Any, Any]) -> Any:
    """The value at a point, with integrals and sums evaluated numerically; None if there is no finite value."""
    at_point = expression.subs(point)
    value = at_point.evalf(DIGITS)
    if not all(part.is_Number for part in value.as_real_imag()):  # a limit, or a sum that only closed forms can judge
        value = at_point.doit().evalf(DIGITS)
    return value if value.is_number and value.is_finite else None


def _send(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _read_reply(reader: int, deadline_s: float) -> dict[str, Any]:
    """A reply is far smaller than a pipe's buffer, so one read gets all of it."""
    started = time.monotonic()
    if not select.select([reader], [], [], deadline_s)[0]:
        return {"lost": f"no result within {deadline_s:g} s"}
    data = os.read(reader, select.PIPE_BUF)
    if not data:
        return {"lost": f"ended by a limit of CPU time or memory after {time.monotonic() - started:.1f} s"}
    reply: dict[str, Any] = json.loads(data)
    return reply


def _limit_child(deadline_s: float, memory_bytes: int) -> None:
    """Limits that the kernel enforces, whatever the interpreter is busy with and even if nobody is left to kill it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.setitimer(signal.ITIMER_PROF, deadline_s)  # in CPU time; its signal ends this process by default
    cpu_seconds = int(deadline_s) + 2  # in reserve, should anything in here touch the timer
    for which, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (limit, limit))


if __name__ == "__main__":
    main()
