"""The registry names 49 papers and 4 baselines, stays light, and finds other packages' methods."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from counterpoint import methods
from counterpoint.errors import InputError

DOMAINS = {
    "vision", "language", "image_text", "recommendation", "series", "audio_visual", "points", "detection",
    "restoration", "generation", "decoding",
}  # fmt: skip


def test_the_catalogue_is_complete_and_unambiguous():
    assert [line.number for line in methods.CATALOGUE] == list(range(1, 50))
    every = [*methods.BASELINES, *methods.CATALOGUE]
    assert len({line.slug for line in every}) == 49 + len(methods.BASELINES)
    assert {line.domain for line in every} <= DOMAINS
    assert methods.entry("dcl").number == 28 and methods.entry("dcl").status == "ready"
    assert methods.entry("esimcse").number == 49
    assert {"simclr", "moco", "byol", "simsiam", "simcse", "sasrec", "cl4srec"} <= {
        line.slug for line in methods.BASELINES
    }
    assert all(line.number is None and line.status == "ready" for line in methods.BASELINES)


def test_the_registry_does_not_import_torch():
    code = "import sys, counterpoint.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match=r'no method named "simlcr"; did you mean simclr\?'):
        methods.get("simlcr")
    with pytest.raises(InputError, match="did you mean dcl"):
        methods.entry("dlc")


def test_planned_methods_say_so(monkeypatch):
    monkeypatch.setattr(methods, "CATALOGUE", (methods.Entry(1, "later", "Later", "vision"),))
    assert "later" not in methods.names()
    with pytest.raises(InputError, match="planned"):
        methods.get("later")


def test_get_imports_the_class(monkeypatch):
    monkeypatch.setattr(methods, "BASELINES", (methods.Entry(None, "here", "Here", "vision", "fractions:Fraction"),))
    from fractions import Fraction

    assert methods.get("here") is Fraction


def test_methods_of_other_packages(monkeypatch):
    points = [
        EntryPoint("theirs", "decimal:Decimal", methods.ENTRY_POINTS),
        EntryPoint("broken", "no_such_module_here:X", methods.ENTRY_POINTS),
        EntryPoint("simclr", "decimal:Decimal", methods.ENTRY_POINTS),
    ]
    monkeypatch.setattr(methods, "entry_points", lambda group: points if group == methods.ENTRY_POINTS else [])
    from decimal import Decimal

    assert methods.get("theirs") is Decimal
    assert methods.names().count("simclr") == 1 and "theirs" in methods.names()
    with pytest.raises(InputError, match="cannot be imported"):
        methods.get("broken")
    with pytest.raises(InputError, match="did you mean theirs"):
        methods.get("their")


@pytest.mark.parametrize("name", methods.names())
def test_every_ready_method_can_be_imported(name):
    assert isinstance(methods.get(name), type)


def test_names_and_import_paths_go_back_and_forth():
    from fractions import Fraction

    assert methods.name_of(methods.get("simclr")) == "simclr"
    assert methods.name_of(Fraction) == "fractions:Fraction"
    assert methods.get("fractions:Fraction") is Fraction
    for broken in ("fractions:Absent", "no_such_module_here:X"):
        with pytest.raises(InputError, match="cannot be imported"):
            methods.get(broken)
