"""The worker's side of the event stream: from the engine's events to numbered batches.

nodes.py       engine hash -> sequence hash and position
residency.py   what one rank holds: the engine's events in, net changes out
healing.py     what finished requests prove after events were lost
history.py     what readers can ask for: recent batches and snapshots
ledger.py      all of it as values: the engine's events in, numbered batches out (no I/O)
publisher.py   the ledger on the worker's event loop, and NATS
"""
