"""``vswa explain --choice``: what a running router would choose for one prompt, and why."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.registry import Entry
from vswa_plugin.router.http.messages import ChoiceAnswer, ErrorAnswer

#: Terms that are not seconds: how they are written.
_UNITS = {"price": "x{:.1f}", "evicted": "{:.0f} blocks", "back": "{:.1f} blocks"}


async def show_choice(
    router: str, tokens: Sequence[int], entry: Entry, timeout_s: float, as_json: bool
) -> int:
    """Ask the router at that URL, and print what it answers.

    :raises ConfigError: no URL, or a prompt that the router refuses.
    :raises ConnectError: the router cannot be reached, or cannot choose now.
    """
    if urlsplit(router).scheme not in ("http", "https"):
        raise ConfigError(f"--router: expected a URL such as http://127.0.0.1:8090, got {router!r}")
    body = msgspec.json.encode({"token_ids": tokens, "model_name": entry.served_model_name})
    status, answer = await _post(f"{router.rstrip('/')}/choice", body, timeout_s)
    if status != 200:
        reason = _reason(answer)
        kind = ConfigError if status in (400, 413) else ConnectError
        raise kind(f"--router: {router} answered {status}: {reason}")
    try:
        found = msgspec.json.decode(answer, type=list[ChoiceAnswer])
    except msgspec.MsgspecError as error:
        raise ConnectError(
            f"--router: expected the choice of a router of this version at {router}: {error}"
        ) from error
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        print(f"{len(tokens)} tokens")
        for phase in dict.fromkeys(each.phase for each in found):
            of_phase = [each for each in found if each.phase == phase]
            print("\n".join(lines(phase, of_phase)))
    return 0


async def _post(url: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
    import aiohttp

    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout_s)) as session:
            headers = {"Content-Type": "application/json"}
            async with session.post(url, data=body, headers=headers) as response:
                return response.status, await response.read()
    except (TimeoutError, aiohttp.ClientError, ValueError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise ConnectError(
            f"--router: cannot reach {url}: {reason}; is it the router's --http-port?"
        ) from error


def _reason(answer: bytes) -> str:
    try:
        return msgspec.json.decode(answer, type=ErrorAnswer).error
    except msgspec.MsgspecError:
        return answer[:200].decode("utf-8", "replace")


def lines(phase: str, found: Sequence[ChoiceAnswer]) -> list[str]:
    """The ranks of one phase, the cheapest first, and why the winner won."""
    ordered = sorted(found, key=lambda each: (not each.chosen, each.cost))
    shown = [f"\n{phase}: {len(ordered)} ranks, costs in blocks"]
    for each in ordered:
        mark = "->" if each.chosen else "  "
        rank = f"{each.rank.worker_id}.{each.rank.dp_rank}"
        shown.append(f"{mark} rank {rank}: cost {each.cost:.1f}, promises {each.cached_tokens} tokens")
        terms = [
            f"{name} {_UNITS.get(name, '{:.3f} s').format(number)}" for name, number in each.terms.items()
        ]
        if terms:
            shown.append("     " + ", ".join(terms))
    if len(ordered) > 1:
        shown.append(_why(*ordered[:2]))
    return shown


def _why(winner: ChoiceAnswer, other: ChoiceAnswer) -> str:
    """What speaks most for the winner against the cheapest other."""
    lead = f"   the winner is {other.cost - winner.cost:.1f} blocks cheaper than the next"
    if winner.cost >= other.cost:
        lead = "   the winner is as cheap as the next, or a plugin has chosen it"
    price = winner.terms.get("price", 1.0)
    weights = {"wait": 1.0, "compute": price, "room": price, "loss": price, "held": 1.0}
    saved = {
        name: weight * (other.terms[name] - winner.terms[name])
        for name, weight in weights.items()
        if name in winner.terms and name in other.terms
    }
    if not saved or max(saved.values()) <= 0:
        tokens = winner.cached_tokens - other.cached_tokens
        return f"{lead}; it promises {tokens:+} tokens against that"
    best = max(saved, key=lambda name: saved[name])
    return f"{lead}, most of all by {best} ({saved[best]:.3f} s)"
