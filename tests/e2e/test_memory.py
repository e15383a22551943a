"""Memory is bounded by a block, not by the model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import TEXT_VALUES, random_text, read_json, tiny_tokenizer, trunk_shapes
from support.commands import environment

HIDDEN, INNER, HEADS, HEAD_DIM, BLOCKS = 1280, 3840, 8, 128, 12
VOCAB = 272_000  # its embedding alone would fill what the libraries leave of the limit
ROWS, SEQLEN = 2, 64
LIMIT = 1_000_000_000

CONFIG = {
    **TEXT_VALUES,
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (BLOCKS // 4),
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
MTP_LAYER = {
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
    "self_attn.q_proj": (2 * HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (2 * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (2 * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.q_norm": (HEAD_DIM,),
    "self_attn.k_norm": (HEAD_DIM,),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MTP = {
    "mtp.fc": (HIDDEN, 2 * HIDDEN),
    "mtp.norm": (HIDDEN,),
    "mtp.pre_fc_norm_embedding": (HIDDEN,),
    "mtp.pre_fc_norm_hidden": (HIDDEN,),
    **{f"mtp.layers.0.{name}": shape for name, shape in MTP_LAYER.items()},
}


@pytest.fixture
def large_base(tmp_path: Path) -> Iterator[Path]:
    """About 2 GB of random weights, written piece by piece and deleted in the end."""
    folder = tmp_path / "base"
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {**trunk_shapes(CONFIG), **{f"{name}.weight": shape for name, shape in MTP.items()}}
    header, end = {}, 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    values = 0.02 * torch.randn(2**22, generator=generator)
    piece = values.bfloat16().view(torch.uint8).numpy().tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(piece)):
            file.write(piece[: end - start])
    yield folder
    shutil.rmtree(tmp_path)


def activation_bytes() -> int:
    """Both streams, and a bound for what autograd keeps of one batch in a block (float32).

    Per token some 30 hidden-sized and 6 inner-sized tensors; the chunked recurrence of Gated
    DeltaNet holds a state of 8 heads x 128 x 128 for each chunk.
    """
    tokens = ROWS * SEQLEN
    streams = 2 * tokens * HIDDEN * 4
    kept = tokens * (30 * HIDDEN + 6 * INNER) * 4
    states = 10 * ROWS * 8 * 128 * 128 * 4
    return streams + kept + states


@pytest.mark.slow
def test_two_gigabytes_are_quantized_within_one(large_base: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(random_text(400, seed=1), encoding="utf-8")
    values = {
        "calibration.source": text,
        "calibration.layout": "pack",
        "calibration.rows": ROWS,
        "calibration.seqlen": SEQLEN,
        "algorithm.iters": 2,
        "algorithm.batch_size": ROWS,
    }
    settings = [word for k, v in values.items() for word in ("--set", f"{k}={v}")]
    command = [sys.executable, "-m", "nybble", "quantize", large_base, "-o", out, *settings]
    # Through a shell that forks: Linux counts the peak of the process that calls exec as the new
    # program's own, and pytest's may be large by now.
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@"; exit $?', "sh", *map(str, command)],
        env=environment({"OMP_NUM_THREADS": "2"}),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    base_bytes = (large_base / "model.safetensors").stat().st_size
    peak = read_json(out / "nybble.json")["cost"]["peak_rss_bytes"]
    assert base_bytes > 1_850_000_000
    assert activation_bytes() < 50_000_000
    assert peak < LIMIT + activation_bytes()
