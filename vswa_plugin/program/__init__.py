"""What every process of ours shares: arguments, exit codes, lifetime, and the HTTP surface of its state.

args.py     options that several programs have, and how help looks
addresses.py  addresses to listen on, and their URLs
disk.py       where temporary files go, and what to say where a disk is full
options.py  types of options, and options that need or exclude each other
model_path.py  a model by its path, or by its name on the Hugging Face Hub
run.py      one log format, and one way from an error to a line and an exit code
logs.py     the lines of the log, readable or JSON
life.py     signals, watched tasks, draining
metrics.py  the page of metrics of a program
status.py   /health, /ready and /metrics
"""
