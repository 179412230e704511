"""Hooks of a router: how far an engine can resume a prompt, and which rank serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from vswa_plugin.blocks.reuse import ReuseRule
    from vswa_plugin.selection import Booked, RoutedRequest, Scored
    from vswa_plugin.wire.events import Event, Rank


@hookspec
def vswa_reuse_rules() -> Mapping[str, ReuseRule] | None:
    """Add reuse rules, which say from the blocks of each group how far an engine can resume a prompt.

    Called: A router, a worker (for ``vswa_worker_connected``) and a command that makes or explains
        predictions call it once, at their start. The rules themselves are then on the hot path: they do no
        I/O, keep no state, and are called from any thread.
    Order: Plugins are called in the order of their names. A rule that exists already cannot be replaced.
    Combine: The result is all rules, with the built-in ones. A plugin that adds a name that is taken loses
        its rules, and the message names both owners.
    Errors: All rules of a plugin that fails are left out. The failure is counted, and logged once per plugin
        and minute. A rule that raises later, or that returns a value out of its bounds, is counted too, and
        its ranks score 0 for that prompt.

    :returns: by name, objects with the shape of ``vswa_plugin.blocks.reuse.ReuseRule``. A layout names its
        rule.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_score(request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float] | None:
    """Adjust the cost of some candidates by blocks that are added, or taken off where the number is below 0.

    Called: A router's event loop calls it once per request and phase, after all candidates are scored and
        before one is chosen. This is a hot path: do no I/O, and do not wait.
    Order: The order has no effect, because all plugins see the costs of the router itself.
    Combine: The sum of all answers is added to the router's own costs.
    Errors: A plugin that fails adjusts nothing for this request. The failure is counted, and logged once per
        plugin and minute. A rank that is no candidate, and a number that is not finite, are errors.

    :param request: lengths, sequence hashes, the client's session id and the ``x-dynamo-meta-*`` headers that
        it sent. It is frozen, and never has token ids.
    :param candidates: rank, cached tokens, load, and cost in blocks, of each rank that may serve the request;
        they are frozen.
    :returns: the blocks to add, by rank. A rank that is left out keeps its cost. None adjusts nothing.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_select_worker(request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
    """Choose the rank that serves a request, or return None to leave the choice to others.

    Called: A router's event loop calls it once per request and phase, after ``vswa_score``. This is a hot
        path: do no I/O, and do not wait.
    Order: The calls stop at the first answer. The router's own choice comes last.
    Combine: The first answer that is not None is used. Where all are None, the router takes the cheapest
        candidate, or draws one by ``--router-temperature``.
    Errors: A plugin that fails has no answer. The failure is counted, and logged once per plugin and minute.
        A rank that is no candidate is an error.

    :param request: the request as ``vswa_score`` gets it; it is frozen.
    :param candidates: the candidates with all adjustments in their costs; they are frozen.
    :returns: the rank of one of the candidates, or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_load_changed(model: str, key: Hashable, step: str, request: Booked) -> None:
    """Observe what becomes of a request after the choice: on which rank it is, and when it computes and ends.

    Called: A router's event loop calls it when a request is given to a rank, when its prompt is computed, and
        when it has ended. A cancelled request has no first token. Requests of the other routers of the same
        model come too. This is a hot path: do no I/O, and do not wait.
    Order: Plugins are called in the order of their names, after the router has counted the step itself.
    Combine: There is no answer.
    Errors: A failure is counted, and logged once per plugin and minute.

    :param model: the name under which the model is served.
    :param key: names the request from ``sent`` to ``ended``; it is never used again.
    :param step: ``sent``, ``first_token`` or ``ended``.
    :param request: its rank, sequence hashes, prompt tokens, and what was cached; never token ids. The router
        goes on using it.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_rank_changed(rank: Rank, event: Event | None) -> None:
    """Observe what the ranks hold, as a router follows it: each event after the index has taken it.

    Called: A router's event loop calls it for each event of each rank that it follows, in their order. A
        layout comes before all other events of a rank, and again where all begins anew with nothing resident.
        This is a hot path: do no I/O, and do not wait.
    Order: Plugins are called in the order of their names.
    Combine: There is no answer.
    Errors: A failure is counted, and logged once per plugin and minute.

    :param rank: the rank whose event it is.
    :param event: ``Layout``, ``Stored``, ``Removed``, ``Moved`` or ``Cleared``; None: the rank has gone.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_choice_terms(
    request: RoutedRequest, candidates: Sequence[Scored]
) -> Mapping[Rank, Mapping[str, float]] | None:
    """Say what the cost of each candidate consists of, for ``vswa explain --choice``.

    Called: A router's event loop calls it when it is asked what it would choose. Nothing is chosen.
    Order: The calls stop at the first answer.
    Combine: The first answer that is not None is shown.
    Errors: A plugin that fails has no answer. The failure is counted, and logged once per plugin and minute.

    :param request: the request as ``vswa_score`` gets it; it is frozen.
    :param candidates: the candidates with the router's own costs; they are frozen.
    :returns: by rank, what is to be shown: names and numbers, in the order in which they are shown.

    .. versionadded:: 0.1
    """
