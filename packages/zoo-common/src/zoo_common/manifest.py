"""What a zoo says of itself: ``zoo.json`` and ``layouts/<id>.json``."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo_common.coding import STORAGES
from zoo_common.files import atomic_write, json_text, read_json, write_json
from zoo_common.layout import ParameterLayout

FORMAT = "weightspace-zoo"
VERSION = 1
ENTRIES = {"format", "version", "task", "creator", "layout", "split", "dtype", "attributes"}
"""What ``zoo.json`` holds, beside its sum."""


def read_document(path: Path) -> dict[str, Any]:
    """The content of ``zoo.json``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, something else, or of a newer format.
    """
    file = path / "zoo.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no zoo in {path} (no zoo.json): check the path, or make one there first; `zoo convert` makes one "
            "of published runs"
        )
    document = read_json(file)
    if not isinstance(document, dict) or document.get("format") != FORMAT or "version" not in document:
        raise ValueError(f"{file} does not describe a zoo")
    if document["version"] != VERSION:
        raise ValueError(
            f"{path} has format version {document['version']}, this zoo-common reads {VERSION}: upgrade it"
        )
    written = json_text(document)
    if "sha256" in document and (document.pop("sha256"), file.read_text()) != (_digest(document), written):
        raise ValueError(
            f"{file} is damaged (wrong SHA-256): restore it from another copy, or, if it was edited on purpose, "
            "remove its entry 'sha256'"
        )
    if odd := document.keys() ^ ENTRIES:
        raise ValueError(f"{file} is damaged: missing or unknown: {', '.join(sorted(odd))}")
    if document["dtype"] not in STORAGES:
        raise ValueError(f"{file} has dtype {document['dtype']!r}, this zoo-common reads {', '.join(STORAGES)}")
    return document


def write_document(path: Path, document: Mapping[str, object]) -> None:
    """Write ``zoo.json`` with its checksum."""
    write_json(path / "zoo.json", {**document, "sha256": _digest(document)})


def read_layout(path: Path, layout_id: str) -> ParameterLayout:
    """A layout of the zoo in ``path``, by its id, checked against it."""
    file = path / "layouts" / f"{layout_id}.json"
    if not file.is_file():
        raise FileNotFoundError(f"the zoo in {path} has no layout {layout_id!r} ({file} is missing)")
    text = file.read_bytes()
    if hashlib.sha256(text[:-1]).hexdigest()[:16] != layout_id or text[-1:] != b"\n":
        raise ValueError(f"{file} is damaged (its content does not have this id): restore it from another copy")
    return ParameterLayout.from_json(text.decode())


def write_layout(path: Path, layout: ParameterLayout) -> None:
    """Store a layout under its id, unless it is there."""
    file = path / "layouts" / f"{layout.id}.json"
    if not file.exists():
        with atomic_write(file) as temporary:
            temporary.write_bytes(f"{layout.to_json()}\n".encode())


def _digest(document: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
