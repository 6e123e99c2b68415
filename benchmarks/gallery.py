"""The pages of the networks, written from the code: `docs/networks.md`, its Chinese form, for each
file of networks a lesson in `docs/learn` with its pictures, and `docs/parity.md`.

    python -m benchmarks.gallery                       # write all
    python -m benchmarks.gallery --check               # exit code 1 where they are out of date
    python -m benchmarks.gallery --check --only 'vit*' # other networks' figures are believed

Names, aliases, papers, sizes, parameters, multiply-adds and lines of code come from the networks
themselves, the ideas and the drawings from `gallery.toml` beside this file, and the largest errors
from `benchmarks/results`, where `python -m benchmarks.parity` puts them.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import fnmatch
import functools
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence

from benchmarks import drawing, parity

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ROOT / "tests" / "data" / "names.txt"
PAGES = {"en": ROOT / "docs" / "networks.md", "zh": ROOT / "docs" / "networks.zh-CN.md"}
LESSONS = ROOT / "docs" / "learn"
PICTURES = LESSONS / "pictures"
ROOMS = ("torch_ref", "flax_nets/models")
COLUMNS = 60  # of code, so that two pieces find room beside each other
MODULES = ("attention",)  # files of modules, which have a lesson and no variants

# Whose checkpoints fit, where neither torchvision nor timm has the network.
AUTHORS = {
    "cbam": ("*", "Jongchan/attention-module"),
    "shufflenet": ("shufflenet_v1*", "megvii-model/ShuffleNet-Series"),
}
# Variants from the second paper that their file's docstring cites.
SECOND_PAPER = ("shufflenet_v2*", "deit_*", "xception?[0-9]", "xception[0-9][0-9]")

WORDS = tomllib.loads((pathlib.Path(__file__).with_suffix(".toml")).read_text("utf-8"))
TEXT, IDEAS = WORDS["page"], WORDS["ideas"]  # language -> its words; file -> title and ideas


@dataclasses.dataclass(frozen=True)
class Paper:
    """As a docstring cites it: `link` is an address, or a title in quotes."""

    authors: str
    year: str
    link: str

    def __str__(self) -> str:
        named = f"{self.authors} {self.year}"
        return (
            f"[{named}]({self.link})" if self.link.startswith("http") else f"{named}, {self.link}"
        )


def papers(file: str) -> list[Paper]:
    """The papers in the docstring of a file of networks, in its order."""
    from flax_nets import registry

    text = " ".join((registry.module(file).__doc__ or "").split())
    cited = r'([A-Z][\w&. -]*?) (\d{4}), (https?://[^\s),]+|"[^"]+")'
    return [Paper(*match) for match in re.findall(cited, text)]


def libraries() -> dict[str, list[str]]:
    """Our name -> the names, with their library, that torchvision and timm have for it."""
    from flax_nets import registry

    found: dict[str, list[str]] = {}
    for job in sorted(NAMES.read_text().split(), reverse=True):  # torchvision first
        name = registry.resolve(job).name
        found.setdefault(registry.ALIASES.get(name, (name,))[0], []).append(job)
    return found


def sources(name: str, jobs: Sequence[str]) -> list[str]:
    """Whose checkpoints a variant loads."""
    from convert import dialects
    from flax_nets import registry

    spec = registry.resolve(name)
    found = list(dict.fromkeys(job.partition("/")[0] for job in jobs))
    pattern, authors = AUTHORS.get(spec.file, ("", ""))
    if not found:
        found = [authors if fnmatch.fnmatchcase(name, pattern) else "torch_ref"]
    others = [d.name for d in dialects.of(spec) if d.name not in ("native", *found)]
    return found + others


def figures(name: str) -> tuple[str, str, str]:
    """Input size, parameters and multiply-adds of a variant, as the table shows them."""
    from flax_nets import registry, summary
    from flax_nets.create import build

    found = summary(build(registry.resolve(name)))
    size = "x".join(map(str, found.input_shape))
    return size, f"{found.parameters:,}", f"{found.multiply_adds:,}"


def believed(page: str) -> dict[str, tuple[str, str, str]]:
    """The figures that a page has."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines()]
    return {r[0].strip("`"): (r[3], r[4], r[5]) for r in rows if len(r) == len(TEXT["en"]["rows"])}


def errors() -> dict[str, tuple[float, float]]:
    """Reference and name -> the largest errors of outputs and of gradients measured."""
    found = {}
    for row in parity.read(parity.OUT):
        modes = [row[mode] for mode in ("eval", "train") if mode in row]
        if modes:
            outputs = max(m["outputs"] for m in modes)
            gradients = max(max(m["gradients"], m["input_gradient"]) for m in modes)
            found[row["job"]] = outputs, gradients
    return found


def distances() -> dict[str, tuple[float, float]]:
    """Reference and name -> how far our float32 outputs are from the truth, and PyTorch's."""
    rows = parity.read(parity.OUT32)
    return {row["job"]: (row["ours"], row["theirs"]) for row in rows if "error" not in row}


def worst(jobs: Sequence[str], measured: Mapping[str, tuple[float, float]], language: str) -> str:
    """The largest errors of some jobs as "outputs / gradients" (or "ours / PyTorch's")."""
    pairs = [measured[job] for job in jobs if job in measured]
    if not pairs:
        return TEXT[language]["unmeasured"]
    return " / ".join(f"{max(values):.0e}" for values in zip(*pairs, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(language: str, known: Mapping[str, tuple[str, str, str]]) -> str:
    """The whole page; `known` has the figures of all variants."""
    from flax_nets import registry

    text, references, measured, shorter = TEXT[language], libraries(), errors(), distances()
    index, sections = [], []
    for file in (*registry.FILES, *MODULES):
        title = IDEAS[file]["title"]
        cited, rows, every = papers(file), [], []
        for name in variants(file):
            second = any(fnmatch.fnmatchcase(name, pattern) for pattern in SECOND_PAPER)
            jobs = references.get(name, [])
            aliases = [alias for alias, (ours, _) in registry.ALIASES.items() if ours == name]
            every += (compared := [f"torch_ref/{name}", *jobs])
            rows.append(
                (
                    f"`{name}`",
                    ", ".join(f"`{alias}`" for alias in aliases),
                    cited[int(second)].year,
                    *known[name],
                    ", ".join(sources(name, jobs)),
                    worst(compared, measured, language),
                    worst(compared, shorter, language),
                )
            )
        anchor = "-".join(re.findall(r"[\w-]+", title.lower()))
        index.append(
            (
                f"[{title}](#{anchor})",
                cited[0].year,
                str(cited[0]),
                str(len(rows) or "-"),
                worst(every, measured, language) if rows else "-",
                worst(every, shorter, language) if rows else "-",
            )
        )
        files = ", ".join(
            f"[`{room}/{file}.py`](../{room}/{file}.py)"
            for room in ("flax_nets/models", "torch_ref")
        )
        origin = text["paper"].format("; ".join(map(str, cited)), files)
        origin += f" [{text['more']}](learn/{file}.md)"
        last = table(text["rows"], rows) if rows else text["modules"] + "\n"
        sections.append("\n\n".join((f"## {title}", IDEAS[file][language], origin, last)))
    return "\n".join([text["head"], table(text["index"], index), *sections])


def variants(file: str) -> Mapping[str, object]:
    """The rows at the end of a file of networks; none in one of modules."""
    from flax_nets import registry

    return getattr(registry.module(file), "VARIANTS", {})


def cost() -> str:
    """The table of docs/attention.md, and the words before it that say what was measured."""
    text = read(ROOT / "docs" / "attention.md")
    return text[text.index("One forward and backward") : text.index("\n\n`python -m")]


def pictures(file: str) -> dict[str, str]:
    """Name -> SVG: the drawing of a file's block, and the tables that its code holds."""
    found = {file: drawing.blocks(IDEAS[file]["picture"])}
    if file == "lenet":
        from flax_nets.models.lenet import CODES, CONNECTIONS

        table_1 = [[i in row for row in CONNECTIONS] for i in range(6)]
        found["lenet_table"] = drawing.grids([("6 maps (rows), 16 maps (columns)", table_1)])
        bitmaps = [[[p > 0 for p in c[i : i + 7]] for i in range(0, 84, 7)] for c in CODES]
        found["lenet_codes"] = drawing.grids([(str(i), b) for i, b in enumerate(bitmaps)], cell=6)
    if file == "attention":
        from flax_nets.models.attention import fixed_mask, local_mask, strided_mask

        masks = {"local": local_mask(12, 2), "strided": strided_mask(12, 3)}
        masks |= {"fixed": fixed_mask(12, 3), "fixed, causal": fixed_mask(12, 3, causal=True)}
        seen = [("dense", [[True] * 12] * 12), *((n, (~m).tolist()) for n, m in masks.items())]
        found["attention_masks"] = drawing.grids(seen)
    return found


@functools.cache
def pieces(room: str, file: str, name: str) -> tuple[str, ...]:
    """The code of a class method by method, or of a function: no words, types and checks."""
    source = (ROOT / room / f"{file}.py").read_text("utf-8")
    node = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    starts = [0, *itertools.accumulate(map(len, lines))]

    def place(row: int, column: int) -> int:
        return starts[row - 1] + column

    cuts = []
    for part in ast.walk(node):
        if isinstance(part, ast.arg) and part.annotation:
            end = place(part.annotation.end_lineno, part.annotation.end_col_offset)
            cuts.append((place(part.lineno, part.col_offset) + len(part.arg.encode()), end))
        if isinstance(part, ast.FunctionDef) and part.returns:
            end = place(part.returns.end_lineno, part.returns.end_col_offset)
            before = b"".join(lines)[: place(part.returns.lineno, part.returns.col_offset)]
            cuts.append((before.rindex(b"->"), end))
        if isinstance(part, ast.If) and isinstance(part.body[-1], ast.Raise) and not part.orelse:
            cuts.append((place(part.lineno, 0), place(part.end_lineno + 1, 0)))
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
            words = part.body[0]
            cuts.append((place(words.lineno, 0), place(words.end_lineno + 1, 0)))
    text, whole = b"".join(lines), place(node.end_lineno + 1, 0)
    for start, end in sorted(cuts, reverse=True):
        text, whole = text[:start] + text[end:], whole - (end - start)
    text = text[place(node.lineno, 0) : whole]
    options = ("line-length = COLUMNS", "format.skip-magic-trailing-comma = true")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--isolated",
        "--stdin-filename",
        f"{name}.py",
    ]
    for option in options:
        command += ["--config", option.replace("COLUMNS", str(COLUMNS))]
    done = subprocess.run([*command, "-"], input=text, capture_output=True, check=True)
    parts = re.split(r"\n\n(?=    (?:@|def ))", done.stdout.decode().strip("\n"))
    if "def " not in parts[0] and len(parts) > 1:  # attributes of the class
        parts = ["\n\n".join(parts[:2]), *parts[2:]]
    return tuple(parts)


def side_by_side(file: str, names: Sequence[str]) -> str:
    """A table of HTML with both forms of each class, a row for each method.

    A name may be that of a class in another file, as "resnet.Bottleneck".
    """
    rows = []
    for name in names:
        file, name = name.rpartition(".")[0] or file, name.rpartition(".")[2]
        pairs = itertools.zip_longest(*(pieces(room, file, name) for room in ROOMS), fillvalue="")
        for pair in pairs:
            cells = "".join(f"<td>\n\n```python\n{code}\n```\n\n</td>" for code in pair)
            rows.append(f'<tr valign="top">{cells}</tr>')
    head = "".join(
        f'<th><a href="../../{room}/{file}.py">{room}/{file}.py</a></th>' for room in ROOMS
    )
    return "\n".join(["<table>", f"<tr>{head}</tr>", *rows, "</table>"])


LOOK = """
```text
flax-nets summary {name}
```
"""


def lesson(file: str) -> str:
    """`docs/learn/<file>.md`: the idea, its drawing, and what to read side by side."""
    from flax_nets import registry

    words = {"differs": "", "more": "", "caption": "", "look": LOOK} | IDEAS[file]
    _, _, differences = (registry.module(file).__doc__ or "").partition("\n\n")
    defined = re.compile(r"^class (\w+)", re.MULTILINE)
    theirs, ours = (
        defined.findall((ROOT / room / f"{file}.py").read_text("utf-8")) for room in ROOMS
    )
    links = [f"[`{room}/{file}.py`](../../{room}/{file}.py)" for room in ROOMS]
    classes = ", ".join(f"`{name}`" for name in ours if name in theirs)
    name = next(iter(variants(file)), "")
    differs = "\n\n".join(filter(None, (differences.strip(), words["differs"].strip())))
    more = "\n" + words["more"].format(cost=cost()).strip() + "\n" if words["more"] else ""
    seen = "\n\n".join(
        filter(None, (f"![{words['title']}](pictures/{file}.svg)", words["caption"].strip()))
    )
    return f"""# {words["title"]}

{words["en"]}

Paper: {"; ".join(map(str, papers(file)))}.

{seen}
{more}
## Two files, side by side

PyTorch on the left, Flax on the right, without docstrings, types and checks of arguments, and in
shorter lines than the files have. {" and ".join(links)} have, with the same attributes in the same
order: {classes}.

{side_by_side(file, words["code"])}

## Names, and what differs from the paper

{differs}

## Look inside

{words["look"].strip().format(name=name)}

[All networks](../networks.md)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or with --check compare them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument(
        "--only", nargs="*", default=["*"], help="whose figures are counted; others' are believed"
    )
    args = parser.parse_args(argv)
    from flax_nets import registry

    known = believed(read(PAGES["en"]))
    for file in registry.FILES:
        for name in variants(file):
            if name not in known or any(fnmatch.fnmatchcase(name, p) for p in args.only):
                known[name] = figures(name)
    made = {path: page(language, known) for language, path in PAGES.items()}
    for file in (*registry.FILES, *MODULES):
        made[LESSONS / f"{file}.md"] = lesson(file)
        made |= {PICTURES / f"{name}.svg": svg for name, svg in pictures(file).items()}
    made[parity.PAGE] = parity.page()
    if args.check:
        stale = [path for path, text in made.items() if read(path) != text]
        for path in stale:
            print(f"{path.name} is out of date: python -m benchmarks.gallery", file=sys.stderr)
        return 1 if stale else 0
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path, text in made.items():
        path.write_text(text, "utf-8")
    return 0


def read(path: pathlib.Path) -> str:
    """A file's text, empty where there is none yet."""
    return path.read_text("utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
