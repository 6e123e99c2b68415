"""What the benchmarks of speed share: a process for each job, results to go on from, ratios.

A benchmark is a list of jobs and a function that measures one. The parent runs each job in a
process of its own, on the same few cores for all frameworks, and appends its row to the file
`--out`; a run that was stopped goes on where it was. Rows of other versions, processors or settings
stay in that file and are measured anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.parity import versions

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAYOUTS = ("NCHW", "channels_last")  # of torch
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What `main` needs to know.

    Args:
      name: of the module in `benchmarks`, and of the file of its results.
      doc: the module's docstring.
      jobs: () -> names of what there is to measure.
      measure: (job, rounds) -> a row, called in a process of its own.
      table: rows of one machine -> Markdown.
      publish: None, or writes a page about all rows into a folder (`--write`).
      platform: of JAX, in the process that measures; None leaves the choice to JAX and the caller.
    """

    name: str
    doc: str
    jobs: Callable[[], Sequence[str]]
    measure: Callable[[str, int], Row]
    table: Callable[[Sequence[Row]], str]
    publish: Callable[[pathlib.Path, Sequence[Row]], None] | None = None
    platform: str | None = "cpu"

    @property
    def results(self) -> pathlib.Path:
        return RESULTS / f"{self.name}.jsonl"


def main(benchmark: Benchmark, argv: Sequence[str]) -> int:
    """The command line of a benchmark; exit code 2 for a mistake, 1 where a job failed."""
    prog = f"python -m benchmarks.{benchmark.name}"
    parser = argparse.ArgumentParser(prog=prog, description=benchmark.doc, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="glob patterns of jobs")
    add("--rounds", type=int, default=10, help="of which the median counts (default: %(default)s)")
    cores = len(usable_cores())
    add("--threads", type=int, default=cores, help="of each framework (default: %(default)s)")
    add("--seconds", type=float, default=float("inf"), help="start no job after this")
    add(
        "--out", type=pathlib.Path, default=benchmark.results, help="results (default: %(default)s)"
    )
    add("--json", action="store_true", help="print the rows")
    if benchmark.publish:
        add("--write", type=pathlib.Path, metavar="FOLDER", help="write the page into a folder")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1 or not 1 <= args.threads <= cores:
        parser.error(
            f"--rounds {args.rounds} --threads {args.threads}: 1 or more, of {cores} cores"
        )
    if args.job:
        restrict(args.threads)
        print(json.dumps(benchmark.measure(args.job, args.rounds)))
        return 0
    known = benchmark.jobs()
    jobs = [job for job in known if any(fnmatch.fnmatchcase(job, p) for p in args.only)]
    if not jobs:
        parser.error(f"--only {' '.join(args.only)}: matches none of {', '.join(known)}")
    rows = sweep(benchmark, jobs, args)
    print(json.dumps(rows) if args.json else sections(rows, benchmark.table))
    if benchmark.publish and args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        benchmark.publish(args.write, in_order(read(args.out), known))
    return int(any("error" in row for row in rows))


def sweep(benchmark: Benchmark, jobs: Sequence[str], args: argparse.Namespace) -> list[Row]:
    """The rows of all jobs; those that are not in `args.out` are measured and appended."""
    settings = {"machine": versions(), "threads": args.threads, "rounds": args.rounds}
    kept = {key(row): row for row in read(args.out)}
    rows, end = [], time.monotonic() + args.seconds
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        for number, job in enumerate(jobs, start=1):
            row = kept.get(key({"job": job, **settings}))
            if row is None or "error" in row:
                if time.monotonic() > end:
                    continue
                print(f"[{number}/{len(jobs)}] {job} ...", file=sys.stderr, flush=True)
                row = {"job": job, **settings, **child(benchmark, job, args)}
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(benchmark.table([row]).splitlines()[2], file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def key(row: Row) -> tuple[Any, ...]:
    return row["job"], row["machine"], row["threads"], row["rounds"]


def child(benchmark: Benchmark, job: str, args: argparse.Namespace) -> Row:
    """What a process of its own measures."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark.name}", "--job", job]
    command += ["--rounds", str(args.rounds), "--threads", str(args.threads)]
    start = time.perf_counter()
    platform = benchmark.platform or os.environ.get("JAX_PLATFORMS", "")
    env = environment(args.threads, JAX_PLATFORMS=platform)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1]) | {
        "seconds": round(time.perf_counter() - start, 1)
    }


def environment(threads: int, **more: str) -> dict[str, str]:
    """Of a process that measures: the same for everybody, whatever the caller's is."""
    ours = {n: v for n, v in os.environ.items() if not n.startswith(("JAX_", "FLAX_NETS_", "XLA_"))}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PJRT_NPROC"), str(threads))
    return {**ours, **counts, "JAX_PLATFORMS": "cpu", **more}


def python(code: str, **more: str) -> Any:
    """What the code prints last, as JSON, in a process of its own that starts from nothing."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(len(usable_cores()), **more),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{code}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(ours: str, theirs: str, rounds: int) -> Row:
    """Medians of the seconds that two pieces of code print, after one run that does not count."""
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        for side, code in (("ours", ours), ("theirs", theirs)):
            found[side].append(python(code))
    return {side: statistics.median(values[1:]) for side, values in found.items()}


def shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3f} ms"


def usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def restrict(threads: int) -> None:
    """As many cores as threads: XLA starts a thread for each core that it sees."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable_cores()[:threads])


def torch_threads() -> None:
    """Let torch use the cores that there are."""
    import torch

    torch.set_num_threads(len(usable_cores()))


def compare(sides: Mapping[str, Callable[[], Any]], rounds: int) -> Row:
    """Medians of "ours", "plain" and torch's layouts, taken in turns, and the ratios.

    "torch" is ours over the better of torch's layouts, "plain" ours over XLA's own operations.
    """
    from flax_nets.inspect.bench import in_turns

    found = in_turns(sides, rounds)
    ms = {side: 1e3 * statistics.median(values) for side, values in found.items()}
    best = min(LAYOUTS, key=ms.__getitem__)
    return {
        "ms": ms,
        "rounds": {side: len(values) for side, values in found.items()},
        "layout": best,
        "torch": ms["ours"] / ms[best],
        "plain": ms["ours"] / ms["plain"],
    }


def in_order(rows: Iterable[Row], jobs: Sequence[str]) -> list[Row]:
    return sorted(
        (row for row in rows if row["job"] in jobs), key=lambda row: jobs.index(row["job"])
    )


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a file, none where there is no such file yet; of several for one job the last."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({key(row): row for row in map(json.loads, lines)}.values())


def by_machine(rows: Iterable[Row]) -> list[list[Row]]:
    """What one machine measured with as many threads; of several rows for one job the last."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["machine"], row["threads"]), {})[row["job"]] = row
    return [list(own.values()) for own in found.values()]


def sections(rows: Sequence[Row], table: Callable[[Sequence[Row]], str]) -> str:
    """A table for each machine and number of threads."""
    parts = []
    for own in by_machine(rows):
        counts = [row["rounds"] for row in own]
        rounds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        parts.append(
            f"{own[0]['machine']}; {own[0]['threads']} threads for each framework; "
            f"medians of {rounds} rounds.\n\n{table(own)}"
        )
    return "\n\n".join(parts)


def markdown(header: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], Any]) -> str:
    """A table of a line for each row: its job, then `cells`, or why it failed."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for row in rows:
        failed = [f"failed: {row.get('error')}", *[""] * (len(header) - 2)]
        lines.append(f"| {' | '.join([row['job'], *(failed if 'error' in row else cells(row))])} |")
    return "\n".join(lines)


def ratios(rows: Sequence[Row], modes: Mapping[str, str], first: str) -> str:
    """Markdown of rows of `compare`: `modes` are keys of a row, and what to call them."""
    header = [first]
    for title in modes.values():
        header += [f"{title}, ms: ours / torch / plain", "ours : torch", "ours : plain"]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for row in rows:
        cells = [f"{row['job']} ({row['against']})" if "against" in row else row["job"]]
        if "error" in row:
            cells += [f"failed: {row['error']}", *[""] * (len(header) - 2)]
        else:
            for mode in modes:
                ms, part = row[mode]["ms"], row[mode]
                times = (ms["ours"], ms[part["layout"]], ms["plain"])
                cells += [" / ".join(f"{t:.4g}" for t in times)]
                cells += [f"**{part['torch']:.2f}**", f"{part['plain']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["geometric mean"]
    for mode in modes:
        parts = [row[mode] for row in rows if "error" not in row]
        for what in ("torch", "plain") if parts else ():
            cells += [""] * (what == "torch")
            cells.append(f"{statistics.geometric_mean(p[what] for p in parts):.2f}")
    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
