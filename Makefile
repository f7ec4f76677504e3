# make train and make test need nothing but Python 3.10 or newer with its venv module.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/first
BENCH_OUT ?= runs/bench
FUZZ_SECONDS ?= 120
# Processes that the tests run in, with one thread each: more would wait for each other on the same cores.
# Each takes a stretch of neighbouring tests, which share references and fixtures, and helps another when it is done.
TEST_PROCESSES ?= auto
# Each needs up to 6 GB, one of them up to 18: of the large networks, one runs at a time. Run nothing else beside it.
ZOO_PROCESSES ?= 2
# Chosen to end within four minutes on two CPU cores.
TRAIN_FLAGS ?= --filters 32 --targets 3 --batch 4 --epochs 5 --iterations 40 --meta-lr 0.003 \
	--validation-tasks 100 --test-tasks 200

.PHONY: help gpu train test test-all zoo trust fuzz browser docs docs-serve lint format types bench clean

help:
	@echo "make train     install into $(VENV), meta-train MAML++ on generated characters, show the accuracy (minutes)"
	@echo "make test      install the test tools into $(VENV), run the tests; make test-all runs the long ones too"
	@echo "make zoo       wrap every network of the zoo, compare with a plain loop, write docs/supported-models.md"
	@echo "make trust     random kills, 20,000 meta-steps, eight threads on one learner; make fuzz: the readers, FUZZ_SECONDS each"
	@echo "make browser   open the report and the service in a headless Chromium (CHROMIUM=... names it)"
	@echo "make docs      build the documentation into build/site; make docs-serve shows it while you write"
	@echo "make lint      ruff; make format lets it change files"
	@echo "make types     mypy --strict"
	@echo "make bench     compare one meta-step with a plain loop and other libraries, in time and memory (half an hour)"
	@echo "               BENCH_FLAGS='--cases A --repeats 3' for less; into BENCH_OUT, runs/bench"
	@echo "make gpu       with CUDA: parity, speed and a 20-way run in ten minutes, logs in runs/gpu; without: lay what"
	@echo "               a machine with a GPU lacks into .whl and .dev"
	@echo "make clean     remove $(VENV), caches and build files; runs/ stays"

# A second `make train` shows the result again, or continues what was interrupted: OUT=runs/other starts a new run.
train: $(VENV)/installed
	$(BIN)/metawrap train --data glyphs $(TRAIN_FLAGS) --out $(OUT) --resume

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_FLAGS)

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "" $(PYTEST_FLAGS)

zoo: $(VENV)/installed-zoo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" -n $(ZOO_PROCESSES) --dist worksteal tests/zoo \
		--write-table docs/supported-models.md $(PYTEST_FLAGS)

trust: $(VENV)/installed-test
	$(BIN)/python -m pytest -m trust $(PYTEST_FLAGS)

fuzz: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python tests/robustness/fuzz/run.py all --seconds $(FUZZ_SECONDS)

# Needs a Chromium: CHROMIUM=/path/to/it where it is not found.
browser: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,browser]"
	$(BIN)/python -m pytest -m browser tests/report tests/service $(PYTEST_FLAGS)

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/installed-test
	$(BIN)/mypy -p metawrap

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks compare --out $(BENCH_OUT) $(BENCH_FLAGS)

# A python3 that has torch with CUDA is used as it is, with the wheels in .whl; elsewhere a driver is the sign of a GPU.
gpu:
	@if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then \
		PYTHON=$(PYTHON) bash benchmarks/gpu/first.sh; \
	elif command -v nvidia-smi >/dev/null; then \
		$(MAKE) $(VENV)/installed-test && PYTHON=$(BIN)/python bash benchmarks/gpu/first.sh; \
	else \
		bash benchmarks/gpu/prepare.sh; \
	fi

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamp files: installing is repeated only when the package's metadata changed.
$(VENV)/installed: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-test: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $(VENV)/installed $@

$(VENV)/installed-zoo: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,zoo]"
	@touch $(VENV)/installed $(VENV)/installed-test $@

$(VENV)/installed-docs: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $(VENV)/installed $@

$(VENV)/installed-bench: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	@touch $(VENV)/installed $@
