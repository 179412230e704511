"""The worker: one engine behind Dynamo, whose per-window KV events are published.

args.py reads the command line; app.py wires and runs; handler.py serves requests; liveness.py
notices an engine that hangs; status.py and metrics.py are the operator's HTTP surface.
"""
