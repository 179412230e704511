"""The error of the decode side when blocks do not arrive."""

from __future__ import annotations

from typing import Literal, TypeAlias

from vswa_plugin.errors import VswaError

#: Labels for metrics. connect: no connection; refused: the prefill worker refused; lost: the connection
#: ended; timeout: too slow; corrupt: a checksum differs; protocol: not what was asked for, or no message of
#: this version; write: the blocks could not be stored; cancelled: this side gave up; bug: anything else.
Cause: TypeAlias = Literal[
    "connect", "refused", "lost", "timeout", "corrupt", "protocol", "write", "cancelled", "bug"
]


class TransferError(VswaError):
    """A transfer that did not bring all blocks. The request goes on: its prompt is computed locally.

    :ivar cause: one of :data:`Cause`.
    :ivar address: (host, port) of the prefill worker.
    """

    def __init__(self, cause: Cause, address: tuple[str, int], what: str) -> None:
        host, port = address
        super().__init__(
            f"KV transfer from the prefill worker at {host}:{port}: {what}; "
            "the prompt will be computed locally"
        )
        self.cause = cause
        self.address = address
