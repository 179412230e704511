"""Routing simulated: what kept promises are worth in first-token time and reuse.

workloads.py    requests, made up or from a file
costs.py        how long a rank computes
policies.py     ways to choose a rank
research.py     ways that others have published
simulation.py   ranks behind a router: requests in, reuse and time out
sweep.py        many simulations side by side
report.py       averages and tables; where exactness helped and where it did not
"""
