# Two commands do everything: `make demo` and `make test`. Both install what they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Two processes, whole files each: many tests wait for processes of their own.
PARALLEL := -n 2 --dist loadfile

.PHONY: install demo test test-slow check prove models bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "isomoe needs Python 3.11 or later; PYTHON=python3.12 make ... names another")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve]'
	@touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@.ci/chromium || echo "The browser test of the parity report will be skipped."
	@touch $@

demo: .venv/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh

test: .venv/.dev
	$(BIN)/pytest $(PARALLEL)

test-slow: .venv/.dev
	$(BIN)/pytest $(PARALLEL) -m slow

check: test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

prove: .venv/.installed
	$(BIN)/isomoe prove --all-models --max-ranks 64

models: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -m models.record

bench: .venv/.installed
	$(BIN)/python benchmarks/cpu_decode.py

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
