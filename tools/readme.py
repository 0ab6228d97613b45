"""Write the table of methods into README.md, between its two markers: python tools/readme.py"""

from pathlib import Path

from counterpoint import methods, results

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: begin (python tools/readme.py) -->", "<!-- methods: end -->"


def table() -> str:
    """Ready methods with their evidence, then the planned ones by domain."""
    every = (*methods.BASELINES, *methods.CATALOGUE)
    rows = ["| ready | | golden cases passed | study |", "|---|---|---|---|"]
    for line in every:
        if line.status == "ready":
            counts, study = results.parity(line.slug), results.study(line.slug)
            golden = f"{counts['passed']} of {sum(counts.values())}" if counts else ""
            verdict = study["verdict"].replace("_", " ") if study else ""
            rows.append(f"| `{line.slug}` | {line.title} | {golden} | {verdict} |")
    planned: dict[str, list[str]] = {}
    for line in every:
        if line.status == "planned":
            planned.setdefault(line.domain.replace("_", "-"), []).append(line.title.partition(":")[0])
    rows += ["", "| planned | |", "|---|---|"]
    rows += [f"| {domain} | {', '.join(titles)} |" for domain, titles in planned.items()]
    return "\n".join(rows)


def written(text: str) -> str:
    """`text` with the current table between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
