"""Blocks under any order of taking, sharing and releasing: none is lost, none is given to two owners."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from step35.engine.blocks import BlockPool, chain


class Pool(RuleBasedStateMachine):
    """A pool beside a plain account of who holds what."""

    held = Bundle("held")

    @initialize(count=st.integers(1, 6))
    def begin(self, count: int) -> None:
        self.pool, self.count = BlockPool(count), count
        self.holds: list[int] = []
        self.content: dict[bytes, int] = {}
        """Where each published key was put; a block taken anew forgets its key."""

    @rule(target=held)
    def take(self) -> int:
        if not self.pool.available:
            with pytest.raises(IndexError, match="no block is left"):
                self.pool.take()
            return -1
        block = self.pool.take()
        assert block not in self.holds
        self.content = {key: where for key, where in self.content.items() if where != block}
        self.holds.append(block)
        return block

    @rule(block=held, key=st.binary(min_size=1, max_size=1))
    def publish(self, block: int, key: bytes) -> None:
        if block in self.holds:
            self.pool.publish(block, key)
            if key not in self.content and block not in self.content.values():
                self.content[key] = block

    @rule(target=held, key=st.binary(min_size=1, max_size=1))
    def share(self, key: bytes) -> int:
        assert self.pool.knows(key) == (key in self.content)
        if key not in self.content:
            return -1
        assert self.pool.share(key) == self.content[key]
        self.holds.append(self.content[key])
        return self.content[key]

    @rule(block=consumes(held))
    def release(self, block: int) -> None:
        if block in self.holds:
            self.pool.release(block)
            self.holds.remove(block)

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.holders == [self.holds.count(block) for block in range(self.count)]
            assert self.pool.available == self.count - len(set(self.holds))


TestPool = Pool.TestCase


def test_a_block_is_not_given_back_twice() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(ValueError, match="given back more often"):
        pool.release(block)


def test_the_block_released_longest_ago_is_taken_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    for block in (blocks[1], blocks[2], blocks[0]):
        pool.release(block)
    assert [pool.take() for _ in range(3)] == [blocks[1], blocks[2], blocks[0]]


@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=3), min_size=1, max_size=3), st.binary(max_size=2))
def test_keys_name_the_whole_prefix(blocks: list[list[int]], salt: bytes) -> None:
    def key(blocks: list[list[int]], salt: bytes) -> bytes:
        for block in blocks:
            salt = chain(salt, block)
        return salt

    changed = [[blocks[0][0] + 1, *blocks[0][1:]], *blocks[1:]]
    assert key(blocks, salt) == key(blocks, salt)
    assert len({key(blocks, salt), key(changed, salt), key(blocks, salt + b"x")}) == 3
