"""The Linears that nearly every family has: softmax attention and a gated MLP."""

from __future__ import annotations

from nybble.arch.spec import InputGroup

ATTENTION_GROUPS = (
    InputGroup(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention",
        "self_attn.qkv_proj",
    ),
    InputGroup(("self_attn.o_proj",), "attention", "self_attn.o_proj"),
)
MLP_GROUPS = (
    InputGroup(("mlp.gate_proj", "mlp.up_proj"), "mlp", "mlp.gate_up_proj"),
    InputGroup(("mlp.down_proj",), "mlp", "mlp.down_proj"),
)
