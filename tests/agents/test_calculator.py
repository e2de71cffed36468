from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35.agents.tools.calculator import Calculator, evaluate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("4821 * 77", "371217"),
        (" 2 + 3 * 4 ", "14"),
        ("(2 + 3) * 4", "20"),
        ("-3 - +2", "-5"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("6 / 3", "2"),
        ("7 / 2", "3.5"),
        ("2 ** 10", "1024"),
        ("-2 ** 2", "-4"),
        ("2 ** -1", "0.5"),
        ("2 ** 3 ** 2", "512"),
        ("1.5 * 2", "3.0"),
        ("1e3 + 1", "1001.0"),
        (f"{10**60} / {10**30}", str(10**30)),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(1 + 2", "parentheses"),
        ("1 + 2)", "parentheses"),
        ("1 +", "not an arithmetic expression"),
        ("", "not an arithmetic expression"),
        (")(", "not an arithmetic expression"),
        ("1 2", "not an arithmetic expression"),
        ("1(2)", "not an arithmetic expression"),
        ("e", "not an arithmetic expression"),
        ("()", "not an arithmetic expression"),
        ("1, 2", "only numbers"),
        ("__import__('os')", "only numbers"),
        ("2 == 2", "only numbers"),
        ("٣ + 1", "only numbers"),
        ("(-8) ** 0.5", "not a real number"),
        ("9 ** 9 ** 9", "too large"),
        ("9 ** 999", "too large"),
        ("10.0 ** 999", "too large"),
        ("1e999", "too large"),
        ("9" * 101, "too large"),
        ("9" * 60 + " * " + "9" * 60, "too large"),
        ("1 + " * 60 + "1", "too long"),
        ("1\n+ 2", "not an arithmetic expression"),
    ],
)
def test_errors_are_answers(expression: str, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(expression)
    assert result.startswith("error: ")
    assert message in result


def test_deep_nesting_is_no_crash() -> None:
    assert evaluate("(" * 99 + "1" + ")" * 99) == "1"
    assert evaluate("-" * 198 + "1") == "1"


@given(st.text(st.sampled_from("0123456789.e+-*/%() "), max_size=30) | st.text())
def test_never_raises(expression: str) -> None:
    assert evaluate(expression)


@given(st.integers(-9999, 9999), st.integers(1, 9999), st.sampled_from(["+", "-", "*", "//", "%"]))
def test_agrees_with_python(a: int, b: int, symbol: str) -> None:
    assert evaluate(f"{a} {symbol} {b}") == str(eval(f"{a} {symbol} {b}"))


def test_tool_reads_its_argument() -> None:
    calculator = Calculator()
    assert calculator({"expression": "1 + 1"}) == "2"
    for bad in ({}, {"expression": 2}, {"x": "1"}):
        assert calculator(bad).startswith("error: ")
    function = calculator.schema["function"]
    assert function["name"] == calculator.name == "calculator"
    assert list(function["parameters"]["properties"]) == function["parameters"]["required"] == ["expression"]
