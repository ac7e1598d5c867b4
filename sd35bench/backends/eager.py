"""The reference backend: diffusers' own pipeline, nothing changed, in fp32, bf16 or fp16.

Every other backend is held against this one, so it does nothing for speed. Its images are
bit-identical to a bare diffusers call with the same seed.
"""

from sd35bench.backends.pipeline import DiffusersBackend

__all__ = ["EagerBackend"]


class EagerBackend(DiffusersBackend):
    """diffusers as it comes; options `dtype` (fp32, bf16, fp16), `device` (auto, cpu, cuda)."""
