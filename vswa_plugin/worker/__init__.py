"""The worker: one engine behind Dynamo, whose per-window KV events are published.

args.py reads the command line; app.py wires and runs; handler.py serves requests; status.py is the
operator's HTTP surface.
"""
