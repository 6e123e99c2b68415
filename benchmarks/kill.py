"""Kill a small run at random moments: `python -m benchmarks.kill --count 20`.

A run is started again after each kill, and four times at most; then it is left alone, and must
end with the bits of a run that nothing disturbed, figures included. Of three kills one is SIGKILL,
one SIGTERM (the run saves itself and ends with code 75), and one SIGKILL after which the newest of
several checkpoints is damaged: emptied, or one of its files cut (the run goes on from the one
before and says so). Exit code 1 where an end differs.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
READY = "training"
PER_RUN = 4


def child(out: Path) -> None:
    """A run of 88 steps with all that has a state: dropout, averages, augmentation, a schedule."""
    import jax
    import numpy as np

    import flax_nets
    from flax_nets import train
    from flax_nets.train import data

    images, held_out = data.digits("train"), data.digits("test")
    model = flax_nets.create_model("lenet5", dropout=0.3)
    batches = data.Batches(images, 32, seed=0, drop_last=True, augment=data.shift(2))
    print(READY, flush=True)
    rows = train.fit(
        model,
        batches,
        data.Batches(held_out, 100),
        train.sgd(train.schedules.cosine(0.02, 2 * len(batches)), momentum=0.9),
        epochs=2,
        out=out,
        resume=True,
        checkpoint_every=8,
        progress=False,
        ema_decay=0.9,
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(flax_nets.functional(model)[1:]):
        digest.update(np.asarray(leaf).tobytes())
    timed = ("seconds", "images_per_second")
    figures = [{k: v for k, v in row.items() if k not in timed} for row in rows]
    print(json.dumps([digest.hexdigest(), figures]))


def attempt(out: Path, wait: float | None, how: int) -> tuple[int, float, str, str]:
    """Start or resume, and send a signal after `wait` seconds: (code, seconds, output, errors)."""
    command = [sys.executable, "-m", "benchmarks.kill", "--child", str(out)]
    with tempfile.TemporaryFile("w+") as errors:
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert run.stdout
        assert run.stdout.readline().strip() == READY
        began = time.perf_counter()
        if wait is not None:
            try:
                run.wait(wait)
            except subprocess.TimeoutExpired:
                run.send_signal(how)
        output = run.stdout.read()
        code = run.wait()
        errors.seek(0)
        return code, time.perf_counter() - began, output, errors.read()


def damage(out: Path, chance: random.Random) -> str:
    """Of the newest of several checkpoints; what was done, or nothing."""
    found = sorted(
        (p for p in (out / "checkpoints").glob("*") if p.name.isdecimal()),
        key=lambda p: int(p.name),
    )
    if len(found) < 2:
        return ""
    files = sorted(p for p in found[-1].rglob("*") if p.is_file() and p.stat().st_size)
    if chance.random() < 0.5:
        shutil.rmtree(found[-1])
        found[-1].mkdir()
        return f"{found[-1].name} emptied"
    file = chance.choice(files)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return f"{found[-1].name} cut"


def disturbed(folder: Path, kills: int, length: float, chance: random.Random) -> tuple[str, int]:
    """A run with up to so many kills: (what it printed in the end, the kills)."""
    done, harm = 0, ""
    while True:
        kind = ("SIGKILL and damage", "SIGTERM", "SIGKILL")[done % 3]
        how = signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL
        wait = chance.uniform(0.3, 1) * length if done < kills else None
        code, seconds, output, errors = attempt(folder, wait, how)
        if harm and "is torn" not in errors:
            raise SystemExit(f"{harm}, and nothing was said:\n{errors}")
        harm = ""
        if code == 0:
            return output, done
        if kind == "SIGTERM" and code == 75:
            assert "stopped by SIGTERM after step" in errors, errors
        elif code != -how:
            raise SystemExit(f"exit code {code}\n{errors}")
        done += 1
        if kind == "SIGKILL and damage":
            harm = damage(folder, chance)
        harmed = f", {harm}" if harm else ""
        print(f"  {kind} {seconds:.2f} s into training, code {code}{harmed}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    chance, kills, runs, same = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        code, length, whole, errors = attempt(Path(folder) / "whole", None, 0)
        assert code == 0, errors
        while kills < args.count:
            out = Path(folder) / str(runs)
            found, more = disturbed(out, min(PER_RUN, args.count - kills), length, chance)
            kills, runs, same = kills + more, runs + 1, same + (found == whole)
            print(
                f"run {runs}: {more} kills, {'the same bits' if found == whole else 'OTHER BITS'}"
            )
    print(f"{kills} kills, {same} of {runs} runs ended bit-identical")
    return same != runs


if __name__ == "__main__":
    sys.exit(main())
