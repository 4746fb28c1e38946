"""Checkpoint -> ONNX graphs over the checkpoint's own weights, parity-checked. Needs torch."""

from gentron.export.bundle_writer import export_bundle

__all__ = ["export_bundle"]
