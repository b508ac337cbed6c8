"""The graphs of GHN-1 and GHN-2 (2021): which nodes of an autograd record stay, and how they are joined."""

from torch import nn

from ghn.draft import Draft
from ghn.support import OPERATIONS, Support, operation_of, own_name


def repair_linear(draft: Draft) -> None:
    """Let data enter every linear layer at its weight."""
    for i, record in enumerate(draft.records):
        if type(record.module) is nn.Linear and "weight" in own_name(record):
            for o in sorted(draft.after[i]):
                for a in tuple(draft.before[o]):
                    draft.disconnect(a, o)
                    if a != i:
                        draft.connect(a, i)
                draft.connect(i, o)


def filter_nodes(draft: Draft, support: Support) -> None:
    """Take out what has no type or does not count, one kind after the other; the list runs from input to output."""
    names = [record.name for record in draft.records]
    at = _with(names, "Mul")
    draft.remove([i for i in at if not names[i - 2].startswith("Hard")])
    names = [record.name for record in draft.records]
    at = _with(names, "Clone")
    draft.remove([i for i in at if not names[i - 11].startswith("Softmax")])
    draft.remove([i for i, record in enumerate(draft.records) if not _is_known(draft, i, support)])
    names = [record.name for record in draft.records]
    draft.remove([i for i in _with(names, "Mean") if not _pools_all(draft, i)])
    for prefix in ("Add", "Cat"):
        doomed = []
        for i in _with([record.name for record in draft.records], prefix):
            if len(draft.before[i]) < 2:  # as it is now: earlier ones may have been bridged over
                draft.bridge(i)
                doomed.append(i)
        draft.remove(doomed, bridged=True)


def _with(names: list[str], prefix: str) -> list[int]:
    return [i for i, name in enumerate(names) if name.startswith(prefix) and "Backward" in name]


def _is_known(draft: Draft, i: int, support: Support) -> bool:
    record = draft.records[i]
    if not record.is_op:
        return support(record) is not None
    kind = operation_of(record)
    return kind in ("input", "Clone") or (kind in OPERATIONS and kind != "Softmax")


def _pools_all(draft: Draft, i: int) -> bool:
    keeps = getattr(draft.records[i].function, "_saved_keepdim", None)
    if keeps is not None:
        return bool(keeps)
    return not (i + 1 < len(draft) and draft.records[i + 1].name.startswith("cells."))
