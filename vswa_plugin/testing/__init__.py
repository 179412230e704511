"""What plugin authors and this project's own tests build on. docs/testing.md explains it with examples.

host.py                a plugin host with given plugins, which fails the test where one of them failed unasked
engine.py              a stand-in engine that refuses what real engines refuse, and TensorRT-LLM's events
faults.py              what a network may do to messages, by name and with a seed
memory.py              a message broker in memory
streams.py             real publishers and followers over that broker or a real nats-server
mutations.py           events almost well-formed or in any order, and JSON that is none (imports hypothesis)
conformance.py         suites that an engine or an event adapter must pass (imports pytest)
engine_checks.py       the checks of the suite for engines
phases.py              the suite for a prefill and a decode engine (imports pytest)
adapter_checks.py      the checks of the suite for event adapters
rules.py               the suite for reuse rules (imports pytest and hypothesis)
walks.py               what the engines' own matching reuses, token by token
cases.py               random caches and prompts for reuse rules
scorers.py             the suite for scorers (imports pytest and hypothesis)
registries.py          the suite for registries (imports pytest)
registry_outages.py    the suite for registries that can be put out of reach
registry_backends.py   what a registry's author provides for these two

Import from the modules: nothing is imported here, so that pytest and nats come only with what needs them.
"""
