"""Runs one decoder block at a time, with the weights of that block alone in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from nybble.arch.spec import Architecture

OnInput = Callable[[str, int, torch.Tensor, torch.Tensor | None], None]
"""(parameter, expert, inputs [N, I], their token numbers [N]); expert 0 and None for all tokens
in a Linear that is no expert."""


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and dense shape of every parameter of the text model, its head and its MTP head."""
    with torch.device("meta"):
        model = arch.build_text_model()
    shapes: dict[str, tuple[int, ...]] = {
        f"{arch.text_prefix}{name}": tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    embedding = shapes[arch.embedding]
    return {**shapes, arch.lm_head: embedding, **(arch.mtp.shapes if arch.mtp else {})}


class _CallRecorder(nn.Module):
    """Stands in for a block and notes the keyword arguments it is called with."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        for name, value in vars(block).items():
            if not name.startswith("_") and isinstance(value, str | int):
                setattr(self, name, value)

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.kwargs = kwargs
        return hidden


class _LastInput(Exception):
    """Ends a pass through a block early."""


class BlockRunner:
    """The blocks of a text model, as functions of their weights; the MTP layer is the last.

    Masks and rotary embeddings come from the model's own forward: it is run once on a row of
    zeros with every block replaced by a recorder. One row's arguments serve a batch of any size:
    padding stands at the end of a row, where no causal layer lets an earlier token see it.
    """

    def __init__(
        self, arch: Architecture, seqlen: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        with torch.device("meta"):
            model = arch.build_text_model().eval()
        self._norm = model.norm
        self._blocks: list[nn.Module] = list(model.layers)
        recorders = [_CallRecorder(block) for block in self._blocks]
        model.layers = nn.ModuleList(recorders)
        model.norm = nn.Identity()
        model.rotary_emb = type(model.rotary_emb)(config=arch.text_config).to(device)
        row = torch.zeros(1, seqlen, arch.text_config.hidden_size, device=device, dtype=dtype)
        with torch.no_grad():
            model(inputs_embeds=row, use_cache=False)
        self._kwargs = [recorder.kwargs for recorder in recorders]
        if arch.mtp:
            with torch.device("meta"):
                self._blocks.append(arch.mtp.build().eval().get_submodule("layers.0"))
            # Its rows are one token shorter: the last token has no next one to be fused with.
            positions = torch.arange(seqlen - 1, device=device)[None]
            rotary = model.rotary_emb(row, positions)
            self._kwargs.append({"position_embeddings": rotary, "attention_mask": None})

    @contextmanager
    def inputs_of(self, index: int, parameters: Iterable[str], on_input: OnInput) -> Iterator[None]:
        """While open, ``on_input`` is told every input of the named parameters of a block.

        A parameter is the ``….weight`` of a Linear, or a stack of experts.
        """
        block, handles = self._blocks[index], []
        for parameter in parameters:
            owner, _, name = parameter.rpartition(".")
            hook = _linear_hook(parameter, on_input)
            if name != "weight":
                hook = _experts_hook(parameter, on_input)
            handles.append(block.get_submodule(owner).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run_to_inputs(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        parameters: Sequence[str],
        on_input: OnInput,
    ) -> None:
        """Runs block ``index`` no further than the input of the last of ``parameters``.

        They are in the order of execution; see ``inputs_of``. What lies behind, a large Linear
        or all experts, is not computed.
        """

        def stop(_module: nn.Module, _args: tuple[torch.Tensor, ...]) -> None:
            raise _LastInput

        last = self._blocks[index].get_submodule(parameters[-1].rpartition(".")[0])
        with self.inputs_of(index, parameters, on_input):
            handle = last.register_forward_pre_hook(stop)  # after the one that tells
            try:
                self(index, weights, hidden)
            except _LastInput:
                pass
            finally:
                handle.remove()

    def __call__(
        self, index: int, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Block ``index`` on hidden [B, T, D] under ``weights`` (all of its tensors, by name)."""
        output = functional_call(
            self._blocks[index], dict(weights), (hidden,), self._kwargs[index], strict=True
        )
        assert isinstance(output, torch.Tensor)
        return output

    def final_norm(self, weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The norm between the last block and the head, on hidden [..., D]."""
        output = functional_call(self._norm, {"weight": weight}, (hidden,))
        assert isinstance(output, torch.Tensor)
        return output


def mtp_fusion(
    arch: Architecture, weights: Mapping[str, torch.Tensor]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(normed hidden states, embeddings of the next tokens) -> input of the MTP decoder layer.

    ``weights`` are those of the head outside its decoder layer, by full name.
    """
    assert arch.mtp is not None
    with torch.device("meta"):
        head: Any = arch.mtp.build().eval()
    own = {name.removeprefix(arch.mtp.prefix): tensor for name, tensor in weights.items()}
    head.load_state_dict(own, strict=False, assign=True)
    fuse: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = head.fuse
    return fuse


def _linear_hook(parameter: str, on_input: OnInput) -> Callable[..., None]:
    def tell(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        on_input(parameter, 0, args[0].detach().flatten(0, -2), None)

    return tell


def _experts_hook(parameter: str, on_input: OnInput) -> Callable[..., None]:
    """Told of every expert's tokens; an expert without any is told of none."""
    is_down = parameter.endswith("down_proj")

    def tell(experts: Any, args: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen = args[0].detach(), args[1]
        for expert in range(len(experts.gate_up_proj)):
            tokens = (chosen == expert).any(dim=-1).nonzero().squeeze(1)
            if not len(tokens):
                continue
            rows = hidden[tokens]
            if is_down:
                stack = experts.gate_up_proj[expert].detach()
                gate, up = F.linear(rows, stack).chunk(2, dim=-1)
                rows = experts.act_fn(gate) * up
            on_input(parameter, expert, rows, tokens)

    return tell
