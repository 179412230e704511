"""The page docs/dynamo-flags.md; ``python -m tests.flags_page > docs/dynamo-flags.md`` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from vswa_plugin.worker.dynamo_flags import DOTTED, FLAGS, VARIABLES, VERSION, Fate, Flag, Takes

_INTRODUCTION = f"""\
# Flags of Dynamo's own TensorRT-LLM worker

`python -m vswa_plugin.worker` takes the command line of `python -m dynamo.trtllm`: a script of Dynamo's works
with the name of the module changed and nothing else. Every flag of Dynamo {VERSION} is in a table below, with
what becomes of it. Its variable counts where the flag is not given. The tables are those that the code uses
(`vswa_plugin/worker/dynamo_flags.py`); a test compares them with Dynamo's parser, and `python -m
tests.flags_page > docs/dynamo-flags.md` writes this page anew.

**The engine.** A worker that is given no `--engine` runs TensorRT-LLM where the package and a GPU are
there, else the embedded engine; `VSWA_ENGINE` names one. See [tensorrt-llm.md](tensorrt-llm.md).

**Order.** As with Dynamo, the file of `--extra-engine-args` goes over single flags such as
`--max-batch-size`, and `--override-engine-args` or `{DOTTED}*` over the file. `{DOTTED}section.option VALUE`
sets one engine option; it and `--override-engine-args` exclude each other.

**Values.** A flag that is refused is taken with a value that asks for nothing, such as `--modality text`.
`--disaggregation-mode prefill_and_decode`, of older releases of Dynamo, means `agg`.
"""

_ABOUT = {
    Fate.OWN: "Flags with the same meaning, and the option of ours that each is.",
    Fate.OPTION: "Flags that set an engine option.",
    Fate.VARIABLE: "Flags that set their variable, for Dynamo's runtime or our NATS client.",
    Fate.EVENTS: "Flags by which workers show their blocks to Dynamo's own KV router.",
    Fate.NOTHING: "Flags that are accepted and have no effect; the worker logs one line for each.",
    Fate.REFUSED: "Flags that are refused, with what to use.",
}


def page() -> str:
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _INTRODUCTION.rstrip()
    for fate, about in _ABOUT.items():
        yield f"\n## {fate.value.partition(',')[0].capitalize()}\n\n{about}\n"
        yield "| flag | variable | |"
        yield "|---|---|---|"
        for flag in FLAGS:
            if flag.fate is fate:
                yield f"| {_names(flag)} | {f'`{flag.env}`' if flag.env else ''} | {_text(flag)} |"
    yield "\n## Variables without a flag\n"
    yield "| variable | |"
    yield "|---|---|"
    for name, text in VARIABLES.items():
        yield f"| `{name}` | {text} |"


def _names(flag: Flag) -> str:
    names = ", ".join(f"`{name}`" for name in (flag.name, *flag.others))
    return f"{names} (also `--no-...`)" if flag.takes is Takes.SWITCH else names


def _text(flag: Flag) -> str:
    if flag.fate is Fate.OPTION:
        return f"`{flag.text}`" + "".join(
            f"; {value} is refused: {why}" for value, why in flag.refused.items()
        )
    harmless = [f"`{value}`" for value in flag.harmless if value]
    return flag.text + (f" (taken: {', '.join(harmless)})" if harmless else "")


if __name__ == "__main__":
    sys.stdout.write(page())
