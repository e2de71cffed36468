"""A safe calculator: + - * / // % ** and parentheses over numbers, as a tool.

The expression is parsed, never executed, and every step is bounded: text length, operand and result digits,
exponents. Errors are answers, so that a model can read them and try again.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from step35.api.messages import ToolSchema

Number = int | float

_MAX_CHARACTERS = 200  # also bounds the depth of the tree
_MAX_DIGITS = 100
_MAX_EXPONENT = 1000
_ALLOWED = re.compile(r"[0-9.eE+\-*/%()\s]*")

_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Calculator:
    """The calculator as a `step35.api.tools.Tool`."""

    name = "calculator"
    # Every token of the schema is paid in every prompt, which a tiny model feels.
    schema: ToolSchema = {  # noqa: RUF012 (the protocol reads it as a property)
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }

    def __call__(self, arguments: dict[str, Any]) -> str:
        """Evaluate `arguments["expression"]`; return the number, or text that begins with "error:"."""
        expression = arguments.get("expression")
        if not isinstance(expression, str):
            return "error: give the expression as a string"
        return evaluate(expression)


def evaluate(expression: str) -> str:
    """Return the value as Python prints it (integers are exact), or "error: ..."; never raises."""
    try:
        return str(_value(_tree(expression.strip())))
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: number too large"
    except ValueError as error:
        return f"error: {error}"


def _tree(expression: str) -> ast.expr:
    """Parse; the character check keeps names, strings and Python's own warnings out."""
    if len(expression) > _MAX_CHARACTERS:
        raise ValueError("expression too long")
    if not _ALLOWED.fullmatch(expression):
        raise ValueError("only numbers, + - * / // % ** and parentheses")
    if expression.count("(") != expression.count(")"):
        raise ValueError("parentheses do not match")
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("not an arithmetic expression") from None


def _value(node: ast.expr) -> Number:
    """Evaluate a node and its children, checking the size of each value."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _checked(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _checked(_UNARY[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _checked(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("not an arithmetic expression")


def _checked(value: Any) -> Number:
    if isinstance(value, complex):
        raise ValueError("not a real number")
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        raise OverflowError
    return value  # type: ignore[no-any-return]


def _divide(left: Number, right: Number) -> Number:
    """Divide; integers that divide evenly stay exact."""
    if isinstance(left, int) and isinstance(right, int) and left % right == 0:
        return left // right
    return left / right


def _power(base: Number, exponent: Number) -> Any:
    """Raise to a power; the base is bounded already, so a bounded exponent costs milliseconds at most."""
    if abs(exponent) > _MAX_EXPONENT:
        raise OverflowError
    return base**exponent


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: _divide,
    ast.Pow: _power,
}
