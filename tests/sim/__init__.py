"""Deterministic simulation of ledger, publisher, reader, subscriber, registry view and index, under faults.

Time, network, broker and registry are simulated; everything else is the project's own code. One schedule is
one seed: what engines, machines and bad actors do, and when. ``make sim`` runs many, and
``python -m tests.sim --seed N --schedules 1`` runs one again, and shrinks it where it fails.

loop.py       an event loop whose clock jumps
network.py    a broker, and connections that lose, delay, repeat, reorder and cut
store.py      a registry with leases
engine.py     an engine's cache, which is the truth, and what it says of it
worker.py     a worker's process: engine, publisher, registration
schedule.py   what happens when: made from a seed, and shrunk
world.py      all of it together, and one schedule run
checks.py     what must hold at every moment, and in the end
planted.py    bugs that a run must find
"""
