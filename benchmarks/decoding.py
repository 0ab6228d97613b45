"""Time per token of contrastive search beside the greedy search of transformers and the loop as it was published.

Random weights (a token costs the same whatever it says), prompts of random tokens, nothing ends early:

- ``greedy, transformers``: ``model.generate(do_sample=False)``, the yardstick of all ratios;
- ``greedy, ours``: the same search in our loop;
- ``search, ours``: contrastive search at k = 5, candidates side by side behind one cache;
- ``search, copied``: ours with the cache copied for every candidate, as models need that cannot share it;
- ``search, published``: the released fast loop: the cache repeated k times, states normalised anew at every step.

Every form writes the same number of tokens from the same prompts; the forms take turns, so that a busy minute of the machine
hits all of them. ``seconds`` is the median time of a step (one token of every text) with its quartiles, prompt included;
``cpu_seconds`` counts the processor's time alone, which other programs disturb less.

Run from the repository root on a quiet machine:

    python benchmarks/decoding.py                # a few minutes, writes results/benchmarks/decoding.json
    python benchmarks/decoding.py --models small --new 16 --repeat 2 --out -   # seconds
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterpoint import results
from counterpoint.decoding import ContrastiveSearch, Greedy, Reader, Readers, decode
from counterpoint.encoders.causal import CausalLM, causal

OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "decoding.json"
K, ALPHA = 5, 0.6
MODELS: dict[str, dict[str, Any]] = {
    "small": {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 4096},
    "medium": {"n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 16384},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
}
"""GPT-2s from configurations; the last one is the size of the released small model."""

Form = Callable[[CausalLM, Tensor, int], list[list[int]]]


def transformers_greedy(lm: CausalLM, prompts: Tensor, new: int) -> list[list[int]]:
    mask = torch.ones_like(prompts)
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        return lm.model.generate(prompts, attention_mask=mask, **options)[:, prompts.shape[1] :].tolist()


def ours(strategy: Any) -> Form:
    def run(lm: CausalLM, prompts: Tensor, new: int) -> list[list[int]]:
        return decode(strategy, lm, prompts.tolist(), steps=new, stop=False)

    return run


@torch.inference_mode()
def copied(lm: CausalLM, prompts: Tensor, new: int) -> list[list[int]]:
    reader = Reader(lm, prompts, torch.ones_like(prompts), shared=False)
    steps = ContrastiveSearch(k=K, alpha=ALPHA).tokens(Readers(reader), torch.Generator())
    found = [tokens for _, tokens in zip(range(new), steps, strict=False)]
    return torch.stack(found, 1).tolist()


@torch.inference_mode()
def published(lm: CausalLM, prompts: Tensor, new: int) -> list[list[int]]:
    """As in the release: one forward pass a step, of a cache that is repeated for all candidates and then cut to one."""
    model, rows = lm.model, torch.arange(len(prompts))
    out = model(prompts, use_cache=True, output_hidden_states=True)
    cache, context, logits = out.get("cache", None) or out.past_key_values, out.hidden_states[-1], out.logits[:, -1]
    name, found = lm.cache_name, []
    for _ in range(new):
        share = logits.softmax(-1)
        best = logits.topk(K, -1).indices
        cache.batch_repeat_interleave(K)
        out = model(best.reshape(-1, 1), use_cache=True, output_hidden_states=True, **{str(name): cache})
        states = out.hidden_states[-1]
        before = context.unsqueeze(1).expand(-1, K, -1, -1).reshape(-1, *context.shape[1:])
        before, after = (x / x.norm(dim=2, keepdim=True) for x in (before, states))
        penalty = torch.matmul(before, after.transpose(1, 2)).squeeze(-1).amax(-1).view(-1, K)
        choice = ((1 - ALPHA) * share.gather(1, best) - ALPHA * penalty).argmax(1)
        cache.batch_select_indices(rows * K + choice)
        context = torch.cat([context, states.view(len(prompts), K, -1)[rows, choice][:, None]], 1)
        logits = out.logits.view(len(prompts), K, -1)[rows, choice]
        found.append(best[rows, choice])
    return torch.stack(found, 1).tolist()


FORMS: dict[str, Form] = {
    "greedy, transformers": transformers_greedy,
    "greedy, ours": ours(Greedy()),
    "search, ours": ours(ContrastiveSearch(k=K, alpha=ALPHA)),
    "search, copied": copied,
    "search, published": published,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8", help="texts at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to write")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", default=str(OUT), help="file to write, - for none")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        torch.manual_seed(0)
        lm = causal({**MODELS[name], "initializer_range": 0.1}, tokenizer="bytes", positions=1024).eval()
        lm.model.generation_config.eos_token_id = None
        for batch in map(int, options.batches.split(",")):
            prompts = torch.randint(
                0, lm.vocabulary, (batch, options.prompt), generator=torch.Generator().manual_seed(1)
            )
            texts = {form: run(lm, prompts, 4) for form, run in FORMS.items()}  # warm-up
            assert texts["greedy, transformers"] == texts["greedy, ours"]
            assert texts["search, ours"] == texts["search, copied"] == texts["search, published"]
            seconds: dict[str, list[float]] = {form: [] for form in FORMS}
            worked: dict[str, list[float]] = {form: [] for form in FORMS}
            for _ in range(options.repeat):
                for form, run in FORMS.items():
                    start, before = time.perf_counter(), time.process_time()
                    run(lm, prompts, options.new)
                    seconds[form].append((time.perf_counter() - start) / options.new)
                    worked[form].append((time.process_time() - before) / options.new)
            base, work = (statistics.median(found["greedy, transformers"]) for found in (seconds, worked))
            for form, found in seconds.items():
                middle = statistics.median(found)
                quartiles = statistics.quantiles(found, n=4) if len(found) > 1 else [middle] * 3
                row = {"model": name, "batch": batch, "form": form, "seconds": middle, "ratio": middle / base}
                row |= {
                    "cpu_seconds": statistics.median(worked[form]),
                    "cpu_ratio": statistics.median(worked[form]) / work,
                }
                rows.append(row | {"low": quartiles[0], "high": quartiles[2]})
                print(
                    f"{name:<8} batch {batch:<3} {form:<22} {1000 * middle:8.2f} ms a step   {middle / base:5.2f}   "
                    f"of processor time {row['cpu_ratio']:5.2f}",
                    flush=True,
                )
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    from importlib.metadata import version

    about |= {"transformers": version("transformers"), "processor": platform.machine()}
    settings = {"k": K, "alpha": ALPHA, "prompt": options.prompt, "new": options.new, "repeat": options.repeat}
    if options.out != "-":
        results.save(options.out, {"rows": rows, "settings": settings, "environment": about})


if __name__ == "__main__":
    main()
