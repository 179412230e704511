"""Bad input: every decoder of what comes over a wire, fed with valid messages that were spoilt at random.

A decoder may refuse with an error of this project and nothing else; it may neither hang nor take memory that
its input does not have. ``make fuzz`` runs many cases of each; those that failed once lie in ``corpus``, by
target, and are tried each time.

targets.py     what is fed, with what is valid there
mutations.py   how a message is spoilt
"""
