"""No option is silently ignored: one that could have no effect, or no sensible one, is refused."""

from __future__ import annotations

import gzip
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vswa_plugin.cli import BUILT_IN, PROGRAMS
from vswa_plugin.cli.main import main
from vswa_plugin.host.loading import load_host
from vswa_plugin.router import args as router_args

Output = pytest.CaptureFixture[str]

#: Command line -> what is said. {model}, {trace} and {requests} stand for files that are fit to be used.
NO_EFFECT = {
    "worker --model-path {model} --status-host ::1": "--status-host: expected --status-port with it",
    "relay --model-path {model} --events tcp://h:1 --status-host ::1": "--status-host: expected",
    "relay --model-path {model} --events tcp://h:1 --workers x": "--workers: expected no --events with it",
    "relay --model-path {model} --replay tcp://h:1": "--replay: expected --events with it",
    "relay --model-path {model} --worker-id 1": "--worker-id: expected --events with it",
    "relay --model-path {model} --data-parallel-size 2": "--data-parallel-size: expected --events with it",
    "relay --events tcp://h:1 --endpoint dyn://a.b.c --namespace a": "--endpoint: expected no --namespace",
    "router --http-host ::1": "--http-host: expected --http-port with it",
    "router --selector-only --served-model-name x": "--served-model-name: expected no --selector-only",
    "router --selector-only --drain-timeout 3": "--drain-timeout: expected no --selector-only with it",
    "router --selector-only --namespace a --endpoint dyn://b.c.d": "--endpoint: expected no --selector",
    "selector --endpoint dyn://b.c.d": "unrecognized arguments: --endpoint",
    "selector --drain-timeout 3": "unrecognized arguments: --drain-timeout",
    "--plugin x frontend": "unrecognized arguments: --plugin",
    "--no-plugin x launch agg": "unrecognized arguments: --no-plugin",
    "launch disagg --model-path {model} --workers 2": "--workers: topology 'disagg' has prefill and decode",
    "launch agg --model-path {model} --decode-workers 2": "--decode-workers: topology 'agg' has agg workers",
    "launch agg --model-path {model} --router exact": "--router: topology 'agg' routes by no cache",
    "launch agg --model-path {model} --routers 2": "--routers: only ROUTER=exact and ROUTER=picker have",
    "launch agg_router --model-path {model} --router-mode kv": "--router-mode: 'agg_router' has its own",
    "index --json": "--json: expected --once with it",
    "index --check": "--check: expected --once with it",
    "index --once --status-port 0": "--status-port: expected no --once with it",
    "explain word --token-ids 1": "argument --token-ids: not allowed with argument prompt",
    "explain --chat --token-ids 1": "--chat: expected no --token-ids with it, got both",
    "explain --file x --token-ids 1": "argument --token-ids: not allowed with argument --file",
    "events --plugin x.py": "--plugin: expected no plugin, got ['x.py']: `vswa events` loads none",
    "events --no-plugin x": "--no-plugin: expected no plugin, got ['x']: `vswa events` loads none",
    "events --plugin-options x.yaml": "--plugin-options: expected no options of plugins, got x.yaml",
    "picker --tls-cert x.pem": "--tls-cert: expected --tls-key with it",
    "picker --tls-key x.pem": "--tls-key: expected --tls-cert with it",
    "picker --http-host ::1": "--http-host: expected --http-port with it",
    "--plugin x.py envoy-config": "`vswa envoy-config` loads none",
    "--plugin-options x.yaml brokers": "no plugin acts in `vswa brokers`",
    "completion bash --plugin-options x.yaml": "no plugin acts in `vswa completion`",
    "--plugin-options x.yaml frontend": "unrecognized arguments: --plugin-options",
    "--plugin x.py brokers": "`vswa brokers` loads none",
    "--plugin x.py demo": "`vswa demo` loads none",
    "--plugin x.py serve": "`vswa serve` loads none",
    "--plugin x.py new-plugin mine --kind rule": "`vswa new-plugin` loads none",
    "demo --log-size 3": "unrecognized arguments: --log-size",
    "accuracy route forks --rate 1 --load 1": "--load: expected no --rate with it",
    "accuracy route {requests} --load 1": "--load: expected a made-up workload",
    "simulate --seed 1 --from {requests}": "--seed: expected no --from with it",
    "simulate --prompt-len 9 --from {requests}": "--prompt-len: expected no --from with it",
    "simulate --model gpt-oss --windows 64": "--windows: expected no --model with it, got gpt-oss",
    "simulate --model gemma-4-31b --layers 3": "--layers: expected no --model with it, got gemma-4-31b",
    "simulate --model gemma-4-31b --rule trtllm_v2": "--rule: expected no --model of vLLM with it",
    "simulate --model gemma-4-31b --host-blocks 9": "--host-blocks: expected no --model of vLLM with it",
    "simulate --model gemma-4-31b --block-size 9": "--block-size: expected none for gemma-4-31b",
    "simulate --model gemma-4-31b --blocks global=9": "--blocks: expected a number of at least 1 with",
    "make-model /nowhere --layers 1 --window 64": "--window: expected --layers of at least 2 with it",
}
OUT_OF_RANGE = {
    "worker --model-path {model} --status-port 65536": "--status-port: expected a port from 0 to 65535",
    "worker --model-path {model} --stall-timeout -1": "--stall-timeout: expected 0 seconds or more, got -1",
    "worker --model-path {model} --heartbeat 0": "--heartbeat: expected more than 0 seconds, got 0",
    "worker --model-path {model} --drain-timeout nan": "--drain-timeout: expected 0 seconds or more, got nan",
    "worker --model-path {model} --data-parallel-size 0": "--data-parallel-size: expected at least 1,",
    "worker --model-path {model} --taint=": "--taint: expected a name, got nothing",
    "relay --model-path {model}": "--events: expected the address of a worker's KV events, or --workers",
    "relay --events tcp://h:1": "--model-path: expected the directory or name of a model, got none",
    "relay --model-path {model} --events tcp://*:1": "events: expected an address to connect to, such as",
    "relay --model-path {model} --events tcp://h:1 --replay h:1": "replay: expected an address to connect to",
    "relay --model-path {model} --events tcp://h:1 --engine no": "--engine: expected an engine whose workers",
    "relay --model-path {model} --events tcp://h:1 --mode both": "--mode: unknown mode 'both'",
    "relay --model-path {model} --events tcp://h:1 --worker-id -1": "expected a whole number, 0 or more",
    "relay --model-path {model} --events tcp://h:1 --data-parallel-size 1025": "at most 1024, got 1025",
    "relay --model-path {model} --events tcp://h:1 --status-port 65536": "expected a port from 0 to 65535",
    "relay --model-path {model} --events tcp://h:1 --engine-options x": "expected a JSON object such as",
    "router --http-port -1": "--http-port: expected a port from 0 to 65535, got -1",
    "router --stale-grace -1": "--stale-grace: expected 0 seconds or more, got -1",
    "router --router-temperature -1": "router_temperature",
    "router --namespace a.b": "--namespace: expected letters, digits",
    "selector --http-port 65536": "--http-port: expected a port from 0 to 65535, got 65536",
    "frontend --http-port 65536": "--http-port: expected a port from 0 to 65535, got '65536'",
    "frontend --migration-limit -1": "--migration-limit: expected a whole number, 0 or more, got '-1'",
    "launch agg --http-port -1": "--http-port: expected a port from 0 to 65535, got '-1'",
    "launch agg --model-path {model} --workers 0": "--workers: expected a whole number of at least 1",
    "launch agg --model-path {model} --log-size 0": "--log-size: expected a whole number of at least 1",
    "launch agg_router --model-path {model} --routers 0": "--routers: expected a whole number of at least 1",
    "picker --grpc-port 65536": "--grpc-port: expected a port from 0 to 65535, got '65536'",
    "picker --request-timeout 0": "--request-timeout: expected 0 < seconds <= 86400, got 0",
    "picker --request-timeout nan": "--request-timeout: expected 0 < seconds <= 86400, got nan",
    "picker --destination host": "--destination: expected HOST:PORT, got 'host'",
    "picker --tls-cert /nowhere --tls-key /nowhere": "--tls-cert, --tls-key: expected a certificate",
    "envoy-config --port -1": "--port: expected a port from 0 to 65535, got '-1'",
    "envoy-config --frontend host": "--frontend: expected HOST:PORT, got 'host'",
    "envoy-config --picker host:0": "--picker: expected HOST:PORT, got 'host:0'",
    "brokers --nats-port -1": "--nats-port: expected a port from 0 to 65535, got '-1'",
    "brokers --etcd-port 65536": "--etcd-port: expected a port from 0 to 65535, got '65536'",
    "events --count 0": "--count: expected a whole number of at least 1, got '0'",
    "events --count -3": "--count: expected a whole number of at least 1, got '-3'",
    "events --window 0": "--window: expected a number of tokens or 'global', got '0'",
    "events --namespace *": "--namespace: expected letters, digits",
    "events --component a.b": "--component: expected letters, digits",
    "index --once --timeout 0": "--timeout: expected more than 0 seconds, got '0'",
    "index --timeout nan": "--timeout: expected more than 0 seconds, got 'nan'",
    "index --status-port 65536": "--status-port: expected a port from 0 to 65535, got '65536'",
    "index --once --namespace >": "--namespace: expected letters, digits",
    "doctor --timeout 0": "--timeout: expected more than 0 seconds, got '0'",
    "doctor --http-port 65536": "--http-port: expected a port from 0 to 65535, got '65536'",
    "explain word --timeout -1": "--timeout: expected more than 0 seconds, got '-1'",
    "explain word --namespace >": "--namespace: expected letters, digits",
    "explain --token-ids 1,-2": "--token-ids: expected numbers from 0 to 2**32 - 1 with commas between",
    "explain --token-ids=": "--token-ids: expected numbers from 0 to 2**32 - 1 with commas between",
    "explain --token-ids 4294967296": "--token-ids: expected numbers from 0 to 2**32 - 1",
    "demo --max-tokens 0": "--max-tokens: expected a whole number of at least 1, got '0'",
    "demo --http-port 65536": "--http-port: expected a port from 0 to 65535, got '65536'",
    "serve --log-size 0": "--log-size: expected a whole number of at least 1",
    "serve --http-port -1": "--http-port: expected a port from 0 to 65535, got '-1'",
    "accuracy replay {trace} --ttl 0": "--ttl: expected a whole number of at least 1, got '0'",
    "accuracy replay {trace} --min-exact 2": "--min-exact: expected a share from 0 to 1, got 2",
    "accuracy replay {trace} --min-exact nan": "--min-exact: expected a share from 0 to 1, got nan",
    "accuracy replay {trace} --plot x.txt": "--plot: ",
    "accuracy route forks --requests 0": "--requests: expected a whole number of at least 1, got '0'",
    "accuracy route forks --workers 0": "--workers: expected a whole number of at least 1",
    "accuracy route forks --block-size 0": "--block-size: expected a whole number of at least 1, got '0'",
    "accuracy route forks --seeds 0": "--seeds: expected a whole number of at least 1, got '0'",
    "accuracy route forks --jobs 0": "--jobs: expected a whole number of at least 1, got '0'",
    "accuracy route forks --rate 0": "--rate: expected a finite number above 0, got '0'",
    "accuracy route forks --load inf": "--load: expected a finite number above 0, got 'inf'",
    "accuracy route forks --sliding-share 2": "--sliding-share: expected a share above 0, up to 1, got 2",
    "accuracy route forks --blocks 0": "--blocks: expected numbers of at least 1, got '0'",
    "accuracy route forks --blocks ,": "--blocks: expected at least one word, got ','",
    "accuracy route forks --model ,": "--model: expected at least one word, got ','",
    "accuracy route forks --policies ,": "--policies: expected at least one word, got ','",
    "accuracy route forks --cost-fixed -1": "fixed_s: expected a finite number, 0 or more, got -1",
    "plugins --plugin-options /nowhere.yaml": "--plugin-options: expected a YAML or JSON file at /nowhere",
    "accuracy replay {trace} --plugin-options /nowhere.yaml": "--plugin-options: expected a YAML or JSON",
    "simulate --plugin-options /nowhere.yaml": "--plugin-options: expected a YAML or JSON file at /nowhere",
    "simulate --workers 0": "--workers: expected a whole number of at least 1, got '0'",
    "simulate --requests -1": "--requests: expected a whole number of at least 1, got '-1'",
    "simulate --chunk 0": "--chunk: expected a whole number of at least 1, got '0'",
    "simulate --blocks -1": "--blocks: expected a number, or window=number for each, got '-1'",
    "make-model /nowhere --seed -1": "--seed: expected a whole number, 0 or more, got '-1'",
    "make-model /nowhere --context 0": "--context: expected a whole number of at least 1, got '0'",
    # Digits of another script, which Python reads as these.
    "launch agg --http-port ٨٠٠٠": "--http-port: expected a port from 0 to 65535, got '٨٠٠٠'",
    "worker --model-path {model} --status-port ٩": "--status-port: expected a whole number, got '٩'",
    "worker --model-path {model} --stall-timeout ٩": "--stall-timeout: expected a number, got '٩'",
    "worker --model-path {model} --heartbeat 1_0": "--heartbeat: expected a number, got '1_0'",
    "router --http-port ٩": "--http-port: expected a whole number, got '٩'",
    "router --stale-grace ٩": "--stale-grace: expected a number, got '٩'",
    "router --router-temperature ٩": "--router-temperature: expected a number, got '٩'",
    "index --timeout ٩": "--timeout: expected more than 0 seconds, got '٩'",
    "accuracy route forks --seed ٩": "--seed: expected a whole number, got '٩'",
    "accuracy route forks --sliding-share ٠": "--sliding-share: expected a number, got '٠'",
    "accuracy replay {trace} --min-exact ١": "--min-exact: expected a number, got '١'",
    "simulate --requests ٩": "--requests: expected a whole number of at least 1, got '٩'",
    "simulate --seed ٩": "--seed: expected a whole number, 0 or more, got '٩'",
    "make-model /nowhere --seed ٩": "--seed: expected a whole number, 0 or more, got '٩'",
    "make-model /nowhere --layers ٩": "--layers: expected a whole number of at least 1, got '٩'",
}


@pytest.fixture(autouse=True)
def no_program_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not refused ends the test at once instead of running."""

    def fail(*arguments: Any, **_: Any) -> int:
        for argument in arguments:
            getattr(argument, "close", lambda: None)()
        raise AssertionError("was not refused")

    monkeypatch.setattr("asyncio.run", fail)
    for module in ("worker.__main__", "relay.__main__", "router.__main__", "frontend"):
        monkeypatch.setattr(f"vswa_plugin.{module}.run_on_uvloop", fail)
    monkeypatch.setattr("vswa_plugin.cli.accuracy_route._run_all", fail)
    monkeypatch.setattr("vswa_plugin.cli.accuracy.replay_with", fail)


@pytest.fixture
def fill(model_dir: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("")
    trace = Path(__file__).parents[1] / "data" / "trtllm-v2-gemma3-1b-head.jsonl.gz"
    with gzip.open(trace) as file:
        assert file.read(1)
    return lambda line: shlex.split(line.format(model=model_dir, trace=trace, requests=requests))


@pytest.mark.parametrize(("line", "message"), [*NO_EFFECT.items(), *OUT_OF_RANGE.items()])
def test_an_option_that_does_nothing_is_refused_with_exit_code_2(
    line: str, message: str, fill: Callable[[str], list[str]], capsys: Output
) -> None:
    try:
        code: Any = main(fill(line))
    except SystemExit as refused:
        code = refused.code
    error = capsys.readouterr().err

    assert message in error
    assert 2 == code


def test_every_command_is_in_the_tables() -> None:
    """A new command is gone through too; those that are left out have no option that could do nothing."""
    lines = [*NO_EFFECT, *OUT_OF_RANGE]
    covered = {word for line in lines for word in line.split()}
    with load_host(environ=dict(os.environ)) as host:
        added = {command.name for command in host.commands({})}

    nothing_to_refuse = {"get-model", "import-gguf"}
    assert nothing_to_refuse == ({*BUILT_IN, *PROGRAMS} | added) - covered


def test_what_an_option_needs_is_enough_for_it() -> None:
    assert "::1" == router_args.parse(["--http-host", "::1", "--http-port", "0"], {}).http.host
    assert "::1" == router_args.parse(["--http-host", "::1", "--selector-only"], {}).http.host
    assert "a" == router_args.parse(["--selector-only", "--endpoint", "dyn://a.b.c"], {}).namespace
