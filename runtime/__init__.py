"""Prompt -> tokens -> embeddings -> guided loop -> pictures, on compiled engines, without torch."""

from gentron.runtime.pipeline import Pipeline
from gentron.runtime.result import Result, StageReport

__all__ = ["Pipeline", "Result", "StageReport"]
