"""Thinking: limits the tokens of the open think block, and starts what limits the answer right behind it.

The chat format's prompt ends in `<think>\\n`; the turn goes on with reasoning, `\\n</think>\\n` and the answer. A
budget closes the block with exactly those tokens; a grammar begins with the first token behind them.
"""

# V vocabulary of the model, which may be padded beyond the tokenizer's

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch

from step35.api.constraint import Constraint
from step35.api.sampling import SamplingParams
from step35.data.tokenizer import Tokenizer
from step35.engine.grammar import GrammarCompiler


class _State(NamedTuple):
    """Where a generation stands. With neither thinking nor forced tokens left, it is in the answer."""

    thinking: bool
    spent: int = 0
    """Tokens of thinking so far."""
    line_ended: bool = False
    """Whether the thinking so far ends in a newline."""
    forced: tuple[int, ...] = ()
    """Tokens that have to come next, in this order, before anything else."""


class ThinkingConstraint:
    """A think block with an optional budget, then what `inner` allows.

    With `inner`, an answer must come: neither end tokens nor `<tool_call>` may stand in the thinking, and the
    template's newline is forced behind `</think>`. Without it a `<tool_call>` ends the thinking, as it does for
    `chat.parse`: closing the block inside a call would break the call.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        budget: int | None,
        inner: Constraint | None,
        in_thinking: bool,
        vocab_size: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._budget = budget
        self._inner = inner
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._close_id = tokenizer.id_of("</think>")
        self._call_id = tokenizer.id_of("<tool_call>")
        self._newline = tuple(tokenizer.encode("\n"))
        self._states = [self._close_if_spent(_State(thinking=in_thinking))]

    def allowed(self) -> torch.Tensor | None:
        """Return which tokens may come next (V,), on the CPU; None when all may."""
        state = self._states[-1]
        if state.forced:
            only_V = torch.zeros(self._vocab_size, dtype=torch.bool)
            only_V[state.forced[0]] = True
            return only_V
        if state.thinking:
            return None if self._inner is None else self._no_end_V.clone()
        return None if self._inner is None else self._inner.allowed()

    def advance(self, token: int) -> None:
        """Move on by one token; raise `ValueError`, and stay, when it is not the one that has to come."""
        state = self._states[-1]
        if state.forced and token != state.forced[0]:
            raise ValueError(f"token {token} cannot come inside the end of a think block; {state.forced[0]} has to.")
        if self._inner is not None and not state.thinking and not state.forced:
            self._inner.advance(token)
        self._states.append(self._after(state, token))

    def rollback(self, tokens: int) -> None:
        """Take the last `tokens` tokens back, also across the end of the thinking."""
        if not 0 <= tokens < len(self._states):
            raise ValueError(f"cannot take {tokens} tokens back; there are {len(self._states) - 1}.")
        kept = len(self._states) - tokens
        # The state before a token says who took it.
        answered = sum(not state.thinking and not state.forced for state in self._states[kept - 1 : -1])
        if self._inner is not None and answered:
            self._inner.rollback(answered)
        del self._states[kept:]

    def _after(self, state: _State, token: int) -> _State:
        if state.forced:
            thinking = state.thinking and token != self._close_id
            return state._replace(thinking=thinking, forced=state.forced[1:])
        if not state.thinking:
            return state
        if token == self._close_id:
            return state._replace(thinking=False, forced=() if self._inner is None else self._newline)
        if token == self._call_id and self._inner is None:
            return state._replace(thinking=False)
        line_ended = self._tokenizer.decode([token]).endswith("\n")
        return self._close_if_spent(_State(thinking=True, spent=state.spent + 1, line_ended=line_ended))

    def _close_if_spent(self, state: _State) -> _State:
        """Force the end of the block once the budget is spent. An empty block has its blank line in the template."""
        if not state.thinking or self._budget is None or state.spent < self._budget:
            return state
        opening = () if state.line_ended else self._newline
        return state._replace(forced=(*opening, self._close_id, *self._newline))

    @cached_property
    def _no_end_V(self) -> torch.Tensor:
        """All tokens of the tokenizer but those that would end or leave the thinking without an answer."""
        allowed_V = torch.arange(self._vocab_size) < self._tokenizer.vocab_size
        allowed_V[[*self._tokenizer.eos_ids, self._call_id]] = False
        return allowed_V


def build_constraint(params: SamplingParams, tokenizer: Tokenizer, compiler: GrammarCompiler) -> Constraint | None:
    """Return what limits a generation with `params`, or None when neither grammar nor budget is set.

    A budget has an effect only where `params.in_thinking` says that the prompt ends in an open think block.
    Raises `ConfigError` for a grammar that cannot be compiled.
    """
    if params.grammar is None and params.thinking_budget is None:
        return None
    return ThinkingConstraint(
        tokenizer,
        budget=params.thinking_budget,
        inner=None if params.grammar is None else compiler.compile(params.grammar),
        in_thinking=params.in_thinking,
        vocab_size=compiler.vocab_size,
    )
