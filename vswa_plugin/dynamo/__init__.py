"""Everything that touches NVIDIA Dynamo: nothing else imports dynamo.

names.py          what both sides call things: environment, endpoints, options; imports nothing of Dynamo
runtime.py        a worker behind Dynamo, and what our programs need of its runtime
kubernetes.py     Dynamo's discovery on Kubernetes: whether its API answers
chat.py           what a model's directory must hold for chat
client.py         a front door: found by the frontend, calls workers
reports.py        what its bindings write to standard error
frontend.py       Dynamo's own OpenAI frontend
preprocess.py     the token ids that it makes of a request, without a worker
client_fields.py  what that frontend makes of each field of a client's request
bursts.py         chunks that come together are passed on together
"""
