# make demo   the whole ladder on a real model: environment, calibration, training, export, report
# make test   every check: ruff, pyright, import-linter, pytest
# make env    the environment for `make test`; does nothing when it is up to date
PYTHON ?= python3
BIN := .venv/bin

# The tests start a hundred processes; without bytecode each would compile torch's sources again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env demo test
env: .venv/.dev

demo: .venv/.demo
	$(BIN)/recoup run recipes/demo.yaml

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 -q

# A stamp is newer than what it was installed from, or the environment is brought up to date.
.venv/.demo .venv/.dev: .venv/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[$*]'
	touch $@
