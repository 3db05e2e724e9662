"What chapter 01 cannot show in one process: kill and resume, several processes, a full disk, a GPU."
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cxr_nb import train
from cxr_nb.core import seeded, to_unit
from cxr_nb.train import (
    Callback,
    Plateau,
    Validate,
    fit,
    latest_checkpoint,
    launch,
    load_weights,
    read_log,
)

HERE = Path(__file__).resolve().parent


class Images:
    def __init__(self, n=52):
        self.x = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.seen = []
    def __len__(self): return len(self.x)
    def __getitems__(self, positions):
        self.seen.append(positions)
        return {"image": self.x[positions]}


class Net(nn.Module):
    "Everything that holds state or draws noise: batch norm, dropout, noise of its own."
    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(.2), nn.Conv2d(width, 1, 3, padding=1))
    def losses(self, batch, step):
        x = to_unit(batch["image"])
        return {"mse": (self.net(x + .1*torch.randn_like(x)) - x).square().mean()}


class Tell(Callback):
    def after_step(self, s): print(s.step, flush=True)


def net(config):
    "A fit with all that must survive a kill: average, clipping, a learning rate that falls, the best so far."
    with seeded(0, "init"): model = Net(config.get("width", 8))
    data = Images()
    def validate(m): return {"val": m.losses({"image": data.x}, 0)["mse"]}
    callbacks = [Validate(validate, best="val"), Plateau("val", patience=0, factor=.5), *([Tell()] if config.get("tell") else [])]
    return fit(model, data, out=config["out"], steps=config["steps"], batch_size=8, seed=3, optimizers=.3, ema=.9, clip=1., accumulate=2,
               checkpoint_every=config.get("every", 5), checkpoint_seconds=config.get("seconds", 60.), precision=config.get("precision", "no"), device="cpu", callbacks=callbacks, progress=False)


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    assert (a/"log.jsonl").read_bytes() == (b/"log.jsonl").read_bytes()
    assert (a/"best.safetensors").read_bytes() == (b/"best.safetensors").read_bytes()
    p, q = latest_checkpoint(a), latest_checkpoint(b)
    assert p.name == q.name
    for f in ("model.safetensors", "ema.safetensors", "state.json"): assert (p/f).read_bytes() == (q/f).read_bytes(), f
    assert same(*(torch.load(c/"training.pt", weights_only=True) for c in (p, q)))


def python(code, **kw):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, **kw)


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_one_left_alone(tmp_path):
    net({"out": str(tmp_path/"alone"), "steps": 40})
    r, config, kills = random.Random(), {"out": str(tmp_path/"killed"), "steps": 40, "tell": True}, 0
    for _ in range(2):
        p, until = python(f"import test_train; test_train.net({config!r})"), r.randrange(4, 30)
        for n, _ in enumerate(p.stdout):
            if n == until: break
        time.sleep(r.uniform(0, .02))
        p.kill()
        kills += p.wait() == -signal.SIGKILL
    assert kills >= 1
    net(config)
    log = read_log(tmp_path/"killed")
    assert log["step"].tolist() == list(range(40)) and log["lr"].nunique() > 1
    assert_same_run(tmp_path/"alone", tmp_path/"killed")


@pytest.mark.parametrize("step", ["training.pt", "state.json"])
def test_a_kill_between_the_files_of_a_checkpoint_leaves_the_one_before(tmp_path, monkeypatch, step):
    net({"out": str(tmp_path/"alone"), "steps": 20})
    class Killed(BaseException): pass
    def kill(*a, **kw): raise Killed
    net({"out": str(tmp_path/"killed"), "steps": 11})
    with monkeypatch.context() as m:
        m.setattr(*{"training.pt": (train.torch, "save"), "state.json": (train, "write_json")}[step], kill)
        with pytest.raises(Killed): net({"out": str(tmp_path/"killed"), "steps": 20})
    assert (tmp_path/"killed"/"checkpoints"/"step-00000015").exists() and latest_checkpoint(tmp_path/"killed").name == "step-00000011"
    with open(tmp_path/"killed"/"log.jsonl", "a") as f: f.write('{"step": 15, "ep')
    net({"out": str(tmp_path/"killed"), "steps": 20})
    assert_same_run(tmp_path/"alone", tmp_path/"killed")


@pytest.mark.parametrize(("writing", "last"), [(0., 12), (2., 9)])
def test_slow_steps_are_saved_by_the_clock_and_resume_exactly(tmp_path, monkeypatch, writing, last):
    net({"out": str(tmp_path/"alone"), "steps": 20})
    now, step, write_json = [0.], train._step, train.write_json
    def slow(s, batches):  # a step takes 7 seconds; the process is killed in the fourteenth
        now[0] += 7
        if s.step == 13: raise KeyboardInterrupt
        return step(s, batches)
    def wait(*a): now[0] += writing; write_json(*a)
    config = {"out": str(tmp_path/"killed"), "steps": 20, "every": 1000, "seconds": 20.}
    with monkeypatch.context() as m:
        m.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))
        m.setattr(train, "_step", slow); m.setattr(train, "write_json", wait)
        with pytest.raises(KeyboardInterrupt): net(config)
    assert latest_checkpoint(tmp_path/"killed").name == f"step-{last:08d}"
    assert net(config).resumed == last
    assert_same_run(tmp_path/"alone", tmp_path/"killed")


def test_only_the_last_two_checkpoints_stay_and_a_finished_run_is_handed_back(tmp_path):
    (tmp_path/"checkpoints"/"step-00000007").mkdir(parents=True)  # left half-written by a killed process
    first = net({"out": str(tmp_path), "steps": 23})
    assert sorted(p.name for p in (tmp_path/"checkpoints").iterdir()) == ["step-00000020", "step-00000023"]
    again = net({"out": str(tmp_path), "steps": 23})
    assert again.resumed == 23 and same(dict(first.model.state_dict()), dict(again.model.state_dict())) and first.log.equals(again.log)


def test_a_full_disk_is_said_and_the_older_checkpoint_is_intact(tmp_path):
    config = {"out": str(tmp_path/"full"), "width": 100}
    net(config | {"steps": 4})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        with pytest.raises(OSError, match="step-00000005 could not be written.*goes on from .*step-00000004"): net(config | {"steps": 10})
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path/"full"/"checkpoints").iterdir()] == ["step-00000004"]
    net(config | {"steps": 10})
    net({"out": str(tmp_path/"alone"), "width": 100, "steps": 10})
    assert_same_run(tmp_path/"alone", tmp_path/"full")


def test_a_corrupt_or_foreign_weight_file_is_named(tmp_path):
    net({"out": str(tmp_path), "steps": 5})
    file = latest_checkpoint(tmp_path)/"model.safetensors"
    with pytest.raises(ValueError, match=r"model.safetensors does not fit this Net .*size mismatch.*net.0.weight"): load_weights(Net(4), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="model.safetensors does not fit"): net({"out": str(tmp_path), "steps": 10})


def test_mixed_precision_resumes_exactly_and_is_another_fit(tmp_path):
    net({"out": str(tmp_path/"alone"), "steps": 12, "precision": "bf16"})
    for n in (7, 12): net({"out": str(tmp_path/"twice"), "steps": n, "precision": "bf16"})
    assert_same_run(tmp_path/"alone", tmp_path/"twice")
    with pytest.raises(ValueError, match="precision is 'bf16' there and 'no' here"): net({"out": str(tmp_path/"twice"), "steps": 14})


class Pair(nn.Module):
    "A GAN without noise, so that the number of processes cannot change it. Its generator has a weight that is never used."
    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Conv2d(1, 1, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
        self.generator.unused = nn.Parameter(torch.ones(1))
    def phases(self, step): return ["critic", "generator", "generator"]
    def losses(self, batch, step, phase):
        x = to_unit(batch["image"])
        y = self.generator(x)
        if phase == "generator": return {"adversarial": -self.critic(y).mean()}
        u = y.requires_grad_()
        g, = torch.autograd.grad(self.critic(u).sum(), u, create_graph=True)
        return {"gap": (self.critic(y) - self.critic(x)).mean(), "penalty": g.flatten(1).norm(dim=1).sub(1).square().mean()}


def pair(config):
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(rank)  # each process starts with other weights: those of the first must count
    data, model = Images(48), Pair()
    h = fit(model, data, out=config["out"], steps=config["steps"], batch_size=config["batch_size"], seed=1, ema=.5, accumulate=config.get("accumulate", 1), checkpoint_seconds=config.get("seconds", 60.), device="cpu", progress=False,
            optimizers=lambda m: {k: torch.optim.SGD(getattr(m, k).parameters(), .05) for k in ("critic", "generator")})
    (Path(config["out"])/f"seen-{rank}.json").write_text(json.dumps(data.seen))
    torch.save([dict(h.model.state_dict()), dict(h.ema.state_dict())], Path(config["out"])/f"weights-{rank}.pt")


def load(folder, rank): return torch.load(folder/f"weights-{rank}.pt", weights_only=True)


def assert_near(a, b):
    for x, y in zip(a, b):
        for k in x: torch.testing.assert_close(x[k], y[k], rtol=1e-4, atol=1e-5)


def test_two_processes_learn_what_one_does_from_disjoint_shares_and_resume(tmp_path):
    config = {"steps": 55, "batch_size": 8}
    one, two = ({**config, "out": str(tmp_path/n)} for n in ("one", "two"))
    pair(one)
    launch(pair, two | {"steps": 51, "seconds": 0.}, out=tmp_path/"two", processes=2, cpu=True)
    assert [p.name for p in sorted((tmp_path/"two"/"checkpoints").iterdir())] == ["step-00000050", "step-00000051"]  # the first by the clock
    launch(pair, two, out=tmp_path/"two", processes=2, cpu=True)
    seen = [json.loads((tmp_path/"two"/f"seen-{r}.json").read_text()) for r in (0, 1)]
    assert all(len(a) == len(b) == 4 and not set(a) & set(b) for a, b in zip(*seen)) and len(seen[0]) == 4
    assert same(load(tmp_path/"two", 0), load(tmp_path/"two", 1))
    assert_near(load(tmp_path/"one", 0), load(tmp_path/"two", 0))
    logs = [read_log(tmp_path/n) for n in ("one", "two")]
    assert logs[1]["step"].tolist() == list(range(55))
    torch.testing.assert_close(*(torch.tensor(x["critic/loss"].to_numpy()) for x in logs), rtol=1e-3, atol=1e-4)


def test_micro_batches_do_not_change_the_step_of_a_mean_over_images(tmp_path):
    for a in (1, 4): pair({"steps": 6, "batch_size": 8, "accumulate": a, "out": str(tmp_path/str(a))})
    assert_near(load(tmp_path/"1", 0), load(tmp_path/"4", 0))


def broken(config):
    if int(os.environ["RANK"]) == 1: raise RuntimeError("the second process fails on purpose")
    time.sleep(60)


def test_a_failing_process_fails_the_launch_with_its_last_lines(tmp_path):
    with pytest.raises(RuntimeError, match="ended with code 1(.|\n)*fails on purpose"): launch(broken, {}, out=tmp_path, processes=2, cpu=True)


def sleeper(config):
    (Path(config["out"])/f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a dead process")
def test_the_processes_die_with_the_one_that_launched_them(tmp_path):
    p = python(f"import test_train; test_train.launch(test_train.sleeper, {{'out': {str(tmp_path)!r}}}, out={str(tmp_path)!r}, processes=2, cpu=True)")
    def until(f, seconds):
        end = time.monotonic() + seconds
        while not f() and time.monotonic() < end: time.sleep(.1)
        return f()
    assert until(lambda: all((tmp_path/f"{r}.pid").exists() and (tmp_path/f"{r}.pid").read_text() for r in (0, 1)), 60)
    p.kill(); p.wait()
    def gone(pid): return not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    assert until(lambda: all(gone((tmp_path/f"{r}.pid").read_text()) for r in (0, 1)), 20)


def test_a_schedule_scales_the_rate_and_refuses_a_plateau(tmp_path):
    kw = dict(steps=8, batch_size=8, seed=0, optimizers=.1, schedule=lambda s: 1 - s/8, progress=False, device="cpu")
    h = fit(Net(), Images(), out=tmp_path/"a", **kw)
    assert h.log["lr"].tolist() == pytest.approx([.1*(1 - s/8) for s in range(8)])
    with pytest.raises(ValueError, match="give one of them"): fit(Net(), Images(), out=tmp_path/"b", callbacks=[Plateau("val")], **{**kw, "progress": True})


def test_losses_without_a_gradient_and_unknown_phases_are_said(tmp_path):
    class Still(Net):
        def losses(self, batch, step): return {"mse": super().losses(batch, step)["mse"].detach()}
    class Lost(Net):
        def phases(self, step): return ["critic"]
    for cls, why in [(Still, "nothing with a gradient at step 0"), (Lost, "phase 'critic' at step 0")]:
        with pytest.raises(ValueError, match=why): fit(cls(), Images(), out=tmp_path/cls.__name__, steps=2, batch_size=8, seed=0, progress=False, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_gpu_trains_and_resumes(tmp_path, precision):
    def run(out, steps):
        with seeded(0, "init"): model = Net()
        return fit(model, Images(), out=tmp_path/out, steps=steps, batch_size=8, seed=0, optimizers=.02, ema=.9, clip=1., precision=precision, checkpoint_every=10, device="cuda", progress=False)
    before = torch.cuda.get_rng_state()
    alone, _, twice = run("alone", 40), run("twice", 23), run("twice", 40)
    assert next(alone.model.parameters()).is_cuda and alone.log["loss"].iloc[-5:].mean() < alone.log["loss"].iloc[:5].mean()
    assert torch.equal(before, torch.cuda.get_rng_state()) and twice.log["step"].tolist() == list(range(40))
    for a, b in zip(alone.ema.parameters(), twice.ema.parameters()): torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
