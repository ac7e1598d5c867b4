from sd35bench.analysis.summary import show_document
from sd35bench.report.render import markdown_document
from sd35bench.report.show import settings_parts
from sd35bench.study.store import Study
from sd35bench.workers.process import run_plan
from tests.studies.fakes import fake_load, fake_plan


def make_document(tmp_path, name="s"):
    study = Study.open(tmp_path, name, create=True)
    for steps in (4, 8):
        run_plan(fake_plan(fake_load(), 3, steps=steps), study)
    return show_document(study)


def test_markdown_has_a_row_per_setting_with_n_and_environment(tmp_path):
    text = markdown_document(settings_parts(make_document(tmp_path)))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    widths = {line.count(" | ") for line in rows}
    assert len(widths) == 1
    assert " 3 |" in rows[2]
    assert "Environment: " in text
    assert "torch" in text


def test_markdown_escapes_what_could_be_markup(tmp_path):
    document = make_document(tmp_path)
    document["study"] = "a|b<script>_x_"
    assert "a\\|b\\<script>\\_x\\_" in markdown_document(settings_parts(document))
