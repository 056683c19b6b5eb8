# ldmfast: `make demo` draws a picture, `make test` runs everything. Needs Python >= 3.10 with headers, and g++.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.setup
DEV    := $(VENV)/.dev
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup demo test sanitize bench lint wheel clean
help:
	@echo "make demo   set up $(VENV), build, and draw demo.png with the shipped model"
	@echo "make test   set up and run the whole test suite (what CI runs)"
	@echo "make sanitize  the op tests on a build with address and undefined-behaviour sanitizers"
	@echo "make setup  only set up and build"
	@echo "make bench  kernel micro-benchmarks against torch, with the share of the roofline"
	@echo "make lint   ruff and mypy"
	@echo "make wheel  a wheel for this Python in dist/"
	@echo "make clean  remove what was built (not $(VENV))"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "ldmfast needs Python >= 3.10; call make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "the venv module is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }

$(SETUP): $(BIN)/python requirements.txt $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

$(DEV): $(SETUP) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

setup: $(SETUP)

demo: $(SETUP)
	$(BIN)/ldmfast generate "a red circle above a blue square" --seed 0 --out demo.png

test: $(DEV)
	$(BIN)/python -m pytest tests

sanitize: $(DEV)
	LDMFAST_SANITIZE=1 LDMFAST_CUDA=0 $(BIN)/python setup.py -q build --build-lib build/sanitized
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONPATH=build/sanitized $(BIN)/pytest -s tests/test_ops.py

bench: $(DEV)
	$(BIN)/python bench/ops.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy ldmfast

wheel: $(SETUP)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	@ls -1 dist/*.whl

clean:
	rm -rf build dist *.egg-info ldmfast/*.so
