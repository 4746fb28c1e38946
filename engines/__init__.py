"""An ONNX graph becomes something that runs: one small interface, one file per backend."""

from gentron.engines.base import Backend, Buffer, Call, Engine
from gentron.engines.registry import backend_named, backend_reports

__all__ = ["Backend", "Buffer", "Call", "Engine", "backend_named", "backend_reports"]
