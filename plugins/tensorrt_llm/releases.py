"""Which cache manager TensorRT-LLM uses, release by release: the table behind :mod:`.rules`. Data.

TensorRT-LLM decides while it starts and does not report its choice. Its sources were read file by file; a
change is placed by the date of its merge against the version bumps, which is right to one release candidate.
Where that leaves it open whether V1 has a change, the row promises less.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from .package import Version


class Handover(StrEnum):
    """How blocks are handed over between prefill and decode workers. NIXL stands for DEFAULT as well."""

    NONE = "aggregated"
    NIXL = "NIXL, no runtime given"
    NIXL_PYTHON = "NIXL, runtime PYTHON"
    OTHER = "UCX, MPI or Mooncake, no runtime given"
    OTHER_PYTHON = "UCX, MPI or Mooncake, runtime PYTHON"
    CPP = "any, runtime CPP"


class Manager(StrEnum):
    """The KV cache manager of a model that prefers V2, where its options leave it open."""

    V1 = "V1"
    V1_UNLESS_ASKED = "V1; V2 where use_kv_cache_manager_v2 is true"
    V2 = "V2"
    NOT_AN_OPTION = "the release does not know this option"
    NO_START = "the engine does not start"


class Release(NamedTuple):
    """One row: what is so from release ``first`` until that of the next row.

    :param managers: by :class:`Handover`, in its order.
    :param v1_rule: the reuse rule of manager V1.
    :param v2_events: whether manager V2 starts with an event buffer, and so gives KV events.
    :param derives_windows: whether V2 takes the windows from the model where none are given.
    :param read: the change that begins the row.
    """

    first: Version
    managers: tuple[Manager, Manager, Manager, Manager, Manager, Manager]
    v1_rule: str
    v2_events: bool
    derives_windows: bool
    read: str

    def manager(self, handover: Handover) -> Manager:
        return self.managers[tuple(Handover).index(handover)]


_V1, _ASKED, _V2 = Manager.V1, Manager.V1_UNLESS_ASKED, Manager.V2
_NO_OPTION, _NO_START = Manager.NOT_AN_OPTION, Manager.NO_START

_LINE_1_2 = Release(
    Version(0, 0, 0, 0),
    (_V1, _V1, _NO_OPTION, _V1, _NO_OPTION, _NO_OPTION),
    "trtllm_v1_contiguous",
    v2_events=False,
    derives_windows=False,
    read="the 1.2 line: its option models forbid other fields, and have neither transceiver_runtime nor "
    "use_kv_cache_manager_v2",
)
_RC0 = _LINE_1_2._replace(
    first=Version(1, 3, 0, 0),
    managers=(_V1, _V1, _V1, _V1, _NO_START, _V1),
    read="both options exist; V2 asserts that event_buffer_max_size is 0",
)
_RC17 = _RC0._replace(
    first=Version(1, 3, 0, 17),
    v1_rule="trtllm_v1",
    read="#13346, merged 2026-05-02, about rc14 or rc15: V1 looks past holes",
)
_RC20 = _RC17._replace(
    first=Version(1, 3, 0, 20),
    managers=(_ASKED, _V1, _ASKED, _V1, _NO_START, _V1),
    v2_events=True,
    read="#15378: V2 gives KV events",
)
_RC25 = _RC20._replace(
    first=Version(1, 3, 0, 25),
    managers=(_V2, _V2, _V2, _V1, _NO_START, _V1),
    read="#17396: V2 is the default of Gemma 3, in both its classes, and of Gemma 4",
)
_RC26 = _RC25._replace(
    first=Version(1, 3, 0, 26),
    managers=(_V2, _V2, _V2, _NO_START, _NO_START, _V1),
    read="#18134: the model's preference for the runtime PYTHON is taken with every transceiver, and PYTHON "
    "supports NIXL alone",
)
_RC27 = _RC26._replace(
    first=Version(1, 3, 0, 27),
    derives_windows=True,
    read="#18767: V2 derives the windows from layer_types",
)

#: Oldest first, each with what differs from the one before. Architectures of :data:`PREFER_V2` follow it;
#: others use V1 unless V2 is asked for.
RELEASES = (_LINE_1_2, _RC0, _RC17, _RC20, _RC25, _RC26, _RC27)

#: Releases from which on the runtime is PYTHON for every model where none is given.
RUNTIME_DEFAULTS_TO_PYTHON = Version(1, 4, 0, 1)

#: Beginnings of the architectures that prefer V2. GPT-OSS does so since #16942 of July 2026, in a candidate
#: before rc25 that is not known: until rc25 the table promises less.
PREFER_V2 = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma4", "GptOss")


def release_of(version: Version | None) -> Release:
    """The row of a release; None: unknown, taken as the newest."""
    if version is None:
        return RELEASES[-1]
    return next(row for row in reversed(RELEASES) if row.first <= version)
