"""Finished KV blocks from a prefill worker to a decode worker, over TCP with one-time tickets.

The prefill side makes an :class:`~.serving.Offer` to a :class:`~.server.TransferServer`; the ticket travels
in :class:`~.params.TransferParams`; the decode side gives it to a :class:`~.puller.Puller`. See
docs/transfer.md for the wire format and for what happens when something fails.
"""
