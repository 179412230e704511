"""A whole deployment on this machine: brokers, frontend, routers and workers as child processes.

__main__.py     ``python -m vswa_plugin.launch``
topologies.py   the deployments of NVIDIA's guide "Gemma3 Sliding Window"
settings.py     what a cluster consists of, and the command lines that come of it
cluster.py      starts, watches and stops them
processes.py    one child process
logs.py         its log, bounded
probe.py        the state of a deployment, read over HTTP
brokers.py      nats-server and etcd, embedded; never for production
serving.py      a deployment kept until a signal
"""
