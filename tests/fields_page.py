"""The page docs/request-fields.md; ``python -m tests.fields_page > docs/request-fields.md`` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from vswa_plugins.gemma3_cpu.serving.fields import FIELDS as GEMMA3_CPU
from vswa_plugins.tensorrt_llm.fields import FIELDS as TENSORRT_LLM
from vswa_plugins.tensorrt_llm.fields import NOT_SET
from vswa_plugins.vllm.fields import FIELDS as VLLM
from vswa_plugins.vllm.fields import NOT_SET as VLLM_NOT_SET

from vswa_plugin.dynamo.client_fields import CLIENT_FIELDS, LOST, Fate
from vswa_plugin.engine import FieldUse, client_name

ENGINES = {"gemma3_cpu": GEMMA3_CPU, "tensorrt_llm": TENSORRT_LLM, "vllm": VLLM}

_INTRODUCTION = f"""\
# What becomes of each field of a request

A request passes Dynamo's frontend, and an exact router where there is one, before it reaches a worker. No
field is ignored without a reason: it is used, or the request is refused with 400 and the name of the
field as the client sent it, or the tables below state why it has no effect. The tables are those that the
code uses (`vswa_plugin/dynamo/client_fields.py`, `vswa_plugin/engine/uses.py`, and `fields.py` of each
engine). Tests send every field to the real frontend and compare what reaches a worker; `python -m
tests.fields_page > docs/request-fields.md` writes this page again.

**What no worker can refuse.** Dynamo's frontend accepts some fields and drops them, so that a worker never
receives them. Of these, the following change the answer, and should not be sent:
{", ".join(f"`{name}`" for name in LOST)}. `vswa frontend`
names them in its log when it starts.

**Sampling.** Without `temperature`, a request is greedy, unless it has `top_p`, `top_k`, `min_p` or
`seed`: then it is sampled, at OpenAI's default temperature of 1.

**Evaluations.** A completion with `echo` reaches the worker as `prompt_logprobs`. No engine here
gives log probabilities of the prompt, so it is refused. Otherwise a tool such as lm-eval would mistake the
score of the answer for that of the prompt.

**The cache.** With `prompt_logprobs`, or `skip_reading_prefix_cache` from a frontend other than Dynamo's,
engines reuse nothing, so the exact router and `/select` promise nothing for such a request. `vllm` serves the
second one so.

**A field that no table names**, from a newer frontend, is refused if it is a generation option, and is
otherwise ignored and logged once.

## From the client to the worker

The table shows what the frontend of ai-dynamo-runtime 1.6.1 does with the fields at its two endpoints. It
refuses every field that is not listed here.
"""

_WORKER = """
## In the worker

After "used" the table states for what, after "refused" what is expected instead, and after "ignored" why
nothing is lost. Where the engines differ, each is named.
"""

_SAMPLING = """
## Sampling parameters of {engine} that no request sets

| `SamplingParams` | why |
|---|---|
"""


def _fate(fate: Fate) -> str:
    if fate.kind == "passed":
        paths = ", ".join(f"`{path}`" for path in fate.paths)
        return f"{paths}; {fate.text}" if fate.text else paths
    word = {"done": "frontend", "dropped": "**dropped**", "refused": "refused"}[fate.kind]
    return f"{word}: {fate.text}" if fate.text else word


def _use(use: FieldUse | None) -> str:
    if use is None:
        return "refused: unknown"
    return f"{use.use}: {'expected ' if use.use == 'refused' else ''}{use.text}"


def _client_rows() -> Iterator[str]:
    yield "| field | `/v1/chat/completions` | `/v1/completions` |"
    yield "|---|---|---|"
    for field in CLIENT_FIELDS:
        same = field.chat == field.completions
        yield f"| `{field.name}` | {_fate(field.chat)} | {'the same' if same else _fate(field.completions)} |"


def _worker_rows() -> Iterator[str]:
    yield "| field | name in refusals | what becomes of it |"
    yield "|---|---|---|"
    paths = dict.fromkeys(path for table in ENGINES.values() for path in table.uses)
    for path in sorted(paths, key=lambda each: (each.count("."), each)):
        name = "" if client_name(path) == path else client_name(path)
        uses = {engine: _use(table.uses.get(path)) for engine, table in ENGINES.items()}
        texts = list(dict.fromkeys(uses.values()))
        cell = "<br>".join(f"`{engine}`: {text}" for engine, text in uses.items())
        yield f"| `{path}` | {name} | {texts[0] if len(texts) == 1 else cell} |"


def _not_set(engine: str, reasons: Mapping[str, str]) -> str:
    rows = "\n".join(f"| `{name}` | {reason} |" for name, reason in reasons.items())
    return f"{_SAMPLING.format(engine=engine)}{rows}\n"


def page() -> str:
    client, worker = "\n".join(_client_rows()), "\n".join(_worker_rows())
    not_set = _not_set("TensorRT-LLM", NOT_SET) + _not_set("vLLM", VLLM_NOT_SET)
    return f"{_INTRODUCTION}\n{client}\n{_WORKER}\n{worker}\n{not_set}"


if __name__ == "__main__":
    sys.stdout.write(page())
