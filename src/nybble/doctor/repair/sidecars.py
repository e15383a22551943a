"""Files beside the weights that the base has and the checkpoint lacks."""

from __future__ import annotations

from nybble.checkpoint.sidecar import is_sidecar
from nybble.doctor.repair.draft import Draft, Patient

ACTION = "sidecars"

_TEMPLATE = "chat_template"
_NOT_THE_BASES = frozenset({"nybble.json"})


def copy_missing(patient: Patient, draft: Draft) -> Draft:
    """Copies tokenizer, templates and processors of the base that are not there.

    A chat template stays out where tokenizer_config.json has one: the file would win over it.
    """
    if patient.base is None:
        return draft.failed("files of the tokenizer or processor are missing: give --base")
    own = patient.snapshot
    has_template = _TEMPLATE in own.objects.get("tokenizer_config.json", {})
    names = [
        name
        for name in patient.base.source.sizes()
        if is_sidecar(name)
        and name not in own.sizes
        and name not in _NOT_THE_BASES
        and not (has_template and name.startswith(_TEMPLATE))
    ]
    if not names:
        return draft
    source = patient.base.source
    return draft.mended(
        ACTION,
        f"{', '.join(names)}: copied from {source.label}",
        files={**draft.files, **{name: source.read(name) for name in names}},
    )
