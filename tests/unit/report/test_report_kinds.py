from __future__ import annotations

import itertools

import pytest

from nybble.report.kinds import SOLID, kind_of, styles

MIXERS = ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
REST = ["gate_proj", "up_proj", "down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.language_model.layers.12.linear_attn.in_proj_qkv", "in_proj_qkv"),
        ("model.layers.3.self_attn.q_proj", "q_proj"),
        ("mtp.layers.0.mlp.down_proj", "down_proj"),
        ("model.layers.3.mlp.experts.17.up_proj", "experts.up_proj"),
        ("model.layers.3.mlp.shared_expert.up_proj", "shared_expert.up_proj"),
        ("lm_head", "lm_head"),
        ("model.layers.3.fc", "fc"),
    ],
)
def test_a_kind_is_a_name_without_its_place(module: str, kind: str) -> None:
    assert kind_of(module) == kind


@pytest.mark.parametrize("panel", [MIXERS, REST])
def test_kinds_in_one_panel_differ_in_colour_and_in_marker(panel: list[str]) -> None:
    for one, other in itertools.combinations(styles(panel).values(), 2):
        assert one.colour != other.colour
        assert one.marker != other.marker


def test_a_kind_looks_the_same_whatever_is_beside_it() -> None:
    assert styles(["v_proj"])["v_proj"] == styles(MIXERS)["v_proj"]
    assert styles(["up_proj"])["up_proj"] == styles(REST)["up_proj"]


def test_experts_are_told_apart_by_the_line() -> None:
    found = styles(["experts.up_proj", "up_proj", "shared_expert.up_proj"])
    assert list(found) == ["up_proj", "experts.up_proj", "shared_expert.up_proj"]
    assert len({style.colour for style in found.values()}) == 1
    assert len({style.dashes for style in found.values()}) == 3
    assert found["up_proj"].dashes == SOLID


def test_unknown_kinds_have_a_style_each() -> None:
    found = styles(["zeta", "alpha", "q_proj"])
    assert list(found) == ["q_proj", "alpha", "zeta"]
    assert found["alpha"] != found["zeta"]
    assert len(styles(f"kind{number}" for number in range(20))) == 20
