"""The plugin host: plugins are loaded, checked, and called so that a failure costs its plugin alone.

host.py         PluginHost: one typed method per hook
registered.py   which plugins there are, and their states
calls.py        one call, isolated and counted
checks.py       what hooks may answer
sources.py      entry points and files
loading.py      from command line and environment to a host
"""
