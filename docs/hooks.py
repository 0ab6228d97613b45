"""What the site builds from the package itself: method pages, reference sections, and formulas as MathML.

MkDocs calls the `on_*` functions. Nothing here needs the network, and pages load no script for their formulas.

- A line ``::: dotted.path`` becomes the signature and docstring of that object (Google style, with RST math).
- A line ``<!-- methods -->`` becomes the table of methods.
- ``$...$`` and ``$$...$$`` become MathML.
- A line ``<!-- comparisons -->`` becomes a table for every record in ``results/comparisons/``.
- A line ``<!-- leaderboard NAME: PROTOCOL, PROTOCOL -->`` becomes the table and plot of
  ``results/comparisons/NAME.json``, best first by the first protocol.
- A line ``<!-- benchmark NAME -->`` becomes what ``results/benchmarks/NAME.json`` holds, as a table (and curves).
- A line ``<!-- study SLUG: METRIC, METRIC -->`` becomes a table of these means, one row an arm of that study's record.
- A line ``<!-- combinations -->`` becomes the tables of ``combinations.yaml``: which part goes with which method.
- ``methods/`` gets an index and one page for every method that is ready.
"""

import dataclasses
import html
import inspect
import re
from importlib import import_module
from pathlib import Path
from statistics import stdev
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from counterpoint import methods, results
from counterpoint.errors import InputError

LEADERBOARDS = {"vision-leaderboard": "leaderboard.md", "language-leaderboard": "leaderboard-sentences.md"}
"""Comparisons that have a page of their own."""

EXAMPLES = {
    "images": "photos/",
    "sentences": "sentences.txt",
    "histories": "purchases.csv",
    "pairs": "captions.csv",
    "language": "text.txt",
}
"""Data of one's own, by the family of a method."""

MEASURED = {
    "supremix": "ages.npz",
    "lol": "movie-facts",
    "cocosoda": "pairs.csv",
    "primer": "labelled.csv",
    "fine-tuning-text": "labelled.csv",
    "peft-augmentation": "labelled.csv",
}
"""The same for methods that need more than their family says: a value for each image, facts, code, classes."""

VERDICTS = {"reproduced": "reproduced", "not_reproduced": "not reproduced", "untestable": "cannot be tested here"}

# ---- events ----------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the method pages into the navigation where it says ``Methods``."""
    pages: list[Any] = ["methods/index.md"]
    pages += [{line.title.partition(":")[0]: f"methods/{line.slug}.md"} for line, _ in _ready()]
    for section in config.nav or []:
        if "Methods" in section:
            section["Methods"] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file holds."""
    files.append(File.generated(config, "methods/index.md", content=_index_page()))
    for line, cls in _ready():
        files.append(File.generated(config, f"methods/{line.slug}.md", content=_method_page(line, cls)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in reference sections and tables, then set formulas aside, where Markdown cannot touch them."""
    markdown = re.sub(r"^<!-- methods -->$", lambda _: _methods_table("methods/"), markdown, flags=re.M)
    markdown = re.sub(r"^<!-- combinations -->$", lambda _: _combinations(), markdown, flags=re.M)
    markdown = re.sub(r"^<!-- comparisons -->$", lambda _: _comparisons(), markdown, flags=re.M)
    markdown = re.sub(
        r"^<!-- leaderboard (\S+): (.+) -->$", lambda found: _leaderboard(*found.groups()), markdown, flags=re.M
    )
    markdown = re.sub(r"^<!-- benchmark (\w+) -->$", lambda found: _benchmark(found[1]), markdown, flags=re.M)
    markdown = re.sub(r"^<!-- study (\S+): (.+) -->$", lambda found: _arms(found[1], found[2]), markdown, flags=re.M)
    markdown = re.sub(r"^::: ([\w.]+)$", lambda found: _reference(found[1]), markdown, flags=re.M)
    formulas: list[str] = []
    page.meta["formulas"] = formulas

    def aside(found: re.Match[str]) -> str:
        if found["code"]:
            return found["code"]
        block = found["block"] is not None
        formulas.append(_mathml(found["block"] if block else found["inline"], block, page))
        token = f"FORMULA{len(formulas) - 1}END"
        return f"\n\n{token}\n\n" if block else token

    return re.sub(
        r"(?P<code>^```.*?^```|``.+?``|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$",
        aside,
        markdown,
        flags=re.M | re.S,
    )


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the formulas back."""
    formulas = page.meta.get("formulas", [])
    content = re.sub(
        r"<p>FORMULA(\d+)END</p>", lambda found: f'<div class="formula">{formulas[int(found[1])]}</div>', content
    )
    return re.sub(r"FORMULA(\d+)END", lambda found: formulas[int(found[1])], content)


def _mathml(latex: str, block: bool, page: Page) -> str:
    try:
        mathml = convert(" ".join(latex.split()), display="block" if block else "inline")
        return mathml.replace("<mi>&#x02032;</mi>", "<mo>&#x02032;</mo>")  # a prime is no identifier
    except Exception as error:
        raise PluginError(f"{page.file.src_uri}: cannot set the formula {latex.strip()!r}: {error}") from error


# ---- method pages ----------------------------------------------------------------------------------------------------


def _ready() -> list[tuple[methods.Entry, type]]:
    """Methods that can be imported now, baselines first."""
    found = []
    for line in (*methods.BASELINES, *methods.CATALOGUE):
        try:
            found.append((line, methods.get(line.slug)))
        except (InputError, ImportError):
            continue
    return found


def _index_page() -> str:
    return (
        "# Methods\n\n"
        "Every method is one short file that states its choices; its page is made from that file, from the recipes and "
        "from the tracked records. The command `counterpoint methods` prints the same list.\n\n" + _methods_table("")
    )


def _methods_table(to: str) -> str:
    """Ready methods with their evidence, then the planned ones by domain."""
    ready = _ready()
    rows = ["## Ready\n", "| method | domain | golden cases | study |", "|---|---|---|---|"]
    for line, _ in ready:
        cells = [f"[{line.title}]({to}{line.slug}.md)", _words(line.domain), _parity(line.slug), _verdict(line.slug)]
        rows.append(f"| {' | '.join(cells)} |")
    done = {line.slug for line, _ in ready}
    rows += ["", "## Planned\n", "| domain | methods |", "|---|---|"]
    domains: dict[str, list[str]] = {}
    for line in methods.CATALOGUE:
        if line.slug not in done:
            domains.setdefault(line.domain, []).append(f"{line.title.partition(':')[0]} ({line.number})")
    rows += [f"| {_words(domain)} | {', '.join(names)} |" for domain, names in domains.items()]
    return "\n".join(rows) + "\n\nThe number is a paper's place in the catalogue of 49.\n"


def _parity(slug: str) -> str:
    counts = results.parity(slug)
    return "none recorded" if counts is None else f"{counts['passed']} of {sum(counts.values())}"


def _verdict(slug: str) -> str:
    found = results.study(slug)
    return "none recorded" if found is None else VERDICTS[found["verdict"]]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _method_page(line: methods.Entry, cls: type) -> str:
    text, sections = _docstring(cls)
    place = "baseline" if line.number is None else f"paper {line.number} of 49"
    module = cls.__module__
    data = MEASURED.get(line.slug) or EXAMPLES[cls.family]  # type: ignore[attr-defined]
    parts = [
        f"# {line.title}\n",
        f"`{line.slug}` · {_words(line.domain)} · {place}\n",
        text,
        "## Use\n",
        _commands(line.slug, data),
        f"```python\nimport counterpoint as cp\nfrom {module} import {cls.__name__}\n\n"
        f'model = {cls.__name__}()\nrun = cp.fit(model, data="{data}", epochs=100)\n'
        f'vectors = model.encode("{data}")\n```\n',
        "## Arguments\n",
        "Each is a constructor argument, a flag of `counterpoint train` and a key of a recipe.\n",
        _arguments_table(_constructor(cls), _inherited(cls, sections)),
        "## Recipes\n",
        _recipes(line.slug),
        "## Evidence\n",
        _evidence(line.slug),
        f"Source file: `{module.replace('.', '/')}.py`\n",
    ]
    return "\n".join(parts)


def _commands(slug: str, data: str) -> str:
    """How to train on data of one's own, and the first recipe that runs as it is."""
    ready = [name for name, recipe in _all_recipes().items() if recipe.get("method") == slug and "data" in recipe]
    lines = [f"counterpoint train {slug} --data {data}"]
    lines += [f"counterpoint train {ready[0]}    # a recipe, with its data"] if ready else []
    return "```bash\n" + "\n".join(lines) + "\n```\n"


def _constructor(cls: type) -> list[inspect.Parameter]:
    """Arguments of a constructor, with those it hands on to its base."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        own = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found = {p.name: p for p in own} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(found.values())


def _inherited(cls: type, sections: dict[str, str]) -> dict[str, str]:
    """What each argument means: the class's own words first, then its bases'."""
    meaning: dict[str, str] = {}
    for base in cls.__mro__[1:]:
        if base.__doc__ and "Args:" in base.__doc__ and base.__module__.startswith("counterpoint"):
            meaning = _entries(_docstring(base)[1].get("Args", "")) | meaning
    return meaning | _entries(sections.get("Args", ""))


def _recipes(slug: str) -> str:
    found = []
    for name, recipe in _all_recipes().items():
        if recipe.get("method") == slug:
            rest = {key: value for key, value in recipe.items() if key not in ("method", "about", "budget")}
            found.append(
                f"### {name}\n\n{recipe.get('about', '')}\n\n```yaml\n{yaml.safe_dump(rest, sort_keys=False)}```\n"
            )
    if not found:
        return "None yet: the method's own defaults apply.\n"
    return "An entry says only what differs from the defaults; run it with `counterpoint train NAME`.\n\n" + "\n".join(
        found
    )


def _all_recipes() -> dict[str, dict[str, Any]]:
    try:
        return import_module("counterpoint.recipes").entries()
    except ModuleNotFoundError:
        return {}


def _evidence(slug: str) -> str:
    counts, study = results.parity(slug), results.study(slug)
    said = []
    if counts is None:
        said.append("No golden cases of published code have been recorded for this method.")
    else:
        said.append(f"Golden cases of published code: {counts['passed']} passed, {counts['failed']} failed.")
    if study is None:
        said.append("No study has been recorded for it.")
    else:
        said += _study(study)
    for further in _further(slug):
        said += [f"### {further['slug']}", *_study(further)]
    said += _compared(slug)
    return "\n\n".join(said) + "\n"


def _combinations() -> str:
    """One table of all parts by all methods, then the reasons part by part."""
    known = yaml.safe_load((Path(__file__).parent / "combinations.yaml").read_text(encoding="utf-8"))
    titles = {slug: methods.entry(slug).title.partition(":")[0] for slug in known["baselines"]}
    parts = {part["name"]: part for part in known["parts"]}
    rows = [f"| | {' | '.join(titles.values())} |", "|---" * (1 + len(titles)) + "|"]
    for name, part in parts.items():
        answers = ["yes" if "works" in known["cells"][name][slug] else "no" for slug in titles]
        rows.append(f"| [{part['title']}](#{name}) | {' | '.join(answers)} |")
    for name, part in parts.items():
        rows += [
            "",
            f"### {part['title']} {{ #{name} }}",
            "",
            f"`{part['argument']}={name}`",
            "",
            "| | | |",
            "|---|---|---|",
        ]
        rows += [f"| {titles[slug]} | {_answer(known['cells'][name][slug])} |" for slug in titles]
    rows += ["", "### Several parts at once", "", "| parts, in this order | on | | |", "|---|---|---|---|"]
    for row in known["together"]:
        rows.append(f"| {', '.join(f'`{name}`' for name in row['parts'])} | {titles[row['method']]} | {_answer(row)} |")
    return "\n".join(rows)


def _answer(cell: dict[str, str]) -> str:
    if "works" in cell:
        return f"yes | {cell['works']}"
    return f"no | {cell['refused']}" + (f"; {cell['why']}" if "why" in cell else "")


def _records() -> dict[str, dict[str, Any]]:
    """Recorded comparisons by name."""
    folder = results.folder() / "comparisons"
    return {path.stem: results.read(path) for path in sorted(folder.glob("*.json"))}


def _comparisons() -> str:
    """One table a recorded comparison; what learned nothing comes first."""
    parts = []
    for name, record in _records().items():
        if name in LEADERBOARDS:
            continue
        parts.append(f"## {name}\n\n{_settings(name, record)}\n")
        protocols = [key for key in record["rows"][0] if key != "name"]
        parts.append(f"| | {' | '.join(protocols)} | minutes | memory |\n|---|{'---|' * (len(protocols) + 2)}")
        parts += [f"| {row['name']} | {' | '.join(_cells(row, protocols))} |" for row in record["rows"]]
        parts.append("")
    return "\n".join(parts) if parts else "None recorded yet."


def _settings(name: str, record: dict[str, Any]) -> str:
    """What all rows of a comparison have in common."""
    shared = record["shared"]
    items = f"{shared['limit']:,} items" if shared["limit"] else "all items"
    length = f"{shared['steps']:,} steps" if shared.get("steps") else f"{shared['epochs']} epochs"
    return (
        f"{shared['data']}, {items}, encoder {shared['encoder']}, {length}, batch {shared['batch_size']}, seeds "
        f"{', '.join(map(str, record['seeds']))}; {record['environment']['device']}, torch "
        f"{record['environment']['torch']}. Record: `results/comparisons/{name}.json`."
    )


def _cells(row: dict[str, Any], protocols: list[str]) -> list[str]:
    """Values, minutes and memory of one row of a comparison."""
    cells = [_spread(key, row[key]) if key in row else "" for key in protocols]
    return cells + ([f"{row['minutes']:.1f}", f"{row['memory_mb']:,} MB"] if "minutes" in row else ["", ""])


def _spread(protocol: str, found: dict[str, Any]) -> str:
    digits = 2 if protocol.endswith(("alignment", "uniformity")) else 1  # these are no shares in %
    return f"{found['mean']:.{digits}f} ± {found['deviation']:.{digits}f}"


def _leaderboard(comparison: str, shown: str) -> str:
    """All methods of a kind at one budget: what learned nothing first, then the others from best to worst."""
    path = results.folder() / "comparisons" / f"{comparison}.json"
    record = results.read(path)
    if record is None:
        return "*Not recorded yet.* The command below writes the record from which this table is made."
    protocols = [name.strip() for name in shown.split(",")]
    still = sorted((row for row in record["rows"] if "minutes" not in row), key=lambda row: row["name"] != "untrained")
    trained = [row for row in record["rows"] if "minutes" in row]
    trained.sort(key=lambda row: row[protocols[0]]["mean"], reverse=True)
    rows = [
        f"| | | {' | '.join(protocols)} | minutes | memory | items seen |",
        "|---|" + "---|" * (len(protocols) + 4),
    ]
    slugs = {row["name"]: _all_recipes().get(row["name"], {}).get("method", row["name"]) for row in trained}
    for place, row in enumerate([*still, *trained], 1 - len(still)):
        name = {"untrained": "untrained encoder"}.get(row["name"], row["name"])
        seen = f"{row['items']:,}" if "items" in row else ""
        slug = slugs.get(row["name"])
        if any(line.slug == slug for line, _ in _ready()):
            alone = [*slugs.values()].count(slug) == 1  # else the recipe's name tells the rows of a method apart
            title = methods.entry(slug).title.partition(":")[0] if alone else f"`{name}`"
            name = f"[{title}](methods/{slug}.md)"
        rows.append(f"| {place if place > 0 else ''} | {name} | {' | '.join(_cells(row, protocols))} | {seen} |")
    plot = path.with_suffix(".svg")
    picture = _inline(plot.read_text(encoding="utf-8")) if plot.is_file() else ""
    return f"{_settings(comparison, record)}\n\n" + "\n".join(rows) + f"\n\n{picture}"


def _inline(picture: str) -> str:
    """An SVG file as part of a page."""
    return '<div class="figure">' + picture[picture.index("<svg") :].replace("\n", " ") + "</div>"


def _compared(slug: str) -> list[str]:
    """What the recorded comparisons say of one method."""
    said = []
    for name, record in _records().items():
        for row in record["rows"]:
            if _all_recipes().get(row["name"], {}).get("method", row["name"]) == slug:
                values = ", ".join(
                    f"{key} {_spread(key, value)}" for key, value in row.items() if isinstance(value, dict)
                )
                place = LEADERBOARDS.get(name, f"comparisons.md#{name}")
                said.append(f"- `{row['name']}` in [{name}](../{place}): {values}")
    return ["Measured side by side, mean and deviation over seeds:\n\n" + "\n".join(said)] if said else []


def _further(slug: str) -> list[dict[str, Any]]:
    """Recorded studies that belong to a method besides the one of its name: SLUG-MORE.json, where that is no method."""
    taken = {line.slug for line in (*methods.BASELINES, *methods.CATALOGUE)}
    stems = [path.stem for path in sorted((results.folder() / "studies").glob(f"{slug}-*.json"))]
    found = [(stem, results.study(stem)) for stem in stems if stem not in taken]
    return [{"slug": stem, **record} for stem, record in found if record is not None]


def _study(study: dict[str, Any]) -> list[str]:
    """A recorded study in words and tables; a part that the record lacks is left out."""
    said = [f"Study: **{VERDICTS[study['verdict']]}**."]
    if study.get("claim"):
        said.append(f"Claim: {study['claim']}")
    if study.get("reason"):
        said.append(str(study["reason"]))
    arms, metric = study.get("arms"), study.get("metric", "value")
    if arms:
        rows = [f"| arm | {metric}, mean | deviation | by seed |", "|---|---|---|---|"]
        for name, arm in arms.items():
            values = ", ".join(f"{value:.2f}" for value in arm["values"])
            spread = f"{stdev(arm['values']):.2f}" if len(arm["values"]) > 1 else ""
            rows.append(f"| {name} | {arm['mean']:.2f} | {spread} | {values} |")
        said.append("\n".join(rows))
    if study.get("expectations"):
        rows = ["| expected | margin | 95 % interval | holds |", "|---|---|---|---|"]
        for item in study["expectations"]:
            margin = f"{item['margin']:+.2f}" if item.get("margin") is not None else ""
            rows.append(
                f"| `{item['expect']}` | {margin} | {_interval(item.get('ci'))} | {'yes' if item['holds'] else 'no'} |"
            )
        said.append("\n".join(rows))
    if study["effect"] is not None:
        of = f" (`{study['effect_of']}`)" if study.get("effect_of") else ""
        said.append(f"Effect{of}: {study['effect']:+.2f}, 95 % interval {_interval(study['ci'])}.")
    said.append(f"Record: `results/{study['record'].removeprefix('results/')}`.")
    return said


def _benchmark(name: str) -> str:
    record = results.read(results.folder() / "benchmarks" / f"{name}.json")
    shown = {"contrast_cpu": _contrast_cpu, "ring": _ring, "training_step": _training_step, "decoding": _decoding}
    return "*Not measured yet.*" if record is None else shown[name](record)


def _contrast_cpu(record: dict[str, Any]) -> str:
    """Our losses beside those of other libraries, as measured in one run."""
    ratio = {(r["form"], r["n"], r["d"], r["against"]): r["times"] for r in record["ratios"]}
    rows = [
        "| loss | pairs | d | library | seconds | extra memory, MB | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        head = f"| {row['form']} | {row['n']:,} | {row['d']} | {row['name']} "
        if "left_out" in row:
            rows.append(f"{head}| {row['left_out']} | | |")
            continue
        times = ratio.get((row["form"], row["n"], row["d"], row["name"]))
        rows.append(
            f"{head}| {row['seconds']:.4f} | {row['extra_mb']:,.0f} | {'' if times is None else f'{times:.2f}'} |"
        )
    about = record["environment"]
    said = f"Measured with {about['threads']} threads, torch {about['torch']}. Curves: 128 dimensions."
    return f"{said}\n\n{_curves(record['rows'])}\n\n" + "\n".join(rows)


def _decoding(record: dict[str, Any]) -> str:
    """Time of a step of contrastive search beside that of greedy search."""
    rows = [
        "| model | texts at a time | search | ms a step | times greedy | of processor time |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        times = f"{row['ratio']:.2f} | {row['cpu_ratio']:.2f}"
        rows.append(f"| {row['model']} | {row['batch']} | {row['form']} | {1000 * row['seconds']:.1f} | {times} |")
    about, used = record["environment"], record["settings"]
    return (
        f"GPT-2s with random weights, k = {used['k']}, {used['prompt']} + {used['new']} tokens; {about['threads']} threads, "
        f"torch {about['torch']}, transformers {about['transformers']}.\n\n" + "\n".join(rows)
    )


def _curves(rows: list[dict[str, Any]]) -> str:
    """Time and memory over the number of pairs, one panel a loss, as an inline picture."""
    import io

    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measured = [row for row in rows if "seconds" in row and row["d"] == 128]
    forms = list(dict.fromkeys(row["form"] for row in measured))
    names = list(dict.fromkeys(row["name"] for row in measured))
    colours = dict(zip(names, ["#b03a2e", *pyplot.get_cmap("tab10").colors], strict=False))
    figure, panels = pyplot.subplots(2, len(forms), figsize=(2.6 * len(forms), 5.2), sharex=True, sharey="row")
    for column, form in enumerate(forms):
        for axis, key in zip(panels[:, column], ("seconds", "extra_mb"), strict=True):
            for name in names:
                points = [(row["n"], row[key]) for row in measured if (row["form"], row["name"]) == (form, name)]
                if points:
                    ours = name == "counterpoint"
                    axis.plot(
                        *zip(*points, strict=True), "o-", color=colours[name], lw=2.4 if ours else 1.2, ms=3, label=name
                    )
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.25)
        panels[0, column].set_title(form, fontsize=10)
        panels[1, column].set_xlabel("pairs")
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("extra memory, MB")
    handles = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    pyplot.close(figure)
    return _inline(drawn.getvalue())


def _ring(record: dict[str, Any]) -> str:
    rows = [
        "| loss | pairs | how | seconds | over half of one process | MB sent by each |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        sent = f"{row['sent_bytes'] / 1e6:.1f}" if row["sent_bytes"] else ""
        rows.append(f"| {row['loss']} | {row['pairs']:,} | {row['form']} | {row['seconds']:.2f} | {ratio} | {sent} |")
    return "\n".join(rows)


def _training_step(record: dict[str, Any]) -> str:
    """Items per second, ours and a peer's, and where our step's time goes."""
    rows = ["| what | ours, items per second | peer | ours is faster by |", "|---|---|---|---|"]
    for name, cell in record["cells"].items():
        form = name.removesuffix(" ours")
        peer = record["cells"].get(f"{form} peer", {})
        if form != name and "items_per_second" in cell and "items_per_second" in peer:
            rows.append(
                f"| {form} | {cell['items_per_second']:,.0f} | {peer['items_per_second']:,.0f} | {record[f'{form} ratio']:.2f} |"
            )
    parts = ("views", "encoder", "loss", "optimiser")
    rows += ["", f"| of a step of ours | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
    for name, cell in record["cells"].items():
        if "share_of_views" in cell:
            shares = " | ".join(f"{cell[f'share_of_{part}']:.0%}" for part in parts)
            rows.append(f"| {name.removesuffix(' ours')} | {shares} |")
    start = record["cells"]["start-up"]
    return (
        "\n".join(rows)
        + f"\n\n`import counterpoint` takes {start['import_seconds']:.2f} s, a first training step is done "
        f"{start['first_step_seconds']:.1f} s after the command ({record['environment']['threads']} threads, torch "
        f"{record['environment']['torch']})."
    )


def _arms(slug: str, metrics: str) -> str:
    """Arms of a recorded study by metrics of their results; nothing where no record is."""
    record = results.study(slug)
    if record is None:
        return f"*The study {slug} has no record yet.*"
    names = [name.strip() for name in metrics.split(",")]
    rows = ["| arm | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for arm, found in record["arms"].items():
        cells = [f"{found['detail'][name]:.2f}" if name in found.get("detail", {}) else "" for name in names]
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _interval(ci: Any) -> str:
    return f"{ci[0]:+.2f} to {ci[1]:+.2f}" if ci else "none"


# ---- reference from docstrings ---------------------------------------------------------------------------------------


def _reference(path: str) -> str:
    """Heading, signature and docstring of one object."""
    module, _, name = path.rpartition(".")
    try:
        thing = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PluginError(f"::: {path}: {error}") from error
    text, sections = _docstring(thing)
    parameters = list(inspect.signature(thing).parameters.values()) if callable(thing) else []
    parts = [f"### {name} {{ #{path} }}\n", f"```python\n{_signature(name, thing)}\n```\n", text]
    if "Args" in sections:
        meaning = _entries(sections["Args"])
        undescribed = [p for p in parameters if not any(p.name in _names(key) for key in meaning)]
        shown = [p for p in parameters if p not in undescribed]
        parts.append(_arguments_table(shown, meaning))
    if "Attributes" in sections:
        parts.append(_definitions("Attributes", _entries(sections["Attributes"])))
    if "Returns" in sections:
        parts.append(f"**Returns** {_joined(sections['Returns'])}\n")
    if "Raises" in sections:
        parts.append(_definitions("Raises", _entries(sections["Raises"])))
    return "\n".join(part for part in parts if part)


def _docstring(thing: Any) -> tuple[str, dict[str, str]]:
    """Body in Markdown, and the indented sections by name."""
    body, sections, name = [], {}, ""
    for row in (inspect.getdoc(thing) or "").splitlines():
        found = re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", row)
        if found:
            name = found[1]
            sections[name] = ""
        elif name and row and not row.startswith(" "):
            name = ""
            body.append(row)
        elif name:
            sections[name] += row + "\n"
        else:
            body.append(row)
    return _markdown("\n".join(body)), {key: inspect.cleandoc(value) for key, value in sections.items()}


def _markdown(text: str) -> str:
    """RST as our docstrings use it -> Markdown: math blocks, inline math, double backticks, notes with a lead."""
    text = re.sub(
        r"^\.\. math::[ ]*(.*)\n((?:[ ]+.*\n|[ ]*\n(?=[ ]+\S))*)",
        lambda found: f"\n$$ {found[1]} {' '.join(found[2].split())} $$\n\n",
        text + "\n",
        flags=re.M,
    )
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"^(Source|Defaults|When to use it|Where codes differ): ", r"**\1:** ", text, flags=re.M)
    return text.strip() + "\n"


def _entries(section: str) -> dict[str, str]:
    """``name: meaning`` lines, continued by indentation."""
    found: dict[str, str] = {}
    name = ""
    for row in section.splitlines():
        start = re.match(r"(\*{0,2}\w[\w., *]*?)(?: \([^)]*\))?: (.*)", row)
        if start and not row.startswith(" "):
            name = start[1]
            found[name] = start[2]
        elif name and row.strip():
            found[name] += " " + row.strip()
    return {name: _joined(_markdown(meaning)) for name, meaning in found.items()}


def _joined(text: str) -> str:
    return " ".join(_markdown(text).split())


def _names(key: str) -> list[str]:
    return [name.strip(" *") for name in key.split(",")]


def _arguments_table(parameters: list[inspect.Parameter], meaning: dict[str, str]) -> str:
    by_name = {name: text for key, text in meaning.items() for name in _names(key)}
    rows = ["| argument | default | meaning |", "|---|---|---|"]
    for parameter in parameters:
        default = "" if parameter.default is parameter.empty else f"`{_default(parameter.default)}`"
        rows.append(f"| `{parameter.name}` | {_cell(default)} | {_cell(by_name.get(parameter.name, ''))} |")
    return "\n".join(rows) + "\n" if parameters else ""


def _definitions(title: str, entries: dict[str, str]) -> str:
    return f"**{title}**\n\n" + "\n".join(f"- `{name}`: {text}" for name, text in entries.items()) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(value: Any) -> str:
    """A default as a person would write it: named views by name, functions by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        home = import_module(type(value).__module__)
        named = [name for name, other in vars(home).items() if name.isupper() and other is value]
        return named[0] if named else f"{type(value).__name__}(...)"
    if isinstance(value, str):
        return f'"{value}"'
    return getattr(value, "__name__", None) or str(value)


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing):
        own = [p.replace(annotation=p.empty) for p in inspect.signature(thing).parameters.values()]
        return f"{name}({', '.join(_parameters(own))})"
    signature = inspect.signature(thing)
    parts = _parameters(list(signature.parameters.values()))
    back = "" if signature.return_annotation is signature.empty else f" -> {_annotation(signature.return_annotation)}"
    line = f"{name}({', '.join(parts)}){back}"
    return line if len(line) <= 96 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){back}"


def _parameters(parameters: list[inspect.Parameter]) -> list[str]:
    parts, starred = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        starred = starred or p.kind is p.VAR_POSITIONAL
        if p.annotation is not p.empty:
            text += f": {_annotation(p.annotation)}"
        if p.default is not p.empty:
            text += f" = {_default(p.default)}" if p.annotation is not p.empty else f"={_default(p.default)}"
        parts.append(text)
    return parts


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return html.unescape(re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text))
