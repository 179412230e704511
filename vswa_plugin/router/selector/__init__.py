"""A router that chooses and does not forward: ``/select`` for gateways.

app.py       the program; it needs no Dynamo runtime
choices.py   choices for gateways that pin a request to its workers
"""
