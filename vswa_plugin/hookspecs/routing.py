"""What a router asks: how far a prompt can be resumed, and which rank serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vswa_plugin.blocks.reuse import ReuseRule
    from vswa_plugin.selection import RoutedRequest, Scored
    from vswa_plugin.wire.events import Rank


@hookspec
def vswa_reuse_rules() -> Mapping[str, ReuseRule] | None:
    """Add reuse rules: how far an engine can resume a prompt, from the blocks that each group holds.

    Called: once at the start of a router, of a command that makes or explains predictions, and of a worker,
        for ``vswa_worker_connected``. The rules themselves are then on the hot path: no I/O, no state, from
        any thread.
    Order: by plugin name; a rule that is there already cannot be replaced.
    Combine: all rules, the built-in ones included. A name that is taken costs that plugin its rules; the
        message names both owners.
    Errors: all rules of that plugin are left out; counted, logged once per plugin and minute. A rule that
        raises later, or answers out of its bounds, is counted too, and its ranks score 0 for that prompt.

    :returns: by name, objects with the shape of ``vswa_plugin.blocks.reuse.ReuseRule``; a layout names its
        rule.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_score(request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float] | None:
    """Adjust what some candidates cost: blocks to add, below 0 to take off.

    Called: on a router's event loop, once per request and phase, after all were scored and before one is
        chosen. Hot path: no I/O, no waiting.
    Order: of no effect; all see the costs of the router itself.
    Combine: the sum of all answers, added to the router's own costs.
    Errors: that plugin adjusts nothing for this request; counted, logged once per plugin and minute. A rank
        that is no candidate and a number that is not finite are errors.

    :param request: frozen; lengths, sequence hashes, the client's session id and what it sent in
        ``x-dynamo-meta-*`` headers, never token ids.
    :param candidates: frozen; rank, cached tokens, load and cost in blocks of each that may serve it.
    :returns: by rank, blocks to add; ranks left out keep their cost. None adjusts nothing.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_select_worker(request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
    """Choose the rank that serves a request, or None to leave that to others.

    Called: on a router's event loop, once per request and phase, after ``vswa_score``. Hot path: no I/O, no
    waiting.
    Order: stops at the first answer; the router's own choice comes last.
    Combine: first non-None. None from all: the cheapest, or one drawn by ``--router-temperature``.
    Errors: that plugin has no answer; counted, logged once per plugin and minute. A rank that is no
        candidate is an error.

    :param request: frozen; as ``vswa_score`` gets it.
    :param candidates: frozen; with all adjustments in their costs.
    :returns: the rank of one of the candidates, or None.

    .. versionadded:: 0.1
    """
