"""The exact router: shows each model on an endpoint of its own and chooses the worker of every request.

args.py reads the command line; app.py wires and runs; models.py follows the workers and shows their models;
decide.py scores, selects and books; forward.py serves one request, disagg.py knows its two phases and
under_way.py keeps its books; accuracy.py compares what was promised with what the engines reused.
"""
