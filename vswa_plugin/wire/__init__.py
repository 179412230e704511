"""The protocol between workers and routers (docs/protocol.md): its messages, and NATS, which carries them.

events.py      batches of events, as values and as bytes
subjects.py    the names of the NATS subjects
control.py     what a router requests of a worker, and the answers
numbering.py   numbers of batches, and epochs
transport.py   NATS itself; nothing else imports its client
login.py       how a connection to NATS is secured
"""

from vswa_plugin.wire.events import (
    Batch,
    Cleared,
    Event,
    Layout,
    Moved,
    Rank,
    Removed,
    ReuseReport,
    Source,
    Stored,
    Unknown,
    decode,
    encode,
    layout_event,
)

__all__ = [
    "Batch",
    "Cleared",
    "Event",
    "Layout",
    "Moved",
    "Rank",
    "Removed",
    "ReuseReport",
    "Source",
    "Stored",
    "Unknown",
    "decode",
    "encode",
    "layout_event",
]
