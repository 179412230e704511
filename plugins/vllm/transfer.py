"""vLLM's ``kv_transfer_config`` for prefill and decode workers, checked before vLLM starts. Pure.

NIXL is the only way: the decode worker reads the blocks from the prefill worker's memory.
"""

from __future__ import annotations

from typing import Any

from vswa_plugin.engine import Section

OPTION = "kv_transfer_config"
#: vLLM's connectors of which the decode worker reads; both names are of one class.
CONNECTORS = ("NixlConnector", "NixlPullConnector")
#: Holds others, of which one must be of these.
_SEVERAL = "MultiConnector"
#: What may be written for each mode; the first one is set where nothing is.
_ROLES = {"prefill": ("kv_producer", "kv_both"), "decode": ("kv_consumer", "kv_both")}


def transfer_config(top: Section, mode: str, changes: list[str]) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``KVTransferConfig`` for ``mode``: the user's own, completed.

    :param changes: where what was added is noted.
    :raises ConfigError: the user's own do not hand over blocks as this mode has to.
    """
    given = top.section(OPTION)
    made = dict(given.data)
    roles = _ROLES[mode]
    if not made:
        made = {"kv_connector": CONNECTORS[0], "kv_role": roles[0]}
        changes.append(f"{OPTION} = {made}: --mode {mode} hands over blocks by NIXL")
        return made
    _check_connector(given)
    if given.data.get("kv_role") is None:
        made["kv_role"] = roles[0]
        changes.append(f"{OPTION}.kv_role = {roles[0]}: --mode {mode}")
    given.only("kv_role", roles, f"it is that of --mode {mode}")
    extra = given.section("kv_connector_extra_config")
    extra.only("bidirectional_kv_xfer", (False,), "what a prefill worker fetched would be counted as reused")
    return made


def _check_connector(given: Section) -> None:
    name = given.data.get("kv_connector")
    if name in CONNECTORS:
        return
    advice = "prefill and decode workers hand over blocks by NIXL"
    if name != _SEVERAL:
        raise given.error("kv_connector", f"{' or '.join(CONNECTORS)}", name, advice)
    extra = given.section("kv_connector_extra_config")
    inner = extra.data.get("connectors")
    names = (
        [each.get("kv_connector") for each in inner if isinstance(each, dict)]
        if isinstance(inner, list)
        else []
    )
    if not set(names) & set(CONNECTORS):
        raise extra.error("connectors", f"one of them to be {CONNECTORS[0]}", names, advice)
