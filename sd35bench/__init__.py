"""Measure how Stable Diffusion 3.5 Medium should be run, and show how it is known.

    import sd35bench as sb
    study = sb.run("model=nano", "steps=4,16", "cfg=1,4", study="grid")

The public API is `sd35bench.api`, whose names are here too; everything else may change. It is
imported when one of them is first used, and loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd35bench.api import ConfigError, Plots, SD35BenchError, Study, open, run

__version__ = "0.1.0"
__all__ = ["ConfigError", "Plots", "SD35BenchError", "Study", "__version__", "open", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sd35bench' has no attribute {name!r}")
    from sd35bench import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
