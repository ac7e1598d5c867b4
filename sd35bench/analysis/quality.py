"""How a row's value of a metric is computed.

Per-image metrics are means with intervals over prompts. Set metrics are computed here from
features that `score` kept, against a reference file that `score` made; below the metric's minimum
number of images there is no value, and the entry says how many it needs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.facts import facts
from sd35bench.analysis.grouping import cluster_labels
from sd35bench.analysis.reference import read_reference
from sd35bench.analysis.scores import Found
from sd35bench.analysis.set_metrics import FRECHET, compute
from sd35bench.analysis.table import Row, Table
from sd35bench.errors import MetricError
from sd35bench.prompts import same_prompt
from sd35bench.stats.clustered import mean_t
from sd35bench.stats.intervals import Interval
from sd35bench.stats.kernel import Sample
from sd35bench.study.columns import Floats, Some, distinct_refs, is_ref, pick, texts


def row_metric(study: Any, table: Table, row: Row, metric: str) -> dict[str, Any]:
    """Compute one metric of one row: value, ci95, n, n_prompts, and what else it has to say."""
    records = row.quality_records()
    found = table.scores.found(metric, records)
    if not found.there.any():
        return _nothing("not applicable, or not scored: no image of this setting has it")
    first = found.detail(int(np.argmax(found.there)))
    if "extractor" in first:
        return _set_metric(study, pick(records, found.there), found)
    if not found.valued.any():
        return _nothing(str(first.get("reason", "no value for any image")))
    valued, values = pick(records, found.valued), found.values[found.valued]
    entry = _mean(metric, valued, values).document()
    entry["levels"] = _levels(metric, valued, values)
    truncated = found.count("truncated")
    if truncated:
        entry["truncated_prompts"] = truncated
    return entry


def _mean(metric: str, records: Some, values: Floats) -> Interval:
    return mean_t(values, cluster_labels(records), bounds=facts(metric).bounds)


def _levels(metric: str, records: Some, values: Floats) -> dict[str, Any] | None:
    found = {}
    for level in sorted(v for (v,) in distinct_refs(records, "level") if v is not None):
        mine = is_ref(records, "level", level)
        found[level] = _mean(metric, pick(records, mine), values[mine]).document()
    return found if found else None


def _set_metric(study: Any, scored: Some, found: Found) -> dict[str, Any]:
    codes = found.codes[found.there]
    detail = found.details[codes[-1]]
    extractor, name, need = detail["extractor"], detail["reference"], detail["min_images"]
    alike = [code for code in np.unique(codes).tolist() if found.details[code] == detail]
    records = pick(scored, np.isin(codes, alike))
    if name is None or len(records) < need:
        reason = f"refused: {extractor} needs {need} images, there are {len(records)}"
        return _nothing(reason) | {"n": len(records), "needs": need}
    reference = read_reference(study, name)
    kept = study.features(extractor)
    digests = texts(records, "image").tolist()
    gone = sum(digest not in kept for digest in digests)
    if gone:
        return _nothing(f"features of {gone} images are gone; sd35bench score makes them again")
    images = Sample(np.stack([kept[digest] for digest in digests]), _prompts(records))
    parameters = detail.get("parameters", {})
    try:
        interval, more = compute(detail.get("statistic", FRECHET), images, reference, parameters)
    except MetricError as exc:
        return _nothing(f"refused: {exc}") | {"n": len(records)}
    about = {"reference": reference.name, "reference_source": reference.source}
    return interval.document() | about | {"reference_n": reference.gaussian.n} | more


def _prompts(records: Some) -> NDArray[np.str_]:
    """What resampling draws together, as text, so that a reference's prompts can be matched."""
    asked = (texts(records, name).tolist() for name in ("prompt", "init_image"))
    keys = ((same_prompt(prompt), init) for prompt, init in zip(*asked, strict=True))
    return np.array([p if init is None else f"{init} {p}" for p, init in keys])


def _nothing(reason: str) -> dict[str, Any]:
    return {"value": None, "ci95": None, "n": 0, "n_prompts": 0, "reason": reason}
