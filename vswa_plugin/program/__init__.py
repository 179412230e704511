"""What every process of ours shares: arguments, exit codes, lifetime, and the HTTP surface of its state.

args.py     options that several programs have, and how help looks
options.py  types of options, and options that need or exclude each other
run.py      one log format, and one way from an error to a line and an exit code
life.py     signals, watched tasks, draining
status.py   /health, /ready and /metrics
"""
