# The verbs of this project; CI calls the same ones. `make help` lists them.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first of these that is supported; where none is, the last, which is refused below.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do $$python -c '$(SUPPORTED)' 2>/dev/null && break; done; echo $$python)
VENV := .venv
BIN := $(VENV)/bin
SOURCE ?= sample
ARGS ?=
# As they were typed: make would take $H of a $HOME for a variable, and a shell the quotes in a name.
export SOURCE_AS_TYPED := $(value SOURCE)
API ?= http://127.0.0.1:4200/api
# Kept on disk, since a server that forgets who holds the GPU's slot never frees it.
LEASES := PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem
# A pip.conf may name the mirror, but not that packages go to the user's folder.
PIP_INSTALL := PIP_USER=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# The packages and the Python are those of $(VENV); the project is found from this folder.
unexport PYTHONHOME PYTHONPATH PYTHONSAFEPATH PYTHONOPTIMIZE
# The project's own servers on this machine are not asked through a proxy (Prefect's own commands do not know).
ifneq ($(strip $(HTTP_PROXY)$(http_proxy)$(HTTPS_PROXY)$(https_proxy)$(ALL_PROXY)$(all_proxy)),)
export NO_PROXY := $(or $(no_proxy),$(NO_PROXY)),localhost,127.0.0.1,::1
export no_proxy := $(NO_PROXY)
endif

.PHONY: help run test test-all check format bench faults ui deploy worker clean-runs

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / — /'

$(VENV)/.run: requirements.txt constraints.txt
	@echo "setting up $(VENV) (once; a few minutes)" >&2
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { echo "error: Python 3.11, 3.12 or 3.13 is needed; name one with make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

run: $(VENV)/.run ## run the pipeline on SOURCE (default: the embedded sample); ARGS="--training.epochs 3 …"
	@$(BIN)/python -m flows.pipeline --source "$$SOURCE_AS_TYPED" $(value ARGS)

test: $(VENV)/.dev ## run the quick tests, at most 5 minutes on 2 cores; ARGS="-k splitting" picks tests
	@$(BIN)/python -m pytest $(value ARGS)

test-all: $(VENV)/.dev ## run all tests but the long faults, and say what is skipped; ARGS="-m slow" leaves out the quick ones
	@$(BIN)/python -m pytest -m "not long" -rs $(value ARGS)

check: $(VENV)/.dev ## formatting, lint, types and known vulnerabilities of packages
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m infra.audit_packages

format: $(VENV)/.dev ## rewrite files in the house format
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

bench: $(VENV)/.run ## measure, one JSON object per line; ARGS="screen" picks benchmarks
	@$(BIN)/python -m tests.benchmarks $(value ARGS)

faults: $(VENV)/.dev ## break runs in every way and feed them garbage; ends with a table (within an hour); ARGS="-k disk" picks
	@$(BIN)/python -m pytest tests/faults -n 0 -m "" --all-faults $(value ARGS)

ui: $(VENV)/.run ## start a Prefect server and its web page on this machine, at http://127.0.0.1:4200
	@echo 'runs appear there after: export PREFECT_API_URL=$(API)' >&2
	@PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 $(LEASES) $(BIN)/prefect server start

deploy: $(VENV)/.run ## create pools, the limit of GPUs, automations and deployments on the server at API; safe to repeat
	@PREFECT_API_URL=$(API) $(BIN)/python -m infra.bootstrap

worker: $(VENV)/.run ## start a worker for POOL=cpu or POOL=gpu
	@PREFECT_API_URL=$(API) $(BIN)/prefect worker start --pool "$(POOL)" --type process

clean-runs: $(VENV)/.run ## remove all but the newest KEEP finished runs, and what the cache holds for them alone; ARGS="--dry-run"
	@test -n "$(KEEP)" || { echo "error: KEEP is missing: say how many finished runs stay, make clean-runs KEEP=8" >&2; exit 2; }
	@$(BIN)/python -m infra.clean_runs --keep "$(KEEP)" $(value ARGS)
