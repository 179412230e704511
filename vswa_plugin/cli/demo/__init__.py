"""``vswa demo``: the whole system once, with what each request reused.

run.py       the command, from a chat request to a verdict
routing.py   who was chosen for each request, what was promised, and what was kept
report.py    what is counted, shown and judged
"""
