"""Which stages there are, what each takes from earlier ones, with what parameters it runs, and when it must run again. The Snakefile executes this plan."""
import ast, difflib, functools, hashlib, json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cxr_nb.core import check_parameters, read_parameters, repo_root

# What a stage takes from earlier ones: {stage: {parameter: path in the folder of runs}}. The parameters `dataset` (the set of radiographs), `phantom` (the simulated one) and `real` (that of a release) need no row here.
GENERATORS = {"vae": "31_vae", "gmvae": "32_gmvae", "lsgan": "33_lsgan", "pggan": "34_pggan", "dit": "37_dit", "sd": "38_stable_diffusion"}
TAKES = {
    "22_features": {"classifier": "20_classifier"},
    "27_sanity": {"oracles": "24_oracles"},
    "35_latents": {"classifier": "20_classifier", "oracles": "24_oracles"},
    "37_dit": {"latents": "35_latents", "texts": "28_text", "oracles": "24_oracles"},
    "38_stable_diffusion": {"latents": "35_latents", "oracles": "24_oracles"},
    "39_families": GENERATORS,
    "42_inpaint": {"glori": "40_glori", "oracles": "24_oracles"},
    "50_augment": {"synthetic": "31_vae/set"},
    "60_leaderboard": GENERATORS | {"oracles": "24_oracles"},
    "61_equal_time": {"latents": "35_latents", "texts": "28_text", "oracles": "24_oracles"},
    "90_report": {"runs": ""},  # all others
}


@dataclass
class Stage:
    parameters: dict[str, Any]  # what papermill is given
    needs: list[str]            # the stages before it
    key: str                    # hash of parameters, code and the keys of the stages before it; the code's layout, comments and prose do not count
    threads: int                # of PyTorch: fixed by the preset, because sums depend on it, and never by the number of cores
    resources: dict[str, Any] = field(default_factory=dict)  # for the scheduler


def nearest(name, names): return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]


def plan(
    preset: str,                # "smoke", the name of a file in reports/presets, or the path of a YAML file
    runs: str,                  # folder of runs, as the notebooks are given it
    source: str | None = None,  # real radiographs: a source, e.g. "nih", ...
    root: str | None = None,    # ... and the folder of its release
    repo: Path | None = None,   # the checkout
) -> dict[str, Stage]:          # in reading order
    "The stages to run. Raises `ValueError`, before anything runs, for a preset that does not fit the notebooks, an unknown source, or a root that is no folder."
    repo = repo or repo_root()
    notebooks = {p.stem: p for p in sorted((repo/"nbs").glob("[0-9][0-9]_*.ipynb")) if p.stem < "95"}  # from 95 on: benchmarks, run by hand
    if bool(source) != bool(root): raise ValueError("SOURCE (e.g. nih) and ROOT (the folder of its release) go together")
    if source: check_source(source, root)
    given = {"12_images": {"source": source, "root": root}} if source else {}
    if gone := sorted({*TAKES, *given} - {*notebooks}): raise ValueError(f"the workflow names {', '.join(gone)}, but nbs/ has no such notebook")

    settings, where = read_preset(preset, repo)
    resources, chosen, seeds = settings.pop("resources", {}), settings.pop("stages", list(notebooks)), settings.pop("seeds", [])
    if not isinstance(seeds, list) or not all(isinstance(k, int) and k > 0 for k in seeds) or len(set(seeds)) < len(seeds): raise ValueError(f"{where}: `seeds` is {seeds!r}; give a list of different whole numbers from 1 on, e.g. [1, 2]")
    for s in [*settings, *resources, *chosen]:
        if s not in notebooks: raise ValueError(f"{where}: no stage `{s}`; the nearest is `{nearest(s, notebooks)}`. Stages: {', '.join(notebooks)}")

    have = {s: read_parameters(p) for s, p in notebooks.items()}
    data = "12_images/set" if source else "15_phantom/set"
    sets = {"dataset": data, "phantom": "15_phantom/set"} | ({"real": data} if source else {})
    takes = {s: {k: path for k, path in sets.items() if k in have[s]} | TAKES.get(s, {}) for s in notebooks}
    before = {s: {path.split("/")[0] for path in takes[s].values()} - {""} for s in notebooks}
    def with_needs(s): return {s}.union(*map(with_needs, before[s]))
    stages: dict[str, Stage] = {}
    wanted = sorted(set().union({"90_report"}, *map(with_needs, chosen)))
    again = {s: {f"seed{k}/{s}": k for k in seeds} for s in GENERATORS.values()} if "60_leaderboard" in wanted else {}  # trained once more, with another seed
    for s in wanted:
        needs = list(stages) if s == "90_report" else sorted(before[s])
        wired = {"out": f"{runs}/{s}"} | {k: f"{runs}/{path}".rstrip("/") for k, path in takes[s].items()} | given.get(s, {})
        if s == "60_leaderboard" and seeds: needs += [n for many in again.values() for n in many]; wired["repeats"] = [f"{runs}/seed{k}" for k in seeds]
        mine = settings.get(s) or {}
        if twice := sorted({*mine} & {*wired}): raise ValueError(f"{where}: `{twice[0]}` of {s} is set by the workflow; leave it out of the preset")
        check_parameters(notebooks[s], mine | wired, where)
        rest = dict(resources.get(s) or {}); threads = rest.pop("threads", 1)
        for name, own in {s: mine | wired, **{n: mine | wired | {"seed": k, "out": f"{runs}/{n}"} for n, k in again.get(s, {}).items()}}.items():
            key = [own, threads, code_of_notebook(notebooks[s], repo), [stages[n].key for n in needs]]
            stages[name] = Stage(own, needs, hashlib.sha256(json.dumps(key).encode()).hexdigest(), threads, rest)
    def size_of(s): return stages[s].parameters.get("size", have[s].get("size", 0))
    for s, source in [(stage, sets[k].split("/")[0]) for stage in wanted for k in sorted(set(sets) & set(takes[stage]))]:
        if size_of(s) > size_of(source): raise ValueError(f"{where}: {s} asks for {size_of(s)} px, but {source} makes a set of {size_of(source)} px: give that size={size_of(s)}, or {s} a smaller one")
    if early := [(s, n) for s in wanted for n in stages[s].needs if Path(n).name >= s]: raise ValueError(f"{early[0][0]} cannot take anything from {early[0][1]}, which comes after it")
    return stages


def check_source(source: str, root: str) -> None:
    "Raises `ValueError` for a source that no reader knows or a root that is no folder."
    from cxr_nb.data.sources import SOURCES  # here, because it takes seconds
    if source not in SOURCES: raise ValueError(f"no source `{source}`; the nearest is `{nearest(source, SOURCES)}`. Sources: {', '.join(SOURCES)}")
    if not Path(root).is_dir(): raise ValueError(f"ROOT={root}: there is no such folder; give the root of the {source} release")


def read_preset(preset: str, repo: Path) -> tuple[dict[str, Any], str]:  # settings, and how errors name the file
    "The settings of a preset; smoke has none: it is the notebooks' own defaults. Raises `ValueError` where there is no such preset."
    names = {p.stem: p for p in sorted((repo/"reports"/"presets").glob("*.yaml"))}
    path = names.get(preset, repo/preset)
    if preset == "smoke": return {}, "smoke"
    if not path.is_file(): raise ValueError(f"no preset `{preset}`: the nearest is `{nearest(preset, ['smoke', *names])}`; the path of a YAML file will do as well")
    try: return yaml.safe_load(path.read_text()) or {}, path.name
    except yaml.YAMLError as e: raise ValueError(f"{path} is no YAML: {' '.join(str(e).split())}") from None


def code_of_notebook(notebook: Path, repo: Path) -> dict[str, str]:
    "The code of a notebook, and that of the modules of this package that it imports, directly or not."
    cells = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    code = {notebook.stem: "\n".join(map(code_of, cells))}
    new = {m for c in cells for m in imports(c)}
    while new:
        m = new.pop(); path = repo/f"{m.replace('.', '/')}.py"
        if m in code or not path.is_file(): continue
        code[m] = code_of(path.read_text()); new |= imports(path.read_text())
    return dict(sorted(code.items()))


@functools.cache
def code_of(text: str) -> str:
    "Code without comments and layout; a cell with an IPython magic as it stands."
    try: return ast.dump(ast.parse(text))
    except SyntaxError: return text


@functools.cache
def imports(text: str) -> set[str]:
    "Modules of this package that a piece of code imports."
    try: tree = ast.parse(text)
    except SyntaxError: return set()
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.module: names |= {n.module, *(f"{n.module}.{a.name}" for a in n.names)}
    return {n for n in names if n.split(".")[0] == "cxr_nb"}
