"""The contract of an engine: all that an engine author imports.

contract.py   settings, requests and chunks, KV events, and the shape of an engine and of an event adapter
options.py    an engine's options file, section by section
requests.py   the fields of a request, checked
predicted.py  what is compared with an engine: scorers, and its cache without a model
records.py    what is noted of a finished request
"""
