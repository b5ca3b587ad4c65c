"""``tael inspect`` and ``tael bench`` on a model of zeros."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner
from safetensors.numpy import save_file
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tael import LLM, TaelError
from tael.cli.main import main
from tael.config import BLOCK_SIZE
from tael.evals.plot import plot
from tael.loader.prepared import open_checkpoint
from tael.memory.kv_store import KVStore
from tael.models.extension import EXTENSIONS
from tael.models.registry import read_spec
from tael.models.spec import ContextExtension, cache_groups, with_kv_format


def inspect(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["inspect", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A llama of two layers, all weights zero."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 1 << 20,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    shapes = {"model.embed_tokens.weight": (300, 64), "model.norm.weight": (64,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (64,),
            f"{layer}post_attention_layernorm.weight": (64,),
            f"{layer}self_attn.q_proj.weight": (64, 64),
            f"{layer}self_attn.k_proj.weight": (32, 64),
            f"{layer}self_attn.v_proj.weight": (32, 64),
            f"{layer}self_attn.o_proj.weight": (64, 64),
            f"{layer}mlp.gate_proj.weight": (96, 64),
            f"{layer}mlp.up_proj.weight": (96, 64),
            f"{layer}mlp.down_proj.weight": (64, 96),
        }
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_inspect(tiny_model: Path) -> None:
    report = json.loads(inspect(str(tiny_model), "--json", "--memory", "1GiB"))
    num_parameters = 300 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert report["num_parameters"] == num_parameters
    assert report["weights_bytes"] == 4 * num_parameters
    assert report["tensor_types"] == {"F32": {"num_tensors": 20, "bytes": 4 * num_parameters}}
    # Keys and values of 2 heads of 16 channels in bf16, in two layers.
    (cache,) = report["cache"]
    q8_head, nibble_head = 16 + 1 + 16 + 2, 16 + 1 + 8 + 4  # with scales of 2 bytes
    assert cache["bytes_per_token"] == {
        "bf16": 2 * (2 * 2 * 16 * 2),
        "q8": 2 * 2 * q8_head,
        "k8v4": 2 * 2 * nibble_head,
    }
    for kv_format, num_bytes in cache["bytes_per_token"].items():
        spec = with_kv_format(read_spec(open_checkpoint(tiny_model)), kv_format)
        store = KVStore(cache_groups(spec, BLOCK_SIZE), [5])
        assert store.num_bytes == 5 * BLOCK_SIZE * num_bytes
    assert report["max_context"] == report["trained_context"] == 1 << 20
    text = inspect(str(tiny_model))
    assert "llama: 2 layers" in text
    assert "bytes a token: bf16 256, q8 140, k8v4 116; with a budget 24 more" in text


def test_inspect_names_the_scalings(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(inspect(str(tiny_model), "--json"))["rope_scaling"] is None
    extension = ContextExtension(("yarn", "dynamic"), 1e4, (1 << 20,), 1 << 20, 1 << 22)
    monkeypatch.setitem(EXTENSIONS, "llama", extension)
    assert "4,194,304 tokens with --rope-scaling yarn or dynamic" in inspect(str(tiny_model))


def test_inspect_says_what_a_run_would_get(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tael.memory.process.rss_bytes", lambda: 0)
    monkeypatch.setattr("tael.llm.rss_bytes", lambda: 0)
    report = json.loads(inspect(str(tiny_model), "--json", "--memory", "128MiB"))
    with LLM(str(tiny_model), memory="128MiB") as llm:
        assert report["max_context"] == llm.engine.max_model_len < 1 << 20


def test_inspect_of_a_model_that_does_not_fit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tael.memory.process.rss_bytes", lambda: 0)
    report = json.loads(inspect(str(tiny_model), "--json", "--memory", "1MiB"))
    assert report["max_context"] == 0
    assert "too small" in report["problem"]
    assert report["num_layers"] == 2
    assert report["problem"] in inspect(str(tiny_model), "--memory", "1MiB")


def test_bench_measures_every_depth_and_batch(tiny_model: Path, tmp_path: Path) -> None:
    image = tmp_path / "plot.png"
    arguments = [str(tiny_model), "--prompt", "40", "--depth", "0,64,600", "--batch", "1,3"]
    arguments += ["--decode", "2", "--context", "2048", "--runs", "1", "--plot", str(image)]
    result = CliRunner().invoke(main, ["bench", *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["limits"]["read_bytes_per_s"] > 0
    rows = report["rows"]
    assert [(r["depth"], r["batch"]) for r in rows] == [
        (depth, batch) for depth in (0, 64, 600) for batch in (1, 3)
    ]
    assert all(row["prefill_tokens_per_s"] > 0 < row["decode_tokens_per_s"] for row in rows)
    assert rows[0]["decode_limit"] > rows[-2]["decode_limit"]  # a deeper step reads more
    assert image.read_bytes().startswith(b"\x89PNG")


def test_bench_prints_a_table(tiny_model: Path) -> None:
    arguments = [str(tiny_model), "--prompt", "8", "--decode", "2", "--context", "512"]
    result = CliRunner().invoke(main, ["bench", *arguments, "--runs", "1"])
    assert result.stdout.split()[:4] == ["depth", "batch", "prefill", "t/s"]
    assert len(result.stdout.splitlines()) == 2
    assert "GB/s read" in result.stderr


def test_plot_without_matplotlib_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TaelError, match=r"pip install 'tael\[plot\]'"):
        plot(Path("plot.png"), {}, {}, title="", x_label="")


@pytest.mark.parametrize("option", ["--depth", "--prompt"])
def test_bench_refuses_nonsense(tiny_model: Path, option: str) -> None:
    result = CliRunner().invoke(main, ["bench", str(tiny_model), option, "many"])
    assert result.exit_code == 2
    assert "many" in result.stderr
