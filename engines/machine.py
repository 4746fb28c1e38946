"""Which processor this is, exactly enough to know whether code made for it runs here."""

from __future__ import annotations

import functools
import hashlib
import platform


@functools.cache
def cpu_name() -> str:
    """Architecture, model and a digest of the instruction sets: virtual machines of one name
    differ in these."""
    model, flags = platform.processor(), ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            parts = (line.partition(":") for line in stream)
            facts = {name.strip(): value.strip() for name, _, value in parts}
        model = facts.get("model name", model)
        flags = facts.get("flags", facts.get("Features", ""))
    except OSError:  # not Linux
        pass
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]
    return f"{platform.machine()} {model} {digest}"
