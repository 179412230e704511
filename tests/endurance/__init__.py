"""Load for long: many ranks of real publishers behind a real nats-server, and one fleet that follows them.

``make soak`` runs it. Publishers have processes of their own (publishers.py); measuring.py follows them, asks
for scores and measures.
"""
