"""An ONNX graph becomes something that runs: one small interface, one file per backend."""

from gentron.engines.base import Backend, Buffer, Call, Engine, Graph
from gentron.engines.graphs import bundle_graph
from gentron.engines.options import EngineOptions
from gentron.engines.registry import backend_named, backend_reports

__all__ = [
    "Backend",
    "Buffer",
    "Call",
    "Engine",
    "EngineOptions",
    "Graph",
    "backend_named",
    "backend_reports",
    "bundle_graph",
]
