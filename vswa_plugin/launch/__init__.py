"""A whole deployment on this machine: brokers, frontend, routers and workers as child processes.

__main__.py     ``python -m vswa_plugin.launch``
topologies.py   the deployments of NVIDIA's guide "Gemma3 Sliding Window"
gpus.py         which worker gets which GPUs
settings.py     what a cluster consists of, and the command lines that come of it
cluster.py      starts, watches and stops them
processes.py    one child process
scratch.py      the temporary folder of a program, and what it leaves behind where it is killed
reaper.py       the process that cleans up then
logs.py         its log, bounded
complaints.py   why the frontend does not serve a model, out of its log
probe.py        the state of a deployment, read over HTTP
targets.py      where the metrics of all programs are, for Prometheus
envoy.py        Envoy's configuration, and its binary
brokers.py      nats-server and etcd, embedded; never for production
serving.py      a deployment kept until a signal
"""
