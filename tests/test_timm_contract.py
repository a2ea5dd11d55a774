"""timm's own model tests, on one model: what `make test-timm` runs on all."""

from xml.etree import ElementTree

import pytest

from tests import timm_contract

# Tests of timm 1.0.31 that take their models from the registry. Fewer would mean that a filter left ours out.
NUM_TESTS = "11"


def test_all_pass(tmp_path):
    report = tmp_path / "report.xml"
    try:
        code = timm_contract.run(["dinat_mini"], f"--junitxml={report}", "-p", "no:warnings", "--tb=short")
    except timm_contract.Unavailable as reason:
        pytest.skip(str(reason))
    (suite,) = ElementTree.parse(report).iter("testsuite")
    assert (code, suite.get("tests"), suite.get("skipped")) == (0, NUM_TESTS, "0")
