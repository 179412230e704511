"""Several routers of one model: each sends the others the load that it has put on the workers.

messages.py   what they send each other
load.py       load books that several routers share
exchange.py   this router among the others, over NATS
"""
