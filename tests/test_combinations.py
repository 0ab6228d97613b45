"""Every part on every method as docs/combinations.yaml says: trained for a step, or refused with that reason."""

import copy
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from counterpoint import methods, views
from counterpoint.encoders import several
from counterpoint.errors import InputError
from counterpoint.memory import mixing
from counterpoint.recipes import experiment, model_options
from counterpoint.train.method import Method

KNOWN = yaml.safe_load((Path(__file__).parents[1] / "docs" / "combinations.yaml").read_text(encoding="utf-8"))
PARTS = {part["name"]: part for part in KNOWN["parts"]}
CELLS = [(name, slug, cell) for name, row in KNOWN["cells"].items() for slug, cell in row.items()]
ALLOWED = [(name, slug) for name, slug, cell in CELLS if "works" in cell]
REFUSED = [(name, slug, cell["refused"]) for name, slug, cell in CELLS if "refused" in cell]

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"encoder": "convnet-4", "image_size": 12, "projection": [12, 6]}
SMALL = {
    "moco": {**IMAGE, "queue": 20},
    "simclr": IMAGE,
    "dcl": IMAGE,
    "simcse": {"encoder": TEXT, "max_length": 32},
    "esimcse": {"encoder": TEXT, "max_length": 32, "queue": 20},
    "clip": {"encoder": "convnet-4", "text": TEXT, "dim": 12, "image_size": 12, "max_length": 16},
    "simsiam": {**IMAGE, "bottleneck": 4},
    "byol": IMAGE,
    "barlow-twins": IMAGE,
}
CHOICES = {
    "mochi": mixing.HardMixing(hard=4, mixed=3, mixed_with_query=2, warmup_epochs=0),
    "feature-transformation": mixing.Transformation(),
    "hallucinator": mixing.Hallucination(),
    "several": several.SeveralHeads(count=2),
    "amcl": several.AdaptiveHeads(count=2, hidden=8, tau=(0.01, 2.0)),
    "multi-crop-small": views.MultiCrop(count=2, size=8),
}
REGISTERED = {"mixing": mixing.NAMED, "heads": several.NAMED, "small_views": views.NAMED}
SENTENCES = ["a dog runs", "two cats sleep", "it rains again", "the sky is falling", "nothing happens", "x"]


@cache
def items(slug: str) -> dict[str, torch.Tensor]:
    """A batch of six as the method takes it."""
    image = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if slug not in ("simcse", "esimcse", "clip"):
        return {"image": image}
    method = build(slug)
    if slug != "clip":
        return method.read(SENTENCES).take(torch.arange(6))
    tokens = method.encoder.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    ids, mask = (tokens[name][:, None] for name in ("input_ids", "attention_mask"))
    return {"image": image, "input_ids": ids, "attention_mask": mask, "caption": torch.arange(6)[:, None]}


def build(slug: str, *names: str) -> Method:
    """The method with parts, through the same door as recipes and the command line."""
    options: dict = {}
    for name in names:
        if PARTS[name]["argument"] == "mixing":
            options.setdefault("mixing", []).append(CHOICES[name])
        else:
            options[PARTS[name]["argument"]] = CHOICES[name]
    return experiment(slug, **SMALL[slug], **options).build(0).train()


def step(method: Method, slug: str) -> float:
    """Loss after one optimiser step on the same batch, so that queues are filled and all that learns has learned."""
    groups = [group for group in method.parameter_groups() if group["params"]]
    optimiser = torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.01)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loss = method.loss(copy.copy(items(slug)))
        optimiser.zero_grad()
        loss.backward()
        grown = [p for group in groups for p in group["params"] if p.requires_grad]
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in grown)
        optimiser.step()
        losses.append(loss.item())
    return losses[1]


@cache
def plain(slug: str) -> float:
    return step(build(slug), slug)


@pytest.mark.parametrize(("name", "slug"), ALLOWED)
def test_an_allowed_pair_trains_and_the_part_matters(name, slug):
    method = build(slug, name)
    assert step(method, slug) != pytest.approx(plain(slug), abs=1e-4)
    parts = [method.mixing, *([method.heads] if hasattr(method, "heads") else [])]
    groups = {id(p) for group in method.parameter_groups() for p in group["params"]}
    for p in (p for part in parts for p in part.parameters()):
        assert id(p) in groups and p.grad is not None and p.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "slug", "reason"), REFUSED)
def test_a_refused_pair_says_why(name, slug, reason):
    with pytest.raises(InputError) as refused:
        build(slug, name)
    assert reason in str(refused.value)


@pytest.mark.parametrize("row", KNOWN["together"], ids=lambda row: "-".join([row["method"], *row["parts"]]))
def test_parts_together(row):
    if "works" in row:
        alone = [step(build(row["method"], name), row["method"]) for name in row["parts"]]
        found = step(build(row["method"], *row["parts"]), row["method"])
        assert all(found != pytest.approx(other, abs=1e-4) for other in [plain(row["method"]), *alone])
    else:
        with pytest.raises(InputError) as refused:
            build(row["method"], *row["parts"])
        assert row["refused"] in str(refused.value)


def test_the_table_is_complete():
    """A new part, or a method that takes parts, must be put in."""
    classes = {part["class"]: part for part in KNOWN["parts"]}
    kinds = (*get_args(mixing.Mixing), *get_args(several.Heads), views.MultiCrop)
    assert classes.keys() == {kind.__name__ for kind in kinds}
    for name, part in PARTS.items():
        assert type(REGISTERED[part["argument"]][name]).__name__ == part["class"] == type(CHOICES[name]).__name__
    assert all([*row] == KNOWN["baselines"] for row in KNOWN["cells"].values())
    assert KNOWN["cells"].keys() == PARTS.keys() and all(
        ("works" in cell) != ("refused" in cell) for _, _, cell in CELLS
    )
    options = {line.slug: model_options(methods.get(line.slug)) for line in methods.BASELINES}
    taking = [slug for slug, known in options.items() if "mixing" in known or "small_views" in known]
    assert {*taking} <= {*KNOWN["baselines"]}
