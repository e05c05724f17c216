# make demo: environment, tiny model family, search, report, winner exported and reproduced.
# make test: environment, tests.  Both work from a fresh clone with Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Two threads of one process stall each other on a busy machine; one is as fast for models of this size.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test docs test-more test-slow test-mergekit test-ray build chaos fuzz gpu gpu-dry-run lint clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "evomerge needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/tiny/make.py runs/tiny
	test -e runs/quickstart/config.yaml || $(BIN)/evomerge search configs/quickstart.yaml
	test -e runs/quickstart/report.html || $(BIN)/evomerge resume runs/quickstart
	$(BIN)/evomerge status runs/quickstart --timing
	rm -rf runs/merged runs/again
	$(BIN)/evomerge export runs/quickstart --out runs/merged
	$(BIN)/evomerge reproduce runs/merged/recipe.yaml --out runs/again --check runs/merged
	@echo "report: runs/quickstart/report.html   model: runs/merged"

test: $(READY)
	$(BIN)/python -m pytest

# The site of the documentation, in build/site; opens from disk.
docs: $(READY)
	$(BIN)/python docs/build_site.py

# Whole searches of single features, disturbed searches in their short form, the notebook of the tutorial.
test-more: $(READY)
	$(BIN)/python -m pytest -m more

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# As many spoilt files of each kind, in structure and in bytes; the default suite tries some dozens.
EXAMPLES ?= 5000
fuzz: $(READY)
	EVOMERGE_FUZZ=$(EXAMPLES) $(BIN)/python -m pytest -n 2 --dist load tests/test_fuzz.py

# Real searches disturbed at random moments; `make test-more` has a short form.
ROUNDS ?= 5
chaos: $(READY)
	$(BIN)/python tests/chaos.py --rounds $(ROUNDS)

# sdist and wheel, in build/dist; the wheel is installed in an environment of its own and used there without a compiler.
WHEEL := .cache/wheel
build: $(READY)
	rm -rf build/dist build/lib $(WHEEL)
	$(BIN)/python -m build --outdir build/dist
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt build/dist/*.whl
	$(BIN)/python tests/installed.py $(WHEEL)/bin/python

# Ray is 240 MB, so it is not part of the default environment.
test-ray: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev,ray]"
	$(BIN)/python -m pytest -n 0 -m "slow or more or not slow" tests/test_ray.py tests/test_workers.py

# mergekit's pins clash with ours, so it gets an environment of its own; the same files then go through both programs.
MERGEKIT := .cache/mergekit
$(MERGEKIT)/ready: tests/mergekit-constraints.txt
	test -x $(MERGEKIT)/bin/python || $(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/pip install --quiet --disable-pip-version-check --no-compile -c tests/mergekit-constraints.txt mergekit
	touch $@

test-mergekit: $(READY) $(MERGEKIT)/ready
	EVOMERGE_MERGEKIT=$(MERGEKIT)/bin/python $(BIN)/python -m pytest -n 0 -m slow tests/test_mergekit.py

# What an accelerator is to show, in nine minutes; and the same steps with the least sizes on the CPU.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py --out runs/gpu

gpu-dry-run: $(READY)
	$(BIN)/python benchmarks/gpu.py --out runs/gpu-dry-run --device cpu --small

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

clean:
	rm -rf $(VENV) .cache build runs/tiny runs/quickstart runs/merged runs/again
