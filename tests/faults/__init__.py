"""Real processes under streaming load, killed and frozen: what clients receive, and for how long nothing.

``make faults`` runs it. load.py has the clients, which know the right text of every answer.
"""
