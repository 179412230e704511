"""How often a router's promise is kept: recorded engine traces, replayed through the real event path.

trace.py          what an engine did, as JSON Lines: open_trace, TraceWriter
headers.py        its first line: cache groups of any kind; header_of
scorers.py        ways to predict a request from the events before it; ours and others'
forecasting.py    the scorer that looks at what is queued: what a prompt finds when its turn comes
pipeline.py       the way of an event at one rank: adapter, ledger, wire bytes, scorers
replay.py         replay: trace in, report out; predicted and actual of every request
exceptions.py     the two cases that hashes cannot show
waiting.py        requests whose results come later: lag is kept apart from mistakes
report.py         Report as numbers, table, plot and page; assert_exact
pytest_plugin.py  ``--vswa-trace=FILE`` and its fixtures
jsonl.py          files of JSON Lines, plain or gzip
showing.py        tables, progress bars and plots

Import from the modules: this one stays empty, because every pytest on the machine loads the plugin.
What kept promises are worth is simulated in ``vswa_plugin.simulation``.
"""
