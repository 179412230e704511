"""An endpoint picker: it chooses the workers of a gateway's requests, and their bytes do not pass it.

args.py          the command line
app.py           the program
grpc_server.py   gRPC on this event loop, for the one method that Envoy calls
messages.py      the messages of Envoy's external processing
exchange.py      one request as Envoy tells of it, from its headers to its end
destinations.py  endpoints of frontends, where a picker chooses them
headers.py       the headers by which requests are pinned, and those that clients must not send
requests.py      what a client's request says about its routing
models.py        whose requests are read here: as the registry has them
picker.py        from a client's request to its workers
reports.py       what the workers report as reused, against what was promised
"""
