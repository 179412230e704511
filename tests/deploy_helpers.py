"""The manifests of deploy/: their documents, the schemas that they are compared with, and our containers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
KUBERNETES = sorted(
    path for path in (DEPLOY / "kubernetes").rglob("*.yaml") if path.name != "kustomization.yaml"
)
_SCHEMAS = ROOT / "tests" / "data" / "deploy"
#: What the operator gives a pod, of which our manifests name some.
OPERATOR = {"DYN_NAMESPACE": "default-vswa", "DYN_NAMESPACE_WORKER_SUFFIX": "1a2b3c", "POD_IP": "10.0.0.7"}
_IMAGE = "vswa-plugin"
_VARIABLE = re.compile(r"\$\((\w+)\)")
_DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")


class Container(msgspec.Struct, frozen=True):
    """One container that runs a command of ours.

    :ivar words: the command line, from the name of the program on; ``ports``: those that it says it has.
    :ivar grace_s: between SIGTERM and SIGKILL.
    :ivar probes: path and port of each; ``name``: for messages.
    """

    name: str
    words: list[str]
    environ: dict[str, str]
    ports: dict[str, int]
    probes: list[tuple[str, int | str]]
    grace_s: float


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def complaints(document: Mapping[str, Any]) -> list[str]:
    """What the schema of its kind says against a document of Kubernetes."""
    kubernetes = json.loads((_SCHEMAS / "kubernetes-1.33.json").read_text("utf-8"))
    if document["kind"] == "DynamoGraphDeployment":
        own = json.loads((_SCHEMAS / "dynamographdeployment-v1beta1.json").read_text("utf-8"))
        schema = {**own, "$defs": {**kubernetes["$defs"], **own["$defs"]}}
    else:
        schema = {**kubernetes, "$ref": kubernetes["kinds"][document["kind"]]}
    return _errors(schema, document)


def compose_complaints(document: Mapping[str, Any]) -> list[str]:
    return _errors(json.loads((_SCHEMAS / "compose-spec.json").read_text("utf-8")), document)


def _errors(schema: dict[str, Any], document: Mapping[str, Any]) -> list[str]:
    found = jsonschema_rs.validator_for(schema).iter_errors(document)
    return [f"{'/'.join(map(str, error.instance_path))}: {error.message}" for error in found]


def interpolated(text: str) -> str:
    """As Compose reads it where no variable is set."""
    return _DEFAULT.sub(r"\1", text)


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(interpolated(COMPOSE.read_text("utf-8")))
    return document


def compose_containers() -> Iterator[Container]:
    for name, service in compose()["services"].items():
        if _IMAGE not in service["image"] or "entrypoint" in service:
            continue
        test = " ".join(map(str, service.get("healthcheck", {}).get("test", ())))
        probes = [(path, int(port)) for port, path in re.findall(r"127\.0\.0\.1:(\d+)(/\w+)", test)]
        ports = {each: int(each.rpartition(":")[2]) for each in service.get("ports", ())}
        grace = float(service["stop_grace_period"].removesuffix("s"))
        yield Container(name, service["command"], service["environment"], ports, probes, grace)


def kubernetes_containers() -> Iterator[Container]:
    """Of the standalone manifests and of the operator's; jobs run to their end and have no port."""
    for path in KUBERNETES:
        for document in documents(path):
            shared = _config_maps(path)
            spec = document.get("spec", {})
            for name, template, environ in _templates(document, spec):
                for each in template["spec"]["containers"]:
                    if _IMAGE not in each["image"] or document["kind"] == "Job":
                        continue
                    yield _container(f"{path.stem} {name}", each, template["spec"], {**shared, **environ})


def _templates(
    document: Mapping[str, Any], spec: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    if document["kind"] == "DynamoGraphDeployment":
        environ = {**OPERATOR, **_values(spec["env"])}
        for component in spec["components"]:
            yield component["name"], component["podTemplate"], environ
    elif "template" in spec:
        yield document["metadata"]["name"], spec["template"], {}


def _config_maps(path: Path) -> dict[str, str]:
    found = {}
    for beside in path.parent.glob("*.yaml"):
        for document in documents(beside):
            if document.get("kind") == "ConfigMap":
                found |= document["data"]
    return found


def _container(name: str, spec: Any, pod: Any, environ: dict[str, str]) -> Container:
    environ = {**environ, **_values(spec.get("env", ()))}
    words = [*spec.get("command", ["vswa"]), *spec.get("args", ())]
    ports = {port["name"]: port["containerPort"] for port in spec.get("ports", ())}
    probes = [probe["httpGet"] for key, probe in spec.items() if key.endswith("Probe")]
    return Container(
        name,
        [_VARIABLE.sub(lambda found: environ[found[1]], word) for word in words[1:]],
        environ,
        ports,
        [(probe["path"], probe["port"]) for probe in probes],
        pod.get("terminationGracePeriodSeconds", 30),
    )


def _values(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Values of variables; of one from a secret or a field, what the tests give it."""
    return {each["name"]: each.get("value", OPERATOR.get(each["name"], "secret")) for each in entries}
