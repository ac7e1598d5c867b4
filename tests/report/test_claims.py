"""Claims in every rendering: verdicts with their effects, and nothing lost on the way."""

import copy
import io
import re

import pytest
from rich.console import Console

from sd35bench.claims.catalogue import CLAIMS, claims_document
from sd35bench.report.claims import claims_parts, claims_section
from sd35bench.report.page import render_report
from sd35bench.report.render import markdown_document, print_document
from tests.studies.drawn import Synthetic, document_of
from tests.studies.planted_claims import Truth, planted_claims


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Verdicts of every kind but refuted latency: edits are missing."""
    study = planted_claims(tmp_path_factory.mktemp("claims"), Truth(), levels=128)
    study.kept = [r for r in study.kept if r.trial.request.init_image is None]
    return claims_document(study)


def printed(document: dict, width: int = 120) -> str:
    out = io.StringIO()
    print_document(claims_parts(document), Console(file=out, width=width, highlight=False))
    return out.getvalue()


def page(demo: Synthetic, document: dict) -> str:
    return render_report(document_of(demo.study, demo.show, None, document))


def test_the_lead_counts_verdicts_and_names_the_judge(document):
    lead = claims_section(document)["lead"]
    assert lead.startswith(f"Of {len(CLAIMS)} claims of the model page, tested on nano: ")
    assert "3 not measured" in lead
    assert "1 not testable" in lead
    assert lead.endswith("Following the prompt is judged by prompt accuracy.")
    told = sum(int(count) for count in re.findall(r"(\d+) (?:supported|refuted|inc|not)", lead))
    assert told == len(CLAIMS)


def test_markdown_has_every_claim_with_effect_threshold_and_n(document):
    text = markdown_document(claims_parts(document))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    head = next(line for line in rows if line.startswith("| verdict"))
    summary = rows[2 : 2 + len(CLAIMS)]
    assert len(summary) == len(CLAIMS)
    assert {line.count("|") for line in summary} == {head.count("|")}
    detail = next(line for line in summary if "more detail" in line)
    assert "supported" in detail
    assert re.search(r"×1\.20\d \[1\.1\d+, 1\.2\d+\] \| ×1\.02 \| 96 \| 48 \|", detail)
    for claim in CLAIMS:
        assert claim.text in text.replace("\\_", "_")
        says = claim.says if claim.tested is None else f"{claim.says} (tested: {claim.tested})"
        assert re.search(rf"\| \w[\w ]+ on nano \| {re.escape(says)} \|", text)
        assert re.search(rf"^## .{re.escape(says[1:])}: [\w ]+ on nano$", text, re.MULTILINE)
    assert text.startswith("# Claims of SD 3.5 Medium's model page, tested on nano: study ")
    assert "`sd35bench run experiment=claims-edit study=synthetic backend.dtype=fp32 " in text


@pytest.mark.parametrize("width", [80, 120, 200])
def test_terminal_has_every_claim_within_its_width(document, width):
    text = printed(document, width)
    table = text[text.index("verdict") : text.index("latency:")]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= width
    verdict = re.compile(r"^ ?(supported|refuted|inconclusive|not \w+)", re.MULTILINE)
    assert len(verdict.findall(table)) == len(CLAIMS)
    assert "sd35bench run experiment=claims-edit study=synthetic" in text


def test_the_report_has_a_section_with_designs_and_figures(demo, document):
    html = page(demo, document)
    assert 'href="#claims"' in html
    assert html.count('<li class="claim">') == len(CLAIMS)
    measured = [claim for claim in document["claims"] if claim["contrasts"]]
    assert html.count("Design and figures") == len(measured)
    for claim in measured:
        for one in claim["contrasts"]:
            assert one["name"] in html
    assert '<span class="verdict supported">' in html
    assert '<span class="verdict not-measured">' in html


def test_the_report_of_another_study_has_no_section(demo):
    html = render_report(document_of(demo.study, demo.show, None))
    assert 'id="claims"' not in html
    assert 'href="#claims"' not in html


def test_the_effect_shown_is_the_one_that_the_verdict_hangs_on(document):
    changed = copy.deepcopy(document)
    claim = next(c for c in changed["claims"] if c["name"] == "cfg-follows")
    claim["deciding"] = claim["contrasts"][1]["name"]
    section = claims_section(changed)
    view = next(v for v in section["claims"] if v["says"] == claim["says"])
    assert view["effect"].startswith("cfg 15 better than 7: +0.2")


def test_names_are_escaped(demo, document):
    hostile = {**document, "study": "a|b<script>_x_"}
    assert "a\\|b\\<script>\\_x\\_" in markdown_document(claims_parts(hostile))
    changed = copy.deepcopy(document)
    changed["claims"][0]["says"] = "<script>window.pwned=1</script>"
    assert "<script>window.pwned" not in page(demo, changed)
