"""The page's styles and script: files in `assets/`, beside this module."""

from importlib import resources

__all__ = ["read_asset"]


def read_asset(name: str) -> str:
    """Text of an asset: ``charts.css``, ``report.css`` or ``report.js``."""
    return resources.files("sd35bench.report").joinpath("assets", name).read_text("utf-8")
