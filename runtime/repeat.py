"""Making an image again from the settings it carries, and saying when that cannot be exact."""

from __future__ import annotations

from typing import Any

from gentron.errors import RequestError
from gentron.guidance import check_interval
from gentron.runtime.result import Result, Settings


def settings_of(metadata: dict[str, Any]) -> tuple[Settings, int]:
    """Settings and batch row of a stored image. The whole batch is run again, since the bits of a
    row may depend on the shape of the call; raises RequestError for a missing or odd field."""
    fields = dict(Settings.__dataclass_fields__)
    del fields["guidance_interval"]  # files without it are older, and had none
    missing = [name for name in (*fields, "row") if name not in metadata]
    if missing:
        raise RequestError("like", f"the file's settings lack {', '.join(missing)}")
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    for name, entry in fields.items():
        if not isinstance(metadata[name], kinds[str(entry.type)]):
            raise RequestError("like", f"the file's {name} is {metadata[name]!r}")
    row = metadata["row"]
    if not isinstance(row, int) or not 0 <= row < metadata["batch"]:
        raise RequestError("like", f"the file's row {row!r} is not in its batch")
    given = metadata.get("guidance_interval")
    interval = None if given is None else check_interval(given)
    return Settings(**{name: metadata[name] for name in fields}, guidance_interval=interval), row


def engines_of(metadata: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Component -> backend, device, precision, version; raises RequestError for anything else."""
    engines = metadata.get("engines")
    if not isinstance(engines, dict) or not all(
        isinstance(engine, dict) and all(isinstance(value, str) for value in engine.values())
        for engine in engines.values()
    ):
        raise RequestError("like", f"the file's engines are {engines!r}")
    return engines


def differences(metadata: dict[str, Any], result: Result, row: int) -> list[str]:
    """What is not as it was when the image was made; empty if the same bits are promised."""
    return differences_of(metadata, result.metadata(row))


def differences_of(metadata: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The same for two records of settings and engines."""
    found = []
    for name in ("digest", "machine", "gentron", "numpy"):
        if metadata.get(name) != now[name]:
            label = "bundle digest" if name == "digest" else name
            found.append(f"{label} was {_short(metadata.get(name))}, is {_short(now[name])}")
    before = engines_of(metadata)
    for component, engine in now["engines"].items():
        if before.get(component) != engine:
            was = " ".join((before.get(component) or {"": "absent"}).values())
            found.append(f"{component} ran on {was}, now {' '.join(engine.values())}")
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 48 else text[:12] + "..."
