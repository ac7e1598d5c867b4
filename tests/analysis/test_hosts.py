"""Hosts and devices: what shares a row, what stays apart, and how far apart pooled ones are."""

from dataclasses import replace

import pytest

from sd35bench.analysis.summary import show_document
from sd35bench.types import Timings
from tests.studies.memory import MemoryStudy, record, session


@pytest.fixture
def study_of(tmp_path):
    """Makes a study with eight timed images on each host and device, all of one environment."""

    def make(*where: tuple[str, str | None]) -> MemoryStudy:
        study = MemoryStudy(tmp_path, lives={})
        for number, (host, gpu) in enumerate(where):
            facts = {"hostname": host, "boot_id": f"boot {number}", "device_uuid": gpu}
            study.lives[f"s{number}"] = replace(session(f"s{number}"), environment=facts)
            for n in range(8 * number, 8 * number + 8):
                timings = Timings(generate_s=1.0 + number / 4, encode_s=0.0)
                begun = f"2026-01-01T00:00:{n:02}"
                study.add(record(n, session_id=f"s{number}", started_at=begun, timings=timings))
        return study.touch_images()

    return make


def test_devices_of_one_host_share_a_row_and_the_spread_is_said(study_of):
    document = show_document(study_of(("h", "GPU-0"), ("h", "GPU-1")))
    (row,) = document["settings"]
    assert (row["latency_s"]["n"], row["device_spread"], row["host_spread"]) == (16, 1.25, None)
    assert any("devices share this row" in text for text in row["warnings"])


def test_hosts_stay_apart_unless_they_are_pooled_and_then_the_spread_is_said(study_of):
    apart = show_document(study_of(("h", None), ("i", None)))["settings"]
    assert [(r["latency_s"]["n"], r["host_spread"]) for r in apart] == [(8, None)] * 2
    assert len({r["id"] for r in apart}) == 2
    (pooled,) = show_document(study_of(("h", None), ("i", None)), pool_hosts=True)["settings"]
    assert (pooled["latency_s"]["n"], pooled["host_spread"]) == (16, 1.25)
    assert any("hosts, pooled as asked" in text for text in pooled["warnings"])


def test_a_boot_splits_no_row_and_one_host_keeps_its_id(study_of):
    (row,) = show_document(study_of(("h", "GPU-0"), ("h", "GPU-0"), ("h", "GPU-0")))["settings"]
    assert row["environment_id"] == session().environment_id
