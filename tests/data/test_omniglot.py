"""The embedded set is the published one, whole, upright in polarity, and its test shares nothing with training."""

import hashlib
import re
from pathlib import Path

import pytest
import torch

from counterpoint.data import load, omniglot
from counterpoint.errors import InputError
from counterpoint.evaluate import one_shot, raw_pixels


def test_packed_file_is_the_recorded_one():
    record = omniglot.FILE.with_name("OMNIGLOT.md").read_text()
    digest = hashlib.sha256(omniglot.FILE.read_bytes()).hexdigest()
    assert re.search(rf"`omniglot.npz` \| {omniglot.FILE.stat().st_size:,} \| `{digest}`", record)
    assert "Permission is hereby granted, free of charge" in record and "Copyright (c) 2015 Brenden Lake" in record


def test_every_distinct_drawing_once():
    images = load("omniglot")
    assert images.image.shape == (4840, 1, 105, 105) and images.image.dtype == torch.uint8
    assert len(images.image.flatten(1).unique(dim=0)) == 4840
    assert len(images.classes) == 242 and images.classes[0] == "Balinese/1"
    assert torch.equal(images.label.bincount(), torch.full((242,), 20))


def test_who_drew_what():
    about = omniglot.drawings()
    assert about.alphabets == (
        "Balinese", "Early_Aramaic", "Greek", "Japanese_(katakana)", "Korean", "Latin", "Sanskrit", "Tagalog",
    )  # fmt: skip
    assert (about.sets & 1).count_nonzero() == 2720 and (about.sets & 2).count_nonzero() == 3120
    shared = about.alphabet[about.sets == 3].unique().tolist()
    assert [about.alphabets[i] for i in shared] == ["Greek", "Latin"]
    assert torch.equal(about.drawer.bincount()[1:], torch.full((20,), 242))
    images = load("omniglot")
    at = 1234
    assert images.classes[images.label[at]] == f"{about.alphabets[about.alphabet[at]]}/{about.character[at]}"


def test_ink_is_bright_on_dark():
    image = load("omniglot", limit=50).image
    assert image.unique().tolist() == [0, 255]
    assert 0.02 < (image == 255).float().mean() < 0.2
    assert (image[:, 0, 0, 0] == 0).all()


def test_official_runs():
    runs = omniglot.runs()
    assert runs.training.shape == runs.test.shape == (20, 20, 1, 105, 105)
    assert runs.answer.shape == (20, 20) and runs.answer.dtype == torch.int64
    # in each run every training drawing is the answer exactly once
    assert torch.equal(runs.answer.sort(1).values, torch.arange(20).expand(20, 20))
    # the first lines of run01/class_labels.txt: item01 is class08, item02 class09, item03 class02
    assert runs.answer[0, :3].tolist() == [7, 8, 1]
    test = torch.cat([runs.training, runs.test]).flatten(0, 1).flatten(1)
    both = torch.cat([load("omniglot").image.flatten(1), test])
    assert len(both.unique(dim=0)) == 4840 + 800


def test_resizing_averages_area():
    runs, small = omniglot.runs(), omniglot.runs(size=35)
    assert small.test.shape == (20, 20, 1, 35, 35)
    exact = torch.nn.functional.avg_pool2d(runs.test[3].float(), 3).round().to(torch.uint8)
    assert torch.equal(small.test[3], exact)
    assert load("omniglot", size=28, limit=10).image.shape == (10, 1, 28, 28)


def test_limit_takes_a_seeded_subset():
    whole, some = load("omniglot"), load("omniglot", limit=100, seed=3)
    at = torch.randperm(4840, generator=torch.Generator().manual_seed(3))[:100].sort().values
    assert torch.equal(some.image, whole.image[at]) and torch.equal(some.label, whole.label[at])
    assert not torch.equal(some.label, load("omniglot", limit=100, seed=4).label)


def test_there_is_no_test_split():
    with pytest.raises(InputError, match="one-shot protocol"):
        load("omniglot", "test")


def test_raw_pixels_reach_what_they_are_known_to():
    result = one_shot(raw_pixels, omniglot.runs(), subject="raw pixels")
    assert (result.protocol, result.n, result.subject) == ("one-shot-20way", 400, "raw pixels")
    assert result.value == 22.0
    assert result.ci[0] < 22 < result.ci[1]


def test_needs_nothing_but_the_package():
    assert omniglot.FILE.parent == Path(omniglot.__file__).parent
    assert omniglot.FILE.stat().st_size < 3_000_000
