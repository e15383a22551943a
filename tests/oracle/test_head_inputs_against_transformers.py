"""What the output head and the MTP layer are calibrated on, against the whole model at once.

The twin is transformers' text model under the weights of the finished result, read with numpy.
It runs each row alone and cut to its real tokens; the fusion is spelled out in float64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    HIDDEN,
    TEXT_VALUES,
    Tiny,
    quantized_modules,
    random_text,
    read_weights,
)
from support.mtp_twin import normed
from support.packed import dense
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

from nybble.data.rows import Rows, build_rows
from nybble.pipeline import heads, run
from nybble.pipeline.block import Block, Calibrated, Rounded
from nybble.pipeline.quantize import load_tokenizer, quantize
from nybble.quant.moments import InputMoments
from nybble.recipe.schema import Algorithm, Calibration, Gptq, Recipe, Scheme, SignRound

Tensors = dict[str, torch.Tensor]
PREFIX = Tiny().prefix
TRUNK = quantized_modules(PREFIX)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Rows of 2 to 40 tokens: one has a single position with a next token."""
    path = tmp_path_factory.mktemp("text") / "short.jsonl"
    lengths = (1, 3, 6, 9, 12, 30)
    lines = [random_text(n, seed=n).strip().replace("\n", " ") for n in lengths]
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines), encoding="utf-8")
    return Calibration(source=str(path), rows=6, seqlen=40, layout="pad", min_tokens=1)


@pytest.fixture(scope="module")
def rows(tiny_base: Path, calibration: Calibration) -> Rows:
    return build_rows(calibration, load_tokenizer(tiny_base))


@pytest.fixture
def base(tiny_base: Path) -> Tensors:
    return {name: tensor.float() for name, tensor in read_weights(tiny_base).items()}


def rounded_trunk(out: Path, base: Tensors) -> Tensors:
    """The base's tensors with those of the trunk that the result holds quantized."""
    stored = read_weights(out)
    return base | {f"{module}.weight": dense(stored, module) for module in TRUNK}


def last_hidden(weights: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [T, D] after the final norm."""
    model = Qwen3_5TextModel(Qwen3_5TextConfig(**TEXT_VALUES)).eval().float()
    model.load_state_dict(
        {n.removeprefix(PREFIX): w for n, w in weights.items() if n.startswith(PREFIX)}
    )
    with torch.no_grad():
        hidden = model(input_ids=ids[None], use_cache=False).last_hidden_state
    return hidden[0]


def fused(weights: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """The MTP layer's inputs at every position that has a next token, float64 [T-1, D]."""
    hidden = last_hidden(weights, ids).double()
    table, fc = weights[f"{PREFIX}embed_tokens.weight"], weights["mtp.fc.weight"].double()
    embed_norm, hidden_norm = (
        weights[f"mtp.pre_fc_norm_{part}.weight"].double() for part in ("embedding", "hidden")
    )
    inputs = []
    for t in range(len(ids) - 1):
        embedding = table[ids[t + 1]].double()
        inputs.append(
            fc @ torch.cat([normed(embedding, embed_norm), normed(hidden[t], hidden_norm)])
        )
    return torch.stack(inputs) if inputs else torch.empty(0, HIDDEN, dtype=torch.float64)


def real_ids(rows: Rows) -> list[torch.Tensor]:
    return [ids[:length] for ids, length in zip(rows.token_ids, rows.lengths, strict=True)]


@pytest.mark.parametrize("algorithm", [Gptq(), SignRound(iters=3, batch_size=3)], ids=str)
def test_the_mtp_layers_inputs(
    tiny_base: Path,
    base: Tensors,
    calibration: Calibration,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Algorithm,
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []
    real = run.enter_mtp_layer

    def spy(*arguments: object) -> Calibrated:
        entered = real(*arguments)
        streams = entered.streams
        assert streams.mask is not None
        base_stream = None if streams.base is None else streams.base.clone()
        seen.append((streams.quantized.clone(), base_stream, streams.mask.clone()))
        return entered

    monkeypatch.setattr(run, "enter_mtp_layer", spy)
    recipe = Recipe(scheme=Scheme(mtp_bits=4), algorithm=algorithm, calibration=calibration)
    out = quantize(tiny_base, tmp_path / "out", recipe, "cpu").out
    ((quantized_stream, base_stream, mask),) = seen
    assert quantized_stream.shape == (6, 39, HIDDEN)
    assert (base_stream is not None) == recipe.trains

    trunk = rounded_trunk(out, base)
    assert len(set(rows.lengths.tolist())) > 4
    for row, ids in enumerate(real_ids(rows)):
        count = len(ids) - 1
        assert mask[row].tolist() == [True] * count + [False] * (39 - count)
        expected = fused(trunk, ids)
        found = quantized_stream[row, :count].double()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        if base_stream is not None:
            expected = fused(base, ids)
            assert torch.allclose(base_stream[row, :count].double(), expected, rtol=1e-4, atol=1e-4)
            assert count < 2 or not torch.allclose(found, expected, atol=0.05)


def test_the_output_heads_moments(
    tiny_base: Path,
    base: Tensors,
    calibration: Calibration,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []
    real = heads.gptq_group

    def spy(
        block: Block, names: tuple[str, ...], algorithm: Gptq, moments: list[InputMoments]
    ) -> dict[str, Rounded]:
        assert [one.tokens for one in moments] == [int(rows.lengths.sum())]
        seen.append(moments[0].second_moment())
        return real(block, names, algorithm, moments)

    monkeypatch.setattr(heads, "gptq_group", spy)
    recipe = Recipe(scheme=Scheme(lm_head_bits=8), algorithm=Gptq(), calibration=calibration)
    out = quantize(tiny_base, tmp_path / "out", recipe, "cpu").out
    trunk = rounded_trunk(out, base)
    states = torch.cat([last_hidden(trunk, ids) for ids in real_ids(rows)]).double()
    expected = sum(torch.outer(h, h) for h in states) / len(states)
    ((found),) = seen
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    others = torch.cat([last_hidden(base, ids) for ids in real_ids(rows)]).double()
    assert float((found - others.T @ others / len(others)).norm() / expected.norm()) > 0.01
