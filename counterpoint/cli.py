"""The command line: one vocabulary for every method. Imports nothing heavy until a subcommand needs it."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from counterpoint.errors import CounterpointError, InputError, nearest

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (0 fine, 1 a check failed, 2 bad input, 130 Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        import counterpoint

        print(counterpoint.__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            raise InputError(f'no command "{name}"{nearest(name, COMMANDS)}; counterpoint --help lists them')
        logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
        logging.getLogger("counterpoint").setLevel(logging.INFO)
        return COMMANDS[name][0](rest)
    except CounterpointError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"{place}{error.strerror or error}", file=sys.stderr)
        return 2


def overview() -> str:
    lines = [
        "counterpoint: contrastive representation learning in every modality",
        "",
        "usage: counterpoint COMMAND [options]        counterpoint COMMAND --help",
        "",
    ]
    return "\n".join(lines + [f"  {name:<11}{about}" for name, (_, about) in COMMANDS.items()])


def methods(argv: list[str]) -> int:
    parser = _parser("methods", "The methods: number, name, domain, status and evidence.")
    parser.add_argument("--json", action="store_true", help="the 49 methods of the catalogue as a JSON list")
    options = parser.parse_args(argv)
    from counterpoint.methods import BASELINES, CATALOGUE
    from counterpoint.results import parity, study

    keys = ("verdict", "effect", "ci", "record")
    rows: list[dict[str, Any]] = []
    for entry in (*CATALOGUE,) if options.json else (*BASELINES, *CATALOGUE):
        found = study(entry.slug)
        rows.append(
            {
                "number": entry.number,
                "slug": entry.slug,
                "title": entry.title,
                "domain": entry.domain,
                "status": entry.status,
                "parity": parity(entry.slug),
                "study": {key: found[key] for key in keys} if found else None,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'':>3} {'name':<23}{'domain':<16}{'status':<9}{'parity':<9}{'study':<16}title")
    for row in rows:
        golden = f"{row['parity']['passed']}/{sum(row['parity'].values())}" if row["parity"] else "-"
        verdict = row["study"]["verdict"].replace("_", " ") if row["study"] else "-"
        print(
            f"{row['number'] or '':>3} {row['slug']:<23}{row['domain']:<16}{row['status']:<9}{golden:<9}{verdict:<16}"
            f"{row['title']}"
        )
    return 0


def train(argv: list[str]) -> int:
    from shlex import join

    from counterpoint import methods, recipes
    from counterpoint.train import fit, resume
    from counterpoint.train.method import typed
    from counterpoint.train.run import next_folder

    command = join(["counterpoint", "train", *argv])
    argv, folder = _take(argv, "--resume")
    if folder is not None:
        name, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
        changes = recipes.plain(_pairs(argv))
        data = changes.pop("data", None) if _on_array(folder) else None
        changes |= {"method": recipes.experiment(name).method} if name else {}
        run = resume(folder, data, changes=changes)
        return _after_training(run)
    argv, config = _take(argv, "--config")
    written = _read_config(config) if config else {}
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    elif "method" in written:
        name = written["method"]
    else:
        print(
            "usage: counterpoint train NAME [--data D] [--option value ...]   NAME is a method or a recipe\n"
            "       counterpoint train --resume RUN\n"
            "       counterpoint train NAME --help            every option of that method\n"
            "       counterpoint train NAME --print_config    the resolved configuration as YAML\n\n"
            "recipes: " + ", ".join(recipes.entries())
        )
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    written.pop("method", None)
    for key in ("heads", "views", "other_views", "small_views", "mixing", "mined"):
        argv, value = _take(argv, f"--{key}")
        written |= {key: value} if value else {}
    recipe = recipes.experiment(name, **written)
    typed(methods.get(recipe.method), recipe.model)  # its words about a wrong part are clearer than a parser's
    chosen = _train_options(name, recipe, argv)
    data = chosen.pop("data")
    if data is None:
        raise InputError(f"{name} needs data: --data FOLDER, or one of the recipes {', '.join(_with_data(name))}")
    options = {key: chosen.pop(key) for key in [*recipes.fit_options(), "run"]}
    experiment = recipes.Experiment(name, recipe.method, chosen, data, options)
    target = options.pop("run") or next_folder(name)
    run = fit(experiment.build(options["seed"]), data, run=target, command=command, **options)
    return _after_training(run)


def evaluate(argv: list[str]) -> int:
    parser = _parser("evaluate", "Measure a run by the protocols that fit its data.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", help="other data than the run was trained on")
    parser.add_argument(
        "--protocol", nargs="+", help="only these protocols; NAME@head measures after the projection head"
    )
    parser.add_argument("--head", action="store_true", help="measure before and after the projection head")
    options = parser.parse_args(argv)
    from counterpoint.evaluate.runs import evaluate as measure
    from counterpoint.train import Run

    run = Run.open(options.run)
    show_results(measure(run, options.data, protocols=options.protocol, head=options.head))
    print(f"\nwritten to {run.folder / 'evaluation.json'}; next: counterpoint report {run.folder}")
    return 0


def compare(argv: list[str]) -> int:
    parser = _parser("compare", "Train methods at one budget and seed by seed; other --options apply to all of them.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="recipes or methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/compare", help="folder of the runs; finished ones are reused")
    parser.add_argument("--record", help="also write results/comparisons/NAME.json and its plot")
    options, rest = parser.parse_known_args(argv)
    from counterpoint import results
    from counterpoint.studies import compare as side_by_side

    comparison = side_by_side(options.names, seeds=options.seeds, out=options.out, changes=_pairs(rest))
    _show_comparison(comparison)
    results.save(Path(options.out) / "comparison.json", comparison.to_dict())
    plot = comparison.plot(Path(options.out) / "comparison.svg")
    print(f"\nplot: {plot}")
    if options.record:
        folder = results.folder() / "comparisons"
        results.save(folder / f"{options.record}.json", comparison.to_dict())
        comparison.plot(folder / f"{options.record}.svg")
    return 0


def reproduce(argv: list[str]) -> int:
    parser = _parser("reproduce", "Re-run the central claim of a paper: paired runs, effect with interval, verdict.")
    parser.add_argument("slug", help="method of the catalogue")
    parser.add_argument("--budget", default="cpu", help="size of the study: cpu, gpu, or another that it names")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the study's")
    parser.add_argument("--out", default="runs/studies", help="folder of the runs; finished ones are reused")
    parser.add_argument("--no-save", action="store_true", help="do not write the record into results/")
    options = parser.parse_args(argv)
    from counterpoint.studies import reproduce as run_study

    record = run_study(
        options.slug, budget=options.budget, seeds=options.seeds, out=options.out, save=not options.no_save
    )
    print(record["claim"])
    for name, arm in record["arms"].items():
        values = "  ".join(f"{value:.2f}" for value in arm["values"])
        print(f"  {name:<16}{arm['mean']:7.2f}   {record['metric']}, by seed: {values}")
    for item in record["expectations"]:
        between = f"[{item['ci'][0]:+.2f}, {item['ci'][1]:+.2f}]" if item["ci"] else "(one seed: no interval)"
        print(f"  {'holds' if item['holds'] else 'fails':<7}{item['expect']}   margin {item['margin']:+.2f} {between}")
    print(f"{record['slug']}: {record['verdict'].replace('_', ' ')}")
    return 0


def embed(argv: list[str]) -> int:
    parser = _parser("embed", "Embeddings of a data set under a run's encoder, as an .npz file.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data", required=True, help="known name, folder, .npz or .npy file")
    parser.add_argument("--split", help="part of a data set that has several")
    parser.add_argument("--domain", help="of all texts, where the model knows several and the data do not say it")
    parser.add_argument("--out", default="vectors.npz")
    options = parser.parse_args(argv)
    import inspect

    import numpy as np

    from counterpoint.atomic import save_arrays
    from counterpoint.train import Run

    method = Run.open(options.run).model()
    part = {"split": options.split} if options.split else {}
    if options.domain and "domain" not in inspect.signature(method.encode).parameters:
        raise InputError(f"{type(method).__name__} knows no domains: leave --domain out")
    if method.family in ("images", "pairs"):
        items = getattr(method, "images", method.read)(options.data, **part)
        arrays = {"vector": method.encode(items)}
        if items.label is not None:
            arrays |= {"label": items.label.numpy(), "classes": np.array(items.classes)}
        if items.paths:
            arrays["path"] = np.array(items.paths)
    else:
        arrays = {
            "vector": method.encode(options.data, **part, **({"domain": options.domain} if options.domain else {}))
        }
    if method.family == "sentences":
        from counterpoint.data import texts

        arrays["sentence"] = np.array(texts.load(options.data, **part, whole=True).columns["anchor"])
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    save_arrays(options.out, arrays)
    count, width = arrays["vector"].shape
    print(f"{options.out}: {count:,} vectors of {width} dimensions ({', '.join(arrays)})")
    return 0


def index(argv: list[str]) -> int:
    from counterpoint.serve.index import KINDS, METRICS

    parser = _parser("index", "Make embeddings searchable: those of a file, or what a run makes of data.")
    parser.add_argument("source", help="embedding file (.npz with vector, .npy, .safetensors) or run folder")
    parser.add_argument("--data", help="what a run is to embed; default is what it was trained on")
    parser.add_argument("--split", help="part of a data set that has several")
    parser.add_argument("--out", help="folder of the index; default RUN/index, or FILE.index beside the file")
    parser.add_argument("--metric", choices=METRICS, help="default cosine; dot for the items of a run on histories")
    parser.add_argument(
        "--kind", choices=KINDS, default="exact", help="exact; hnsw (a graph); int8 (a quarter the size)"
    )
    parser.add_argument("--M", type=int, default=32, help="hnsw: links of a vector")
    parser.add_argument("--ef_search", type=int, default=128, help="hnsw: candidates that a search keeps")
    options = parser.parse_args(argv)
    from counterpoint.serve.index import Index, of_file, of_run

    source = Path(options.source)
    about: dict[str, Any]
    if (source / "config.yaml").is_file():
        vectors, ids, about = of_run(source, options.data, options.split)
        out = Path(options.out or source / "index")
    else:
        if source.is_dir():
            raise InputError(f"{source} is neither a run folder (it holds no config.yaml) nor an embedding file")
        for name in ("data", "split"):
            if getattr(options, name) is not None:
                raise InputError(f"{source} holds vectors, so there is nothing to embed: leave --{name} away")
        (vectors, ids), about = of_file(source), {"file": str(source.resolve())}
        out = Path(options.out or source.with_suffix(".index"))
    metric = options.metric or ("dot" if about.get("of") == "histories" else "cosine")
    settings = {"metric": metric, "kind": options.kind, "M": options.M, "ef_search": options.ef_search}
    made = Index.build(vectors, ids, **settings, about=about)
    made.save(out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{out}: {len(made):,} vectors of {made.dim} dimensions, {metric}, {options.kind}, {size:,.1f} MB")
    return 0


def search(argv: list[str]) -> int:
    parser = _parser("search", "The nearest in an index: to one of its items, or to something its run can embed.")
    parser.add_argument("index", help="folder that counterpoint index wrote")
    parser.add_argument("query", nargs="*", help="id in the index (itself left out), image file, sentence, or items")
    parser.add_argument("-k", type=int, default=10, help="how many")
    parser.add_argument("--vector", metavar="FILE", help="queries from an embedding file")
    parser.add_argument("--metric", help="refuse an index of another metric")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(argv)
    from counterpoint.serve.index import Index, ask, of_file

    if not options.query and not options.vector:
        raise InputError("there is no query: name an id, an image file or a sentence, or pass --vector FILE")
    opened = Index.open(options.index, metric=options.metric)
    answers = [(query, *ask(opened, query, options.k)) for query in options.query]
    if options.vector:
        for row, (scores, ids) in enumerate(zip(*opened.search(of_file(options.vector)[0], options.k), strict=True)):
            answers.append((f"{options.vector} {row}", scores, ids))
    if options.json:
        keys = ("rank", "score", "id")
        found = [
            {"query": query, "results": [dict(zip(keys, row, strict=True)) for row in _ranked(scores, ids)]}
            for query, scores, ids in answers
        ]
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    for query, scores, ids in answers:
        _show_neighbours(query, opened.metric, _ranked(scores, ids))
    return 0


def generate(argv: list[str]) -> int:
    from counterpoint.decoding import STRATEGIES, strategy

    parser = _parser("generate", "Continue text with a causal language model; a single prompt is shown while it grows.")
    parser.add_argument("--model", required=True, help="run folder, or a transformers model by name or folder")
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line, or a table with a column prompt")
    parser.add_argument("--out", metavar="FILE", help="write JSON lines: prompt and continuation")
    parser.add_argument("--strategy", default="contrastive-search", help=", ".join(STRATEGIES))
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--amateur", help="contrastive, lol: the model to contrast with (a run of lol has its own)")
    parser.add_argument(
        "--instruction", help="lol: text before the prompt that asks for the truth; its effect is added"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--no_stop", action="store_true", help="go on where the model ends its text")
    parser.add_argument("--seed", type=int, default=0, help="of nucleus and top-k")
    parser.add_argument("--device", default="auto")
    parser.epilog = (
        "settings of the strategy: --k 5 --alpha 0.6 (contrastive-search), --top_p 0.95 --temperature 1 (nucleus), --top_k 50 "
        "(top-k), --relative_top 0.1 (contrastive, dola, lol), --layers high|low|'[2, 3]' (dola, lol), --lower_weight 0.5 "
        "--refocus_weight 0.5 (lol)"
    )
    options, rest = parser.parse_known_args(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in _pairs(rest).items()}
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("give --prompt TEXT, or --prompts FILE with one a line")
    try:
        strategy(options.strategy, **settings)  # before a model is loaded
    except InputError as error:
        close = next((hint for key in settings if (hint := nearest(f"--{key}", known))), "")
        raise InputError(f"{error}{close}") from None
    import counterpoint

    prompts = [options.prompt] if options.prompts is None else _prompts(Path(options.prompts))

    begun = False

    def show(row: int, piece: str) -> None:
        nonlocal begun
        print(piece if begun else options.prompt + piece, end="", flush=True)
        begun = True

    single = options.prompts is None and options.out is None
    found = counterpoint.generate(
        options.model, prompts, options.strategy, max_new_tokens=options.max_new_tokens, amateur=options.amateur,
        instruction=options.instruction, batch_size=options.batch_size, stop=not options.no_stop, seed=options.seed,
        device=options.device, say=show if single else None, **settings,
    )  # fmt: skip
    if single:
        print("" if begun else options.prompt)
        return 0
    lines = [
        json.dumps({"prompt": prompt, "continuation": text}, ensure_ascii=False)
        for prompt, text in zip(prompts, found, strict=True)
    ]
    if options.out is None:
        print("\n".join(lines))
        return 0
    from counterpoint.atomic import writing

    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    with writing(Path(options.out)) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(lines):,} continuations by {options.strategy}")
    return 0


def export(argv: list[str]) -> int:
    parser = _parser("export", "Write a trained encoder for other programs, and check that it loads back.")
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--to", required=True, help="safetensors, onnx, timm, sentence-transformers, open_clip or transformers"
    )
    parser.add_argument("--out", help="file or folder; default inside the run")
    options = parser.parse_args(argv)
    from counterpoint.export import export as write
    from counterpoint.train import Run

    path, difference = write(Run.open(options.run), options.to, options.out)
    checked = f"loaded back, largest difference {difference:.1e}"
    print(f"{path}: {'not loaded back, no ' + options.to + ' here' if difference != difference else checked}")
    return 0


def report(argv: list[str]) -> int:
    parser = _parser("report", "One self-contained HTML file about a run.")
    parser.add_argument("run", help="run folder")
    options = parser.parse_args(argv)
    from counterpoint.report import write

    print(write(Path(options.run)))
    return 0


def parity(argv: list[str]) -> int:
    parser = _parser("parity", "Compare our functions with numbers from the official code.")
    parser.add_argument("directory", help="folder of golden cases (NAME.npz + NAME.json), searched through")
    parser.add_argument("--save", action="store_true", help="write results/parity.json")
    options = parser.parse_args(argv)
    from counterpoint.parity import run

    return run(options.directory, save=options.save).status


def demo(argv: list[str]) -> int:
    parser = _parser("demo", "Train SimCLR on embedded handwriting, test it on unseen alphabets, write a report.")
    parser.add_argument("--run", help="run folder; default runs/demo-N")
    parser.add_argument("--epochs", type=int, help="fewer passes for a quicker look")
    options = parser.parse_args(argv)
    from counterpoint.evaluate.runs import evaluate as measure
    from counterpoint.recipes import experiment
    from counterpoint.report import write
    from counterpoint.train import fit
    from counterpoint.train.run import next_folder

    recipe = experiment("simclr-omniglot", **({"epochs": options.epochs} if options.epochs else {}))
    print(
        "SimCLR learns from 4,840 handwritten characters of 8 alphabets. It sees no label: not which character a\n"
        "drawing shows, not which alphabet. Then it meets alphabets it has never seen, and must recognise a character\n"
        "from a single example.\n"
    )
    run = fit(
        recipe.build(0),
        recipe.data,
        run=options.run or next_folder("demo"),
        command="counterpoint train simclr-omniglot",
        **recipe.fit,
    )
    if run.interrupted:
        return _after_training(run)
    show_results(measure(run))
    print("\nthe data set's own hand-made baseline (modified Hausdorff distance) has 61.2 % right; chance is 5 %")
    print(f"report: {write(run.folder)}   (open it in a browser)")
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "methods": (methods, "the methods, with domain, status and evidence"),
    "train": (train, "train a method or recipe; --resume RUN goes on with one"),
    "evaluate": (evaluate, "measure a run by the protocols that fit its data"),
    "compare": (compare, "several methods at one budget: table and plot"),
    "reproduce": (reproduce, "a paper's central claim: paired runs, interval, verdict"),
    "embed": (embed, "embeddings of a data set as a file"),
    "index": (index, "make embeddings searchable: a file's, or a run's"),
    "search": (search, "the nearest in an index, as a table or JSON"),
    "generate": (generate, "text from a causal language model, by contrastive search and others"),
    "export": (export, "the trained model as safetensors, ONNX, timm, sentence-transformers, open_clip, transformers"),
    "report": (report, "one HTML file about a run"),
    "parity": (parity, "compare with numbers from the official code"),
    "demo": (demo, "three minutes of handwriting, from training to report"),
}


def show_results(results: Sequence[Any]) -> None:
    """A table: one row a protocol and subject."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("protocol", "of", "value", "95 % interval", "n"):
        table.add_column(column, justify="right" if column in ("value", "n") else "left", overflow="fold")
    for result in results:
        share = result.metric == "accuracy"
        between = f"{result.ci[0]:.1f} to {result.ci[1]:.1f}" if result.ci else ""
        value = f"{result.value:.1f} %" if share else f"{result.value:.2f} {result.metric}"
        strong = "bold" if result.subject == "trained" else ""
        table.add_row(result.protocol, result.subject, value, between, f"{result.n:,}", style=strong)
    Console().print(table)
    for note in dict.fromkeys(result.detail["note"] for result in results if "note" in result.detail):
        print(f"test items {note}")


def _prompts(path: Path) -> list[str]:
    """Prompts of a file: one a line, or the column prompt of a table."""
    from counterpoint.data.texts import TABLES, kind_of, read_lines, read_table

    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if kind_of(path) in TABLES:
        table = read_table(path)
        if "prompt" not in table:
            raise InputError(f"{path} has the columns {', '.join(table)}, and no column prompt")
        found = [str(prompt) for prompt in table["prompt"]]
    else:
        found = [line for line in read_lines(path) if line.strip()]
    if not found:
        raise InputError(f"{path} holds no prompt: one a line is expected")
    return found


def _ranked(scores: Any, ids: Any) -> list[tuple[int, float, Any]]:
    return list(zip(range(1, len(ids) + 1), scores.tolist(), ids.tolist(), strict=True))


def _show_neighbours(query: str, metric: str, rows: list[tuple[int, float, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("distance" if metric == "euclidean" else metric, justify="right")
    table.add_column(Text(f"nearest to {query}"), overflow="fold")
    for rank, score, item in rows:
        table.add_row(str(rank), f"{score:.4f}", Text(str(item)))
    Console().print(table)


def _show_comparison(comparison: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("", overflow="fold")
    for protocol in comparison.protocols:
        table.add_column(protocol, justify="right")
    table.add_column("minutes", justify="right")
    table.add_column("memory MB", justify="right")
    for row in comparison.rows():
        cells = [f"{row[p]['mean']:.2f} ± {row[p]['deviation']:.2f}" if p in row else "" for p in comparison.protocols]
        cost = [f"{row['minutes']:.2f}", f"{row['memory_mb']:,}"] if "minutes" in row else ["", ""]
        table.add_row(row["name"], *cells, *cost)
    Console().print(table)
    if seen := sorted({row["items"] for row in comparison.rows() if "items" in row}):
        print(f"each training saw {' or '.join(f'{count:,}' for count in seen)} items; views come on top")


def _after_training(run: Any) -> int:
    if os.environ.get("LOCAL_RANK", "0") != "0":  # one of several processes speaks
        return INTERRUPTED if run.interrupted else 0
    if run.interrupted:
        print(f"stopped; go on with: counterpoint train --resume {run.folder}", file=sys.stderr)
        return INTERRUPTED
    print(f"{run.folder}: trained; next: counterpoint evaluate {run.folder}")
    return 0


def _train_options(name: str, recipe: Any, argv: list[str]) -> dict[str, Any]:
    """Typed flags of one method and of `fit`, parsed."""
    import jsonargparse

    from counterpoint import methods, recipes
    from counterpoint.train import fit
    from counterpoint.train.method import plain

    parser = jsonargparse.ArgumentParser(
        prog=f"counterpoint train {name}", description=f"Train {recipe.method}.", exit_on_error=False
    )
    parser.add_argument("--data", type=str | None, default=recipe.data, help="known name, folder, .npz or .npy file")
    cls = methods.get(recipe.method)
    if taken := recipes.model_options(cls).keys() & {*recipes.fit_options(), "data", "run", "command"}:
        raise InputError(
            f"{cls.__name__} has an argument {min(taken)}, which is an option of every training: rename it"
        )
    parser.add_class_arguments(cls)
    parser.add_function_arguments(fit, skip={"method", "data", "command"})
    known = [option for action in parser._actions for option in action.option_strings]
    try:
        parser.set_defaults({**{key: plain(value) for key, value in recipe.model.items()}, **recipe.fit})
    except KeyError as error:
        option = "--" + str(error).split('"')[1]
        raise InputError(f"{name} has no option {option}{nearest(option, known)}") from error
    for token in argv:
        option = token.split("=", 1)[0]
        if (
            option.startswith("--")
            and option not in known
            and option != "--print_config"
            and not _inside(option, known)
        ):
            raise InputError(f"{name} has no option {option}{nearest(option, known)}")
    printing = "--print_config" in argv
    try:
        values = parser.parse_args([token for token in argv if token != "--print_config"])
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        raise InputError(f"{name}: {_said(str(getattr(error, 'message', error)))}") from error
    if values.data is not None and not _given("--image_size", argv) and "image_size" not in recipe.model:
        with suppress(KeyError):  # a method without views of images
            values["image_size"] = recipes.size_for(values.data, values["image_size"])
    if printing:
        print(f"method: {recipe.method}\n" + parser.dump(values, skip_none=False), end="")
        raise SystemExit(0)
    new = hasattr(parser, "instantiate")  # the older name goes with jsonargparse 5
    built = parser.instantiate(values) if new else parser.instantiate_classes(values)
    return {key: built[key] for key in vars(built)}


def _said(message: str) -> str:
    """What the parser of typed flags found wrong, in one sentence of ours."""
    text = " ".join(message.split())
    found = re.fullmatch(r'Parser key "([\w.]+)": Expected an? (.+?)\. Got value: (.*)', text)
    if found is None:
        return text
    key, wanted, value = found.groups()
    if choices := re.findall(r"'([^']*)'", wanted) if wanted.startswith("typing.Literal") else []:
        return f"{key} must be one of {', '.join(choices)}, not {value}{nearest(value, choices)}"
    words = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}
    words |= {"<class 'tuple'>": "a list such as [512, 128]", "<class 'str'>": "a word"}
    return f"{key} must be {words.get(wanted, wanted.replace('tuple with', 'a list of'))}, not {value}"


def _inside(option: str, known: list[str]) -> bool:
    """Whether it names a field of an argument that may be none, whose fields jsonargparse does not list."""
    name, dot, _ = option.partition(".")
    fields = [other for other in known if other.startswith(f"{name}.") and other != f"{name}.help"]
    return bool(dot) and name in known and not fields


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = next((word.split("=")[0] for word in message.split() if word.startswith("--")), None)
        hint = nearest(unknown, known) if unknown and unknown not in known else ""
        raise InputError(f"{self.prog}: {message}{hint}; {self.prog} --help says what there is")


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"counterpoint {name}", description=about)


def _take(argv: list[str], option: str) -> tuple[list[str], str | None]:
    """Remove ``option VALUE`` (or ``option=VALUE``) and return what is left and the value."""
    for place, token in enumerate(argv):
        if token == option:
            if place + 1 == len(argv):
                raise InputError(f"{option} needs a value")
            return argv[:place] + argv[place + 2 :], argv[place + 1]
        if token.startswith(option + "="):
            return argv[:place] + argv[place + 1 :], token.split("=", 1)[1]
    return argv, None


def _given(option: str, argv: list[str]) -> bool:
    return any(token == option or token.startswith(option + "=") for token in argv)


def _pairs(argv: list[str]) -> dict[str, Any]:
    """``--key value`` pairs, values read as YAML."""
    import yaml

    found: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise InputError(f'"{token}" is no option; options look like --name value')
        key, equals, value = token[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"{token} needs a value")
            value = rest.pop(0)
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f'--{key}: "{value}" cannot be read') from error
        if isinstance(found[key], str) and any(letter.isdigit() for letter in value):
            with suppress(ValueError):  # YAML takes 1e-3 for a word
                found[key] = float(value)
    return found


def _read_config(path: str) -> dict[str, Any]:
    """Options from a YAML file: what --print_config printed, or the config.yaml of a run."""
    import yaml

    try:
        written = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise InputError(f"{path} holds no configuration: option: value lines are expected")
    notes = ("model", "fit", "command", "run", "labels_used_in_training")
    flat = {key: value for key, value in written.items() if key not in notes}
    return {**flat, **(written.get("model") or {}), **(written.get("fit") or {})}


def _with_data(name: str) -> list[str]:
    from counterpoint.recipes import entries

    return [key for key, entry in entries().items() if entry["method"] == name] or list(entries())[:3]


def _on_array(folder: str) -> bool:
    from counterpoint.train import Run

    return Run.open(folder).config["data"] is None


if __name__ == "__main__":
    sys.exit(main())
