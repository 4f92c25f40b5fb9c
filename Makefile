# make setup | demo | test | test-all | lint | bench | clean.   PYTHON=... chooses the interpreter (3.11 to 3.13, 3.11 preferred).

PY := .venv/bin/python
STAMP := .venv/.set-up
PACKAGES := calibration compile models runtime targets

.PHONY: help setup demo test test-all lint bench gpu-kit clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   make .venv with the pinned packages, and what the tests want of apt"
	@echo "make demo    the main job on the demo network: calibrate, quantize, compile, run, compare (build/demo)"
	@echo "make test    the test suite, without what takes minutes"
	@echo "make test-all   all of it, as CI runs it"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the goals of speed, size and compile time against the peers (BENCH_FLAGS=--all: qemu, too)"
	@echo "make gpu-kit the folder that borrowed_gpu.py in it checks and times on a machine with an NVIDIA GPU (build/gpu_kit)"
	@echo "make clean   remove what was built, .venv apart"

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt .ci/setup
	PYTHON="$(PYTHON)" .ci/setup .venv
	@touch $@

demo: $(STAMP)
	$(PY) -m xceptile.compile.demo --output build/demo

test: $(STAMP)
	$(PY) -m pytest -m "not slow" $(PYTEST_FLAGS)

test-all: $(STAMP)
	$(PY) -m pytest $(PYTEST_FLAGS)

# The root of the repository is the package xceptile, so mypy is shown it through a link of that name.
lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@mkdir -p build/typing && ln -sfn ../.. build/typing/xceptile
	cd build/typing && MYPYPATH=. ../../$(PY) -m mypy --config-file ../../pyproject.toml \
	    -m xceptile $(PACKAGES:%=-p xceptile.%)

bench: $(STAMP)
	PYTHONPATH=tests $(PY) tests/benchmarks/table.py $(BENCH_FLAGS)

gpu-kit: $(STAMP)
	PYTHONPATH=tests $(PY) tests/benchmarks/make_gpu_kit.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
