"""The router's HTTP API, in the conventions of Dynamo's standalone indexer and selection service.

messages.py     requests and answers, with all limits
operations.py   the list of operations: the server serves it, openapi.py describes it
openapi.py      the OpenAPI document
guard.py        an optional token, and how long a client may take
server.py       aiohttp: reading, errors, answers
answers.py      answers from the fleet and the index
dump.py         the whole index, piece by piece
overview.py     what the live page shows
prompts.py      prompts that are given as text
page            the live page
metrics.py      everything that is counted, as Prometheus text
"""
