"""Kills `make report` (SIGKILL, the whole process group) at random moments, resumes it each time, and compares what it found with an undisturbed run.

    .venv/bin/python tests/kill_report.py --kills 10                 # the smoke report
    .venv/bin/python tests/kill_report.py --preset tests/chain.yaml --kills 2
"""
import argparse, os, random, shutil, signal, subprocess, tempfile, time
from pathlib import Path

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


def kill_and_resume(runs, site, preset, kills, longest, seed=0, more=(), check=lambda: None, say=print):
    "Kills a report `kills` times, each after a random time of at most `longest` seconds, resumes it, and lets the last one end. One that ends before its kill is checked and begun afresh."
    rand, done = random.Random(seed), 0
    while done < kills:
        process, after, start = report(runs, site, preset, *more), rand.uniform(.5, longest), time.perf_counter()
        try: said, _ = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            at_work = workers(runs)
            os.killpg(process.pid, signal.SIGKILL); process.communicate(); done += 1
            killed = time.perf_counter()
            say(f"kill {done} after {after:.0f} s, at work: {', '.join(sorted(at_work)) or 'no stage'}", flush=True)
            if rand.random() < .5:  # half of the time wait for the orphans, to time them; else resume at once, beside them
                while workers(runs): time.sleep(.05)
                say(f"    the last process was gone after {time.perf_counter() - killed:.1f} s", flush=True)
        else:
            if process.returncode: raise RuntimeError(f"make report failed:\n{said[-3000:]}")
            check(); shutil.rmtree(runs)
            say(f"ended after {time.perf_counter() - start:.0f} s, before its kill, with the same numbers: begun afresh", flush=True)
    finish(report(runs, site, preset, *more))
    check()


def assert_same(a, b) -> int:
    "How many metrics, tables and sets were compared. Raises `AssertionError` with those that differ."
    both = compare(a, b)
    assert both.same.all(), f"{b} differs from {a}:\n{both[~both.same].to_string()}"
    return len(both)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="smoke"); parser.add_argument("--kills", type=int, default=10); parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, help="seconds a report may run before it is killed; default: three quarters of an undisturbed run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        start = time.perf_counter()
        finish(report(f"{d}/calm", f"{d}/calm-site", args.preset))
        took = time.perf_counter() - start
        print(f"undisturbed: {took:.0f} s", flush=True)
        check = lambda: assert_same(f"{d}/calm", f"{d}/killed")
        kill_and_resume(f"{d}/killed", f"{d}/killed-site", args.preset, args.kills, args.longest or .75*took, args.seed, check=check)
        print(f"{args.kills} kills: all {check()} metrics, tables and sets are the same as those of the undisturbed run")
