"""A pocket calculator: arithmetic on numbers only, with bounded time and no access to anything else."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from trl.import_utils import pip_install

Number = int | float

_LONGEST_EXPRESSION = 500
_MOST_BITS = 4096  # of a whole number, intermediate results included
_TOKENS = re.compile(
    r"(?: \s | [-+*/%^(),] | [a-z_]\w*+ | (?: \d[\d_]*+ \.? \d*+ | \.\d++ ) (?: e[-+]?\d++ )? (?![\w.]) )*",
    re.IGNORECASE | re.VERBOSE | re.ASCII,
)


class SimpleCalculatorTool:
    """Answers an expression such as `(2 + 3) * sqrt(2)` or `2^10` with its value.

    The answer is a float such as `10.0`; with `whole_numbers`, whole numbers stay exact: `10`.
    Anything else raises a ValueError.
    """

    def __init__(self, whole_numbers: bool = False) -> None:
        try:
            from simpleeval import SimpleEval
        except ImportError as error:
            raise ImportError(f"SimpleCalculatorTool needs simpleeval: {pip_install('simpleeval')}") from error
        self.whole_numbers = whole_numbers
        self._evaluator: type[Any] = SimpleEval

    def __call__(self, expression: str) -> str:
        if len(expression) > _LONGEST_EXPRESSION:
            raise ValueError(f"cannot compute an expression of more than {_LONGEST_EXPRESSION} characters")
        if not _TOKENS.fullmatch(expression):
            raise ValueError(f"cannot compute {expression!r}: only numbers, operators and functions are known")
        evaluator = self._evaluator(operators=_OPERATORS, functions=_FUNCTIONS, names=dict(_CONSTANTS))
        evaluator.nodes = {kind: evaluate for kind, evaluate in evaluator.nodes.items() if kind in _SYNTAX}
        try:
            value = _number(evaluator.eval(expression.strip().replace("^", "**")))
            return str(value if self.whole_numbers else float(value))
        except Exception as error:
            raise ValueError(f"cannot compute {expression!r}: {error}") from None


_SYNTAX = (ast.Expr, ast.Constant, ast.UnaryOp, ast.BinOp, ast.Call, ast.Name)
_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}


def _number(value: Any) -> Number:
    """`value` if it is a real number that is not too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError("the number gets too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("the result is not finite")
    return value


def _guarded(function: Callable[..., Any]) -> Callable[..., Number]:
    def guarded(*numbers: Any) -> Number:
        return _number(function(*map(_number, numbers)))

    return guarded


def _power(base: Number, exponent: Number) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > 2 * _MOST_BITS:
        raise ValueError("the number gets too large")
    return base**exponent


def _factorial(number: Number) -> int:
    if number > 500:
        raise ValueError("the number gets too large")
    return math.factorial(int(number)) if number == int(number) else math.factorial(number)  # type: ignore[arg-type]


def _round(number: Number, digits: int = 0) -> Number:
    if not -300 <= digits <= 300:
        raise ValueError("round takes from -300 to 300 digits")
    return round(number, digits) if digits else round(number)


_OPERATORS = {
    ast.Add: _guarded(operator.add),
    ast.Sub: _guarded(operator.sub),
    ast.Mult: _guarded(operator.mul),
    ast.Div: _guarded(operator.truediv),
    ast.FloorDiv: _guarded(operator.floordiv),
    ast.Mod: _guarded(operator.mod),
    ast.Pow: _guarded(_power),
    ast.USub: _guarded(operator.neg),
    ast.UAdd: _guarded(operator.pos),
}
_FUNCTIONS = {
    "abs": _guarded(abs),
    "min": _guarded(min),
    "max": _guarded(max),
    "round": _guarded(_round),
    "factorial": _guarded(_factorial),
    **{
        name: _guarded(getattr(math, name))
        for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "atan2",
                     "sinh", "cosh", "tanh", "floor", "ceil", "trunc", "degrees", "radians", "gcd", "hypot")
    },
}  # fmt: skip
