"""The exact router: shows each model on an endpoint of its own and chooses the worker of every request.

args.py reads the command line; app.py wires and runs; models.py follows the workers and shows their models;
decide.py scores, selects and books. forward.py is the story of one request, from its model to its end;
disagg.py knows its two phases, avoided.py the workers that were lost a moment ago, counts.py how many
requests are under way. promises.py compares what was promised with what the engines reused.
"""
