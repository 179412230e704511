"""Which rank serves a request: cost of each candidate, choice, and the load behind it. Pure.

weights.py   the knobs, by the names that Dynamo's users know, and their override per request
cost.py      which ranks are candidates, what each costs, and which is chosen
book.py      the load that this router has put on each rank
hooks.py     where plugins adjust or replace the choice
"""

from vswa_plugin.selection.book import ENDED, FIRST_TOKEN, SENT, Booked, Load, LoadBook, Projection
from vswa_plugin.selection.cost import (
    Candidate,
    Constraints,
    NoCandidate,
    Scored,
    adjusted,
    booked_prefill,
    choose,
    eligible,
    scored,
)
from vswa_plugin.selection.hooks import Chooser, NoHooks, RoutedRequest, SelectionHooks
from vswa_plugin.selection.weights import MAX_WEIGHT, Override, Weights, of_phase, overridden

__all__ = [
    "ENDED",
    "FIRST_TOKEN",
    "MAX_WEIGHT",
    "SENT",
    "Booked",
    "Candidate",
    "Chooser",
    "Constraints",
    "Load",
    "LoadBook",
    "NoCandidate",
    "NoHooks",
    "Override",
    "Projection",
    "RoutedRequest",
    "Scored",
    "SelectionHooks",
    "Weights",
    "adjusted",
    "booked_prefill",
    "choose",
    "eligible",
    "of_phase",
    "overridden",
    "scored",
]
