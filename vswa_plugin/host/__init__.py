"""The plugin host: plugins are loaded, checked, and called so that a failure costs its plugin alone.

host.py         PluginHost: one typed method per hook
registered.py   which plugins there are, and their states
calls.py        one call, isolated and counted
guards.py       what hooks return, isolated and counted as well
checks.py       what hooks may answer
sources.py      entry points and files
plugin_options.py   options of plugins, from a file and the environment
loading.py      from command line and environment to a host
"""
