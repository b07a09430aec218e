"""Check the arguments of public functions against their type annotations, before any work.

:func:`check_arguments` decorates every public function. An argument of the wrong type raises TypeError, one out of
range ValueError, in one line that names it: ``batch_size: expected at least 1, got 0``. NumPy scalars are converted to
Python's; booleans and text are never accepted as numbers, nor a string as a list.
"""

from __future__ import annotations

import inspect
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, wraps
from itertools import pairwise
from os import PathLike as OSPath
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, ParamSpec, TypeVar, Union, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from ._limits import MOST_DEPTH, MOST_RANDOM_STATE

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

MOST_WHOLE = 2**31 - 1
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)

# What to say was expected, by the type of pydantic's error; other types keep pydantic's own words.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "True or False",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "dict_type": "a dictionary",
    "is_instance_of": "{class}",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "other_type": "{expected}",
    "other_value": "{expected}",
}


def refuse_type(expected: str) -> NoReturn:
    """Raise from a validator that a value has the wrong type, saying what was expected."""
    raise PydanticCustomError("other_type", "{expected}", {"expected": expected})


def refuse_value(expected: str) -> NoReturn:
    """Raise from a validator that a value is out of range, saying what was expected."""
    raise PydanticCustomError("other_value", "{expected}", {"expected": expected})


@dataclass(frozen=True)
class Converted:
    """Metadata of an annotation: a function that checks and converts the argument."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Tell pydantic to validate with the function."""
        return core_schema.no_info_plain_validator_function(self.function)


def _whole(value: Any) -> Any:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else refuse_value("a whole number")
    try:
        return operator.index(value)
    except TypeError:
        return value


def list_of(value: Any) -> list[Any]:
    """Convert a sequence or a one-dimensional array to a list; refuse text, sets and mappings."""
    if hasattr(value, "to_numpy"):  # pandas
        value = value.to_numpy()
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        refuse_type("a list")
    return [item.item() if isinstance(item, np.generic) else item for item in value]


def _tuple_of(value: Any) -> tuple[Any, ...]:
    return tuple(list_of(value))


def _keys(value: Any) -> list[str]:
    keys = list_of(value)
    if not all(isinstance(key, str) for key in keys):
        refuse_type("keys that are text")
    if "" in keys or len(set(keys)) < len(keys):
        refuse_value("keys that are not empty, each once")
    return keys


def _one_or_more_keys(value: Any) -> list[str]:
    if not isinstance(value, str) and not hasattr(value, "__len__"):
        refuse_type("a key or a list of keys")
    return _keys([value] if isinstance(value, str) else value) or refuse_value("at least one key")


def _collection(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Set) else list_of(value)


def _increasing(values: tuple[int, ...]) -> tuple[int, ...]:
    if any(a >= b for a, b in pairwise(values)):
        refuse_value("numbers that increase")
    return values


def _distinct(values: Sequence[float]) -> Sequence[float]:
    return values if len(set(values)) == len(values) else refuse_value("numbers, each once")


def _path(value: Any) -> Path:
    if not isinstance(value, str | OSPath):
        refuse_type("a path")
    if not str(value).strip() or "\0" in str(value):
        refuse_value("a path that is not empty")
    return Path(value)


def _depth(value: Any) -> str | float:
    if isinstance(value, str):
        return value or refuse_value("text that is not empty")
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        refuse_type("a column of obs or a number")
    return float(value) if 1 <= value <= MOST_DEPTH else refuse_value("a column of obs or a number from 1 to 1e9")


def _not_bool(value: Any) -> Any:
    return refuse_type("a whole number") if isinstance(value, bool) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_WHOLE)]
Number = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST_WHOLE)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST_RANDOM_STATE)]
# Total count of the spots: a column of obs, or a number.
Depth = Annotated[str | float, Converted(_depth)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Probability = Annotated[Real, Field(ge=0, le=1)]
# Share of the values that an interval should contain: between 0 and 1, both excluded.
ConfidenceLevel = Annotated[Real, Field(gt=0, lt=1)]
# A share that is not zero.
Share = Annotated[Probability, Field(gt=0)]
# A share below 1, such as a dropout rate.
Rate = Annotated[Real, Field(ge=0, lt=1)]
Key = Annotated[str, Field(min_length=1)]
KeyList = Annotated[Sequence[str], Converted(_keys)]
KeyOrKeys = Annotated[str | Sequence[str], Converted(_one_or_more_keys)]
ListOf = Annotated[Sequence[T], BeforeValidator(list_of)]
TupleOf = Annotated[tuple[T, ...], BeforeValidator(_tuple_of)]
# A list or a set: the order does not matter.
CollectionOf = Annotated[Sequence[T], BeforeValidator(_collection)]
# Whole numbers, each larger than the one before.
Increasing = Annotated[TupleOf[Count], AfterValidator(_increasing)]
Probabilities = Annotated[ListOf[Probability], AfterValidator(_distinct)]
PathLike = Annotated[str | Path, Converted(_path)]
# For Literal[1, 2] and the like, since True equals 1.
not_bool = BeforeValidator(_not_bool)


@dataclass(frozen=True)
class Shape:
    """Metadata of an annotation: an array of numbers with named axes.

    Axes of the same name must have the same length in all arguments of a call.

    Parameters
    ----------
    axes
        Names of the axes.
    optional
        If the last axis may be absent.
    """

    axes: tuple[str, ...]
    optional: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Tell pydantic to validate with :meth:`_array`."""
        return core_schema.no_info_plain_validator_function(self._array)

    def _array(self, value: Any) -> NDArray[Any]:
        shape = f"an array of numbers of shape ({', '.join(self.axes)})"
        try:
            array = np.asarray(value)
        except (TypeError, ValueError):
            refuse_type(shape)
        if array.dtype.kind not in "fiu":
            refuse_type(shape)
        if array.ndim not in (len(self.axes), len(self.axes) - self.optional):
            refuse_value(shape)
        return array


class _Argument(NamedTuple):
    """The validator of an argument, and whether None is allowed."""

    adapter: TypeAdapter[Any]
    optional: bool
    shape: Shape | None

    @classmethod
    def of(cls, annotation: Any) -> _Argument:
        members = [annotation, *get_args(annotation)] if _is_union(annotation) else [annotation]
        metadata = [m for member in members for m in getattr(member, "__metadata__", ())]
        shape = next((m for m in metadata if isinstance(m, Shape)), None)
        return cls(TypeAdapter(annotation, config=STRICT), type(None) in members, shape)


def _is_union(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", type(annotation)) in (Union, type(int | str))


@cache
def _arguments(owner: Any) -> dict[str, _Argument]:
    """Validators of a function's arguments or a dataclass's fields; none for those annotated ``Any``."""
    hints = get_type_hints(inspect.unwrap(owner), include_extras=True)
    return {name: _Argument.of(hint) for name, hint in hints.items() if name != "return" and hint is not Any}


def checked(owner: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check and convert values by the annotations of a function or dataclass; return the converted ones.

    Parameters
    ----------
    owner
        The function or class.
    values
        Arguments by name.

    Raises
    ------
    TypeError
        If a value has the wrong type.
    ValueError
        If a value is out of range.
    """
    arguments = _arguments(owner)
    result = {name: _check(name, value, arguments[name]) for name, value in values.items() if name in arguments}
    _check_axes({name: (arguments[name].shape, value) for name, value in result.items()})
    return result


def _check(name: str, value: Any, argument: _Argument) -> Any:
    try:
        return argument.adapter.validate_python(value.item() if isinstance(value, np.generic) else value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A union gives an error for each member. For a list given to `int | list`, only the errors of its items count;
        # for `str | int`, both.
        deepest = max(len(e["loc"]) for e in errors)
        errors = [e for e in errors if len(e["loc"]) == deepest]
        if errors[0]["type"] == "value_error":
            raise ValueError(f"{name}: {errors[0]['ctx']['error']}") from None
        expected = " or ".join(dict.fromkeys(map(_expected, errors)))
        wrong_type = all(e["type"].endswith("_type") or e["type"] == "is_instance_of" for e in errors)
        or_none = " or None" if argument.optional and wrong_type else ""
        message = f"{name}: expected {expected}{or_none}, got {shown(errors[0]['input'])}"
        if "TwoStageVARST" in expected and isinstance(value, str | OSPath):
            message += "; load it with histovar.TwoStageVARST.load"
        raise (TypeError if wrong_type else ValueError)(message) from None


def _expected(error: Mapping[str, Any]) -> str:
    """Say in words what was expected, from an error of pydantic."""
    context = {k: int(v) if v in (0.0, 1.0) else v for k, v in error.get("ctx", {}).items()}  # 1 in place of 1.0
    if error["type"] in EXPECTED:
        return EXPECTED[error["type"]].format(**context)
    return str(error["msg"]).removeprefix("Input should be ")


def _check_axes(arrays: Mapping[str, tuple[Shape | None, Any]]) -> None:
    """Refuse arrays whose axes of the same name differ in length."""
    lengths: dict[str, tuple[str, int]] = {}
    for name, (shape, array) in arrays.items():
        for axis, length in zip(shape.axes, array.shape, strict=False) if shape and array is not None else ():
            other, expected = lengths.setdefault(axis, (name, length))
            if length != expected:
                raise ValueError(f"{name}: expected {expected} {axis}, as in {other}, got {length}")


def nearest(unknown: Iterable[str], known: Iterable[str]) -> list[str]:
    """Find the known name closest to each unknown one, ignoring case; names without a close match are skipped."""
    by_lower = {name.lower(): name for name in known}
    return [by_lower[match] for name in unknown for match in get_close_matches(name.lower(), by_lower, 1)]


def did_you_mean(matches: Iterable[str]) -> str:
    """End of an error message that suggests names, such as those of :func:`nearest`; empty without any."""
    names = ", ".join(matches)
    return f"; did you mean {names}?" if names else ""


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that its arguments are checked and converted by its annotations before it runs."""
    signature = inspect.signature(function)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            matches = nearest([key for key in kwargs if key not in signature.parameters], signature.parameters)
            raise TypeError(f"{function.__name__}: {error}{did_you_mean(map(repr, matches[:1]))}") from None
        bound.arguments.update(checked(function, bound.arguments))
        return function(*bound.args, **bound.kwargs)

    return run


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60


def shown(value: Any) -> str:
    """Format a value for an error message: its repr on one line, shortened."""
    return " ".join(_Short().repr(value).split())
