"""Checkpoint -> ONNX graphs over the checkpoint's own weights, parity-checked. Needs torch."""
