"""The contract of an engine: all that an engine author imports.

contract.py   settings, requests and chunks, KV events, and the shape of an engine and of an event adapter
options.py    an engine's options file, section by section
requests.py   the fields of a request, checked
predicted.py  what is compared with an engine: scorers, and its cache without a model
records.py    what is noted of a finished request
"""

from vswa_plugin.engine.contract import (
    ANY_ENGINE,
    MODES,
    NO_SUCH_GROUP,
    WORKER_ONLY,
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    ChunkDict,
    Engine,
    EngineBlock,
    EngineEvent,
    EngineHash,
    EngineInfo,
    EngineSettings,
    EventAdapter,
    EventSink,
    EventsLost,
    GroupCreated,
    Node,
    RawEvent,
    RequestDict,
)
from vswa_plugin.engine.options import Section, is_number
from vswa_plugin.engine.predicted import Prompt, RankSequence, RankSetup, Scorer, SimulatedRank
from vswa_plugin.engine.records import RequestRecord
from vswa_plugin.engine.requests import Fields, dp_rank, outside, prefill_result, token_ids

__all__ = [
    "ANY_ENGINE",
    "MODES",
    "NO_SUCH_GROUP",
    "WORKER_ONLY",
    "BlocksMoved",
    "BlocksRemoved",
    "BlocksStored",
    "ChunkDict",
    "Engine",
    "EngineBlock",
    "EngineEvent",
    "EngineHash",
    "EngineInfo",
    "EngineSettings",
    "EventAdapter",
    "EventSink",
    "EventsLost",
    "Fields",
    "GroupCreated",
    "Node",
    "Prompt",
    "RankSequence",
    "RankSetup",
    "RawEvent",
    "RequestDict",
    "RequestRecord",
    "Scorer",
    "Section",
    "SimulatedRank",
    "dp_rank",
    "is_number",
    "outside",
    "prefill_result",
    "token_ids",
]
