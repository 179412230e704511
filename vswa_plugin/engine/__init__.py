"""The contract of an engine: all that an engine author imports.

contract.py   settings, requests and chunks, KV events, and the shape of an engine and of an event adapter
sources.py    the shape of what reads the events of a worker of another project
chains.py     chains of blocks as events give them, in which no ring is taken
options.py    an engine's options file, section by section
option_files.py  option files of users, YAML or JSON, read within bounds
requests.py   the fields of a request, checked
uses.py       what becomes of each field of a request: used, refused, or ignored for a reason
predicted.py  what is compared with an engine: scorers, and its cache without a model
presets.py    the cache groups of known models, for simulations
records.py    what is noted of a finished request
outcomes.py   how a request has ended, in one word
gpus.py       the GPUs that a process may use
"""

from vswa_plugin.engine.chains import ParentLinks, check_chain, ring_closed
from vswa_plugin.engine.contract import (
    ANY_ENGINE,
    MODES,
    NO_SUCH_GROUP,
    ROUTER_ENV,
    ROUTERS,
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
    PromptAdapter,
    PromptHolder,
    RawEvent,
    RequestDict,
    with_prompts,
)
from vswa_plugin.engine.gpus import visible_gpus
from vswa_plugin.engine.options import Section, is_number
from vswa_plugin.engine.predicted import Prompt, RankSequence, RankSetup, Scorer, SimulatedRank
from vswa_plugin.engine.records import RequestRecord
from vswa_plugin.engine.requests import (
    Fields,
    client_name,
    dp_rank,
    outside,
    prefill_result,
    reads_cache,
    temperature,
    token_ids,
    unchecked_token_ids,
)
from vswa_plugin.engine.sources import EventSource, SourceSettings, SourceState
from vswa_plugin.engine.uses import SHARED, FieldUse, FieldUses, ignored, refused, used

__all__ = [
    "ANY_ENGINE",
    "MODES",
    "NO_SUCH_GROUP",
    "ROUTERS",
    "ROUTER_ENV",
    "SHARED",
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
    "EventSource",
    "EventsLost",
    "FieldUse",
    "FieldUses",
    "Fields",
    "GroupCreated",
    "Node",
    "ParentLinks",
    "Prompt",
    "PromptAdapter",
    "PromptHolder",
    "RankSequence",
    "RankSetup",
    "RawEvent",
    "RequestDict",
    "RequestRecord",
    "Scorer",
    "Section",
    "SimulatedRank",
    "SourceSettings",
    "SourceState",
    "check_chain",
    "client_name",
    "dp_rank",
    "ignored",
    "is_number",
    "outside",
    "prefill_result",
    "reads_cache",
    "refused",
    "ring_closed",
    "temperature",
    "token_ids",
    "unchecked_token_ids",
    "used",
    "visible_gpus",
    "with_prompts",
]
