"""The relay: it publishes our stream for workers of another project, which stay as they are.

It reads the KV events that such workers publish, and publishes and registers each of them as a worker of ours
does, so that our routers score it. One process serves many workers; a fault of one of them costs that worker
alone.

args.py        the command line
listed.py      the list of workers, from a file or the command line
app.py         what is wired to what
worker.py      one worker: found, connected, registered, and again after it was away
ranks.py       the publishers of its ranks, for one connection
instances.py   which of Dynamo's instances a worker is
metrics.py     what is counted
"""
