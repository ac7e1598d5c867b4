"""User input: Hydra's schema, one line per refusal, and the frozen types that come out.

`compose` turns overrides into a typed, mutable configuration; `freeze` validates it and returns a
`plan.Sweep`. Nothing here imports torch.
"""

from sd35bench.config.compose import compose
from sd35bench.config.files import choices, config_dir
from sd35bench.config.freeze import Job, freeze
from sd35bench.config.overrides import check_overrides

__all__ = ["Job", "check_overrides", "choices", "compose", "config_dir", "freeze"]
