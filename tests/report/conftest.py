"""Synthetic studies, built once per session."""

import pytest

from sd35bench.analysis.summary import show_document
from sd35bench.recommend.advice import recommend_document
from sd35bench.report.page import render_report
from tests.studies.backends import make_backends_study
from tests.studies.drawn import HOSTILE, PROFILES, Synthetic, document_of, make_study, show_of
from tests.studies.hosted import make_hosted_study


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """Text-to-image and image-to-image with scores."""
    study = make_study(tmp_path_factory.mktemp("results"))
    return Synthetic(study, show_of(study), recommend_document(study, PROFILES))


@pytest.fixture(scope="session")
def demo_page(demo: Synthetic) -> str:
    """Its report, which takes a second to make."""
    return render_report(document_of(demo.study, demo.show, demo.recommend))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """A small study whose prompts are attacks."""
    root = tmp_path_factory.mktemp("hostile")
    study = make_study(root, steps=(4, 12), cfgs=(1.0,), strengths=(0.5,), prompts=HOSTILE)
    return Synthetic(study, show_of(study), recommend_document(study, PROFILES))


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """Eager, compiled and quantised runs side by side, on a GPU."""
    study = make_backends_study(tmp_path_factory.mktemp("backends"), gpu=True)
    return Synthetic(study, show_document(study), None)


@pytest.fixture(scope="session")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """Eager beside two hosted services."""
    study = make_hosted_study(tmp_path_factory.mktemp("hosted"))
    return Synthetic(study, show_document(study), None)
