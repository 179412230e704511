"""The command line of ``python -m dynamo.trtllm``, and what becomes of each of its flags here. Data.

Read from the parser of :data:`VERSION`; a test walks that parser, so that a flag of another release shows.
``docs/dynamo-flags.md`` is made from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

#: Of the package ``ai-dynamo`` whose parser was read; 1.6.0 has the same flags.
VERSION = "1.6.1"
#: Begins the flags that set one engine option each, such as ``--trtllm.kv_cache_config.max_tokens 4096``.
DOTTED = "--trtllm."


class Takes(StrEnum):
    """What follows a flag on the command line."""

    VALUE = "a value"
    SWITCH = "nothing; --no-... is the opposite"
    SEVERAL = "any number of values"
    MAYBE = "a value or nothing"


class Fate(StrEnum):
    """What becomes of a flag, and of its variable."""

    OWN = "the same"
    OPTION = "sets an engine option, over which the file and --override-engine-args go"
    VARIABLE = "sets its variable, which Dynamo's runtime and our NATS client read"
    EVENTS = "publishes blocks for Dynamo's own KV router too"
    NOTHING = "accepted, without effect"
    REFUSED = "refused"


class Flag(NamedTuple):
    """One flag.

    :param name: its first name; ``others`` are further ones. A switch has ``--no-`` beside each.
    :param env: the variable that stands for it where it is not given.
    :param text: OPTION: the engine option. Else what is done, what to use, or why nothing is to be done.
    :param kind: OPTION: of its value.
    :param harmless: values that are not refused, because they ask for nothing; of a switch ``false``.
    :param refused: OPTION: values that are refused, each with the reason.
    """

    name: str
    env: str | None
    takes: Takes
    fate: Fate
    text: str
    others: tuple[str, ...] = ()
    kind: type = str
    harmless: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}


_V, _S = Takes.VALUE, Takes.SWITCH
_DIFFUSION = "of diffusion models, which are not served"
_MULTIMODAL = "of images and audio, which are not served"
_ROUTER = "of the router that a worker asks for with --router-mode, which is refused"


def _trtllm(name: str) -> str:
    return "DYN_TRTLLM_" + name.removeprefix("--").replace("-", "_").upper()


def _own(name: str, env: str | None, text: str, *others: str) -> Flag:
    return Flag(name, env, _V, Fate.OWN, text, others)


def _option(name: str, key: str, kind: type = int, refused: Mapping[str, str] = {}) -> Flag:
    return Flag(name, _trtllm(name), _S if kind is bool else _V, Fate.OPTION, key, (), kind, (), refused)


def _variable(name: str, env: str, text: str, takes: Takes = _V) -> Flag:
    return Flag(name, env, takes, Fate.VARIABLE, text)


def _nothing(name: str, env: str | None, text: str, takes: Takes = _V, *others: str) -> Flag:
    return Flag(name, env, takes, Fate.NOTHING, text, others)


def _refused(
    name: str, env: str | None, text: str, takes: Takes = _V, harmless: tuple[str, ...] = ("",), *others: str
) -> Flag:
    return Flag(name, env, takes, Fate.REFUSED, text, others, str, harmless)


_RUNTIME = (
    _own("--namespace", "DYN_NAMESPACE", "`--namespace`; DYN_NAMESPACE_WORKER_SUFFIX is appended"),
    _own("--endpoint", "DYN_ENDPOINT", "`--endpoint`"),
    _refused("--kv-state-endpoint", "DYN_KV_STATE_ENDPOINT", "KV state belongs to the serving endpoint"),
    _variable("--discovery-backend", "DYN_DISCOVERY_BACKEND", "where Dynamo finds its instances"),
    _variable("--request-plane", "DYN_REQUEST_PLANE", "tcp or nats"),
    _variable("--response-plane", "DYN_RESPONSE_PLANE", "tcp or quic"),
    _variable("--event-plane", "DYN_EVENT_PLANE", "of Dynamo's own events; ours go over NATS"),
    _nothing("--fpm-trace", "DYN_FPM_TRACE", "no forward-pass metrics are recorded", _S),
    _refused(
        "--connector",
        "DYN_CONNECTOR",
        "write kv_connector_config in the engine options",
        Takes.SEVERAL,
        ("", "none", "null"),
    ),
    _own("--dyn-tool-call-parser", "DYN_TOOL_CALL_PARSER", "`--dyn-tool-call-parser`"),
    _own("--dyn-reasoning-parser", "DYN_REASONING_PARSER", "`--dyn-reasoning-parser`"),
    _refused(
        "--dyn-default-thinking-mode",
        "DYN_DEFAULT_THINKING_MODE",
        "the chat template decides; clients write chat_template_args",
    ),
    _refused(
        "--exclude-tools-when-tool-choice-none",
        "DYN_EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE",
        "tools are left out then, as by default",
        _S,
        ("true",),
    ),
    _refused("--dyn-enable-structural-tag", "DYN_ENABLE_STRUCTURAL_TAG", "none is shown", _S, ("false", "")),
    _nothing("--dyn-structural-tag-scope", "DYN_STRUCTURAL_TAG_SCOPE", "no structural tag is shown"),
    _nothing("--dyn-structural-tag-schema", "DYN_STRUCTURAL_TAG_SCHEMA", "no structural tag is shown"),
    _refused(
        "--dyn-structural-tag",
        "DYN_STRUCTURAL_TAG",
        "none is shown; a request may give guided_decoding",
        Takes.MAYBE,
        ("false", "0", "no", "off"),
    ),
    _refused(
        "--custom-jinja-template",
        "DYN_CUSTOM_JINJA_TEMPLATE",
        "put the template into the model's directory as chat_template.jinja",
    ),
    _refused(
        "--endpoint-types",
        "DYN_ENDPOINT_TYPES",
        "a model is served for chat where it has a chat template, and for completions; for none of both "
        "use --register hidden",
        _V,
        ("", "chat,completions", "completions,chat"),
        "--dyn-endpoint-types",
    ),
    _nothing("--dump-config-to", "DYN_DUMP_CONFIG_TO", "what is changed in the options is logged"),
    _nothing(
        "--multimodal-embedding-cache-capacity-gb", "DYN_MULTIMODAL_EMBEDDING_CACHE_CAPACITY_GB", _MULTIMODAL
    ),
    _nothing(
        "--multimodal-embedding-cache-publisher",
        "DYN_MULTIMODAL_EMBEDDING_CACHE_PUBLISHER",
        _MULTIMODAL,
        _S,
    ),
    _refused("--output-modalities", "DYN_OUTPUT_MODALITIES", "text alone", Takes.SEVERAL, ("", "text")),
    _nothing("--media-output-fs-url", "DYN_MEDIA_OUTPUT_FS_URL", _DIFFUSION),
    _nothing("--media-output-http-url", "DYN_MEDIA_OUTPUT_HTTP_URL", _DIFFUSION),
    _nothing("--health-check-payload", "DYN_HEALTH_CHECK_PAYLOAD", "of Dynamo's unified backend alone"),
    _variable("--engine-request-limit", "DYN_ENGINE_REQUEST_LIMIT", "more requests are refused"),
    _variable("--tcp-tls-cert-path", "DYN_TCP_TLS_CERT_PATH", "TLS of the request plane"),
    _variable("--tcp-tls-key-path", "DYN_TCP_TLS_KEY_PATH", "TLS of the request plane"),
    _variable("--tcp-tls-ca-cert-path", "DYN_TCP_TLS_CA_CERT_PATH", "TLS of the request plane"),
    _variable("--tcp-tls-insecure", "DYN_TCP_TLS_INSECURE", "TLS of the request plane", _S),
    _variable("--tcp-tls-server-name", "DYN_TCP_TLS_SERVER_NAME", "TLS of the request plane"),
    _variable(
        "--tcp-tls-handshake-timeout", "DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS", "TLS of the request plane"
    ),
    _variable("--tcp-tls-client-cert-path", "DYN_TCP_TLS_CLIENT_CERT_PATH", "TLS of the request plane"),
    _variable("--tcp-tls-client-key-path", "DYN_TCP_TLS_CLIENT_KEY_PATH", "TLS of the request plane"),
    _variable("--tcp-tls-client-ca-cert-path", "DYN_TCP_TLS_CLIENT_CA_CERT_PATH", "TLS of the request plane"),
    _variable("--nats-tls-ca-cert-path", "NATS_TLS_CA_CERT_PATH", "TLS of NATS"),
    _variable("--nats-tls-insecure", "NATS_TLS_INSECURE", "TLS of NATS", _S),
    _variable("--nats-tls-client-cert-path", "NATS_TLS_CLIENT_CERT_PATH", "TLS of NATS"),
    _variable("--nats-tls-client-key-path", "NATS_TLS_CLIENT_KEY_PATH", "TLS of NATS"),
)

_BACKEND = (
    _own("--model", "DYN_TRTLLM_MODEL", "`--model-path`", "--model-path"),
    _own("--served-model-name", "DYN_TRTLLM_SERVED_MODEL_NAME", "`--served-model-name`"),
    _option("--tensor-parallel-size", "tensor_parallel_size"),
    _option("--pipeline-parallel-size", "pipeline_parallel_size"),
    _option("--expert-parallel-size", "moe_expert_parallel_size"),
    _option("--enable-attention-dp", "enable_attention_dp", bool),
    _refused(
        "--conversation-affinity",
        "DYN_ENGINE_CONV_AFFINITY",
        "the router chooses the rank, see routing.dp_rank",
        _S,
        ("false", ""),
    ),
    _nothing(
        "--conversation-affinity-dp-rank-source",
        "DYN_ENGINE_CONV_AFFINITY_DP_RANK_SOURCE",
        "of --conversation-affinity, which is refused",
    ),
    _nothing(
        "--kv-block-size",
        "DYN_TRTLLM_KV_BLOCK_SIZE",
        "the engine's own block size is shown to routers; write kv_cache_config.tokens_per_block to set it",
    ),
    _option("--gpus-per-node", "gpus_per_node"),
    _option("--max-batch-size", "max_batch_size"),
    _option("--max-num-tokens", "max_num_tokens"),
    _option("--max-seq-len", "max_seq_len"),
    _option("--max-beam-width", "max_beam_width"),
    _option("--free-gpu-memory-fraction", "kv_cache_config.free_gpu_memory_fraction", float),
    _own("--extra-engine-args", "DYN_TRTLLM_EXTRA_ENGINE_ARGS", "`--extra-engine-args`"),
    _own("--override-engine-args", "DYN_TRTLLM_OVERRIDE_ENGINE_ARGS", "`--override-engine-args`"),
    Flag(
        "--publish-kv-events",
        "DYN_TRTLLM_PUBLISH_KV_EVENTS",
        _S,
        Fate.EVENTS,
        "as VSWA_ROUTER=stock, unless VSWA_ROUTER says otherwise; the events of every window are always "
        "published on NATS",
    ),
    _nothing(
        "--publish-metrics", "DYN_TRTLLM_PUBLISH_METRICS", "metrics are served with `--status-port`", _S
    ),
    _option("--load-format", "load_format", str, {"gms": "write load_format and gms_config in the file"}),
    _refused(
        "--model-loader-extra-config",
        "DYN_TRTLLM_MODEL_LOADER_EXTRA_CONFIG",
        "write gms_config or mx_config in the engine options",
    ),
    _own("--disaggregation-mode", "DYN_TRTLLM_DISAGGREGATION_MODE", "`--mode`; pd: agg; encode: refused"),
    _refused("--enable-multimodal", "DYN_TRTLLM_ENABLE_MULTIMODAL", "text alone", _S, ("false", "")),
    _refused("--modality", "DYN_TRTLLM_MODALITY", "text alone", _V, ("text", "")),
    _refused("--encode-endpoint", "DYN_TRTLLM_ENCODE_ENDPOINT", "there are no encode workers"),
    _nothing("--allowed-local-media-path", "DYN_TRTLLM_ALLOWED_LOCAL_MEDIA_PATH", _MULTIMODAL),
    _nothing("--max-file-size-mb", "DYN_TRTLLM_MAX_FILE_SIZE_MB", _MULTIMODAL),
    _refused("--frontend-decoding", "DYN_TRTLLM_FRONTEND_DECODING", "text alone", _S, ("false", "")),
    _option("--guided-decoding-backend", "guided_decoding_backend", str),
    *(
        _nothing(name, _trtllm(name), _DIFFUSION)
        for name in (
            "--quant-algo", "--teacache-thresh", "--torch-dtype", "--attn-backend", "--dit-ulysses-size",
            "--dit-ring-size", "--dit-cfg-size", "--default-height", "--default-width",
            "--default-num-inference-steps", "--default-guidance-scale", "--default-num-frames",
            "--default-num-images-per-prompt",
        )
    ),
    *(
        _nothing(name, _trtllm(name), _DIFFUSION, _S)
        for name in (
            "--quant-dynamic", "--enable-teacache", "--teacache-use-ret-steps", "--disable-torch-compile",
            "--enable-fullgraph", "--enable-cuda-graph", "--enable-layerwise-nvtx-marker", "--skip-warmup",
        )
    ),
    _nothing("--revision", "DYN_TRTLLM_REVISION", f"{_DIFFUSION}; for others the model is NAME@REVISION"),
)  # fmt: skip

#: A worker's wishes for the router in Dynamo's frontend. Their variables are the frontend's own.
_ROUTING = (
    _refused(
        "--router-mode", None, "the router is chosen where it runs: `vswa frontend --router-mode`, or ROUTER"
    ),
    *(
        _nothing(name, None, _ROUTER)
        for name in (
            "--router-session-affinity-ttl-secs", "--router-session-affinity-mode",
            "--active-decode-blocks-threshold", "--active-prefill-tokens-threshold",
            "--active-prefill-tokens-threshold-frac", "--router-kv-overlap-score-credit",
            "--router-kv-overlap-score-credit-decay", "--router-prefill-load-scale",
            "--router-decode-active-request-weight", "--router-host-cache-hit-weight",
            "--router-disk-cache-hit-weight", "--router-temperature", "--router-tracking-hash",
            "--router-tracking-key-file", "--router-tracking-key-id", "--router-prefill-load-model",
            "--router-ttl-secs", "--router-approximate-cache-policy", "--router-queue-threshold",
            "--router-policy-config", "--router-conditional-disagg-config", "--router-prefill-policy",
            "--router-decode-policy", "--router-event-threads", "--router-queue-policy",
            "--shared-cache-multiplier", "--shared-cache-type", "--router-predicted-ttl-secs",
        )
    ),
    _nothing("--router-kv-overlap-score-weight", None, _ROUTER, _V, "--kv-overlap-score-weight"),
    *(
        _nothing(name, None, _ROUTER, _S)
        for name in (
            "--load-aware", "--router-replica-sync", "--router-track-prefill-tokens",
            "--router-conditional-disagg", "--use-remote-indexer", "--enable-session-prefix-index",
        )
    ),
    *(
        _nothing(f"--router-{name}", None, _ROUTER, _S, f"--{name}")
        for name in ("kv-events", "track-active-blocks", "track-output-blocks", "assume-kv-reuse")
    ),
)  # fmt: skip

#: Rewritten by Dynamo before its parser runs: both of --publish-kv-events and --publish-metrics.
COMBINED = Flag(
    "--publish-events-and-metrics",
    "DYN_TRTLLM_PUBLISH_EVENTS_AND_METRICS",
    _S,
    Fate.EVENTS,
    "--publish-kv-events and --publish-metrics",
)
FLAGS = (*_RUNTIME, *_BACKEND, COMBINED, *_ROUTING)

#: Variables without a flag, each with what becomes of it.
VARIABLES = {
    "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": "the default of `--drain-timeout`",
    "DYN_NAMESPACE_WORKER_SUFFIX": "appended to the namespace with a hyphen",
    "DYN_FORWARDPASS_METRIC_PORT": "without effect: no forward-pass metrics are published",
    "DYN_TRTLLM_KV_EVENT_HOSTS": "without effect: events are polled, not streamed",
    "DYN_TRTLLM_SERVER_DISABLE_GC": "without effect: the garbage collector stays on",
    "DYN_SYSTEM_PORT": "Dynamo's runtime serves /live, /health and /metrics there",
    "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": "read by Dynamo's runtime",
    "DYN_DYNAMO_REQUEST_QUEUE_LIMIT": "read by Dynamo's runtime",
}


def names_of(flag: Flag) -> tuple[str, ...]:
    """All names of a flag on the command line, the negative ones included."""
    names = (flag.name, *flag.others)
    if flag.takes is not Takes.SWITCH:
        return names
    return (*names, *(f"--no-{name.removeprefix('--')}" for name in names))
