"""Records are found, checked and written whole."""

import json

import pytest

from counterpoint import results
from counterpoint.errors import InputError


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_RESULTS", str(tmp_path))
    return tmp_path


def test_nothing_recorded_is_none():
    assert results.study("dcl") is None
    assert results.parity("dcl") is None


def test_study_round_trip(records):
    results.save(records / "studies" / "dcl.json", {"verdict": "reproduced", "effect": 2.5, "ci": [1.0, 4.0]})
    found = results.study("dcl")
    assert found["verdict"] == "reproduced" and found["effect"] == 2.5 and found["ci"] == [1.0, 4.0]
    assert found["record"] == "studies/dcl.json"


def test_parity_holds_two_counts(records):
    results.save(records / "parity.json", {"dcl": {"passed": 6, "failed": 1, "largest_difference": 1e-7}})
    assert results.parity("dcl") == {"passed": 6, "failed": 1}
    assert results.parity("moco") is None


@pytest.mark.parametrize("content", ["{", '{"verdict": "yes"}', "[1]"])
def test_unusable_study_is_named(records, content):
    (records / "studies").mkdir()
    (records / "studies" / "dcl.json").write_text(content)
    with pytest.raises(InputError, match=r"dcl\.json"):
        results.study("dcl")


def test_save_is_sorted_and_keeps_the_old_file_on_failure(records):
    path = results.save(records / "deep" / "a.json", {"b": 1, "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        results.save(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        results.save(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é", "b": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_checkout_results_are_found_without_the_variable(monkeypatch):
    monkeypatch.delenv("COUNTERPOINT_RESULTS")
    assert results.folder().name == "results"
