"""docs/gateway.md: its manifests against the public schemas, and against each other and our command line."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from vswa_plugin import frontend
from vswa_plugin.launch.cluster import PEEK_ENV
from vswa_plugin.router.picker.args import picker_parser

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/gateway.md").read_text("utf-8")
CRDS = ROOT / "tests/data/crds"


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(block)}


def schemas() -> dict[tuple[str, str], Any]:
    """By kind and apiVersion; strict: a field that a schema does not know would be dropped by the server."""
    found = {}
    for path in CRDS.glob("*.yaml.xz"):
        definition = yaml.safe_load(lzma.decompress(path.read_bytes()))["spec"]
        for version in definition["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            key = definition["names"]["kind"], f"{definition['group']}/{version['name']}"
            found[key] = jsonschema_rs.validator_for(schema)
    return found


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.mark.parametrize("kind", ["Gateway", "HTTPRoute", "InferencePool"])
def test_each_custom_resource_fits_its_public_schema(kind: str) -> None:
    known = schemas()
    of_kind = [each for (name, _), each in manifests().items() if name == kind]
    assert of_kind
    for manifest in of_kind:
        validator = known[kind, manifest["apiVersion"]]
        assert [] == [each.message for each in validator.iter_errors(manifest)]
        broken = json.loads(json.dumps(manifest))
        broken["spec"]["unknown"] = 1
        assert not validator.is_valid(broken), "the check is one"


def container(name: str) -> dict[str, Any]:
    (found,) = manifests()["Deployment", name]["spec"]["template"]["spec"]["containers"]
    return found  # type: ignore[no-any-return]


def test_the_manifests_refer_to_each_other_and_to_what_our_programs_take() -> None:
    found = manifests()
    pool = found["InferencePool", "gemma"]["spec"]
    picker = found["Service", pool["endpointPickerRef"]["name"]]
    frontends = found["Deployment", "dynamo-frontend"]["spec"]["template"]["metadata"]["labels"]
    program, name, *arguments = container("vswa-picker")["args"]
    given = picker_parser().parse_args(arguments)
    (target,) = pool["targetPorts"]
    ports = [each["port"] for each in picker["spec"]["ports"]]

    assert ("vswa", "picker") == (program, name)
    assert pool["endpointPickerRef"]["port"]["number"] == given.grpc_port == ports[0]
    assert pool["selector"]["matchLabels"].items() <= frontends.items()
    assert [f"dynamo-frontend:{target['number']}"] == given.destination
    assert ("Service", "dynamo-frontend") in found
    probe = container("vswa-picker")["readinessProbe"]["httpGet"]
    assert (given.http_port, "/ready") == (probe["port"], probe["path"])
    backend = found["HTTPRoute", "gemma"]["spec"]["rules"][0]["backendRefs"][0]
    assert ("InferencePool", backend["name"]) in found


def test_the_frontends_headers_wait_for_the_first_token_there_too() -> None:
    found = container("dynamo-frontend")
    program, name, *arguments = found["args"]
    environment = {each["name"]: each["value"] for each in found["env"]}

    assert ("vswa", "frontend") == (program, name)
    assert frontend.parser().parse_args(arguments).http_port == 8000
    assert PEEK_ENV.items() <= environment.items()
