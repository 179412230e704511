"""The worker: one engine behind Dynamo, whose per-window KV events are published.

args.py          the command line
dynamo_args.py   flags of Dynamo's own workers on that command line
dynamo_flags.py  the table of those of its TensorRT-LLM worker
vllm_flags.py    those of its vLLM worker that set engine options
engine_args.py   engine options from a YAML file and the command line
app.py           what is wired to what, and what happens in each part of a worker's life
handler.py       serves requests
liveness.py      notices an engine that hangs
counts.py        requests, and how they ended
metrics.py       the worker's own metrics
"""
