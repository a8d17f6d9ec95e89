"""Real processes: killed at a moment nobody chose, and resumed, a run is to the last bit what it would have been."""

from __future__ import annotations

import random


def test_killed_told_to_end_and_resumed_is_the_undisturbed_run(fault_runs, tmp_path):
    """What `scripts/faults.py` tries many times."""
    dice, bench = random.Random(0), fault_runs.Bench(tmp_path)
    run, whole = bench.place(), bench.whole()
    assert len(fault_runs.lines(whole)) == fault_runs.STEPS and fault_runs.STEPS in fault_runs.steps_of(whole)

    killed = bench.start(run)
    goal = dice.randint(8, 25)
    assert fault_runs.wait(killed, lambda: fault_runs.count(run) > goal)
    killed.kill()
    killed.communicate()
    assert goal < fault_runs.count(run) < fault_runs.STEPS
    fault_runs.whole_checkpoints(run)

    ended = bench.start(run, resumed=True)
    goal = fault_runs.count(run) + 5
    assert fault_runs.wait(ended, lambda: fault_runs.count(run) > goal)
    ended.terminate()
    said = fault_runs.done(ended)
    assert fault_runs.count(run) in fault_runs.steps_of(run) and fault_runs.count(run) < fault_runs.STEPS
    assert "ended as told to" in said and "jaxrl-llm resume" in said

    fault_runs.done(bench.start(run, resumed=True))
    fault_runs.check_equal(run, whole)
