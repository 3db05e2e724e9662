"""The workflow: what runs, when it runs again, what a failed or killed run leaves behind, and the pages that come out."""
import fcntl, json, os, re, shutil, subprocess, sys, time
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
import yaml

from cxr_nb.core import repo_root
from cxr_nb.report import read_records

sys.path[:0] = [str(repo_root()/"reports"), str(repo_root()/"tests")]
from kill_report import assert_same, finish, kill_and_resume, report
from stages import plan

ROOT, CHAIN = repo_root(), "tests/chain.yaml"
RUNS, SITE = ROOT/"reports"/"runs"/"chain", ROOT/"reports"/"site"/"chain"


# What is refused before anything runs

@pytest.mark.parametrize("preset, said", [
    ({"31_vae": {"stepz": 3}}, "31_vae has no parameter `stepz`; the nearest is `steps`"),
    ({"31_va": {"steps": 3}}, "no stage `31_va`; the nearest is `31_vae`"),
    ({"31_vae": {"lr": "1e-4"}}, "in YAML write 1.0e-4"),
    ({"31_vae": {"out": "x"}}, "`out` of 31_vae is set by the workflow"),
    ({"16_audit": {"dataset": "x"}}, "`dataset` of 16_audit is set by the workflow"),
    ({"resources": {"15_phantoms": {"threads": 2}}}, "no stage `15_phantoms`; the nearest is `15_phantom`"),
    ({"34_pggan": {"size": 128}}, "34_pggan asks for 128 px, but 15_phantom makes a set of 64 px"),
    ({"seeds": [1, 1]}, "`seeds` is [1, 1]; give a list of different whole numbers"),
    ({"seeds": 2}, "`seeds` is 2; give a list"),
    ({"stages": ["31_vea"]}, "no stage `31_vea`; the nearest is `31_vae`"),
])
def test_preset_that_does_not_fit_is_refused(tmp_path, preset, said):
    (tmp_path/"p.yaml").write_text(yaml.safe_dump(preset))
    with pytest.raises(ValueError, match=re.escape(said)): plan(str(tmp_path/"p.yaml"), "runs")


def test_unknown_preset_bad_yaml_and_half_a_source_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no preset `laptpo`: the nearest is `laptop`"): plan("laptpo", "runs")
    (tmp_path/"p.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="p.yaml is no YAML"): plan(str(tmp_path/"p.yaml"), "runs")
    with pytest.raises(ValueError, match="SOURCE .* and ROOT .* go together"): plan("smoke", "runs", source="nih")


def test_unknown_source_and_a_root_that_is_no_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no source `nhi`; the nearest is `nih`"): plan("smoke", "runs", "nhi", str(tmp_path))
    (tmp_path/"file").touch()
    for root in (tmp_path/"absent", tmp_path/"file"):
        with pytest.raises(ValueError, match=f"ROOT={root}: there is no such folder"): plan("smoke", "runs", "nih", str(root))


# What a stage takes, and when it runs again

def test_stages_take_the_phantom_or_the_release(tmp_path):
    assert plan("smoke", "r")["50_augment"].parameters == {"out": "r/50_augment", "dataset": "r/15_phantom/set", "synthetic": "r/31_vae/set"}
    real = plan("smoke", "r", "nih", str(tmp_path))
    assert real["31_vae"].parameters["dataset"] == "r/12_images/set" and real["31_vae"].needs == ["12_images"]
    assert real["56_transfer"].parameters["real"] == "r/12_images/set" and real["56_transfer"].parameters["phantom"] == "r/15_phantom/set" and "real" not in plan("smoke", "r")["56_transfer"].parameters
    assert real["12_images"].parameters == {"out": "r/12_images", "source": "nih", "root": str(tmp_path)}
    assert list(plan(CHAIN, "r")) == ["15_phantom", "31_vae", "90_report"] and plan(CHAIN, "r")["90_report"].needs == ["15_phantom", "31_vae"]


def test_generators_are_trained_once_more_for_each_seed_of_the_preset(tmp_path):
    (tmp_path/"p.yaml").write_text("seeds: [4, 5]\n31_vae: {steps: 7}\nresources: {31_vae: {threads: 2}}\n"); many, once = plan(str(tmp_path/"p.yaml"), "r"), plan("smoke", "r")
    more = {f"seed{k}/{s}" for k in (4, 5) for s in ("31_vae", "32_gmvae", "33_lsgan", "34_pggan", "37_dit", "38_stable_diffusion")}
    assert set(many) - set(once) == more and more < set(many["60_leaderboard"].needs) and many["60_leaderboard"].parameters["repeats"] == ["r/seed4", "r/seed5"]
    own = many["seed5/31_vae"]; assert own.parameters == many["31_vae"].parameters | {"seed": 5, "out": "r/seed5/31_vae"} and own.threads == 2 and own.needs == ["15_phantom"] and own.key != many["seed4/31_vae"].key
    assert "repeats" not in once["60_leaderboard"].parameters and not set(many["39_families"].needs) & more
    (tmp_path/"p.yaml").write_text("seeds: [4]\nstages: [31_vae]\n"); assert "seed4/31_vae" not in plan(str(tmp_path/"p.yaml"), "r"), "only the leaderboard takes them"


def small_checkout(root):
    "A checkout with a few notebooks: 10 and 20 import a module each, the families and the leaderboard take the generators, 90 is the report."
    (root/"nbs").mkdir(); (root/"cxr_nb").mkdir()
    for name, code in [("10_a", "from cxr_nb.low import f"), ("20_b", "import cxr_nb.high"), ("20_classifier", ""), ("22_features", "classifier = ''"), ("24_oracles", ""), ("27_sanity", "oracles = ''"), ("28_text", ""), ("31_vae", ""), ("32_gmvae", ""), ("33_lsgan", ""), ("34_pggan", ""),
                       ("35_latents", "classifier = ''\noracles = ''"), ("37_dit", "latents = ''\ntexts = ''\noracles = ''"), ("38_stable_diffusion", "latents = ''\noracles = ''"),
                       ("39_families", "vae = ''\ngmvae = ''\nlsgan = ''\npggan = ''\ndit = ''\nsd = ''"), ("40_glori", ""), ("42_inpaint", "glori = ''\noracles = ''"), ("50_augment", "synthetic = ''"), ("60_leaderboard", "vae = ''\ngmvae = ''\nlsgan = ''\npggan = ''\ndit = ''\nsd = ''\noracles = ''"), ("61_equal_time", "latents = ''\ntexts = ''\noracles = ''"), ("90_report", "runs = ''")]:
        cells = [(["parameters"], f"seed = 0\nout = ''\n{code if '=' in code else ''}"), ([], code)]
        (root/"nbs"/f"{name}.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "metadata": {"tags": t}, "source": c} for t, c in cells]}))
    (root/"cxr_nb"/"low.py").write_text("def f(): return 1\n"); (root/"cxr_nb"/"high.py").write_text("from cxr_nb.low import f\n")
    (root/"p.yaml").write_text("")
    return lambda: {s: p.key for s, p in plan("p.yaml", "runs", repo=root).items()}


def test_a_stage_runs_again_for_code_that_it_uses_and_for_its_parameters_only(tmp_path):
    keys = small_checkout(tmp_path)
    def changed(): nonlocal before; now = keys(); out = {s for s in now if now[s] != before[s]}; before = now; return out
    before = keys()
    (tmp_path/"cxr_nb"/"high.py").write_text("# a remark\nfrom cxr_nb.low import f\n"); assert changed() == set()
    (tmp_path/"cxr_nb"/"high.py").write_text("from cxr_nb.low import f\nx = 1\n"); assert changed() == {"20_b", "90_report"}
    (tmp_path/"cxr_nb"/"low.py").write_text("def f(): return 2\n"); assert changed() == {"10_a", "20_b", "90_report"}
    (tmp_path/"p.yaml").write_text("31_vae: {seed: 1}\n"); assert changed() == {"31_vae", "39_families", "50_augment", "60_leaderboard", "90_report"}
    (tmp_path/"p.yaml").write_text("31_vae: {seed: 1}\nresources: {31_vae: {gpu: 1, mem_mb: 9}}\n"); assert changed() == set()
    (tmp_path/"p.yaml").write_text("31_vae: {seed: 1}\nresources: {31_vae: {threads: 2}}\n"); assert changed() == {"31_vae", "39_families", "50_augment", "60_leaderboard", "90_report"}


# One stage, with something else in papermill's place

def stage(folder, key, python):
    return subprocess.run([ROOT/"reports"/"stage.sh", python, folder, key, "1", "{}"], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def python(tmp_path):
    "Writes a script to be called as `python -m papermill ...`; returns its path."
    def make(code):
        (tmp_path/"python").write_text(f"#!/bin/bash\n{code}\n"); (tmp_path/"python").chmod(0o755)
        return tmp_path/"python"
    return make


def test_a_folder_is_continued_for_the_same_key_and_replaced_for_another(tmp_path, python):
    run = tmp_path/"runs"/"31_vae"
    writes = python(f"echo x >> {run}/checkpoint; touch {run}/run.json")
    for key, lines in [("a", 1), ("a", 2), ("b", 1)]:
        assert stage(run, key, writes).returncode == 0 and len((run/"checkpoint").read_text().splitlines()) == lines
    assert len((tmp_path/"runs"/".replaced"/"31_vae"/"checkpoint").read_text().splitlines()) == 2


def test_a_failure_is_told_in_one_line(tmp_path, python):
    run = tmp_path/"runs"/"31_vae"
    assert stage(run, "a", python("echo Traceback; echo 'ValueError: no such set'; exit 3")).returncode == 3
    assert (run/"error.txt").read_text().startswith("31_vae: ValueError: no such set (exit status 3")
    assert stage(run, "a", python("exit 0")).returncode == 1 and "without run.finish()" in (run/"error.txt").read_text()
    assert stage(run, "a", python(f"touch {run}/run.json")).returncode == 0 and not (run/"error.txt").exists()


def test_a_stage_waits_for_the_orphan_of_a_killed_one(tmp_path, python):
    run = tmp_path/"runs"/"31_vae"
    subprocess.Popen(["sleep", "2"], env={**os.environ, "CXR_NB_RUN": str(run)})
    start = time.perf_counter()
    assert stage(run, "a", python(f"touch {run}/run.json")).returncode == 0 and time.perf_counter() - start > 1.5


def test_a_second_report_in_the_same_folder_says_so(tmp_path):
    (tmp_path/"runs").mkdir()
    with open(tmp_path/"runs"/".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another make report is at work in"): finish(report(tmp_path/"runs", tmp_path/"site", CHAIN))


# The chain: three stages in fresh kernels through Snakemake and papermill, and the pages

@pytest.fixture(scope="module")
def chain():
    shutil.rmtree(RUNS, ignore_errors=True); shutil.rmtree(SITE, ignore_errors=True)
    finish(report(RUNS, SITE, CHAIN))
    return read_records(RUNS)


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__(); self.ids, self.local, self.fetched = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.ids |= {a.get("id"), a.get("name")} - {None}
        for to in [a[k] for k in ("href", "src") if a.get(k)]:
            if not re.match(r"[a-z]+:|//", to): self.local.append(to)
            elif tag != "a" and not to.startswith("data:"): self.fetched.append(to)


def test_chain_leaves_records_sets_and_executed_notebooks(chain):
    assert list(chain) == ["15_phantom", "31_vae", "90_report"]
    assert chain["31_vae"]["parameters"]["dataset"] == "reports/runs/chain/15_phantom/set" and chain["31_vae"]["machine"]["threads"] == 1
    assert chain["31_vae"]["sets"][0]["sha256"] == chain["15_phantom"]["sets"][0]["sha256"]
    made = json.loads((RUNS/"31_vae"/"31_vae.ipynb").read_text())
    assert any("injected-parameters" in c["metadata"].get("tags", []) for c in made["cells"])


def test_pages_say_the_data_link_every_record_and_need_no_network(chain):
    pages = {p.resolve(): Page(p) for p in SITE.rglob("*.html") if "_static" not in p.parts}
    index = (SITE/"index.html").read_text()
    assert "simulated radiographs" in index and "60 images" in index and "commit" in index
    for path, page in pages.items():
        assert page.fetched == [], path
        for to in page.local:
            file, _, place = unquote(to).partition("#"); file = file.split("?")[0]
            target = (path.parent/file).resolve() if file else path
            assert target.exists(), f"{path.name} links to {to}"
            if place and target in pages: assert place in pages[target].ids, f"{path.name} links to {to}"
    for s, r in chain.items():
        assert json.loads((SITE/"records"/s/"run.json").read_text()) == r
        assert all((SITE/"records"/s/f["file"]).exists() for f in [*r["tables"], *r["figures"]])


def test_nothing_runs_twice(chain):
    said = finish(report(RUNS, SITE, CHAIN))
    assert "Nothing to be done" in said and "report: " in said


def test_a_dry_run_leaves_nothing_and_names_no_report(tmp_path):
    said = finish(report(tmp_path/"runs", tmp_path/"site", CHAIN, "ARGS=-n"))
    assert "15_phantom" in said and "report: " not in said and not (tmp_path/"runs").exists()


def test_a_deleted_record_is_made_again_with_all_that_follows(chain, tmp_path):
    shutil.copytree(RUNS, tmp_path/"runs")
    (tmp_path/"runs"/"31_vae"/"run.json").unlink()
    said = finish(report(tmp_path/"runs", SITE, CHAIN, "ARGS=-n --rerun-triggers mtime"))
    assert {*re.findall(r"Job \d+: (.*)", said)} == {"31_vae", "90_report", "the pages"}


def test_a_failed_stage_is_named_and_leaves_the_earlier_ones(chain, tmp_path):
    shutil.copytree(RUNS, tmp_path/"runs")
    (tmp_path/"p.yaml").write_text((ROOT/CHAIN).read_text().replace("size: 32, channels", "size: 31, channels"))
    only = ["ARGS=--rerun-triggers mtime --forcerun stage_31_vae --until stage_31_vae"]
    with pytest.raises(RuntimeError, match=r"31_vae: ValueError: .*\(exit status 1; traceback in .*31_vae.ipynb\)"): finish(report(tmp_path/"runs", tmp_path/"site", tmp_path/"p.yaml", *only))
    assert (tmp_path/"runs"/"15_phantom"/"run.json").exists() and not (tmp_path/"runs"/"31_vae"/"run.json").exists()
    assert '"output_type": "error"' in (tmp_path/"runs"/"31_vae"/"31_vae.ipynb").read_text()


def test_killed_twice_and_resumed_it_finds_the_same(chain, tmp_path):
    shutil.copytree(RUNS, tmp_path/"calm", ignore=shutil.ignore_patterns("90_report"))
    kill_and_resume(tmp_path/"killed", tmp_path/"site", CHAIN, 2, 22, seed=3, more=["ARGS=31_vae/run.json"], check=lambda: assert_same(tmp_path/"calm", tmp_path/"killed"))
    assert list(read_records(tmp_path/"killed")) == ["15_phantom", "31_vae"]


@pytest.mark.slow
def test_smoke_report_killed_ten_times_finds_the_same():
    subprocess.run([sys.executable, ROOT/"tests"/"kill_report.py", "--kills", "10"], check=True)
