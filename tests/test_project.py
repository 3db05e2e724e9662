"""What no single notebook shows: the export is up to date, imports point downward, the presets fit, and what is written about the project is true."""
import ast, json, re, shutil, subprocess, sys, tomllib
from pathlib import Path
from statistics import median

import pytest
import yaml

from cxr_nb.core import read_parameters, repo_root

sys.path.insert(0, str(repo_root()/"reports"))
from stages import plan

ROOT = repo_root()
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
MODULES = [p for p in sorted((ROOT/"cxr_nb").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
by_name = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
by_module = pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)


def cells(notebook, kind="code"): return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]
def source(cell): return "".join(cell["source"])


def exported(notebook):
    "The module that a notebook exports to, or None."
    names = [m[1] for c in cells(notebook) for m in re.finditer(r"^#\| *default_exp (\S+)", source(c), re.M)]
    return names[0] if names else None


def test_export_gives_the_modules_that_are_there(tmp_path):
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".*"))
    for f in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT/f, tmp_path)
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=tmp_path, check=True)
    def tree(root): return {str(p.relative_to(root)): p.read_text() for p in sorted((root/"cxr_nb").rglob("*.py")) if p.name not in ("_modidx.py", "__init__.py")}
    made, have = tree(tmp_path), tree(ROOT)
    assert sorted(made) == sorted(have), "a module without a notebook, or a notebook that was not exported: run nbdev_export"
    assert [n for n in made if made[n] != have[n]] == [], "these differ from their notebooks: run nbdev_export"


def test_notebooks_import_only_from_lower_numbers():
    number = {f"cxr_nb.{exported(p)}": p.stem[:2] for p in NOTEBOOKS if exported(p)}
    assert len(number) == len([p for p in NOTEBOOKS if exported(p)]), "two notebooks export to one module"
    for p in NOTEBOOKS:
        for c in cells(p):
            for n in ast.walk(ast.parse(source(c))):
                names = [n.module] if isinstance(n, ast.ImportFrom) and n.module else [a.name for a in n.names] if isinstance(n, ast.Import) else []
                for m in names:
                    if m.startswith("cxr_nb."): assert number[m] < p.stem[:2] or m == f"cxr_nb.{exported(p)}", f"{p.stem} imports {m} of notebook {number[m]}"


@by_name
def test_notebook_is_stored_clean_and_opens_with_its_question(notebook):
    for c in cells(notebook):
        assert c["outputs"] == [] and c["execution_count"] is None
        assert {*c["metadata"]} <= {"tags"}
    first = source(cells(notebook, "markdown")[0]).splitlines()
    assert first[0].startswith("# ") and [l for l in first[1:] if l][0].startswith("> ")


@by_name
def test_displayed_equations_stand_between_blank_lines(notebook):  # else the page shows them garbled
    for c in cells(notebook, "markdown"):
        lines, inside = ["", *source(c).splitlines(), ""], False
        for before, l, after in zip(lines, lines[1:], lines[2:]):
            if "$$" not in l: continue
            opens = not inside; inside ^= l.count("$$") % 2 == 1
            assert l.strip().startswith("$$") or not opens, f"an equation begins within a line: {l}"
            assert not opens or before.strip() == "", f"no blank line before {l}"
            assert inside or after.strip() == "", f"no blank line after {l}"
        assert not inside, "an equation without its end"


@by_name
def test_notebook_has_one_parameters_cell_with_seed_and_out(notebook):
    have = read_parameters(notebook)
    assert have["seed"] == 0 and have["out"] == ""
    cell = next(c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", []))
    assert all(" # " in l for l in source(cell).splitlines() if re.match(r"\w+ *=", l)), "each parameter has its comment, which is papermill's help"


@by_name
def test_cells_are_short(notebook):
    code = [len([l for l in source(c).splitlines() if l.strip()]) for c in cells(notebook)]
    assert max(code) <= 45 and median(code) < 14
    assert len(code)/len(cells(notebook, "markdown")) < 3


@by_module
def test_public_names_have_docstrings(module):
    tree = ast.parse(module.read_text())
    bare = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert bare == []


@pytest.mark.parametrize("preset", ["smoke", *(p.stem for p in sorted((ROOT/"reports"/"presets").glob("*.yaml")))])
def test_preset_fits_the_notebooks(preset, tmp_path):
    assert len([s for s in plan(preset, "runs") if "/" not in s]) == len([p for p in NOTEBOOKS if p.stem < "95"])
    assert plan(preset, "runs", "nih", str(tmp_path))["16_audit"].parameters["dataset"] == "runs/12_images/set"


def test_every_showcase_file_that_the_readme_names_is_there():
    text = (ROOT/"README.md").read_text(); named = set(re.findall(r"`([a-z_]+\.(?:csv|svg|png))`", text)) - {"rejects.csv", "split.csv"}
    assert len(named) > 10 and {n for n in named if not (ROOT/"reports"/"showcase"/n).is_file()} == set()


def requirements(lines): return {re.split(r"[ ><=!~]", l)[0].lower(): re.sub(r"^[\w.-]+ *", "", l) for l in lines}


def test_environment_yml_has_the_requirements_of_pyproject():
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    env = yaml.safe_load((ROOT/"environment.yml").read_text())["dependencies"]
    conda = requirements(d for d in env if isinstance(d, str)) | requirements(env[-1]["pip"])
    names = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
    have = {names.get(n, n): bound for n, bound in conda.items()}
    assert have.pop("python") == project["requires-python"] and have.pop("pip") == ""
    assert have == requirements(project["dependencies"] + project["optional-dependencies"]["dev"])


def tracked():
    "The text files of the project, by path."
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {p: (ROOT/p).read_text() for p in listed if (ROOT/p).suffix not in (".png", ".svg", ".jpg", ".gif") and (ROOT/p).is_file()}


def test_no_path_of_a_machine_is_written_down():
    path = re.compile("|".join(["/" + "work/", "(?<!:)/" + "root/", "/" + "home/[a-z]", "/" + "tmp/", "/" + "opt/", r"C:\\Users"]))
    assert {p: path.findall(t) for p, t in tracked().items() if path.search(t)} == {}


def test_readme_names_only_targets_notebooks_and_files_that_exist():
    readme, makefile = (ROOT/"README.md").read_text(), (ROOT/"Makefile").read_text()
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.M)}
    assert {*re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.M)} <= targets
    assert {*re.findall(r"\b([A-Z]+)=", readme)} <= {*re.findall(r"^([A-Z]+) *[?:]?=", makefile, re.M)}
    for n in re.findall(r"\b(\d\d_[a-z_]+)\b", readme): assert (ROOT/"nbs"/f"{n}.ipynb").exists(), n
    for f in re.findall(r"\b((?:reports|nbs|cxr_nb|tests)/[\w/.-]*\w\.\w+)", readme):
        if not f.startswith(("reports/site/", "reports/runs/")): assert (ROOT/f).exists(), f
    assert all(p.stem in readme for p in NOTEBOOKS)
