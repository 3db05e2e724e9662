"""Kills `make report` (SIGKILL, the whole process group) at random moments, resumes it each time, and compares what it found with an undisturbed run.

    .venv/bin/python tests/kill_report.py --kills 10                 # the smoke report
    .venv/bin/python tests/kill_report.py --preset tests/chain.yaml --kills 2
"""
import argparse, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd

from cxr_nb.core import repo_root
from cxr_nb.report import compare

ROOT = repo_root()


def report(runs, site, preset, *more, **options):
    "Starts `make report` in a process group of its own."
    return subprocess.Popen(["make", "report", f"PRESET={preset}", f"RUNS={runs}", f"SITE={site}", *more], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finish(process):
    "Waits for the end. Raises `RuntimeError` with what it printed if it failed."
    said, _ = process.communicate()
    if process.returncode: raise RuntimeError(f"make report failed:\n{said[-3000:]}")
    return said


def workers(runs):
    "Processes that work in the folders of `runs`: stage -> process numbers."
    mark, found = f"CXR_NB_RUN={Path(runs).resolve()}/", {}
    for p in Path("/proc").glob("[0-9]*/environ"):
        try: env = p.read_bytes().decode(errors="replace").split("\0")
        except OSError: continue
        for e in env:
            if e.startswith(mark): found.setdefault(e[len(mark):], []).append(int(p.parent.name))
    return found


def kill_and_resume(runs, site, preset, kills, longest, seed=0, more=(), say=print):
    "Kills a report `kills` times, each after a random time of at most `longest` seconds, then lets it end. A report that ends before its kill counts as no kill and is started afresh."
    rand, done = random.Random(seed), 0
    while done < kills:
        process, after = report(runs, site, preset, *more), rand.uniform(.5, longest)
        try: process.wait(after)
        except subprocess.TimeoutExpired:
            at_work = workers(runs)
            os.killpg(process.pid, signal.SIGKILL); process.communicate(); done += 1
            killed = time.perf_counter()
            say(f"kill {done} after {after:.1f} s, at work: {', '.join(sorted(at_work)) or 'no stage'}", flush=True)
            if rand.random() < .5:  # half of the time wait for the orphans, to time them; else resume at once, beside them
                while workers(runs): time.sleep(.05)
                say(f"    the last process was gone after {time.perf_counter() - killed:.1f} s", flush=True)
        else: raise RuntimeError(f"make report ended within {after:.1f} s, before its kill {done + 1}:\n{process.communicate()[0][-2000:]}\ngive a smaller --longest")
    return finish(report(runs, site, preset, *more))


def differences(a, b) -> pd.DataFrame:
    "Metrics, tables and sets that are not the same in two folders of runs."
    both = compare(a, b)
    return both[~both.same]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="smoke"); parser.add_argument("--kills", type=int, default=10); parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, help="seconds a report may run before it is killed; default: 2/kills of an undisturbed run")
    parser.add_argument("--undisturbed", help="folder of runs to compare with; default: one is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        start, calm = time.perf_counter(), args.undisturbed
        if not calm: calm = f"{d}/calm"; finish(report(calm, f"{d}/calm-site", args.preset))
        took = time.perf_counter() - start
        print(f"undisturbed: {took:.0f} s", flush=True)
        kill_and_resume(f"{d}/killed", f"{d}/killed-site", args.preset, args.kills, args.longest or 2*took/args.kills, args.seed)
        unlike, n = differences(calm, f"{d}/killed"), len(compare(calm, f"{d}/killed"))
        print(unlike.to_string() if len(unlike) else f"{args.kills} kills: all {n} metrics, tables and sets are the same as those of the undisturbed run")
    sys.exit(len(unlike) > 0)
