"""Routing by what the client says: urgent requests shun busy workers, and a worker can be tried by its id.

curl ... -H 'x-dynamo-meta-urgent: 1'
curl ... -H 'x-dynamo-meta-worker: 7587'      (worker ids as the log and `vswa index` show them)
"""

from collections.abc import Mapping, Sequence

from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.selection import RoutedRequest, Scored
from vswa_plugin.wire import Rank

#: What an active request of others costs an urgent one, in blocks.
BUSY = 100.0


@hookimpl
def vswa_score(request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float] | None:
    if not request.metadata.get("urgent"):
        return None
    return {each.rank: BUSY * each.candidate.load.requests for each in candidates}


@hookimpl
def vswa_select_worker(request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
    wanted = request.metadata.get("worker")
    return next((each.rank for each in candidates if str(each.rank.worker_id) == wanted), None)
