"""Assert statements as tests: what is asked of the program, and what is judged without it."""

from __future__ import annotations

import pytest

from rewards.sandbox import asserts


@pytest.mark.parametrize(
    ("test", "calls", "judgement"),
    [
        ("assert f(2) == 3", ("f(2)",), "_0 == 3"),
        ("assert 3 == f(2)", ("f(2)",), "3 == _0"),
        ("assert abs(f(2) - 3.0) < 1e-6", ("f(2)",), "abs(_0 - 3.0) < 1e-06"),
        ("assert f(g(1)) == g(2)", ("f(g(1))", "g(2)"), "_0 == _1"),
        ("assert Solution().f([1])[0] == 1", ("Solution().f([1])",), "_0[0] == 1"),
        ("assert f(1).real == 1", ("f(1)",), "_0.real == 1"),
        ("assert set(f([i for i in range(3)])) == {0}", ("f([i for i in range(3)])",), "set(_0) == {0}"),
        ("assert sorted(f(1), key=lambda x: -x) == [2, 1]", ("f(1)",), "sorted(_0, key=lambda x: -x) == [2, 1]"),
        ("import math\nassert math.isclose(f(1), 2)", ("f(1)",), "math.isclose(_0, 2)"),
        ("assert sum(1, 2) == 3", ("sum(1, 2)",), "_0 == 3"),
        ("assert abs(pow(2, 3) - 8) < 1", ("pow(2, 3)",), "abs(_0 - 8) < 1"),
        ("assert LIMIT == 3, 'message'", ("LIMIT",), "_0 == 3"),
        ("assert f(1) == 2 and f(2) == 3", ("f(1)", "f(2)"), "_0 == 2 and _1 == 3"),
    ],
)
def test_asserts_are_split_at_the_program(test: str, calls: tuple[str, ...], judgement: str) -> None:
    (split,) = asserts.split_asserts([test])
    assert (split.calls, split.judgement) == (calls, judgement)


@pytest.mark.parametrize(
    ("test", "calls", "judgement", "library"),
    [
        ("assert math.isclose(f(2), 4)", ("f(2)",), "math.isclose(_0, 4)", "import math as math"),
        ("assert isclose(f(2), 4)", ("f(2)",), "isclose(_0, 4)", "from math import isclose"),
        (
            "assert Counter(f('ab')) == Counter('ab')",
            ("f('ab')",),
            "Counter(_0) == Counter('ab')",
            "from collections import Counter",
        ),
        ("assert f(2)[math.floor(1.5)] == inf", ("f(2)",), "_0[math.floor(1.5)] == inf", None),
        ("assert f(math.pi, deque([1])) == 2", ("f(math.pi, deque([1]))",), "_0 == 2", ""),
        ("import math\nassert math.isclose(f(2), 4)", ("f(2)",), "math.isclose(_0, 4)", ""),
        ("assert gcd(4, 6) == 2", ("gcd(4, 6)",), "_0 == 2", ""),
        ("assert set(permutations([1])) == {(1,)}", ("permutations([1])",), "set(_0) == {(1,)}", ""),
        ("assert isclose(sqrt(4), 2)", ("sqrt(4)",), "isclose(_0, 2)", "from math import isclose"),
        ("assert Counter().add(1) == 1", ("Counter().add(1)",), "_0 == 1", ""),
        ("assert copy(select(1)) == code(2)", ("copy(select(1))", "code(2)"), "_0 == _1", ""),
        (
            "assert sorted(f(1), key=lambda np: np.real) == [1]",
            ("f(1)",),
            "sorted(_0, key=lambda np: np.real) == [1]",
            "",
        ),
    ],
)
def test_library_names_belong_to_the_judgement(
    test: str, calls: tuple[str, ...], judgement: str, library: str | None
) -> None:
    (split,) = asserts.split_asserts([test])
    assert (split.calls, split.judgement) == (calls, judgement)
    assert not {"math", "deque", "isclose"} & set(split.roots)
    if library is None:
        library = "import math as math\nfrom math import inf"
        assert sorted(split.library.split("\n")) == sorted(library.split("\n"))
    else:
        assert split.library == library


def test_packages_that_boxes_have_belong_to_the_judgement_too() -> None:
    (split,) = asserts.split_asserts(["assert np.allclose(f(2), 4)"], ["numpy"])
    assert (split.calls, split.library) == (("f(2)",), "import numpy as np")
