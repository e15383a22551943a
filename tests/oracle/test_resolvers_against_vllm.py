"""The resolvers of auto_round, gptq and awq against vLLM 0.32's own config classes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.declarations import (
    BF16,
    IN_BLOCK,
    NEWEST,
    PORTABLE,
    PORTABLE_EXTRA,
    TRUNK,
    awq,
    context,
    gptq,
    inc,
    trunk_linears,
    wrapper_layout,
)
from support.moe_checkpoints import CONFIGS

from nybble.doctor.findings import Part
from nybble.doctor.layout.modules import modules
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Kind, Layout, Module
from nybble.doctor.resolve.built import DENSE, Built, NotAnalysed, Refusal
from nybble.doctor.resolve.methods import method_of

ROOT = Path(__file__).parents[2]
ENGINE_PYTHON = ROOT / ".engine-venv" / "bin" / "python"
RUNNER = ROOT / "tests" / "engine" / "resolver_runner.py"

WIDE = {"bits": 8, "group_size": 128, "sym": True}
BLOCK_0, BLOCK_3 = f"{TRUNK}.0", f"{TRUNK}.3"

BLOCKS = [
    inc(block_name_to_quantize=TRUNK),
    inc(to_quant_block_names=[TRUNK]),
    inc(to_quant_block_names=[[f"{TRUNK}.0"], [f"{TRUNK}.1"]]),
    inc(block_name_to_quantize=f"{TRUNK},mtp.layers"),
    inc(block_name_to_quantize=[TRUNK, "mtp.layers"], extra_config={"mtp.fc": BF16}),
    inc(block_name_to_quantize="model.layers"),
    inc(block_name_to_quantize=[3]),
    inc(block_name_to_quantize=4),
    inc(block_name_to_quantize=TRUNK, extra_config=PORTABLE_EXTRA),
    inc(extra_config={".*mtp.*": BF16, ".*visual.*": BF16}),
    inc(),
    inc(sym=None),
    inc(sym=False),
    inc(bits=8),
    inc(bits=None),
    inc(bits=9),
    inc(bits="4"),
    inc(group_size=None),
    inc(group_size="128"),
    inc(group_size=[1, 2]),
    inc(group_size=48),
    inc(packing_format="auto_round:gptq"),
    inc(packing_format="auto_round:exllamav2"),
    inc(packing_format="auto_round:llm_compressor"),
    inc(packing_format=["auto_round:auto_gptq"]),
    inc(packing_format="auto_round:auto_awq", sym=False),
    inc(packing_format="auto_round:auto_awq", bits=8),
    inc(data_type="float"),
    inc(backend="exllama"),
    inc(extra_config=["mtp"]),
    inc(extra_config={f"{BLOCK_0}.mlp.down_proj": {"group_size": 32}}),
    inc(extra_config={f"{BLOCK_0}.mlp.down_proj": 16}),
    inc(extra_config={f"{BLOCK_0}.mlp.down_proj": {"bits": "8"}}),
    inc(extra_config={f"{BLOCK_0}.mlp.down_proj": {"group_size": "x"}}),
    inc(extra_config={f"{BLOCK_0}.mlp.{name}": WIDE for name in ("gate_proj", "up_proj")}),
    inc(extra_config={f"{BLOCK_0}.mlp.gate_proj": WIDE}),
    inc(extra_config={f"{BLOCK_0}.linear_attn.in_proj_qkv": BF16}),
    inc(extra_config={f"{BLOCK_0}.linear_attn.in_proj_{name}": BF16 for name in ("qkv", "z")}),
    inc(extra_config={f"{BLOCK_0}.linear_attn.in_proj_{name}": BF16 for name in ("a", "b")}),
    inc(extra_config={"in_proj_ba": BF16, "down_proj": WIDE, "0.mlp.down_proj": BF16}),
    inc(extra_config={"lm_head": WIDE}),
    inc(extra_config={"(": BF16, "*": BF16, r".*\.o_proj$": BF16, "layers.[01].*": WIDE}),
    inc(extra_config={r"model\.language_model\.layers.*": BF16}),
    inc(dynamic={"-:.*mtp.*": {}}),
    gptq(),
    gptq(modules_in_block_to_quantize=IN_BLOCK),
    gptq(modules_in_block_to_quantize=IN_BLOCK, dynamic={"-:.*mtp.*": {}}),
    gptq(modules_in_block_to_quantize=IN_BLOCK, dynamic=PORTABLE),
    gptq(modules_in_block_to_quantize=[name for names in IN_BLOCK for name in names]),
    gptq(modules_in_block_to_quantize=["self_attn.q_proj", "mlp.down_proj"]),
    gptq(modules_in_block_to_quantize=["mlp"]),
    gptq(modules_in_block_to_quantize=[TRUNK]),
    gptq(modules_in_block_to_quantize=[f"{TRUNK}.0"]),
    gptq(modules_in_block_to_quantize="mlp"),
    gptq(modules_in_block_to_quantize=[1]),
    gptq(modules_in_block_to_quantize=[["mlp"], "lm"]),
    gptq(modules_in_block_to_quantize=[["mlp"], 4]),
    gptq(lm_head=True, modules_in_block_to_quantize=["mlp", "lm_head"]),
    gptq(dynamic={r"-:.*self_attn\.q_proj": {}, r"-:.*gate_up_proj": {}}),
    gptq(dynamic={r"+:.*\.down_proj": {"bits": 8}, ".*o_proj": {"group_size": 32}}),
    gptq(dynamic={".*down_proj": {"bits": 3}}),
    gptq(dynamic={".*down_proj": {"bits": 0}}),
    gptq(dynamic={".*down_proj": {"group_size": 48}}),
    gptq(dynamic={".*down_proj": 0, ".*o_proj": 7}),
    gptq(dynamic={"+:(": {}}),
    gptq(dynamic=["x"]),
    gptq(dynamic={"+:.*": {"desc_act": True}}),
    gptq(desc_act=True),
    gptq(desc_act=True, group_size=-1),
    gptq(desc_act=None),
    gptq(sym=None),
    gptq(sym=False),
    gptq(bits=3),
    gptq(bits=0),
    gptq(bits="4"),
    gptq(group_size=48),
    gptq(checkpoint_format="gptq_v2"),
    awq(),
    awq(modules_to_not_convert=["mtp", "visual", "in_proj_a", "in_proj_b", "lm_head"]),
    awq(modules_to_not_convert=["model.visual", "mtp."]),
    awq(modules_to_not_convert=["q_proj"]),
    awq(modules_to_not_convert=["qkv_proj", "in_proj_ba"]),
    awq(modules_to_not_convert="z"),
    awq(modules_to_not_convert=[None]),
    awq(modules_to_not_convert=7),
    awq(lm_head=True, modules_to_not_convert=["mtp"]),
    awq(zero_point=None),
    awq(zero_point=False, modules_to_not_convert=["mtp"]),
    awq(bits=8),
    awq(bits=None, w_bit=4, group_size=None, q_group_size=64),
    awq(version="gemv"),
]


EXPERTS = f"{TRUNK}.1.mlp.experts"
MOE_BLOCKS = [
    inc(block_name_to_quantize=TRUNK),
    inc(),
    inc(extra_config={f"{EXPERTS}.{n}.down_proj": BF16 for n in range(2)}),
    inc(extra_config={f"{EXPERTS}": BF16}),
    inc(extra_config={r".*experts.*": BF16, r".*shared_expert\..*": WIDE}),
    inc(group_size=48, extra_config={".*(?<!experts)$": BF16}),
    inc(packing_format="auto_round:auto_awq", bits=8, extra_config={".*(?<!experts)$": BF16}),
    inc(packing_format="auto_round:auto_awq", extra_config={".*(?<!experts)$": BF16}),
    gptq(modules_in_block_to_quantize=IN_BLOCK),
    gptq(dynamic={"-:.*experts": {}, "-:.*mtp.*": {}}),
    gptq(dynamic={r".*experts": {"bits": 8, "group_size": 48}, ".*": {"group_size": 32}}),
    gptq(group_size=48, dynamic={"-:.*": {}}),
    awq(modules_to_not_convert=["experts"]),
    awq(modules_to_not_convert=["mlp.gate", "shared_expert", "mtp"]),
    awq(group_size=48, modules_to_not_convert=["shared_expert.down_proj"]),
]
DENSE_MODEL = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MTP")
MOE_MODEL = ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeMTP")
CASES = [(*DENSE_MODEL, block) for block in BLOCKS] + [(*MOE_MODEL, block) for block in MOE_BLOCKS]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What vLLM makes of every case."""
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    jobs = [_job(*DENSE_MODEL, BLOCKS), _job(*MOE_MODEL, MOE_BLOCKS)]
    folder = tmp_path_factory.mktemp("resolvers")
    files = [folder / name for name in ("job.json", "result.json")]
    files[0].write_text(json.dumps(jobs))
    command = [str(ENGINE_PYTHON), str(RUNNER), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [result for job in json.loads(files[1].read_text()) for result in job]


@pytest.mark.engine
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"block-{number}")
def test_what_is_built_is_what_vllm_builds(answers: list[dict[str, Any]], number: int) -> None:
    (architecture, _, block), expected = CASES[number], answers[number]
    layout = _layout(architecture)
    method = method_of(block)
    assert method is not None
    ours = context(block, NEWEST, _packed(layout), layout)
    refusal = method.refusal(ours)
    assert (refusal and refusal.exception) == expected["refusal"], (block, refusal, expected)
    if refusal is not None:
        return
    compared = 0
    for module in _asked(layout):
        key = module.name + ("|mtp" if module.part is Part.MTP else "")
        built = method.resolve(ours, module)
        theirs = _with_hook(block, module.name, expected["built"][key])
        assert _plain(built) == _kept(theirs), (block, module.name, built, theirs)
        compared += 1
    assert compared > 20


def _job(model: str, draft: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    layout = _layout(model)
    return {
        "model": {"module": "qwen3_5", "class": model},
        "draft": {"module": "qwen3_5_mtp", "class": draft},
        "modules": [
            {
                "name": module.name,
                "kind": module.kind.value,
                "mtp": module.part is Part.MTP,
                "shape": [sum(one.shape[0] for one in module.members), module.members[0].shape[1]],
            }
            for module in _asked(layout)
        ],
        "metadata": _types(layout, _packed(layout)),
        "blocks": blocks,
    }


def _layout(architecture: str) -> Layout:
    if architecture == DENSE_MODEL[0]:
        return wrapper_layout()
    layout = layout_of({"architectures": [architecture], **CONFIGS[architecture]})
    assert layout is not None
    return layout


def _packed(layout: Layout) -> frozenset[str]:
    return frozenset(name for name in trunk_linears(layout) if not name.endswith("gate"))


def _asked(layout: Layout) -> list[Module]:
    return [module for module in modules(layout, NEWEST) if module.kind is not Kind.PLAIN]


def _with_hook(block: dict[str, Any], name: str, theirs: Any) -> Any:
    """The MTP layer's own hook lies in the model's class, which the runner does not build."""
    rules = block.get("dynamic", {})
    is_kept = name.startswith("mtp.layers.") and "-:.*mtp.*" in rules
    return "dense" if is_kept else theirs


def _plain(built: Built) -> Any:
    if isinstance(built, Refusal):
        return "error" if built.exception == "re.error" else built.exception
    assert not isinstance(built, NotAnalysed)
    if built == DENSE:
        return "dense"
    return [built.storage.value, built.bits, built.group_size, built.symmetric]


def _kept(theirs: Any) -> Any:
    return theirs["raises"] if isinstance(theirs, dict) else theirs


def _types(layout: Layout, packed: frozenset[str]) -> dict[str, str]:
    """Of every tensor in the folder, as GPTQ or AWQ writes it."""
    types = {}
    stacked = {f"{one}.weight" for linears in layout.stacks.values() for one in linears}
    for name in layout.tensors.keys() - layout.stacks.keys() | stacked:
        owner = name.removesuffix(".weight")
        if owner in packed:
            types |= {f"{owner}.{part}": "I32" for part in ("qweight", "qzeros")}
            types[f"{owner}.scales"] = "F16"
        else:
            types[name] = "BF16"
    return types
