"""The router's side of the event stream: from messages on NATS to what every rank holds.

reader.py       the stream of one rank: what to apply, what is missing, how to repair it (no I/O)
view.py         whether a rank may be scored (no I/O)
lag.py          by how much a publisher's messages come late (no I/O)
due.py          views by deadline: when time alone changes their state (no I/O)
slots.py        places for requests to publishers, fair to those that answer
options.py      limits and counters of a subscriber
subscriber.py   all ranks: messages in, index kept
fleet.py        registry, subscriber and index together
metrics.py      counters and gauges of all of it
"""
