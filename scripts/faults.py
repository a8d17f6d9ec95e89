"""What happens to a run when something breaks: real processes, real kills, real full disks. Writes docs/faults.md.

    python scripts/faults.py                    # everything, about a quarter of an hour on two cores
    python scripts/faults.py --only kill --times 3 --no-table

Every run is resumed until it is finished and compared with one that nobody disturbed: all lines of metrics.jsonl but
their seconds, and all arrays of the last checkpoint, bit for bit. Full and read-only disks are small tmpfs, mounted for
the purpose (needs root); without that, RLIMIT_FSIZE stands in for the full one and the read-only rows are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_runs import (
    EVERY,
    ROOT,
    STEPS,
    Bench,
    check_equal,
    count,
    done,
    lines,
    small_disk,
    wait,
    whole_checkpoints,
)


def kill(bench: Bench, dice: random.Random, **changes: Any) -> str:
    """kill -9 at a random moment, as often as it takes to the end"""
    whole, run = bench.whole(**changes), bench.place()
    kills, resumed = 0, False
    while kills < 2:
        process = bench.start(run, resumed=resumed, **changes)
        goal = dice.randint(count(run) if resumed else 0, STEPS - 5)
        if wait(process, lambda goal=goal: count(run) > goal):
            time.sleep(dice.random() * 0.02)
        process.kill()
        process.communicate()
        whole_checkpoints(run)
        kills, resumed = kills + 1, True
    done(bench.start(run, resumed=True, **changes))
    check_equal(run, whole)
    return f"{kills} kills, then the undisturbed run"


def kill_in_save(bench: Bench, dice: random.Random) -> str:
    """kill -9 while a checkpoint is being written"""
    changes: dict[str, Any] = {"checkpoint_every": 1}
    whole, run = bench.whole(**changes), bench.place()
    process = bench.start(run, **changes)
    folder, goal = run / "checkpoints", dice.randint(1, STEPS - 10)
    caught = wait(process, lambda: count(run) > goal and folder.is_dir() and list(folder.glob("*tmp*")))
    time.sleep(dice.random() * 0.03)
    process.kill()
    process.communicate()
    half = [path.name for path in folder.iterdir() if not path.name.isdecimal()]
    whole_checkpoints(run)
    done(bench.start(run, resumed=True, **changes))
    check_equal(run, whole)
    assert caught and all(path.name.isdecimal() for path in folder.iterdir()), "half a checkpoint is left"
    return f"{'a half one was left and not used' if half else 'it was complete'}; then the undisturbed run"


def terminate(bench: Bench, dice: random.Random) -> str:
    """SIGTERM at a random moment"""
    whole, run = bench.whole(), bench.place()
    process = bench.start(run)
    goal = dice.randint(1, STEPS - 15)
    wait(process, lambda: count(run) > goal)
    process.terminate()
    told = time.monotonic()
    with contextlib.suppress(AssertionError):
        done(process)
    seconds = time.monotonic() - told
    assert process.returncode == 0 and (run / "checkpoints" / str(count(run))).is_dir() and seconds < 30
    done(bench.start(run, resumed=True))
    check_equal(run, whole)
    return f"saved, exit status 0 after {seconds:.1f} s; then the undisturbed run"


def full(bench: Bench, dice: random.Random, how: str) -> str:
    """the disk is full"""

    def fill(disk: Path) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)

    with small_disk(bench) as disk:
        if disk is not None:
            return _without_room(bench, dice, disk, how, fill, lambda disk: (disk / "filler").unlink())
    run = bench.place()
    done(bench.start(run, limit=6000, save_errors="stop"), status=1)
    done(bench.start(run, resumed=True))
    check_equal(run, bench.whole())
    return "by RLIMIT_FSIZE: ended in words; resumed with room, the undisturbed run"


def read_only(bench: Bench, dice: random.Random, how: str) -> str:
    """the folder cannot be written to"""

    def everything(disk: Path) -> list[str]:
        return [str(path) for path in (disk, *disk.rglob("*")) if path.is_dir() or path.name.startswith("metrics")]

    def lock(disk: Path) -> None:
        subprocess.run(["chattr", "+i", *everything(disk)], check=True, capture_output=True)

    def unlock(disk: Path) -> None:
        subprocess.run(["chattr", "-i", *everything(disk)], check=True, capture_output=True)

    with small_disk(bench) as disk:
        if disk is None:
            return "not tried: mount needs root"
        return _without_room(bench, dice, disk, how, lock, unlock)


def _without_room(
    bench: Bench, dice: random.Random, disk: Path, how: str, take: Callable[[Path], None], give: Callable[[Path], None]
) -> str:
    run = disk / "run"
    changes = {"save_errors": how, "steps": 4 * STEPS}
    whole = bench.whole(**changes)
    process = bench.start(run, **changes)
    goal = dice.randint(EVERY + 1, STEPS)
    assert wait(process, lambda: count(run) > goal)
    take(disk)
    if how == "stop":
        said = done(process, status=1)
        assert "jaxrl-llm resume" in said, said
        whole_checkpoints(run)
        found = f"ended in words after step {count(run)}"
    else:
        assert wait(process, lambda: (run / "checkpoints").is_dir() and _went_on(process, run)), done(process)
        found = "went on"
    give(disk)
    if how == "continue":
        done(process)
    else:
        done(bench.start(run, resumed=True, **changes))
    check_equal(run, whole)
    return f"{found}; with room again, the undisturbed run"


def _went_on(process: subprocess.Popen[str], run: Path) -> bool:
    """A while has passed, and the process is there."""
    time.sleep(0.4)
    return process.poll() is None


def damage(bench: Bench, dice: random.Random) -> str:
    """a file of the newest checkpoint is damaged"""
    whole, run = bench.whole(), bench.place()
    process = bench.start(run)
    wait(process, lambda: count(run) > 3 * EVERY)
    process.kill()
    process.communicate()
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    newest = run / "checkpoints" / str(steps[-1])
    sealed = (newest / "digests.json").exists()
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    files = [path for path in files if path.name != "digests.json"]
    victim, how = dice.choice(files), dice.choice(["a bit flipped", "cut in half", "deleted"])
    data = bytearray(victim.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    if how == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(data if how == "a bit flipped" else data[: len(data) // 2])
    said = done(bench.start(run, resumed=True))
    assert not sealed or f"checkpoint {steps[-1]} is damaged" in said, said
    check_equal(run, whole)
    return "said so, went on from the one before; then the undisturbed run"


def bad_update(bench: Bench, dice: random.Random, size: str, how: str) -> str:
    """gradients that are not finite or explode"""
    run = bench.place()
    changes: dict[str, Any] = {"trouble": size, "bad_updates": how, "bad_norm": 1e3, "checkpoint_every": 2}
    process = bench.start(run, **changes)
    done(process, status=1 if how == "stop" else 0)
    found = lines(run)
    skipped = [line["step"] for line in found if line["skipped"]]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    back = sum(event["event"] == "went back" for event in events)
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    last = max(int(path.name) for path in (run / "checkpoints").iterdir())
    state = ocp.load(run / "checkpoints" / str(last))
    assert all(np.isfinite(np.asarray(x)).all() for name, x in state.items() if name.startswith((".params", ".opt")))
    assert int(state[".memory['guard']['skipped']"]) == len(skipped)
    if how == "skip":
        assert skipped and len(found) == STEPS
        return f"{len(skipped)} of {STEPS} steps left out, all parameters finite"
    if how == "stop":
        assert skipped == [len(found)] == [last]
        return f"ended at step {last}, whose checkpoint is without it"
    assert back and not skipped and len(found) == STEPS
    return f"went back {back} times, finished all steps, all parameters finite"


def verifier(bench: Bench, dice: random.Random, fault: str, where: str) -> str:
    """a verifier misbehaves on some responses"""
    run = bench.place()
    done(bench.start(run, fault=fault, verify=where, steps=4, eval_problems=2))
    found = lines(run)
    name = {"hangs": "hung", "crashes": "crashed", "raises": "raised", "talks nonsense": "nonsense"}[fault]
    faults = sum(line[f"verifier/{name}"] for line in found)
    rows = sum(round(line["unscored_rows"] * 32) for line in found)
    assert faults == rows > 0 and sum(line[k] for line in found for k in line if k.startswith("verifier/")) == faults
    assert all(line["reward/min"] >= 0 and line["loss"] is not None for line in found)
    return f"{faults} of {32 * len(found)} responses not scored and counted, the others as ever"


FAULTS: dict[str, tuple[Callable[[Bench, random.Random], str], int]] = {
    "kill": (kill, 6),
    "kill in a save": (kill_in_save, 6),
    "kill, slots refilled": (functools.partial(kill, slots=5), 2),
    "kill, partial rollouts (april)": (functools.partial(kill, algorithm="april", set={"group_size": 8}, slots=5), 2),
    "kill, several steps a program": (functools.partial(kill, scan=5, checkpoint_every=10), 2),
    "SIGTERM": (terminate, 5),
    "disk full, stop": (functools.partial(full, how="stop"), 2),
    "disk full, continue": (functools.partial(full, how="continue"), 2),
    "read-only folder, stop": (functools.partial(read_only, how="stop"), 2),
    "read-only folder, continue": (functools.partial(read_only, how="continue"), 2),
    "damaged checkpoint": (damage, 5),
    **{
        f"{size} gradient, {how}": (functools.partial(bad_update, size=size, how=how), 1)
        for size in ("NaN", "Inf", "huge")
        for how in ("skip", "stop", "back")
    },
    **{
        f"verifier {fault}, {where}": (functools.partial(verifier, fault=fault, where=where), 1)
        for fault in ("hangs", "crashes", "raises", "talks nonsense")
        for where in ("inside", "between")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="faults whose names contain this")
    parser.add_argument("--times", type=int, help="how often each is tried; none: as the table says")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--no-table", action="store_true", help="print only")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name, (fault, times) in FAULTS.items():
            if given.only is not None and given.only not in name:
                continue
            outcomes: dict[str, int] = {}
            start = time.monotonic()
            for i in range(given.times or times):
                outcome = fault(bench, random.Random(f"{given.seed} {name} {i}"))
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                print(f"{name} {i + 1}: {outcome}", flush=True)
            rows.append((name, sum(outcomes.values()), outcomes, time.monotonic() - start))
    if not given.no_table:
        write(rows)


def write(rows: list[tuple[str, int, dict[str, int], float]]) -> None:
    """docs/faults.md."""
    head = [
        "# What happens when something breaks",
        "",
        "Written by `python scripts/faults.py`; its first lines say what is compared. A row can be tried alone:",
        '`python scripts/faults.py --only "NAME" --no-table`.',
        "",
        "| fault | times | outcome | seconds |",
        "|---|---|---|---|",
    ]
    for name, times, outcomes, seconds in rows:
        said = "<br>".join(f"{n} x {what}" if len(outcomes) > 1 else what for what, n in outcomes.items())
        head.append(f"| {name} | {times} | {said} | {seconds:.0f} |")
    (ROOT / "docs" / "faults.md").write_text("\n".join(head) + "\n")


if __name__ == "__main__":
    main()
