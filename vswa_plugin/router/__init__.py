"""The exact router: shows each model on an endpoint of its own and chooses the worker of every request.

args.py           the command line
app.py            what is wired to what, and what happens in each part of a router's life
models.py         follows the workers in the registry and shows their models
pools.py          one model: its workers by what they do, their load, and how they are called
forward.py        the story of one request, from its model to its end
disagg.py         a request in two phases, prefill and decode
spans.py         what is traced of one request
releases.py       finished prompts that no decode worker will fetch
wishes.py         what a client says about the routing of its request
decide.py         one choice: scores, costs, selection and booking
recent.py         the last choices, each with its reason
watched.py        what plugins are shown of the ranks and of the requests
promises.py       what was promised against what the engines report as reused
reservations.py   choices that a gateway carries out itself
avoided.py        workers that were lost a moment ago
counts.py         requests under way, and how the others ended
picks.py          requests that a picker chose for, and what became of the others
tallies.py        histograms, and labels of which there is a bounded number
faults.py         what does not work right now, logged once
http              the HTTP API
replicas          several routers of the same workers
picker            a router that chooses for an Envoy gateway
selector          a router that chooses and does not forward
"""
