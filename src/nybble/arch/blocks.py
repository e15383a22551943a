"""Runs one decoder block at a time, with the weights of that block alone in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from nybble.arch.spec import Architecture


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and dense shape of every tensor of the text model, its head and its MTP head."""
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


class BlockRunner:
    """The blocks of a text model, as functions of their weights.

    Masks and rotary embeddings come from the model's own forward: it is run once on a row of
    zeros with every block replaced by a recorder. Rows carry no padding, so one row's arguments
    serve a batch of any size.
    """

    def __init__(
        self, arch: Architecture, seqlen: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        with torch.device("meta"):
            model = arch.build_text_model().eval()
        self._blocks: list[nn.Module] = list(model.layers)
        recorders = [_CallRecorder(block) for block in self._blocks]
        model.layers = nn.ModuleList(recorders)
        model.norm = nn.Identity()
        model.rotary_emb = type(model.rotary_emb)(config=arch.text_config).to(device)
        row = torch.zeros(1, seqlen, arch.text_config.hidden_size, device=device, dtype=dtype)
        with torch.no_grad():
            model(inputs_embeds=row, use_cache=False)
        self._kwargs = [recorder.kwargs for recorder in recorders]

    @contextmanager
    def inputs_of(
        self, index: int, modules: Iterable[str], callback: Callable[[str, torch.Tensor], None]
    ) -> Iterator[None]:
        """While open, ``callback(module, input)`` is told every input of the named modules."""

        def tell(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            return lambda _module, args: callback(name, args[0].detach())

        block = self._blocks[index]
        handles = [block.get_submodule(n).register_forward_pre_hook(tell(n)) for n in modules]
        try:
            yield
        finally:
            for handle in handles:
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
