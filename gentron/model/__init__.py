"""The reference GenTron in PyTorch: one module for each component that is deployed."""

from gentron.model.gentron import GenTron

__all__ = ["GenTron"]
