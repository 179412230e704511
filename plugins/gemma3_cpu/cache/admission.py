"""What managers of all rules check alike: their sizes, a request against them, a step against admission."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vswa_plugin.errors import ConfigError, InvalidRequest, InvariantError

from .spec import GroupSpec


class Admission(NamedTuple):
    """What a sequence was admitted for.

    :ivar total_tokens: prompt and longest output.
    :ivar max_chunk_tokens: most tokens computed in one step.
    :ivar held: the most pages it holds at any one time, per group.
    """

    total_tokens: int
    max_chunk_tokens: int
    held: tuple[int, ...]

    def check_step(self, computed_tokens: int, upto_tokens: int) -> None:
        """Return if pages up to ``upto_tokens`` may be asked for.

        :raises InvariantError: they are more than the sequence was admitted for.
        """
        if upto_tokens > self.total_tokens or upto_tokens - computed_tokens > self.max_chunk_tokens:
            raise InvariantError(
                f"expected at most {self.max_chunk_tokens} tokens a step and {self.total_tokens} in all, "
                f"got pages asked for up to token {upto_tokens} with {computed_tokens} computed"
            )


def check_computed(n_tokens: int, reserved: int) -> None:
    """:raises InvariantError: more tokens were computed than there were pages ``reserved`` for."""
    if not 0 <= n_tokens <= reserved:
        raise InvariantError(
            f"expected at most {reserved} computed tokens, for which pages are reserved, got {n_tokens}"
        )


def check_settings(
    groups: Sequence[GroupSpec], block_size: int, max_seq_len: int, max_chunk_tokens: int
) -> None:
    """:raises ConfigError: sizes with which no manager can work."""
    sizes = {"block_size": block_size, "max_seq_len": max_seq_len, "max_chunk_tokens": max_chunk_tokens}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"KV cache: expected {name} of at least 1, got {size}")
    ids = [group.group_id for group in groups]
    if not ids or len(set(ids)) != len(ids):
        raise ConfigError(f"KV cache: expected at least one cache group and each id once, got ids {ids}")
    for group in groups:
        _check_group(group, block_size)


def _check_group(group: GroupSpec, block_size: int) -> None:
    if group.num_blocks < 1 or group.layers < 1 or group.host_blocks < 0:
        raise ConfigError(
            f"KV cache, window {group.label}: expected a block at least, a layer at least and no negative "
            f"number on the host (host_blocks), got {group.num_blocks} blocks, {group.layers} layers, "
            f"{group.host_blocks} host blocks"
        )
    if group.window_size is not None and (group.window_size < 1 or group.window_size % block_size):
        raise ConfigError(
            f"KV cache, cache group {group.group_id}: expected a window that is a multiple of the "
            f"block size ({block_size} tokens), got {group.window_size}; choose a tokens_per_block "
            "that divides it"
        )


class RequestSize(NamedTuple):
    """Tokens of one request, with the words for its refusal."""

    prompt_len: int
    max_new_tokens: int

    @property
    def total(self) -> int:
        return self.prompt_len + self.max_new_tokens

    def __str__(self) -> str:
        return f"{self.prompt_len} prompt tokens and up to {self.max_new_tokens} output tokens"

    def check(self, max_seq_len: int) -> None:
        """:raises InvalidRequest: empty, or longer than any sequence."""
        if self.prompt_len < 1 or self.max_new_tokens < 1:
            raise InvalidRequest(
                f"expected a prompt and an output of at least one token each, got {self.prompt_len} prompt "
                f"tokens and max_tokens {self.max_new_tokens}"
            )
        if self.total > max_seq_len:
            raise InvalidRequest(
                f"{self} make {self.total}, but a sequence has at most {max_seq_len}; "
                "shorten the prompt or lower max_tokens"
            )

    def check_pool(self, needed: int, num_blocks: int, block_size: int, pool: str) -> None:
        """:raises InvalidRequest: one pool is too small for it, were it alone.

        :param pool: its window, e.g. ``window 512``.
        """
        if needed > num_blocks:
            raise InvalidRequest(
                f"{self} need {needed} blocks of {block_size} tokens in the pool of {pool}, which has "
                f"{num_blocks}; shorten the prompt, lower max_tokens or give the KV cache more blocks"
            )
