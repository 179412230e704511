"""What a rank will hold when a prompt's turn comes: its memory, its queue, and the order of eviction. Pure.

shape.py      a layout and what an engine states of its memory, as numbers
requests.py   one request of a rank: its prefixes, and the blocks that it holds
steps.py      which requests must have ended, where nobody says so, from how far others have come since
free.py       blocks that no request holds, in the order in which they are evicted
books.py      which blocks a rank holds: those of its requests, and the free ones
underway.py   what becomes of the requests of a rank, reported or inferred
memory.py     RankMemory: what one rank holds, in order of use, and what is queued and under way there
turns.py      the same run forward, until those before a prompt have had their turn
fleet.py      Forecasts: all ranks of a router
"""

from vswa_plugin.forecast.fleet import Forecasts
from vswa_plugin.forecast.memory import Forecast, RankMemory, Victims
from vswa_plugin.forecast.shape import Shape

__all__ = ["Forecast", "Forecasts", "RankMemory", "Shape", "Victims"]
