"""A comparison as JUnit XML: one test per setting and dimension, as CI systems read it.

What is asked of the comparison as a whole is a suite of its own, so that a gate that failed always
has a failing test.
"""

from typing import Any
from xml.etree import ElementTree

from sd35bench.report.gate import figure_text

__all__ = ["junit_xml"]


def junit_xml(document: dict[str, Any]) -> str:
    """Render a `compare` document.

    A failed dimension is a failure; what does not apply is skipped, and so is what is undecided,
    unless the policy says that it fails.
    """
    root = ElementTree.Element("testsuites", name="sd35bench compare")
    for comparison in document["comparisons"]:
        name = f"{document['candidate']} against {document['baseline']}: {comparison['title']}"
        _suite(root, document, name, comparison["dimensions"])
    _suite(root, document, "the gate as a whole", document["gate"])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(
    root: ElementTree.Element, document: dict[str, Any], name: str, judged: dict[str, Any]
) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=_clean(name))
    outcomes = []
    for dimension, found in judged.items():
        outcome = _outcome(found["verdict"], document["undecided_fails"])
        outcomes.append(outcome)
        case = ElementTree.SubElement(
            suite, "testcase", classname=_clean(f"compare.{document['policy']}"), name=dimension
        )
        figures = found.get("figures")
        text = found["reason"] if figures is None else "\n".join(map(figure_text, figures))
        if outcome is not None:
            message = _clean(f"{found['verdict']}: {found['reason']}")
            ElementTree.SubElement(case, outcome, message=message).text = _clean(text)
        else:
            ElementTree.SubElement(case, "system-out").text = _clean(text)
    suite.set("tests", str(len(outcomes)))
    suite.set("failures", str(outcomes.count("failure")))
    suite.set("skipped", str(outcomes.count("skipped")))
    suite.set("errors", "0")


def _outcome(verdict: str, undecided_fails: bool) -> str | None:
    if verdict == "pass":
        return None
    fails = verdict == "fail" or (verdict == "undecided" and undecided_fails)
    return "failure" if fails else "skipped"


def _clean(text: str) -> str:
    """Leave out the control characters that XML 1.0 cannot hold."""
    return "".join(c for c in text if c in "\t\n\r" or (c >= " " and c not in "\ufffe\uffff"))
