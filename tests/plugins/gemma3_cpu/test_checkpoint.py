"""Configuration, weights and the small random checkpoint of the Gemma 3 engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from vswa_plugins.gemma3_cpu.model.config import Rope, load_config, parse_config
from vswa_plugins.gemma3_cpu.model.model import Chunk, PagedKV, group_layers
from vswa_plugins.gemma3_cpu.weights.checkpoint import (
    CHAT_TEMPLATE,
    DEFAULT_CONFIG,
    make_checkpoint,
    write_safetensors,
)
from vswa_plugins.gemma3_cpu.weights.safetensors import SafetensorsSource, canonical_name
from vswa_plugins.gemma3_cpu.weights.source import load_model

from tests.properties import examples
from vswa_plugin.errors import ConfigError

SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 300, "num_hidden_layers": 2}


def parsed(**changes: Any) -> Any:
    return parse_config({**DEFAULT_CONFIG, **changes}, "config.json")


@pytest.fixture(scope="module")
def default_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "default"
    make_checkpoint(directory)
    return directory


@pytest.fixture
def small_dir(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "small", overrides=SMALL)
    return tmp_path / "small"


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_default_checkpoint_shows_two_windows(default_dir: Path) -> None:
    config = load_config(default_dir)

    assert (512, 512, 512, 512, 512, None) == config.windows()
    assert (512, None) == config.groups
    assert [[0, 1, 2, 3, 4], [5]] == group_layers(config)
    assert 8192 == config.max_position_embeddings
    assert (1, 5) == config.eos_token_ids


def test_the_same_seed_gives_the_same_files_and_another_seed_other_weights(
    default_dir: Path, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "again")
    make_checkpoint(tmp_path / "other", seed=1)
    names = sorted(path.name for path in default_dir.iterdir())

    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all(
        (default_dir / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names
    )
    weights = "model.safetensors"
    assert (default_dir / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_make_checkpoint_keeps_a_directory_that_is_not_empty(small_dir: Path) -> None:
    (small_dir / "model-00001-of-00002.safetensors").touch()

    with pytest.raises(ConfigError, match=r"small: not empty; choose a new directory"):
        make_checkpoint(small_dir)
    with pytest.raises(ConfigError, match="expected a directory to write a checkpoint to, found a file"):
        make_checkpoint(small_dir / "config.json")
    make_checkpoint(small_dir, overwrite=True, overrides=SMALL)
    assert 2 == load_model(small_dir).config.num_hidden_layers


def greedy(directory: Path, text: str, count: int) -> tuple[list[int], list[float]]:
    """Token ids of the greedy answer, and by how much each led the second."""
    model = load_model(directory)
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    kv = PagedKV(model.config, group_layers(model.config), [40, 40], 32)
    tables = [list(range(40))] * 2
    start, answer, leads = 0, [], []
    for _ in range(count):
        logits = model.forward([Chunk(np.array(tokens), start, tables)], kv)[0]
        second, first = np.sort(logits)[-2:]
        start, tokens = start + len(tokens), [int(logits.argmax())]
        answer.append(tokens[0])
        leads.append(float(first - second))
    return answer, leads


def test_answers_depend_on_the_prompt_and_vary(default_dir: Path) -> None:
    """Also on what only the global layer sees: the last two prompts differ in front of the window alone."""
    tail = " ".join(f"line {i} of the text" for i in range(90))
    prompts = ("What is a window?", "Tell me about caches.", "one day " * 60 + tail, "my list " * 60 + tail)
    answers, leads = zip(*(greedy(default_dir, prompt, 16) for prompt in prompts), strict=True)

    assert len(prompts) == len({tuple(answer) for answer in answers})
    assert all(len(set(answer)) > 8 for answer in answers[:2])
    assert np.median(np.concatenate(leads)) > 0.1
    assert not {0, 1, 2, 3, 4, 5} & set(np.concatenate(answers).tolist())


@examples(200)
@given(text=st.text().filter(lambda text: "\u2581" not in text))
def test_the_tokenizer_gives_any_text_back(default_dir: Path, text: str) -> None:
    """All but U+2581, which stands for a space here as it does in Gemma."""
    tokenizer = Tokenizer.from_file(str(default_dir / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids

    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    assert all(token_id < DEFAULT_CONFIG["vocab_size"] for token_id in ids)


def test_the_tokenizer_knows_turns_and_words(default_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(default_dir / "tokenizer.json"))

    assert [2, 4, 5] == [
        tokenizer.token_to_id(token) for token in ("<bos>", "<start_of_turn>", "<end_of_turn>")
    ]
    assert DEFAULT_CONFIG["vocab_size"] == tokenizer.get_vocab_size()
    english = "The function returns a new list that contains the names of the files in the directory."
    assert len(tokenizer.encode(english).ids) < 30


def test_the_chat_template_writes_turns() -> None:
    jinja2 = pytest.importorskip("jinja2", reason="pip install jinja2")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " Hi "}, {"type": "image_url"}]},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on\n"},
    ]
    text = jinja2.Template(CHAT_TEMPLATE).render(
        messages=messages, bos_token="<bos>", add_generation_prompt=True
    )

    expected = (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\nGo on<end_of_turn>\n<start_of_turn>model\n"
    )
    assert expected == text


def test_older_and_newer_rope_keys_mean_the_same() -> None:
    older = parsed(
        rope_theta=5e5, rope_local_base_freq=7e3, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )
    newer = parsed(
        rope_theta=None,
        rope_local_base_freq=None,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
        },
    )

    assert older == newer
    assert Rope(5e5, 8.0) == older.rope(None)
    assert Rope(7e3) == older.rope(512)


def test_missing_keys_have_the_defaults_of_transformers() -> None:
    """The multimodal sizes leave most keys out."""
    config = parse_config(
        {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}}
    )

    assert (262_208, 10240 - 1024, 8, 4, 256) == (
        config.vocab_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    assert (4096, None) == config.groups
    assert [5, 11, 17, 23, 29] == [layer for layer, window in enumerate(config.windows()) if window is None]


def test_a_multimodal_config_says_that_only_text_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        parse_config({"model_type": "gemma3", "text_config": {}}, "dir/config.json")

    assert "only its text part is loaded" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma2"},
            "unknown model_type 'gemma2': did you mean 'gemma3'. Known: gemma3, gemma3_text",
        ),
        ({"model_type": None}, "unknown model_type 'None'"),
        ({"model_type": "gemma3"}, "needs an object 'text_config'"),
        ({"hidden_size": "64"}, "config.json: hidden_size: Expected `int`, got `str`"),
        ({"hidden_size": 0}, "hidden_size: expected a positive number, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4 attention heads, got 3"),
        ({"head_dim": 7}, "head_dim: expected an even number, got 7"),
        (
            {"sliding_window": None},
            "sliding_window: expected a positive window for the sliding layers, got None",
        ),
        ({"use_bidirectional_attention": True}, "only causal attention is supported"),
        ({"hidden_activation": "relu"}, "only 'gelu_pytorch_tanh' is supported, got 'relu'"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected one for each of 6 layers, got 1"),
        (
            {"layer_types": ["ful_attention"] * 6},
            "unknown layer type 'ful_attention': did you mean 'full_attention'",
        ),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern: expected a positive number, got 0"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "unknown rope type 'yarn'. Known: default, linear",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "x"}},
            "factor of full_attention: expected a positive",
        ),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: expected the keys"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(**changes)

    assert message.replace(".", "") in str(error.value).replace(".", "").replace("?", "")


def test_softcapping_that_gemma_3_never_applies_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    parsed(attn_logit_softcapping=50.0)

    assert "attn_logit_softcapping is set" in caplog.text


def test_a_directory_that_is_not_complete_names_what_is_missing(small_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model directory .*nowhere: expected .* found nothing there; `vswa make-"
    ):
        load_config(tmp_path / "nowhere")
    (small_dir / "tokenizer.json").rename(small_dir / "other.json")
    with pytest.raises(ConfigError, match=r"small/tokenizer.json: not found"):
        load_config(small_dir)
    (small_dir / "model.safetensors").rename(small_dir / "model.bin")
    with pytest.raises(
        ConfigError, match=r"expected weights in model.safetensors or .*, found config.json, .*model.bin"
    ):
        load_config(small_dir)
    (small_dir / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"small/config.json: expected a JSON object, got: Expecting"):
        load_config(small_dir)
    (small_dir / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"small/config.json: not found"):
        load_config(small_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 3},
            "missing tensor layers.2.input_layernorm.weight, .* and 8 more of a Gemma 3 of 3",
        ),
        (
            {"num_hidden_layers": 1},
            "unknown tensor layers.1.input_layernorm.weight, .* for a Gemma 3 of 1 layers",
        ),
        (
            {"intermediate_size": 64},
            r"layers.0.mlp.gate_proj.weight: expected shape \[64, 32\] by .* got \[32, 32\]",
        ),
        ({"tie_word_embeddings": False}, "missing tensor lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    small_dir: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(small_dir, **changes)

    with pytest.raises(ConfigError, match=message):
        load_model(small_dir)


def test_a_damaged_weights_file_is_named(small_dir: Path) -> None:
    file = small_dir / "model.safetensors"
    whole = file.read_bytes()
    for damaged, message in [
        (whole[:-1], "it is truncated"),
        (whole[:4], "expected a safetensors file"),
        (b"\xff" * 100, "expected a safetensors file"),
        (b"\x04" + b"\0" * 7 + b"null", "expected a safetensors file"),
        (whole.replace(b'"BF16"', b'"F8XX"', 1), "expected dtype F32, F16, BF16, got 'F8XX'"),
    ]:
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=message) as error:
            load_model(small_dir)
        assert str(file) in str(error.value)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "sharded", overrides=SMALL, shards=2)
    (tmp_path / "sharded" / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(
        ConfigError, match=r"model-00002-of-00002.safetensors: not found; the weights are incomplete"
    ):
        load_model(tmp_path / "sharded")


def test_tensors_of_every_float_type_become_float32(tmp_path: Path) -> None:
    """Written by the safetensors package, read by ours; bfloat16 keeps NaN, infinities and signed zero."""
    exact = np.array([[0.0, -0.0, 1.5], [-2.0, np.inf, 2.0**-100]], dtype=np.float32)
    safetensors.numpy.save_file({"a": exact, "b": exact.astype(np.float16)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    np.testing.assert_array_equal(exact, source.read("a"))
    np.testing.assert_array_equal(exact.astype(np.float16).astype(np.float32), source.read("b"))

    write_safetensors(tmp_path / "model.safetensors", {"c": exact})
    actual = SafetensorsSource(tmp_path).read("c")
    np.testing.assert_array_equal(exact.view(np.uint32), actual.view(np.uint32))
    assert np.float32 == actual.dtype
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert ["c"] == list(file.keys())
        assert "BF16" == file.get_slice("c").get_dtype()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "norm.weight"),
        ("language_model.model.embed_tokens.weight", "embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("norm.weight", "norm.weight"),
        ("vision_tower.vision_model.post_layernorm.weight", None),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
    ],
)
def test_names_of_every_kind_of_checkpoint_mean_the_same(name: str, expected: str | None) -> None:
    assert expected == canonical_name(name)
