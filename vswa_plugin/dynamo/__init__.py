"""Everything that touches NVIDIA Dynamo: nothing else imports dynamo.

names.py     what both sides call things: environment, endpoints, options; imports nothing of Dynamo
runtime.py   a worker behind Dynamo, and what our programs need of its runtime
client.py    a front door: found by the frontend, calls workers
frontend.py  Dynamo's own OpenAI frontend
bursts.py    chunks that come together are passed on together
"""
