"""Which actions a checkpoint needs, in which order, and what they make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nybble.doctor.repair import configs, dequantize, graft, rules, settle, sidecars, values
from nybble.doctor.repair.draft import Action, Draft, Patient, is_mtp, missing

_MTP_ACTIONS = frozenset({graft.ACTION, dequantize.ACTION})
_MTP_FC = "mtp.fc"
"""Which engines build dense, so no rule can make up for a packed one."""

_OTHERS: Mapping[str, Action] = {
    graft.DTYPE: graft.restore_dtypes,
    values.ZERO_POINTS: values.convert_zero_points,
    values.DESC_ACT: values.drop_activation_order,
    rules.ACTION: rules.rewrite_rules,
    sidecars.ACTION: sidecars.copy_missing,
}
"""By the names that findings give, in the order in which they are done, after the MTP head."""


def mended(patient: Patient, wanted: Collection[str]) -> Draft:
    """The result of the actions that findings ask for; raises as they do."""
    draft = settle.settled(patient)
    if patient.base is not None:
        graft.refuse_other_base(patient, draft)
    draft = configs.call_for_head(configs.agree_on_ties(draft))
    actions = set(wanted)
    if patient.snapshot.config is None:
        actions.add(rules.ACTION)
    packed = dequantize.packed_mtp(draft)
    if _MTP_ACTIONS & actions or _MTP_FC in packed or _lacks_mtp(draft):
        draft = _mended_mtp(patient, draft)
        if packed:
            actions.add(rules.ACTION)
    if patient.base is not None:
        draft = graft.graft_missing(patient, draft)
        actions.add(graft.DTYPE)
    for name, action in _OTHERS.items():
        if name in actions:
            draft = action(patient, draft)
    lost = missing(draft)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        draft = draft.failed(
            f"{lost[0]}{more}: in no sound file; download the checkpoint again, or give the base "
            "with --base"
        )
    return draft


def _mended_mtp(patient: Patient, draft: Draft) -> Draft:
    if patient.base is not None:
        return graft.graft_mtp(patient, draft)
    if dequantize.packed_mtp(draft):
        return dequantize.dequantize_mtp(patient, draft)
    if _lacks_mtp(draft):  # told with all that is missing
        return draft
    return draft.failed("mtp.*: only the base has what it takes; give it with --base")


def _lacks_mtp(draft: Draft) -> bool:
    return any(map(is_mtp, missing(draft)))


def is_whole(draft: Draft) -> bool:
    """Whether the decoder is all there: without it a result is of no use to anybody."""
    return not any(name.startswith(draft.layout.blocks) for name in missing(draft))
