# Two commands: `make run` (an installation, ready to answer) and `make test` (the suite).
# `make help` lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCK   := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header \
          --no-annotate --quiet --override deploy/lock-overrides.txt --excludes deploy/lock-excludes.txt \
          --no-emit-package torch --no-emit-package av

.DEFAULT_GOAL := help
.PHONY: help run install install-dev test campaign check check-deploy format lock bench bench-peers clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: install ## Install, start Postgres, migrate, make tenant `demo`, serve on 127.0.0.1:8080
	@exec $(BIN)/python -m service serve --demo

install: $(VENV)/.runtime
install-dev: $(VENV)/.dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Pericarp needs Python 3.11 to 3.13; name one with: make PYTHON=/path/to/python3.11 run" >&2; exit 1; }
	@echo "Creating $(VENV)" && $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "This Python cannot make a virtual environment: it came without venv (Debian: python3-venv)." >&2; exit 1; }

# Everything but torch is pinned by hash; torch comes last, so that its own needs are there already.
$(VENV)/.runtime: requirements.lock | $(BIN)/python
	@echo "Installing locked dependencies (a few minutes the first time)"
	@$(PIP) install --require-hashes --no-deps -r requirements.lock
	@$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	@echo "Installing what the tests need"
	@$(PIP) install --require-hashes --no-deps -r requirements-dev.lock
	@touch $@

test: install-dev ## The suite, against a real Postgres and real worker processes
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not campaign" $(PYTEST_ARGS)

campaign: install-dev ## Kills and rollbacks that take minutes
	@$(BIN)/python -m pytest -m campaign $(PYTEST_ARGS)

check: install-dev ## Format, lint, types, import contract, file sizes
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python tests/file_sizes.py

check-deploy: ## Rules, their cases and the sample of Alertmanager, by promtool and amtool (Debian: prometheus, prometheus-alertmanager)
	@promtool check rules deploy/prometheus/pericarp.rules.yml
	@promtool test rules deploy/prometheus/pericarp.rules.test.yml
	@amtool check-config deploy/alertmanager/alertmanager.yml

format: install-dev ## Format and mend what can be mended
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lock: ## Resolve pyproject.toml into the two lock files again
	@$(PIP) install uv==0.13.8
	@$(BIN)/$(LOCK) -o requirements.lock
	@$(BIN)/$(LOCK) --extra dev -o requirements-dev.lock

bench: install-dev ## The README's figures; needs a quiet machine and some minutes. LITELLM=VENV puts its proxy beside ours
	@$(BIN)/python bench/scoring.py
	@$(BIN)/python bench/request.py
	@$(BIN)/python bench/thresholds.py
	@$(BIN)/python bench/audit.py
	@$(BIN)/python bench/search.py
	@$(BIN)/python bench/operations.py
	@$(BIN)/python bench/admission.py $(if $(LITELLM),--litellm $(LITELLM))

bench-peers: install-dev ## Beside its peers: VLLM=VENV SENTENCE_TRANSFORMERS=VENV, environments of their own
	@$(BIN)/python bench/peers.py $(if $(VLLM),--vllm $(VLLM)) \
	  $(if $(SENTENCE_TRANSFORMERS),--sentence-transformers $(SENTENCE_TRANSFORMERS))

clean: ## Remove the virtual environment and caches, never var/
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
