"""Objects of a Python program in the place of a setting's text: rows, reward functions, models, tokenizers.

A setting such as `data.path` is a text. From Python it may be the thing itself: the setting then is a `Given`, a text
that names the object (`python:rows`) and carries it. A run's config.yaml shows the name; whoever opens the setting
takes the object.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from pydantic import WrapValidator
from pydantic_core import PydanticCustomError

PREFIX = "python:"


class Given(str):
    """The name of an object, and the object.

    It is copied and compared by its name. Pickled it is the name alone, for rows and models stay in the process that
    reads them; a function travels (`GivenFunction`).
    """

    value: Any

    def __new__(cls, name: str, value: Any) -> Given:
        given = super().__new__(cls, name)
        given.value = value
        return given

    def __deepcopy__(self, memo: Any) -> Given:
        return self

    def __reduce__(self) -> Any:
        return str, (str(self),)


class GivenRows(Given):
    """Rows, in a list or by split."""

    def of_split(self, split: str) -> Collection[Any]:
        """Raises KeyError where the rows are given by split, and this one is not among them."""
        return self.value[split] if isinstance(self.value, Mapping) else self.value


class GivenFunction(Given):
    """A function: a reward, a loss, an advantage. It is pickled by whatever pickles the config: Ray's takes lambdas and
    notebooks' functions."""

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.value)


class GivenModel(Given):
    """A model of Transformers."""


class GivenTokenizer(Given):
    """A tokenizer of Transformers."""


def value_of(setting: object) -> Any:
    """The object that a setting carries; None for one that is just a text."""
    return setting.value if isinstance(setting, Given) else None


def was_given(setting: object) -> bool:
    """Whether a setting names an object that it does not carry: read back from a file, or sent elsewhere."""
    return isinstance(setting, str) and setting.startswith(PREFIX) and not isinstance(setting, Given)


def is_rows(value: Any) -> bool:
    """Whether this may be rows: a list of mappings, a `datasets.Dataset`, or several of these by split."""
    if isinstance(value, (str, bytes, type)):
        return False
    if isinstance(value, Mapping):
        return bool(value) and all(is_rows(part) for part in value.values())
    if not (hasattr(value, "__iter__") and hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return False
    return len(value) == 0 or isinstance(value[0], Mapping)


def is_model(value: Any) -> bool:
    """Whether this may be a model of Transformers. Nothing is imported for it."""
    return not isinstance(value, type) and callable(value) and hasattr(value, "save_pretrained")


def is_tokenizer(value: Any) -> bool:
    """Whether this may be a tokenizer of Transformers."""
    return not isinstance(value, type) and hasattr(value, "save_pretrained") and hasattr(value, "convert_ids_to_tokens")


def _rows(value: Any, as_text: Callable[[Any], Any]) -> Any:
    if isinstance(value, GivenRows):
        return value
    try:
        found = is_rows(value)
    except (KeyError, IndexError, TypeError):  # a pandas.DataFrame has no row 0
        found = False
    if found:
        return GivenRows(f"{PREFIX}rows", value)
    if not isinstance(value, str) and hasattr(value, "to_dict"):
        raise PydanticCustomError("rows", "a table of {kind} is no list of rows; give df.to_dict('records')",
                                  {"kind": type(value).__name__})  # fmt: skip
    return as_text(value)


def _function(value: Any, as_text: Callable[[Any], Any]) -> Any:
    if isinstance(value, GivenFunction):
        return value
    if isinstance(value, str) or not callable(value):
        return as_text(value)
    return GivenFunction(f"{PREFIX}{name_of_function(value)}", value)


def name_of_function(function: Callable[..., Any]) -> str:
    """`lambda` for a lambda, the class for an object that is called; of a partial, what it wraps."""
    inner = getattr(function, "func", function)
    name = getattr(inner, "__name__", type(inner).__name__)
    return "lambda" if name == "<lambda>" else name


def _model(value: Any, as_text: Callable[[Any], Any]) -> Any:
    if isinstance(value, GivenModel):
        return value
    if hasattr(value, "merge_and_unload"):
        raise PydanticCustomError("model", "a PEFT model holds its adapter apart; give model.merge_and_unload()")
    return GivenModel(f"{PREFIX}{type(value).__name__}", value) if is_model(value) else as_text(value)


def _tokenizer(value: Any, as_text: Callable[[Any], Any]) -> Any:
    if isinstance(value, GivenTokenizer):
        return value
    return GivenTokenizer(f"{PREFIX}{type(value).__name__}", value) if is_tokenizer(value) else as_text(value)


# Types of settings: a text, or from Python the object itself.
RowsPath = Annotated[str, WrapValidator(_rows)]
FunctionName = Annotated[str, WrapValidator(_function)]
ModelPath = Annotated[str, WrapValidator(_model)]
TokenizerPath = Annotated[str, WrapValidator(_tokenizer)]
