"""The worker: one engine behind Dynamo, whose per-window KV events are published.

args.py          the command line
engine_args.py   engine options from a YAML file and the command line
app.py           what is wired to what, and what happens in each part of a worker's life
handler.py       serves requests
liveness.py      notices an engine that hangs
metrics.py       the worker's own metrics
"""
