"""Lets a CUDA build of torchvision be imported under a CPU build of torch.

vLLM's Qwen3.5 model file imports an image processor from transformers, which imports torchvision,
even when the vision tower is not built. The torchvision wheel that pip offers is a CUDA build: its
compiled operators do not load under a CPU torch, and its Python part then fails at import, because
it attaches shape functions to two operators (nms and qnms) that nobody has declared. Declaring
them is enough; they have no implementation, and no text-only run calls them.

The .pth file beside this package calls install() at every start of the interpreter, so this module
imports next to nothing: torch is imported only when torchvision is.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep_alive = []  # a torch.library.Library withdraws its operators when it is collected


def _declare_operators() -> None:
    """Declare the two operators, unless torch can load torchvision's own."""
    import torch

    if torch.version.cuda is not None or _keep_alive:
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _keep_alive.append(library)


class _TorchvisionLoader(SourceFileLoader):
    """Runs torchvision's own __init__, after declaring the operators it expects."""

    def exec_module(self, module: ModuleType) -> None:
        _declare_operators()
        super().exec_module(module)


class _TorchvisionFinder:
    """Finds torchvision, and nothing else, where the ordinary finder would."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _TorchvisionLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Put the finder in front of the ordinary ones."""
    sys.meta_path.insert(0, _TorchvisionFinder)
