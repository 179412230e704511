"""Namespaces and endpoints, as Dynamo's own workers compose them from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from vswa_plugin import frontend
from vswa_plugin.dynamo.names import EndpointName, worker_namespace
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch import settings as launch
from vswa_plugin.launch.__main__ import settings_from
from vswa_plugin.router import args as router_args
from vswa_plugin.worker import args as worker_args

BOTH = {"DYN_NAMESPACE": "pool", "DYN_NAMESPACE_WORKER_SUFFIX": "ab12"}


@pytest.mark.parametrize(
    ("environ", "namespace"),
    [
        ({}, "dynamo"),
        ({"DYN_NAMESPACE": ""}, "dynamo"),
        ({"DYN_NAMESPACE": "pool"}, "pool"),
        ({"DYN_NAMESPACE": "pool", "DYN_NAMESPACE_WORKER_SUFFIX": ""}, "pool"),
        (BOTH, "pool-ab12"),
        ({"DYN_NAMESPACE_WORKER_SUFFIX": "ab12"}, "dynamo-ab12"),
    ],
)
def test_a_worker_is_in_the_namespace_of_the_environment_with_its_suffix(
    environ: Mapping[str, str], namespace: str, model_dir: Path
) -> None:
    """The cases are those of ``get_worker_namespace`` in ai-dynamo 1.6.1."""
    assert namespace == worker_namespace(environ)
    assert f"{namespace}.backend.generate" == str(
        worker_args.parse(["--model-path", str(model_dir)], environ).endpoint
    )


def test_an_endpoint_that_is_named_is_taken_as_it_is(model_dir: Path) -> None:
    argv = ["--model-path", str(model_dir)]
    environ = {**BOTH, "DYN_ENDPOINT": "dyn://there.c.d"}

    assert "here.a.b" == str(worker_args.parse([*argv, "--endpoint", "dyn://here.a.b"], environ).endpoint)
    assert "there.c.d" == str(worker_args.parse(argv, environ).endpoint)


@pytest.mark.parametrize(
    ("argv", "environ", "endpoint", "namespace"),
    [
        ([], {}, "dynamo.router.generate", "dynamo"),
        ([], {"DYN_NAMESPACE": "pool"}, "pool.router.generate", "pool"),
        ([], BOTH, "pool.router.generate", "pool-ab12"),
        (["--endpoint", "dyn://front.r.g"], {}, "front.r.g", "front"),
        (["--endpoint", "dyn://front.r.g"], BOTH, "front.r.g", "pool-ab12"),
        (["--namespace", "mine"], BOTH, "pool.router.generate", "mine"),
        (["--namespace", "all"], BOTH, "pool.router.generate", None),
        (["--selector-only"], BOTH, "pool.router.generate", "pool-ab12"),
        ([], {"DYN_NAMESPACE": "all"}, "all.router.generate", "all"),
    ],
)
def test_a_router_stands_where_the_frontend_looks_and_follows_the_workers_of_the_suffix(
    argv: list[str], environ: Mapping[str, str], endpoint: str, namespace: str | None
) -> None:
    args = router_args.parse(argv, environ)

    assert (endpoint, namespace) == (str(args.endpoint), args.namespace)


@pytest.mark.parametrize(
    ("argv", "environ", "scope"),
    [
        ([], {}, (None, None)),
        ([], BOTH, ("pool", None)),
        ([], {**BOTH, "DYN_NAMESPACE_PREFIX": "po"}, (None, "po")),
        (["--namespace", "mine"], {**BOTH, "DYN_NAMESPACE_PREFIX": "po"}, ("mine", None)),
        (["--namespace-prefix", "mi"], BOTH, (None, "mi")),
    ],
)
def test_a_frontend_shows_models_of_one_namespace_or_of_those_with_a_prefix(
    argv: list[str], environ: Mapping[str, str], scope: tuple[str | None, str | None]
) -> None:
    assert scope == frontend._scope(frontend.parser().parse_args(argv), environ)


@pytest.mark.parametrize(
    ("argv", "environ", "namespace"),
    [
        ([], BOTH, "pool-ab12"),
        (["--namespace", "mine"], BOTH, "mine-ab12"),
        (["--namespace", "mine"], {}, "mine"),
    ],
)
def test_launch_puts_all_that_it_starts_into_one_namespace(
    argv: list[str],
    environ: dict[str, str],
    namespace: str,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings, _ = settings_from(["agg_router", "--model-path", str(model_dir), *argv], environ)
    routers = router_args.parse(launch.router_arguments(settings), environ)
    (group,) = settings.groups
    workers = worker_args.parse(launch.worker_arguments(settings, group), environ)

    assert 4 * [namespace] == [
        settings.namespace,
        routers.endpoint.namespace,
        routers.namespace,
        workers.endpoint.namespace,
    ]


@pytest.mark.parametrize("variable", ["DYN_NAMESPACE", "DYN_NAMESPACE_WORKER_SUFFIX", "DYN_NAMESPACE_PREFIX"])
@pytest.mark.parametrize("value", ["a.b", "a b", "*", "x/y"])
def test_a_name_that_would_change_what_a_subject_means_is_refused_by_its_variable(
    variable: str, value: str, model_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{variable}: expected letters, digits"):
        if variable == "DYN_NAMESPACE_PREFIX":
            frontend._scope(frontend.parser().parse_args([]), {variable: value})
        else:
            worker_args.parse(["--model-path", str(model_dir)], {variable: value})


@pytest.mark.parametrize("text", ["", "a.b", "a.b.c.d", "a..c", "a.b.c d", "a.*.c", "dyn://"])
def test_an_endpoint_of_three_names_is_wanted(text: str) -> None:
    with pytest.raises(ConfigError, match="--endpoint"):
        EndpointName.parse(text)
