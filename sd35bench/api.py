"""The public Python API: what `import sd35bench as sb` offers, and nothing else is promised.

    import sd35bench as sb
    study = sb.run("model=nano", "steps=4,16", "cfg=1,4", study="grid")
    study.settings(as_="pandas")
    study.recommend(profile="balanced")

Everything here is what the command line does: settings are NAME=VALUE as it takes them, documents
are those of `--json`, errors are `SD35BenchError`. Nothing is printed on stdout. Tables come as
`as_="arrow"` (a pyarrow Table), "pandas" or "polars"; the last two libraries are not brought along.
"""

from __future__ import annotations  # signatures are read as they are written

import contextlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sd35bench import plugins
from sd35bench.errors import ConfigError, SD35BenchError
from sd35bench.study.store import Study as _Store

if TYPE_CHECKING:
    from PIL.Image import Image

    from sd35bench.report.render import Figure

__all__ = ["ConfigError", "Plots", "SD35BenchError", "Study", "open", "run"]

Form = Literal["arrow", "pandas", "polars"]
"""The library whose tables are wanted."""


def run(
    *settings: str,
    study: str = "default",
    results_dir: str | Path = "results",
    config_dir: str | Path | None = None,
    plugin_dir: str | Path | None = None,
    yes: bool = False,
) -> Study:
    """Make what is missing of a point or a grid, as `sd35bench run -m SETTINGS`.

    `settings` are NAME=VALUE, with commas between values to sweep. `config_dir` and `plugin_dir`
    are folders of your own YAML files and code, `yes` agrees to a hosted service's bill.

    Returns: the study; `last_run` is what `run --json` prints. Trials that failed are counted
    there, and the same call tries them again.

    Raises: ConfigError for wrong settings, before anything is loaded; StudyLocked, DiskFull.
    """
    words = [*_folders(config_dir, plugin_dir), *(["--yes"] if yes else [])]
    odd = [text for text in settings if text.startswith("-")]
    if odd:
        raise ConfigError(f"{odd[0]}: expected NAME=VALUE, such as steps=4,16")
    named = [f"study={study}", f"results_dir={results_dir}"]
    document = _answer("run", "-m", *settings, *named, *words)
    return Study(_Store.open(Path(results_dir), study), config_dir, plugin_dir, document)


def open(
    name: str,
    results_dir: str | Path = "results",
    *,
    config_dir: str | Path | None = None,
    plugin_dir: str | Path | None = None,
) -> Study:
    """Open a study that is there; `config_dir` and `plugin_dir` as of `run`, for metrics.

    Raises: ConfigError for an unknown name.
    """
    from sd35bench.cli.study import open_study

    return Study(open_study(Path(results_dir), name), config_dir, plugin_dir)


class Study:
    """A study: its settings, images, answers and plots. Made by `run` and `open`.

    What has no score yet is scored first (the model's default metrics), as `sd35bench show` does.
    `last_run` is what the `run` that returned this did, ``None`` after `open`.
    """

    def __init__(
        self,
        store: _Store,
        config_dir: str | Path | None = None,
        plugin_dir: str | Path | None = None,
        last_run: Mapping[str, Any] | None = None,
    ) -> None:
        """Use `run` or `open`."""
        self._store = store
        self._config_dir = None if config_dir is None else Path(config_dir)
        self._plugin_dir = None if plugin_dir is None else f"{plugin_dir}"
        self.last_run = last_run
        self.plot = Plots(self)

    def __repr__(self) -> str:
        return f"<Study {self.name!r} in {self.path.parent}>"

    @property
    def name(self) -> str:
        """Its name."""
        return self._store.name

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._store.path

    def score(self, *metrics: str, **options: Any) -> dict[str, Any]:
        """Score what is missing, and return what `score --json` prints.

        `metrics` are names (none: the model's defaults); `options` are of one metric, as
        `reference="coco.npz"`.

        Raises: ConfigError for an unknown metric or option, MetricError where one cannot be had.
        """
        if options and len(metrics) != 1:
            raise ConfigError("options are of one metric; name it")
        overrides = [f"metric.{metrics[0]}.{name}={value}" for name, value in options.items()]
        return self._score(metrics or None, overrides, anew=True)

    def show(self) -> dict[str, Any]:
        """What `show --json` prints: settings with latency, memory and metrics, each with n."""
        from sd35bench.analysis.summary import show_document

        self._require_images()
        self._score()
        return show_document(self._store)

    def settings(self, as_: Form = "arrow") -> Any:
        """One row a setting: fields, latency, memory, metrics; `NAME_low`, `_high`: 95 % interval.

        Raises: ConfigError where there is no image, or the library of `as_` is not installed.
        """
        _require_form(as_)
        from sd35bench.data import settings_table

        return _converted(settings_table(self.show()), as_)

    def images(self, as_: Form = "arrow") -> Any:
        """One row a trial, failures too: what was asked, what it took, scores, the file's `path`.

        Raises: ConfigError where the library of `as_` is not installed.
        """
        from sd35bench.analysis.table import read_table
        from sd35bench.data import images_table, with_paths

        _require_form(as_)
        self._score()
        images = images_table(self._store, read_table(self._store))
        return _converted(with_paths(images, self._store), as_)

    def sql(self, query: str, as_: Form = "arrow") -> Any:
        """Run SQL (DuckDB) over the views `records` and `scores`.

        Raises: ConfigError where the library of `as_` is not installed; duckdb's own errors.
        """
        _require_form(as_)
        return _converted(self._store.sql(query), as_)

    def recommend(self, profile: str | None = None) -> dict[str, Any]:
        """A setting for each profile, with the evidence, as `recommend --json` prints it.

        `profile`: names or YAML files between commas, ``None`` for all. Nothing is written.

        Raises: ConfigError for an unknown profile, or where nothing can be compared.
        """
        from sd35bench.cli.study import profiles_of
        from sd35bench.recommend.advice import recommend_document

        profiles = profiles_of(profile, self._config_dir)
        self._require_images()
        self._score()
        return recommend_document(self._store, profiles)

    def compare(self, other: Study | str | Path, policy: str = "all") -> dict[str, Any]:
        """Hold this study against a baseline, as `compare --json` prints it.

        `other`: the baseline, a study, the name of one beside this, or a baseline file (.json).
        `policy`: a name or a YAML file. ``document["verdict"]`` is the whole's.

        Raises: ConfigError where nothing can be compared.
        """
        from sd35bench.cli.compare import Source, judge, read_policy

        root = self.path.parent
        if isinstance(other, Study):
            baseline = Source(other.name, other.path.parent)
        else:
            baseline = Source(f"{other}", root)
        with _quiet():
            return judge(baseline, Source(self.name, root), read_policy(policy, self._config_dir))

    def report(self) -> Path:
        """Write the HTML report and return its path."""
        own = _folders(self._config_dir, self._plugin_dir)
        document = _answer("report", self.name, f"--results-dir={self.path.parent}", *own)
        return Path(document["path"])

    def _score(
        self,
        metrics: Sequence[str] | None = None,
        overrides: Sequence[str] = (),
        anew: bool = False,
    ) -> dict[str, Any]:
        from sd35bench.cli.study import score_missing

        plugins.use_folder(self._plugin_dir)
        config_dir = None if self._config_dir is None else f"{self._config_dir}"
        plugins.keep_flags(config_dir, self._plugin_dir)
        with _quiet():
            return score_missing(self._store, metrics, overrides, anew, self._config_dir)

    def _require_images(self) -> None:
        if not self._store.done_keys():
            raise ConfigError(
                f"study {self.name!r} has no image yet; see what failed with run again"
            )


class Plots:
    """A study's pictures; each shows itself in a notebook."""

    def __init__(self, study: Study) -> None:
        """Use `Study.plot`."""
        self._study = study

    def front(self, metric: str | None = None) -> Figure:
        """Quality over latency with the Pareto front; `metric` ``None`` is the first that it has.

        Returns: a figure, `svg` its text. Raises: ConfigError where no such figure can be drawn.
        """
        from sd35bench.report.charts import quality_figures
        from sd35bench.report.rows import metric_label

        figures = quality_figures(self._study.show())
        label = None if metric is None else metric_label(metric)
        found = [f for f in figures if label in (None, f.title)]
        if not found:
            there = ", ".join(f.title for f in figures) or "none: no metric, or no latency"
            raise ConfigError(f"metric={metric}: there is no such plot; there are {there}")
        return found[0]

    def grid(
        self,
        prompt: str | int = 0,
        x: str = "steps",
        y: str = "cfg",
        seed: int | None = None,
        **fixed: Any,
    ) -> Image:
        """The images of one prompt and seed, field `x` along the top and `y` down the side.

        `prompt`: its text, a part of it, or its number from 0; `seed` ``None`` is the least;
        `fixed` keeps settings with these values, as ``backend="eager"``.

        Returns: a PIL image. Raises: ConfigError where settings that differ elsewhere share a cell.
        """
        from sd35bench.report.sheet import contact_sheet

        return contact_sheet(self._study._store, prompt, x, y, seed, fixed)


def _require_form(form: str) -> None:
    """Refuse a form of tables that cannot be had. Raises: ConfigError."""
    if form not in get_args(Form):
        raise ConfigError(f"as_={form!r}: must be one of {', '.join(get_args(Form))}")
    name = "pyarrow" if form == "arrow" else form
    try:
        importlib.import_module(name)
    except ImportError as exc:
        raise ConfigError(
            f"as_={form!r}: {name} is not installed; pip install {name}, or take as_='arrow'"
        ) from exc


def _converted(table: Any, form: str) -> Any:
    """A pyarrow Table in the reader's library."""
    if form == "pandas":
        return table.to_pandas()
    return importlib.import_module("polars").from_arrow(table) if form == "polars" else table


def _folders(config_dir: str | Path | None, plugin_dir: str | Path | None) -> list[str]:
    """The flags that name the user's own folders."""
    flags = {"--config-dir": config_dir, "--plugin-dir": plugin_dir}
    return [f"{name}={folder}" for name, folder in flags.items() if folder is not None]


def _answer(verb: str, *arguments: str) -> dict[str, Any]:
    """Run a verb as the command line does, with nothing on stdout."""
    from sd35bench.cli import answer

    with _quiet():
        return answer(verb, arguments).document


def _quiet() -> contextlib.redirect_stdout[Any]:
    return contextlib.redirect_stdout(sys.stderr)
