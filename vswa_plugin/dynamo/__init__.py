"""Everything that touches NVIDIA Dynamo: nothing else imports dynamo.

runtime.py   a worker behind Dynamo, and what our programs need of its runtime
client.py    a front door: found by the frontend, calls workers
bursts.py    chunks that come together are passed on together
"""
