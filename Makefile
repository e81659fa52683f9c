PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test gpu zoo lowest check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    make a virtual environment, install, train a small video model on real files and show what it learned"
	@echo "make test    make a virtual environment, install and run the tests"
	@echo "make gpu     run the conformance suite and the speed benchmark on the GPU, let it choose backends, and store the results"
	@echo "make zoo     check every plain ViT of timm and every family in every placement, and store the result"
	@echo "make lowest  run the tests under the lowest supported versions, and store the result"
	@echo "make check   lint, format and types"
	@echo "make format  apply the formatter"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python examples/claver_k400.py

test: install
	$(BIN)/python -m pytest -n 2 --ignore tests/kernels/test_conformance_triton.py
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels/test_conformance_triton.py

gpu: install
	$(BIN)/python benchmarks/gpu.py

zoo: install
	$(BIN)/python tests/patch/zoo.py

lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --disable-pip-version-check -e . -r tests/lowest.txt
	$(VENV)-lowest/bin/python benchmarks/lowest.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
