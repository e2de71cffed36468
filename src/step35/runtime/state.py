"""A state taken apart: tensors by name, and the rest as plain values that JSON can hold. And put together again.

A state is nested dictionaries, lists and tuples of tensors, numbers, text and None. Nothing else is taken, so that
loading a checkpoint never has to run code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

PLAIN = (bool, int, float, str, type(None))


def take_apart(state: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Return (plain values with references, tensors by name); the tensors are those of `state`, the rest is a copy.

    The name of `state["model"]["a.weight"]` is "model/a.weight". Raises `TypeError` for a value of another kind.
    """
    tensors: dict[str, Tensor] = {}
    return _plain(state, "", tensors), tensors


def put_together(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `take_apart`."""
    if isinstance(plain, list):
        return [put_together(inner, tensors) for inner in plain]
    if not isinstance(plain, dict):
        return plain
    [(kind, value)] = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(put_together(inner, tensors) for inner in value)
    return {key: put_together(inner, tensors) for key, inner in value}


def _plain(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    # Exact types: a numpy float is a float to isinstance, and would come back as another type.
    if isinstance(value, Tensor):
        if where in tensors:
            raise TypeError(f"two tensors of the state are called '{where}'; keep number and text keys apart.")
        tensors[where] = value.detach()
        return {"tensor": where}
    if type(value) in PLAIN:
        return value
    if isinstance(value, dict):
        # As pairs, since a key of JSON is text and an optimiser's are numbers.
        return {"dict": [[_key(key, where), _plain(v, _join(where, key), tensors)] for key, v in value.items()]}
    if type(value) in (list, tuple):
        items = [_plain(inner, _join(where, index), tensors) for index, inner in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, text, None, lists, tuples, dicts."
    )


def _join(where: str, key: object) -> str:
    return f"{where}/{key}" if where else str(key)


def _key(key: Any, where: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"{where} has the key {key!r}, a {type(key).__name__}; keys are text or whole numbers.")
    return key  # type: ignore[no-any-return]
