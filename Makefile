# `make full` runs everything, `make test` tests everything; both set themselves up. Bare Python with pip and venv
# is all that is assumed.
#   make full PROMPTS=my_prompts.txt   your own prompts      PROFILE=tiny  PROMOTE=auto|manual|never
#   make full PREFECT_PORT=4200 MLFLOW_PORT=5000             fixed ports; free ones are found otherwise
#   make test ARGS="-k gate"                                 pytest's own options; ARGS="-n 8" for more than two workers
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
BIN := .venv/bin
STAMP := .venv/.complete
UV := $(or $(shell command -v uv),.textcraftor/uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := help
.PHONY: help setup full ui lint test check format lock clean

help:
	@echo "make full    the whole pipeline on this machine, with Prefect and MLflow; exits with the verdict"
	@echo "make ui      look at earlier runs in Prefect and MLflow, until Ctrl-C"
	@echo "make test    all tests"
	@echo "make lint    formatting, lint, imports between packages, types"
	@echo "make check   lint and test: what CI runs"
	@echo "make setup   the environment alone    make lock   pin it anew    make clean   remove caches and one-off runs"

setup: $(STAMP)

# The stamp comes last, so an interrupted set-up is taken up again; without a change there is nothing to do.
$(STAMP): requirements.lock pyproject.toml
	@command -v "$(UV)" >/dev/null || { $(PYTHON) -m venv .textcraftor/uv && .textcraftor/uv/bin/pip install --quiet uv; }
	@test -x $(BIN)/python || "$(UV)" venv --quiet --python "$(PYTHON)" .venv
	"$(UV)" pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	"$(UV)" pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

full: setup
	@$(BIN)/python -m flows.local full

ui: setup
	@$(BIN)/python -m flows.local ui

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

# Two worker processes; a file's tests stay on one, so that a server that its tests share is started once.
test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:
	@command -v "$(UV)" >/dev/null || { $(PYTHON) -m venv .textcraftor/uv && .textcraftor/uv/bin/pip install --quiet uv; }
	"$(UV)" pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --python-version 3.11 \
	  --extra pipeline --extra dev --custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

# What is remade without loss. History (.textcraftor), the DVC cache and the environment stay.
clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
