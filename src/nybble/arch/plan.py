"""The fate of every tensor, decided before any work: quantize, or keep and why.

A tensor no rule knows, or two rules claim, stops the program; so does one that the model needs
and the checkpoint lacks. That is how an MTP head cannot get lost on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nybble.arch.blocks import expected_shapes
from nybble.arch.grids import LinearGroup, linear_groups, lm_head_grid, resolve_grids
from nybble.arch.spec import Architecture
from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import PlanError, RecipeError
from nybble.quant.grid import IntGrid
from nybble.recipe.schema import Scheme

_KEPT_DTYPES = ("BF16", "F32", "F16")


@dataclass(frozen=True)
class Quantize:
    """The tensor holds the weights of Linears that go to an integer grid."""

    modules: tuple[str, ...]
    """The Linears whose rows it holds, in order and in equal shares: one, or a stack's."""
    block: int
    part: str
    grid: IntGrid

    def module_shape(self, info: TensorInfo) -> tuple[int, int]:
        """[out_features, in_features] of each of its Linears."""
        return info.numel // info.shape[-1] // len(self.modules), info.shape[-1]


@dataclass(frozen=True)
class Keep:
    """The tensor is copied byte for byte."""

    part: str
    reason: str
    modules: tuple[str, ...] = ()
    """Of a stack of experts: the Linears its rows are stored as, in order and in equal shares."""


Fate = Quantize | Keep


@dataclass(frozen=True)
class TensorPlan:
    """Every source tensor with its one fate, in the checkpoint's order."""

    fates: Mapping[str, Fate]
    infos: Mapping[str, TensorInfo]
    sources: Mapping[str, tuple[str, ...]]
    """The stored tensors that each parameter of the model is made of, in the order of its rows."""

    def quantized(self, block: int) -> dict[str, Quantize]:
        """The fates of one block's quantized tensors, by tensor name."""
        return {name: fate for name, fate in self.all_quantized() if fate.block == block}

    def all_quantized(self) -> Iterator[tuple[str, Quantize]]:
        """Tensor name and fate of every tensor to quantize."""
        for name, fate in self.fates.items():
            if isinstance(fate, Quantize):
                yield name, fate

    def kept(self) -> Iterator[tuple[str, Keep]]:
        """Tensor name and fate of everything that is copied."""
        for name, fate in self.fates.items():
            if isinstance(fate, Keep):
                yield name, fate

    def keeping_stacks(self) -> TensorPlan:
        """The same, but that kept stacks of experts are stored as such."""
        whole = {
            n: replace(f, modules=()) if isinstance(f, Keep) else f for n, f in self.fates.items()
        }
        return replace(self, fates=whole)

    def grids(self) -> dict[str, IntGrid]:
        """The grid of every quantized Linear, by its name."""
        return {m: fate.grid for _, fate in self.all_quantized() for m in fate.modules}


def plan_tensors(arch: Architecture, index: CheckpointIndex, scheme: Scheme) -> TensorPlan:
    """Decides every tensor's fate.

    Raises PlanError for a tensor that has none, two, or a bad shape; RecipeError for a scheme
    that does not fit the model.
    """
    shapes = expected_shapes(arch)
    sources = {name: _sources(arch, index, name) for name in shapes}
    missing = [
        n for name, found in sources.items() if not found for n in _absent(arch, index, name)
    ]
    if missing:
        raise PlanError(f"{index.folder} lacks {_listed(missing)}, which its config.json calls for")
    for name, shape in shapes.items():
        _check_stored(index, sources[name], shape)
    quantized = _quantize_fates(arch, index, scheme, sources)
    fates = {name: _fate(arch, info, quantized.get(name)) for name, info in index.tensors.items()}
    unexpected_mtp = arch.mtp is None and [n for n in fates if n.startswith("mtp.")]
    if unexpected_mtp:
        raise PlanError(
            f"{index.folder} holds {_listed(unexpected_mtp)}, but its config.json declares no "
            "MTP head (mtp_num_hidden_layers): engines would not load it"
        )
    return TensorPlan(
        fates=fates,
        infos=index.tensors,
        sources={parameter: tuple(tensors) for parameter, tensors in sources.items()},
    )


def _sources(
    arch: Architecture, index: CheckpointIndex, parameter: str
) -> dict[str, tuple[str, ...]]:
    """The stored tensors a parameter is made of, in row order, with the Linears in each.

    Only a stack of experts may be stored in parts. Empty if a part is missing.
    """
    modules = arch.experts.stacked_modules(parameter) if arch.experts else ()
    if parameter in index:
        return {parameter: modules or (parameter.removesuffix(".weight"),)}
    parts: dict[str, tuple[str, ...]] = {f"{module}.weight": (module,) for module in modules}
    return parts if all(name in index for name in parts) else {}


def _absent(arch: Architecture, index: CheckpointIndex, parameter: str) -> list[str]:
    """The tensors to call missing: of a stack that is stored in parts, the parts that are not."""
    modules = arch.experts.stacked_modules(parameter) if arch.experts else ()
    absent = [f"{module}.weight" for module in modules if f"{module}.weight" not in index]
    return absent if len(absent) < len(modules) else [parameter]


def _check_stored(
    index: CheckpointIndex, sources: Mapping[str, tuple[str, ...]], shape: tuple[int, ...]
) -> None:
    if len(sources) > 1:  # rows of a stack [E, rows, inputs]
        shape = (shape[0] * shape[1] // len(sources), shape[2])
    for name in sources:
        info = index.tensors[name]
        if info.shape != shape:
            raise PlanError(
                f"{info.name} in {info.file.name} has shape {list(info.shape)}; config.json calls "
                f"for {list(shape)}"
            )
        if info.dtype not in _KEPT_DTYPES:
            raise PlanError(
                f"{info.name} in {info.file.name} is stored as {info.dtype}; a base checkpoint of "
                "BF16 (or F16, F32) tensors is needed"
            )


def _quantize_fates(
    arch: Architecture,
    index: CheckpointIndex,
    scheme: Scheme,
    sources: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> dict[str, Quantize]:
    """Of the stored tensors the scheme wants quantized."""
    groups = list(linear_groups(arch, sources))
    head = lm_head_grid(scheme)
    if head and arch.lm_head == arch.embedding:
        raise RecipeError(
            "scheme.lm_head_bits is given, but this model's output head is its embedding "
            "(tie_word_embeddings): leave it out"
        )
    if scheme.mtp_bits and arch.mtp is None:
        raise RecipeError("scheme.mtp_bits is given, but this model has no MTP head: leave it out")
    if scheme.mtp_bits and arch.mtp and not arch.mtp.input_groups:
        raise RecipeError(
            "scheme.mtp_bits is given, but this model's MTP layer is a mixture of experts, which "
            "is kept as it is: leave it out"
        )
    grids = resolve_grids(groups, arch, scheme)
    if head:
        module = arch.lm_head.removesuffix(".weight")
        groups.append(LinearGroup((arch.lm_head,), (module,), arch.num_blocks + 1, "lm_head"))
        grids[arch.lm_head] = head
    fates = {}
    for group in groups:
        for parameter in group.parameters:
            grid = grids[parameter]
            for name, modules in sources[parameter].items():
                if grid is not None:
                    fates[name] = Quantize(modules, group.block, group.part, grid)
                    _check_packable(index.tensors[name], fates[name])
    return fates


def _fate(arch: Architecture, info: TensorInfo, quantized: Quantize | None) -> Fate:
    if quantized is not None:
        return quantized
    fates = [
        Keep(rule.part, rule.reason)
        for rule in arch.keep_rules
        if re.fullmatch(rule.pattern, info.name)
    ]
    overridden = _overridden(arch, info.name)
    if overridden is not None:
        fates.append(overridden)
    if len(fates) != 1:
        found = "no rule knows it" if not fates else f"{len(fates)} rules claim it"
        raise PlanError(
            f"{' '.join(info.name.split())} in {info.file.name} has no single fate: {found}"
        )
    return fates[0]


def _overridden(arch: Architecture, name: str) -> Keep | None:
    """The fate of a Linear of a trunk block that is not to be quantized: the recipe says so."""
    match = re.fullmatch(re.escape(arch.blocks_prefix) + r"\.(\d+)\.(.+)", name)
    if not match or int(match[1]) >= arch.num_blocks:
        return None
    for group in arch.input_groups:
        if match[2].removesuffix(".weight") in group.members:
            return Keep(group.part, "as the recipe says")
    experts = arch.experts
    if experts and re.fullmatch(
        re.escape(experts.module) + r"\.(gate_up_proj|down_proj|\d+\.(gate|up|down)_proj\.weight)",
        match[2],
    ):
        return Keep("experts", "as the recipe says", experts.stacked_modules(name))
    return None


def _check_packable(info: TensorInfo, fate: Quantize) -> None:
    outs, ins = fate.module_shape(info)
    group_size = ins if fate.grid.group_size == -1 else fate.grid.group_size
    if ins % group_size or ins % 32 or outs % 32:
        raise PlanError(
            f"{fate.modules[0]} has {outs} x {ins} weights: inputs must be a multiple of the group "
            f"size ({group_size}) and both of 32; choose another group_size"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
