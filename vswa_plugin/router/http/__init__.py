"""The router's HTTP API, in the conventions of Dynamo's standalone indexer and selection service.

messages.py     what is asked and answered, with all limits
operations.py   the list of operations: the server serves it, openapi.py describes it
server.py       aiohttp: reading, errors, answers
answers.py      what the fleet and the index say, as answers
dump.py         the whole index, piece by piece
selection.py    choices for gateways that keep the data path
selector.py     a router that only selects
metrics.py      everything that is counted, as Prometheus text
options.py      its part of the command line
"""
