"""A state goes apart and comes together again as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35.runtime.state import put_together, take_apart

leaf = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
    st.integers(0, 9).map(lambda n: torch.full((n, 2), float(n), dtype=torch.bfloat16)),
)  # fmt: skip
states = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(st.text().filter(lambda key: "/" not in key and not key.isdecimal()), inner),
        st.dictionaries(st.integers(0, 99), inner),
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text().filter(lambda key: "/" not in key and key), states))
def test_round_trip_through_json(state: dict[str, Any]) -> None:
    plain, tensors = take_apart(state)
    assert same(put_together(json.loads(json.dumps(plain)), tensors), state)


def test_names_are_paths() -> None:
    _, tensors = take_apart({"model": {"a.weight": torch.ones(1)}, "optimisers": [{"state": {0: (torch.ones(2),)}}]})
    assert list(tensors) == ["model/a.weight", "optimisers/0/state/0/0"]


def test_what_is_not_a_tensor_is_copied() -> None:
    groups = [{"lr": 1.0}]
    plain, _ = take_apart({"groups": groups})
    groups[0]["lr"] = 2.0
    assert put_together(plain, {}) == {"groups": [{"lr": 1.0}]}


@pytest.mark.parametrize("state", [{"a": {(1, 2): 3}}, {"a": {True: 1}}, {"a": {0: torch.ones(1), "0": torch.ones(1)}}])
def test_keys_that_would_not_come_back_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="key"):
        take_apart(state)
