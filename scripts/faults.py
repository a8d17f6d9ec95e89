"""What happens to a run when something breaks: real processes, real kills, real full disks. Writes docs/faults.md.

    python scripts/faults.py                    # everything, about a quarter of an hour on two cores
    python scripts/faults.py --only kill --times 3 --no-table

Every run is resumed until it is finished and compared with one that nobody disturbed: all lines of metrics.jsonl but
their seconds, and all arrays of the last checkpoint, bit for bit. Most runs train a few thousand numbers, so that a
process costs seconds; those with slots, partial rollouts or a verifier train a small language model. Full and read-only
disks are small tmpfs, mounted for the purpose (needs root); without that, RLIMIT_FSIZE stands in for the full one and
the read-only rows are left out.
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
    LONG,
    ROOT,
    STEPS,
    Bench,
    check_equal,
    check_said,
    count,
    done,
    lines,
    small_disk,
    steps_of,
    wait,
    whole_checkpoints,
)


def kill(bench: Bench, dice: random.Random, times: int, **changes: Any) -> dict[str, int]:
    """kill -9 at random moments of one run"""
    whole, run, landed = bench.whole(**changes), bench.place(), 0
    for i in range(times):
        if (run / "summary.json").exists():
            break
        process = bench.start(run, resumed=i > 0, **changes)
        goal = dice.randint(0, STEPS // 2) if i == 0 else count(run) + dice.randint(-EVERY, STEPS // times)
        wait(process, lambda goal=goal: STEPS > count(run) > goal)
        time.sleep(dice.random() * 0.03)
        landed += process.poll() is None
        process.kill()
        process.communicate()
        whole_checkpoints(run)
    if not (run / "summary.json").exists():
        done(bench.start(run, resumed=True, **changes))
    check_equal(run, whole)
    return {"resumed each time; in the end the undisturbed run": landed}


def kill_one_of_two(bench: Bench, dice: random.Random, times: int) -> dict[str, int]:
    """kill -9 of one of the two processes of a run: the other ends too, and two new ones go on"""
    steps = 20
    changes: dict[str, Any] = {"model": "language", "heartbeat": 8, "steps": steps, "checkpoint_every": 3}
    whole, run = bench.place(), bench.place()
    for process in bench.together(whole, **changes):
        done(process)
    for i in range(times):
        pair = bench.together(run, resumed=i > 0, **changes)
        goal = (count(run) if i else 0) + dice.randint(1, steps // (times + 1))
        wait(pair[0], lambda goal=goal: count(run) > goal)
        victim = dice.randrange(2)
        pair[victim].kill()
        _, said = pair[1 - victim].communicate(timeout=600)
        assert pair[1 - victim].returncode not in (0, -9) and ("died" in said or "heartbeat" in said), said[-2000:]
        pair[victim].communicate()
    for process in bench.together(run, resumed=True, **changes):
        done(process)
    check_said(run, whole)
    return {"the other ended with a message; resumed in two each time; in the end the undisturbed run": times}


def kill_in_save(bench: Bench, dice: random.Random, times: int) -> dict[str, int]:
    """kill -9 while a checkpoint is being written"""
    changes: dict[str, Any] = {"checkpoint_every": 1}
    whole, run = bench.whole(**changes), bench.place()
    found: dict[str, int] = {}
    folder = run / "checkpoints"
    for i in range(times):
        old = set(folder.iterdir()) if i else set()
        process = bench.start(run, resumed=i > 0, **changes)
        goal = max(steps_of(run), default=0) + dice.randint(1, STEPS // (2 * times))

        def saving(old: set[Path] = old, goal: int = goal) -> bool:
            if count(run) <= goal or not folder.is_dir():
                return False
            return any("tmp" in path.name for path in set(folder.iterdir()) - old)

        caught = wait(process, saving)
        time.sleep(dice.random() * 0.05)
        process.kill()
        process.communicate()
        assert caught, "the run ended before it could be killed"
        half = {path for path in folder.iterdir() if not path.name.isdecimal()} - old
        said = "half a checkpoint was left" if half else "it was complete by then"
        found[said] = found.get(said, 0) + 1
        whole_checkpoints(run)
    done(bench.start(run, resumed=True, **changes))
    check_equal(run, whole)
    assert all(path.name.isdecimal() for path in folder.iterdir()), "half a checkpoint is still there"
    return {f"{said}, and none like it was used; in the end the undisturbed run": n for said, n in found.items()}


def terminate(bench: Bench, dice: random.Random, times: int) -> dict[str, int]:
    """SIGTERM at random moments of one run"""
    whole, run, seconds = bench.whole(), bench.place(), []
    for i in range(times):
        if (run / "summary.json").exists():
            break
        process = bench.start(run, resumed=i > 0)
        goal = count(run) + dice.randint(0, STEPS // times - 3)
        wait(process, lambda goal=goal: count(run) > goal)
        process.terminate()
        told = time.monotonic()
        done(process)
        seconds.append(time.monotonic() - told)
        assert count(run) in steps_of(run)
    if not (run / "summary.json").exists():
        done(bench.start(run, resumed=True))
    check_equal(run, whole)
    longest = f"exit status 0 after at most {max(seconds):.1f} s"
    return {f"saved its last step, {longest}; in the end the undisturbed run": len(seconds)}


def full(bench: Bench, dice: random.Random, times: int, how: str) -> dict[str, int]:
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
    return {"by RLIMIT_FSIZE: ended in words; resumed with room, the undisturbed run": 1}


def read_only(bench: Bench, dice: random.Random, times: int, how: str) -> dict[str, int]:
    """the folder cannot be written to"""

    def everything(disk: Path) -> list[str]:
        return [str(path) for path in (disk, *disk.rglob("*")) if path.is_dir() or path.name.startswith("metrics")]

    def lock(disk: Path) -> None:
        subprocess.run(["chattr", "+i", *everything(disk)], check=False, capture_output=True)

    def unlock(disk: Path) -> None:
        subprocess.run(["chattr", "-i", *everything(disk)], check=False, capture_output=True)

    with small_disk(bench) as disk:
        if disk is None:
            return {"not tried: mount needs root": 1}
        return _without_room(bench, dice, disk, how, lock, unlock)


def _without_room(
    bench: Bench, dice: random.Random, disk: Path, how: str, take: Callable[[Path], None], give: Callable[[Path], None]
) -> dict[str, int]:
    run, whole = disk / "run", bench.whole(steps=LONG)
    process = bench.start(run, steps=LONG, save_errors=how)
    goal = dice.randint(EVERY + 1, STEPS)
    assert wait(process, lambda: count(run) > goal)
    take(disk)
    if how == "stop":
        said = done(process, status=1)
        assert "jaxrl-llm resume" in said, said
        whole_checkpoints(run)
        give(disk)
        done(bench.start(run, steps=LONG, save_errors=how, resumed=True))
        check_equal(run, whole)
        return {"ended in words; resumed with room, the undisturbed run": 1}
    time.sleep(1.0)
    assert process.poll() is None, done(process)
    give(disk)
    assert "not saved, going on" in done(process)
    check_equal(run, whole)
    return {"trained on; with room again it wrote what was missing: the undisturbed run": 1}


def damage(bench: Bench, dice: random.Random, times: int) -> dict[str, int]:
    """a file of the newest checkpoint is damaged, in one run again and again"""
    whole, run, newest = bench.whole(), bench.place(), 0
    found: dict[str, int] = {}
    for i in range(times):
        process = bench.start(run, resumed=i > 0)
        goal = max(steps_of(run), default=EVERY) + EVERY
        wait(process, lambda goal=goal: STEPS > count(run) > goal)
        process.terminate()
        said = done(process)
        assert i == 0 or f"checkpoint {newest} is damaged" in said, said
        newest = max(steps_of(run))
        files = [path for path in (run / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
        files = [path for path in files if path.stat().st_size and path.name != "digests.json"]
        victim, how = dice.choice(files), ("a bit flipped", "cut in half", "deleted")[i % 3]
        data = bytearray(victim.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        if how == "deleted":
            victim.unlink()
        else:
            victim.write_bytes(data if how == "a bit flipped" else data[: len(data) // 2])
        found[how] = found.get(how, 0) + 1
    done(bench.start(run, resumed=True))
    check_equal(run, whole)
    after = "said so, went on from the one before; in the end the undisturbed run"
    return {f"{how}: {after}": n for how, n in found.items()}


def bad_update(bench: Bench, dice: random.Random, times: int, size: str, how: str) -> dict[str, int]:
    """gradients that are not finite or explode"""
    run = bench.place()
    changes: dict[str, Any] = {"trouble": size, "bad_updates": how, "bad_norm": 1e3, "checkpoint_every": 2}
    changes |= {"keep_checkpoints": 20} if how == "back" else {}
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
        return {f"{len(skipped)} of {STEPS} steps left out, all parameters finite": 1}
    if how == "stop":
        assert skipped == [len(found)] == [last]
        return {f"ended at step {last}, whose checkpoint is without it": 1}
    assert back and not skipped and len(found) == STEPS
    return {f"went back {back} times, finished all steps, all parameters finite": 1}


def verifier(bench: Bench, dice: random.Random, times: int, fault: str, where: str) -> dict[str, int]:
    """a verifier misbehaves on some responses"""
    run = bench.place()
    done(bench.start(run, model="language", fault=fault, verify=where, steps=4, eval_problems=2))
    found = lines(run)
    name = {"hangs": "hung", "crashes": "crashed", "raises": "raised", "talks nonsense": "nonsense"}[fault]
    faults = sum(line[f"verifier/{name}"] for line in found)
    rows = sum(round(line["unscored_rows"] * 32) for line in found)
    assert faults == rows > 0 and sum(line[k] for line in found for k in line if k.startswith("verifier/")) == faults
    assert all(line["reward/min"] >= 0 and line["loss"] is not None for line in found)
    return {f"{faults} of {32 * len(found)} responses not scored and counted, the others as ever": 1}


LANGUAGE: dict[str, Any] = {"model": "language", "slots": 5, "set": {"group_size": 8}}
Fault = Callable[[Bench, random.Random, int], dict[str, int]]

FAULTS: dict[str, tuple[Fault, int]] = {
    "kill -9": (kill, 10),
    "kill -9 in a save": (kill_in_save, 8),
    "kill -9, slots refilled": (functools.partial(kill, **LANGUAGE), 3),
    "kill -9, partial rollouts": (
        functools.partial(kill, model="language", algorithm="april", set={"group_size": 8}, slots=5),
        3,
    ),
    "kill -9, five steps a program": (functools.partial(kill, scan=5, checkpoint_every=10), 3),
    "kill -9 of one of two processes": (kill_one_of_two, 3),
    "SIGTERM": (terminate, 5),
    "disk full, stop": (functools.partial(full, how="stop"), 1),
    "disk full, continue": (functools.partial(full, how="continue"), 1),
    "read-only folder, stop": (functools.partial(read_only, how="stop"), 1),
    "read-only folder, continue": (functools.partial(read_only, how="continue"), 1),
    "damaged checkpoint": (damage, 4),
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
    parser.add_argument("--only", nargs="+", help="faults whose names contain one of these")
    parser.add_argument("--times", type=int, help="how often each is tried; none: as the table says")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--no-table", action="store_true", help="print only")
    given = parser.parse_args()
    rows: list[tuple[str, dict[str, int], float]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name, (fault, times) in FAULTS.items():
            if given.only is not None and not any(part in name for part in given.only):
                continue
            start = time.monotonic()
            outcomes = fault(bench, random.Random(f"{given.seed} {name}"), given.times or times)
            rows.append((name, outcomes, time.monotonic() - start))
            if not given.no_table:
                write(rows)
            for outcome, n in outcomes.items():
                print(f"{name}, {n} times: {outcome} ({rows[-1][-1]:.0f} s)", flush=True)


def write(rows: list[tuple[str, dict[str, int], float]]) -> None:
    """docs/faults.md: its table, with these rows in the place of those of the same faults."""
    path, found = ROOT / "docs" / "faults.md", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("| ") and (name := line.split(" | ")[0][2:]) in FAULTS:
            found.setdefault(name, []).append(line)
    found |= {name: [f"| {name} | {n} | {what} |" for what, n in outcomes.items()] for name, outcomes, _ in rows}
    head = [
        "# What happens when something breaks",
        "",
        "Written by `python scripts/faults.py`, which says in its first lines what is done and compared; a row alone:",
        '`python scripts/faults.py --only "NAME" --times N`.',
        "",
        "| fault | times | outcome |",
        "|---|---|---|",
    ]
    path.write_text("\n".join(head + [line for name in FAULTS for line in found.get(name, ())]) + "\n")


if __name__ == "__main__":
    main()
