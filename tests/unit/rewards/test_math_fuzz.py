"""The math reward on arbitrary text: it always gives 0 or 1, soon, and is symmetric and reflexive where it must be."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rewards.mathematics.choices import choices_of_answer, choices_of_truth
from rewards.mathematics.comparison import Policy, compare
from rewards.mathematics.extraction import extract_answer, last_box
from rewards.mathematics.normalisation import normalise
from rewards.mathematics.numbers import read_number
from rewards.mathematics.reading import read_answer
from rewards.mathematics.scalars import Verdict

FRAGMENTS = (
    r"\frac \sqrt \boxed{ \text{ \left( \right) \{ \} { } ( ) [ ] | , ; : . ! % ^ _ + - * / = < > \le \ne \in \cup \pm "
    r"\pi \infty \sin \log \int \sum \begin{pmatrix} \end{pmatrix} \\ & $ \( \) x y n i e 0 1 2 3 9 10 100 0.5 1,000 "
    r"km/h and or is answer 答え は 万 億 千 三 分の 割 ２ ％ cm m ^{\circ} \overline A B C \mathbb{R} \setminus "
    r"<think> </think> #### \mod \binom ~ ' ¼ ² ₂ ٣ \, \! \text{and} \dots"
)
PIECES = st.lists(st.sampled_from(FRAGMENTS.split(" ")), max_size=25)
MATHS = PIECES.map("".join) | PIECES.map(" ".join)
TEXT = st.text(max_size=200) | MATHS
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NUMBERS = st.integers(-20, 20).map(str) | st.sampled_from(["0.5", r"\frac{1}{3}", r"\pi", "x", "y", "n", "e", "i"])
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", r"\cdot "]), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
        st.tuples(inner, inner).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
        st.tuples(inner, st.integers(2, 3)).map(lambda t: rf"{{{t[0]}}}^{{{t[1]}}}"),
        inner.map(lambda t: rf"\sqrt{{{t}}}"),
        inner.map(lambda t: rf"\sin({t})"),
    ),
    max_leaves=6,
)


@FUZZ
@given(TEXT, TEXT)
def test_any_two_texts_are_judged(gold, answer):
    first, second = read_answer(gold), read_answer(answer)
    if first.node is not None and second.node is not None:
        assert isinstance(compare(first.node, second.node, Policy()), Verdict)


@FUZZ
@given(TEXT)
def test_any_text_is_searched_for_an_answer(text):
    for found in (extract_answer(text), last_box(text)):
        assert found is None or isinstance(found, str)
    assert isinstance(normalise(text), str)
    choices_of_truth(text)
    choices_of_answer(text)


@FUZZ
@given(TEXT)
def test_a_text_that_can_be_read_equals_itself(text):
    node = read_answer(text).node
    if node is not None:
        assert compare(node, node, Policy()) is Verdict.EQUAL


@FUZZ
@given(EXPRESSIONS, EXPRESSIONS)
def test_values_compare_the_same_both_ways(a, b):
    first, second = read_answer(a).node, read_answer(b).node
    assert first is not None and second is not None
    assert compare(first, second, Policy()) is compare(second, first, Policy())


@FUZZ
@given(EXPRESSIONS)
@example(r"\frac{2}{\sin(\pi)}")
@example(r"\frac{x}{\sin(\pi)}")
def test_adding_one_changes_the_value(expression):
    original, other = read_answer(expression).node, read_answer(f"({expression})+1").node
    assert original is not None and other is not None
    assert compare(original, other, Policy()) is not Verdict.EQUAL


@FUZZ
@given(st.lists(st.tuples(st.integers(-9, 9), st.sampled_from(["x", "y", r"\pi", "x^2", r"\sqrt{3}"])), min_size=1))
def test_the_order_of_a_sum_does_not_matter(terms):
    one, other = ("+".join(f"({factor}){name}" for factor, name in order) for order in (terms, terms[::-1]))
    assert compare(read_answer(one).node, read_answer(other).node, Policy()) is Verdict.EQUAL


@FUZZ
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_are_read_exactly(top, bottom):
    for text in (f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}"):
        number = read_number(text)
        assert number is not None and number.value == Fraction(top, bottom)
    grouped = read_number(f"{top:,}")
    assert grouped is not None and grouped.value == top


@FUZZ
@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_decimals_are_read_exactly(decimal):
    number = read_number(f"{decimal:f}")
    assert number is not None and number.value == Fraction(decimal)


@pytest.mark.parametrize("size", [2_000, 200_000])
@pytest.mark.parametrize(
    "piece",
    ["{", "}", r"\boxed{", "$", "(", "\\", "answer is ", "1,", " ", "\n", "は", "^", r"\frac", "-", "1 ", "<think>"],
)
def test_long_repetitions_are_searched_in_linear_time(piece, size):
    extract_answer(piece * (size // len(piece)))


def test_nothing_accumulates_over_many_samples():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def judge(n: int) -> None:
        first, second = read_answer(f"{n}+\\sqrt{{{n}}}"), read_answer(rf"\sqrt{{{n}}}+{n}")
        assert first.node is not None and second.node is not None
        compare(first.node, second.node, Policy())

    for n in range(1200):  # fills the bounded cache
        judge(n)
    before = resident()
    for n in range(1200, 2400):
        judge(n)
    assert resident() - before < 8 * 2**20
