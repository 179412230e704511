"""The manifests of deploy/ against public schemas, and their commands against our own command lines."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy_helpers import (
    COMPOSE,
    DEPLOY,
    KUBERNETES,
    ROOT,
    Container,
    complaints,
    compose,
    compose_complaints,
    compose_containers,
    documents,
    kubernetes_containers,
)
from vswa_plugin.cli import PROGRAMS
from vswa_plugin.dynamo.names import worker_namespace
from vswa_plugin.frontend import _scope
from vswa_plugin.frontend import parser as frontend_parser
from vswa_plugin.launch.topologies import TOPOLOGIES
from vswa_plugin.router.args import parse as parse_router
from vswa_plugin.worker.args import parse as parse_worker

CONTAINERS = [*compose_containers(), *kubernetes_containers()]
GRAPHS = sorted((DEPLOY / "kubernetes" / "dynamo").glob("*.yaml"))
#: Where the operator's probes reach Dynamo's runtime in a worker.
SYSTEM_PORT = 9090
#: Paths that our programs serve, and Dynamo's frontend.
PATHS = {"worker": {"/health", "/ready"}, "router": {"/health", "/ready"}, "frontend": {"/health", "/live"}}


def named(containers: list[Container]) -> list[Any]:
    return [pytest.param(container, id=container.name) for container in containers]


def of(program: str) -> list[Any]:
    return named([each for each in CONTAINERS if each.words[0] == program])


def read_worker(container: Container, model_dir: Path) -> Any:
    words = list(container.words[1:])
    words[words.index("--model-path") + 1] = str(model_dir)
    return parse_worker(words, container.environ)


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_manifests_are_as_the_schemas_have_them(path: Path) -> None:
    for document in documents(path):
        assert [] == complaints(document)


def test_the_compose_file_is_as_its_schema_has_it() -> None:
    assert [] == compose_complaints(compose())


def test_the_schemas_refuse_what_is_wrong() -> None:
    (graph,) = documents(GRAPHS[0])
    wrong = copy.deepcopy(graph)
    wrong["spec"]["components"][0]["componentType"] = "frontend"  # as v1alpha1 has it
    wrong["spec"]["components"][1]["podTemplate"]["spec"]["containers"][0]["arguments"] = []
    services = {"services": {"a": {"imag": "x"}}}

    assert ["componentType", "arguments"] == [
        found[1] for each in complaints(wrong) if (found := re.search(r"'(\w+)' was unexpected", each))
    ]
    assert 1 == len(compose_complaints(services))


def test_there_is_one_graph_and_one_profile_for_each_topology() -> None:
    profiles = {name for service in compose()["services"].values() for name in service["profiles"]}

    assert set(TOPOLOGIES) == {path.stem for path in GRAPHS}
    assert {*TOPOLOGIES, "observe"} == profiles


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=lambda topology: topology.name)
def test_each_deployment_has_the_programs_of_its_topology(topology: Any, model_dir: Path) -> None:
    active = {name for name, each in compose()["services"].items() if topology.name in each["profiles"]}
    composed = [each for each in compose_containers() if each.name in active]
    graph = [each for each in kubernetes_containers() if each.name.startswith(f"{topology.name} ")]
    for containers in (composed, graph):
        modes = {
            read_worker(each, model_dir).settings.mode for each in containers if each.words[0] == "worker"
        }
        routers = [each for each in containers if each.words[0] == "router"]
        hidden = {each.environ.get("VSWA_ROUTER") for each in containers if each.words[0] == "worker"}

        assert set(topology.modes) == modes
        assert topology.routed == bool(routers)
        assert {"exact" if topology.routed else None} == hidden


@pytest.mark.parametrize("container", named(CONTAINERS))
def test_each_container_runs_a_program_of_ours(container: Container) -> None:
    assert container.words[0] in PROGRAMS


@pytest.mark.parametrize("container", of("worker"))
def test_worker_command_lines_are_read_and_their_ports_are_those_of_the_manifest(
    container: Container, model_dir: Path
) -> None:
    args = read_worker(container, model_dir)

    assert args.settings.options, "expected an engine configuration"
    assert "0.0.0.0" == args.status_host
    assert SYSTEM_PORT != args.status_port
    assert args.status_port in {*container.ports.values(), *(port for _, port in container.probes)}
    assert container.grace_s > args.drain_timeout_s + 5
    check_probes(container, args.status_port)


@pytest.mark.parametrize("container", of("router"))
def test_router_command_lines_are_read_and_their_ports_are_those_of_the_manifest(
    container: Container,
) -> None:
    args = parse_router(container.words[1:], container.environ)

    assert ("0.0.0.0", 8092) == (args.http.host, args.http.port)
    assert args.namespace == args.endpoint.namespace
    assert container.grace_s > args.drain_timeout_s + 5
    check_probes(container, args.http.port)


@pytest.mark.parametrize("container", of("frontend"))
def test_frontend_command_lines_are_read_and_their_ports_are_those_of_the_manifest(
    container: Container,
) -> None:
    given = frontend_parser().parse_args(container.words[1:])
    _scope(given, container.environ)

    assert ("0.0.0.0", 8000) == (given.http_host, given.http_port)
    assert given.http_port in container.ports.values() or not container.ports  # the operator adds it
    check_probes(container, given.http_port)


def check_probes(container: Container, port: int | None) -> None:
    for path, where in container.probes:
        assert path in PATHS[container.words[0]], container.name
        assert port == (where if isinstance(where, int) else container.ports[where]), container.name


@pytest.mark.parametrize("path", [path for path in GRAPHS if path.stem.endswith("router")], ids=str)
def test_routers_of_a_graph_follow_the_namespace_of_its_workers(path: Path, model_dir: Path) -> None:
    containers = [each for each in kubernetes_containers() if each.name.startswith(f"{path.stem} ")]
    workers = {
        read_worker(each, model_dir).endpoint.namespace for each in containers if each.words[0] == "worker"
    }
    (router,) = (
        parse_router(each.words[1:], each.environ) for each in containers if each.words[0] == "router"
    )

    assert {router.namespace} == workers
    # The suffix is the operator's for workers; a worker that took it would be out of the router's sight.
    assert worker_namespace(containers[0].environ) not in workers


def test_each_main_container_of_a_graph_states_the_release_of_dynamo() -> None:
    released = re.search(r"ai-dynamo-runtime==(\S+)", (DEPLOY / "docker" / "constraints.txt").read_text())
    assert released is not None
    for path in GRAPHS:
        (graph,) = documents(path)
        for component in graph["spec"]["components"]:
            assert released[1] == component["runtimeVersionOverride"]
            assert ["main"] == [each["name"] for each in component["podTemplate"]["spec"]["containers"]]


def test_services_and_files_that_manifests_name_are_there() -> None:
    for service in compose()["services"].values():
        for mounted in service.get("volumes", ()):
            source = mounted.split(":")[0]
            assert not source.startswith(".") or (COMPOSE.parent / source).is_file(), source
    for folder in (DEPLOY / "kubernetes").iterdir():
        for document in documents(folder / "kustomization.yaml") if folder.name not in NO_KUSTOMIZE else []:
            assert all((folder / name).is_file() for name in document["resources"])
    services, targets = set(), set()
    for path in KUBERNETES:
        for document in documents(path):
            if document["kind"] == "Service":
                services.add(document["metadata"]["name"])
            targets |= set(re.findall(r"://(vswa-[\w-]+):", yaml.safe_dump(document)))
    assert targets <= services


#: Applied file by file, and prose.
NO_KUSTOMIZE = ("dynamo", "README.md")


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["brokers", "standalone"])
def test_kustomize_makes_manifests_that_the_schemas_take(folder: str) -> None:
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = [document["kind"] for document in yaml.safe_load_all(made)]

    assert "Deployment" in kinds
    for document in yaml.safe_load_all(made):
        assert [] == complaints(document)


def test_the_dockerfile_copies_what_there_is_and_runs_without_root() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    copied = [word for line in re.findall(r"^COPY (?!--)(.+)$", text, re.M) for word in line.split()[:-1]]
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text("utf-8")
    images = re.findall(r"^ARG \w+_IMAGE=(\S+)$", text, re.M)

    assert all((ROOT / word).exists() and f"!{word}" in ignored for word in copied)
    assert 2 == len(images) and not any(image.endswith(":latest") or ":" not in image for image in images)
    for stage in stages[1:]:
        assert "10001:10001" == re.findall(r"^USER (\S+)$", stage, re.M)[-1]
        assert ['["vswa"]'] == re.findall(r"^ENTRYPOINT (.+)$", stage, re.M)


def test_every_image_is_pinned_to_a_version() -> None:
    images = {service["image"] for service in compose()["services"].values()}
    for path in KUBERNETES:
        images |= set(re.findall(r"^\s*(?:- )?image: (\S+)$", path.read_text("utf-8"), re.M))

    assert not [name for name in images if not re.search(r":v?\d+\.\d+\.\d+", name) and name != "vswa-plugin"]
