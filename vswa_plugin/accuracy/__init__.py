"""How often a router's promise is kept: recorded engine traces, replayed through the real event path.

trace.py          what an engine did, as JSON Lines: open_trace, TraceWriter
scorers.py        ways to predict a request from the events before it; ours and others'
views.py          what a router sees of one rank: adapter, residency, wire bytes, to scorers
replay.py         replay: trace in, report out; predicted and actual of every request
exceptions.py     the two cases that hashes cannot show
waiting.py        requests whose results come later: lag told from mistakes
report.py         Report as numbers, table, plot and page; assert_exact
pytest_plugin.py  ``--vswa-trace=FILE`` and its fixtures

jsonl.py          files of JSON Lines, plain or gzip
showing.py        tables, progress bars and plots

What kept promises are worth, by simulation:

workloads.py      requests, made up or from a file
ranks.py          caches without a model: what plugins simulate; attention of known models
costs.py          how long computing takes
policies.py       ways to choose a rank
route.py          ranks behind a router: Simulation
route_sweep.py    many simulations side by side: Plan, Bench
route_report.py   averages, tables, where exactness helped and where not

Import from the modules: this one stays empty, because every pytest on the machine loads the plugin.
"""
