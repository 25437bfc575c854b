# `make full` runs everything, `make test` tests everything; both set themselves up. Bare Python with pip and venv
# is all that is assumed.
#   make full PROMPTS=my_prompts.txt   your own prompts      PROFILE=tiny  PROMOTE=auto|review|manual|never
#   make full PREFECT_PORT=4300 MLFLOW_PORT=5100             fixed ports; otherwise 4200 and 5000 where they are free
#   make full SERVERS=mine                                   on the servers of PREFECT_API_URL and MLFLOW_TRACKING_URI
#   make test ARGS="-k gate"                                 pytest's own options; ARGS="-n 8" for more than two workers
# MLflow cannot set up its database from packages whose path holds a %: then .venv is a link to an environment elsewhere.
TEXTCRAFTOR_VENV ?= $(if $(and $(findstring %,$(CURDIR)),$(HOME)),$(HOME)/.cache/textcraftor/$(shell \
  pwd -P 2>/dev/null | cksum | tr ' ' -),.venv)
quote = '$(subst ','\'',$1)'
VENV := $(TEXTCRAFTOR_VENV)
PLACE := $(if $(filter /%,$(firstword $(VENV))),,$(CURDIR)/)$(VENV)
ENVIRONMENT := $(call quote,$(VENV))
BIN := $(call quote,$(VENV)/bin)
STAMP := .venv/.complete
# A program counts only if it runs: a shim of pyenv or asdf may be on PATH while what it stands for is not installed.
UV := $(or $(shell uv --version >/dev/null 2>&1 && echo uv),.textcraftor/uv/bin/uv)
SUPPORTED := import sys; sys.exit((sys.implementation.name, *sys.version_info[:2]) not in {('cpython', 3, 11), ('cpython', 3, 12)})
PYTHON ?= $(shell for each in $(BIN)/python python3.11 python3.12 python3 python "$$(uv python find '>=3.11,<3.13' 2>/dev/null)"; \
  do if "$$each" -c "$(SUPPORTED)" </dev/null >/dev/null 2>&1; then echo "$$each"; break; fi; done)
# Whether .venv runs and belongs to this folder: its scripts hold their path, so a project that was moved is set up again.
READY := $(shell $(BIN)/python -Ic "import os, importlib.util as u; found = u.find_spec('textcraftor'); \
  print(found is not None and os.path.samefile(found.origin, 'textcraftor/__init__.py') or '')" 2>/dev/null)
export UV_PYTHON_DOWNLOADS := never
# As pip does: a company's proxy is known to the machine's list of certificate authorities, not to the one that uv brings.
ifneq (,$(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem))
export UV_SYSTEM_CERTS ?= true
endif
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := help
.PHONY: always help setup full ui promote lint test check format lock clean

help:
	@echo "make full    the whole pipeline on this machine, with Prefect and MLflow; exits with the verdict"
	@echo "make ui      Prefect and MLflow with earlier runs, and a worker for new ones, until Ctrl-C"
	@echo "make promote VERSION=1   make a registered version the champion, after proving it again"
	@echo "make test    all tests"
	@echo "make lint    formatting, lint, imports between packages, types"
	@echo "make check   lint and test: what CI runs"
	@echo "make setup   the environment alone    make lock   pin it anew    make clean   remove caches and one-off runs"

# DVC wants Git to track the project unless it is told that nothing does: in a ZIP, a `git archive`, a copy in an image.
setup: $(STAMP)
	@git ls-files --error-unmatch dvc.yaml >/dev/null 2>&1 || grep -qs no_scm .dvc/config.local || \
	  $(BIN)/dvc config --quiet --local core.no_scm true

# The stamp comes last, so an interrupted set-up is taken up again; without a change there is nothing to do.
$(STAMP): requirements.lock pyproject.toml $(if $(READY),,always)
	$(if $(shell "$(PYTHON)" -c "$(SUPPORTED)" </dev/null 2>/dev/null && echo yes),,$(error $(UNSUPPORTED)))
	$(if $(findstring %,$(PLACE)),$(error $(PERCENT)))
	@# Only an environment is removed: a TEXTCRAFTOR_VENV that names another folder by mistake stays as it is.
	@test "$(READY)" || { rm -rf .venv; test ! -e $(ENVIRONMENT)/pyvenv.cfg || rm -rf $(ENVIRONMENT); }
	@command -v "$(UV)" >/dev/null || { "$(PYTHON)" -m venv .textcraftor/uv && .textcraftor/uv/bin/pip install --quiet uv; }
	@test -x $(BIN)/python || "$(UV)" venv --quiet --python "$(PYTHON)" $(ENVIRONMENT)
	@test -e .venv || ln -s $(ENVIRONMENT) .venv
	"$(UV)" pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	"$(UV)" pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

UNSUPPORTED = Python 3.11 or 3.12 is needed, and $(or $(PYTHON),none on PATH) is not one (python3 is \
  $(or $(shell python3 -V 2>&1 | grep Python),missing)). Install one, or name it: make PYTHON=/usr/local/bin/python3.12 $(MAKECMDGOALS)
PERCENT = The packages would lie in $(PLACE), and MLflow does not run below a folder with a % in its name. \
  Name another folder for them: export TEXTCRAFTOR_VENV=/path/to/environment

full: setup
	@$(BIN)/python -m flows.local full

ui: setup
	@$(BIN)/python -m flows.local ui

promote: setup
	@$(BIN)/python -m flows.local promote

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
	@command -v "$(UV)" >/dev/null || { "$(PYTHON)" -m venv .textcraftor/uv && .textcraftor/uv/bin/pip install --quiet uv; }
	"$(UV)" pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --python-version 3.11 \
	  --extra pipeline --extra dev --custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

# What is remade without loss. History (.textcraftor), the DVC cache and the environment stay.
clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
