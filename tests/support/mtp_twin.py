"""The MTP head once more, slowly: plain formulas in float64, one position at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from support.checkpoints import HEAD_DIM, HEADS, KEY_HEADS

ROTATED = HEAD_DIM // 4
THETA = 10000.0
EPSILON = 1e-6


def slow_mtp_head(
    tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor, next_embeds: torch.Tensor
) -> torch.Tensor:
    """Hidden states and next tokens' embeddings [T, D] of one row -> the head's output [T, D]."""
    w = {name.removeprefix("mtp."): tensor.double() for name, tensor in tensors.items()}
    layer = {n.removeprefix("layers.0."): t for n, t in w.items() if n.startswith("layers.0.")}
    inputs = [
        w["fc.weight"]
        @ torch.cat(
            [
                normed(next_embeds[t].double(), w["pre_fc_norm_embedding.weight"]),
                normed(hidden[t].double(), w["pre_fc_norm_hidden.weight"]),
            ]
        )
        for t in range(len(hidden))
    ]
    attended = attention(layer, [normed(x, layer["input_layernorm.weight"]) for x in inputs])
    outputs = []
    for x, mixed in zip(inputs, attended, strict=True):
        middle = x + mixed
        ready = normed(middle, layer["post_attention_layernorm.weight"])
        gate, up = layer["mlp.gate_proj.weight"] @ ready, layer["mlp.up_proj.weight"] @ ready
        end = middle + layer["mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
        outputs.append(normed(end, w["norm.weight"]))
    return torch.stack(outputs)


def attention(layer: Mapping[str, torch.Tensor], xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gated causal attention: each head's queries come with a gate of their own size."""
    queries, gates, keys, values = [], [], [], []
    for position, x in enumerate(xs):
        both = (layer["self_attn.q_proj.weight"] @ x).view(HEADS, 2, HEAD_DIM)
        key = (layer["self_attn.k_proj.weight"] @ x).view(KEY_HEADS, HEAD_DIM)
        query_norm, key_norm = (layer[f"self_attn.{n}_norm.weight"] for n in "qk")
        queries.append([rotated(normed(q, query_norm), position) for q in both[:, 0]])
        keys.append([rotated(normed(k, key_norm), position) for k in key])
        gates.append(both[:, 1])
        values.append((layer["self_attn.v_proj.weight"] @ x).view(KEY_HEADS, HEAD_DIM))
    results = []
    for t in range(len(xs)):
        heads = []
        for head in range(HEADS):
            shared = head * KEY_HEADS // HEADS
            scores = [
                float(queries[t][head] @ keys[s][shared]) / math.sqrt(HEAD_DIM)
                for s in range(t + 1)
            ]
            shares = [math.exp(score - max(scores)) for score in scores]
            mixed = sum((share / sum(shares)) * values[s][shared] for s, share in enumerate(shares))
            heads.append(mixed / (1 + torch.exp(-gates[t][head])))
        results.append(layer["self_attn.o_proj.weight"] @ torch.cat(heads))
    return results


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Root mean square norm; the stored weight is an offset from one."""
    return x / math.sqrt(float(x.square().mean()) + EPSILON) * (1 + weight)


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    """The first quarter of a head turned by its position, dimension i together with i + half."""
    half = ROTATED // 2
    result = x.clone()
    for i in range(half):
        angle = position * THETA ** (-2 * i / ROTATED)
        one, other = float(x[i]), float(x[i + half])
        result[i] = one * math.cos(angle) - other * math.sin(angle)
        result[i + half] = other * math.cos(angle) + one * math.sin(angle)
    return result
