"""The window index: which rank holds which block in which cache group, and what each could reuse.

window_index.py   WindowIndex: parts, events in, scores out
part.py           ranks that share model, layout and rule: bits, tiers, sweeping
plans.py          what a rule asks of a prompt length, as numbers
boundaries.py     a rule applied boundary by boundary, for all ranks at once
tables.py         what a table must do; the compiled one
python_table.py   the same in pure Python: reference and fallback
explain.py        why a rank scores what it scores
dump.py           all of it as plain data
"""

from vswa_plugin.index.explain import Explanation, GroupExplanation
from vswa_plugin.index.window_index import IndexStats, WindowIndex

__all__ = ["Explanation", "GroupExplanation", "IndexStats", "WindowIndex"]
