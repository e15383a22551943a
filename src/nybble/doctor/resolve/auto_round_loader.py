"""AutoRound's declaration as Transformers reads it, by the package auto-round.

Source: auto_round 0.16.1, inference/convert_model.py, inference/utils.py and inference/backend.py;
transformers 5.23, AutoRoundConfig. The whole model is gone through once: keys of ``extra_config``
that are no layer's name are patterns, and hold where no key names the layer.
"""

from __future__ import annotations

from typing import Any

from nybble.doctor.findings import Part
from nybble.doctor.layout.names import built_name, has_tower
from nybble.doctor.layout.spec import Kind, Linear, Module
from nybble.doctor.resolve.built import DENSE, Block, Scheme, Storage
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.outcome import not_analysed
from nybble.doctor.resolve.reading import Resolver, begins_with_any, scheme

_STORAGES = {
    "auto_round:auto_gptq": Storage.GPTQ,
    "auto_round:auto_awq": Storage.AWQ,
    "auto_round": Storage.GPTQ,
    "auto_round:gptqmodel": Storage.GPTQ,
}
_SPELLINGS = {
    "auto": "auto_round:auto_gptq",
    "auto_round:gptq": "auto_round:auto_gptq",
    "auto_round:awq": "auto_round:auto_awq",
}
_NOT_ANALYSED = ("dynamic", "modules_in_block_to_quantize", "quant_block_list", "rotation_config")
"""Keys of other formats that this loader reads as well, and AutoRound writes into none."""


def read_by_auto_round(context: Context) -> Resolver:
    """What decides each module. Raises what AutoRoundConfig and ``convert_hf_model`` raise."""
    return _Converted(context).build


class _Converted:
    """The model as ``convert_hf_model`` leaves it."""

    def __init__(self, context: Context) -> None:
        block = context.block
        self._context = context
        self._defaults = {
            "bits": block.get("bits", 4),
            "group_size": block.get("group_size", 128),
            "sym": block.get("sym", True),
            "data_type": block.get("data_type", "int"),
            "act_bits": block.get("act_bits"),
        }
        if self._defaults["bits"] not in [2, 3, 4, 5, 6, 7, 8]:
            raise ValueError(f"Only support quantization to 2 to 8 bits, not {block.get('bits')}")
        if self._defaults["group_size"] != -1 and self._defaults["group_size"] <= 0:
            raise ValueError("group_size must be greater than 0 or equal to -1")
        if block.get("desc_act") and not block.get("static_groups"):
            raise NotImplementedError("This GPTQ model may contain a non-dummy g_idx")
        for key in _NOT_ANALYSED:
            if block.get(key):
                raise not_analysed(f"{key!r} in an auto-round declaration is not analysed")
        packing = block.get("packing_format", "auto_round:gptq")
        self._packing = _SPELLINGS.get(packing, packing)

        starts = frozenset(self._blocks(block))
        all_names = [
            self._built(linear.name)
            for linear in context.layout.linears.values()
            if linear.part is not Part.MTP
        ]
        self._in_blocks = {name: None for name in all_names if begins_with_any(name, starts)}
        self._rules = self._expanded(block, all_names)

    def build(self, module: Module) -> Scheme:
        """What stands in the module's place. Experts are Linears of their own here."""
        if module.kind is not Kind.EXPERTS:
            return self._of(module.name, module.members[0])
        schemes = {self._of(self._built(linear.name), linear) for linear in module.members}
        if len(schemes) > 1:
            raise not_analysed("experts of one block that differ are not analysed")
        return schemes.pop()

    def _of(self, name: str, linear: Linear) -> Scheme:
        if name not in self._in_blocks and name not in self._rules:
            return DENSE
        rule = self._rules.get(name, {})
        config = {key: rule.get(key, default) for key, default in self._defaults.items()}
        if config["act_bits"] is not None and int(config["act_bits"]) <= 8:
            raise not_analysed("quantized activations are not analysed")
        if config["bits"] is None or int(config["bits"]) > 8:
            return DENSE
        if config["data_type"] != "int" or self._packing not in _STORAGES:
            kind = f"{config['data_type']!r} packed as {self._packing!r}"
            raise not_analysed(f"AutoRound's {kind} is not analysed")
        if self._packing == "auto_round:auto_gptq" and not config["sym"]:
            raise not_analysed("which device takes asymmetric auto_gptq weights is not analysed")
        outputs, inputs = linear.shape
        if outputs % 32 or inputs % 32 or inputs % config["group_size"]:
            return DENSE  # backend 'auto_round:fake', which wants ``.weight``, is all that is left
        packed = _STORAGES[self._packing]
        return scheme(packed, config["bits"], config["group_size"], config["sym"])

    def _expanded(self, block: Block, all_names: list[str]) -> dict[str, Any]:
        """``extra_config`` with every pattern written out: utils.py, ``_expand_regex_config``."""
        patterns = self._context.patterns
        rules = {self._renamed(key): rule for key, rule in block.get("extra_config", {}).items()}
        for pattern in (*(block.get("modules_to_not_convert") or []), "lm_head"):
            found = [name for name in self._in_blocks if patterns.search(pattern, name)]
            rules |= {name: {"bits": 16, "act_bits": 16} for name in found}
        known = set(all_names)
        for key in [key for key in rules if key not in known]:
            if not patterns.is_sound(key):
                continue
            found = [name for name in self._in_blocks if patterns.search(key, name)]
            found = found or [name for name in all_names if patterns.search(key, name)]
            if rules[key] != {}:
                for name in found:
                    rules.setdefault(name, rules[key])
        return rules

    def _blocks(self, block: Block) -> list[str]:
        """Prefixes of what is quantized: as declared, else every list of blocks in the model."""
        names = block.get("block_name_to_quantize")
        names = block.get("to_quant_block_names") if names is None else names
        if isinstance(names, list):
            return [self._renamed(name) for name in _flat(names)]
        if isinstance(names, str):
            return [self._renamed(name) for name in names.split(",")]
        if names is not None:
            raise not_analysed("blocks that are neither text nor a list are not analysed")
        blocks = [self._built(self._context.layout.blocks)]
        return [*blocks, "model.visual.blocks"] if has_tower(self._context.layout) else blocks

    def _renamed(self, name: str) -> str:
        """A wrapper's names, where the checkpoint is of its decoder alone."""
        whole = "model.language_model."
        if has_tower(self._context.layout) or not name.startswith(whole):
            return name
        return f"model.{name.removeprefix(whole)}"

    def _built(self, name: str) -> str:
        return built_name(self._context.layout, self._context.engine, name)


def _flat(names: list[Any]) -> list[Any]:
    flat: list[Any] = []
    waiting = names[::-1]
    while waiting:
        name = waiting.pop()
        if isinstance(name, list):
            waiting.extend(name[::-1])
        else:
            flat.append(name)
    return flat
