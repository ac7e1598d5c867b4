"""The one error that this package raises on purpose besides ValueError for wrong input."""

__all__ = ["KernelUnavailable"]


class KernelUnavailable(RuntimeError):
    """There is no kernel for this device, dtype or library; says what would help."""
