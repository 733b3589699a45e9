# make demo        set up, then train on the embedded data set: about half a minute on two cores after the installation
# make test        set up, then run the whole test suite
# make test-fast   the same without the tests marked slow
# make test-long   the same with those that take minutes
# make test-stand-in   run the tests marked gpu on a stand-in for a GPU, where $(STAND_IN) and gcc are there
# make lint        format, lint, types
# make docs        write docs/cli.md anew from the commands' own flags

PYTHON ?= python3
VENV ?= .venv
IN := $(VENV)/bin/python
STAND_IN ?= ../shared/gpu_stand_in

.PHONY: demo test test-fast test-long test-stand-in test-stand-in-kernels test-stand-in-steps lint docs

demo: $(VENV)/installed
	$(IN) -m cifar_fast.train --dataset synthetic --widths 16 32 32 32 64 128 128 128 --epochs 6 --batch-size 128 --output runs/demo --overwrite

test: $(VENV)/installed
	$(IN) -m pytest -n auto --dist worksteal

test-fast: $(VENV)/installed
	$(IN) -m pytest -n auto --dist worksteal -m "not slow and not long"

test-long: $(VENV)/installed
	$(IN) -m pytest -n auto --dist worksteal -m ""

# Not those about time: nothing there takes any, and there is no profiler. Two at a time, after a start that builds the
# stand-in, each with a compiler's cache and a log of its own.
test-stand-in: $(VENV)/installed
	@if [ ! -d $(STAND_IN) ]; then echo "skipped: $(STAND_IN) is not there"; \
	elif ! command -v gcc > /dev/null; then echo "skipped: no gcc here"; \
	else $(IN) $(STAND_IN)/run.py --log $(CURDIR)/$(VENV)/stand-in.log -m pytest --version > /dev/null 2>&1 && \
		$(IN) -m pytest -m long tests/test_bench_launches.py && \
		$(MAKE) --jobs 2 --output-sync=target test-stand-in-kernels test-stand-in-steps; fi

KERNEL_TESTS := $(wildcard tests/test_kernels_*.py) tests/test_check.py tests/test_compare.py
test-stand-in-kernels test-stand-in-steps: test-stand-in-%:
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/stand-in-$*-cache \
	$(IN) $(STAND_IN)/run.py --values --devices 2 --log $(CURDIR)/$(VENV)/stand-in-$*.log -m pytest -m "gpu and not slow and not long" \
		$(if $(filter kernels,$*),$(KERNEL_TESTS),tests $(KERNEL_TESTS:%=--ignore %) \
		--ignore tests/test_profile.py --ignore tests/test_bench_cases.py)

lint: $(VENV)/installed
	$(IN) -m ruff format --check
	$(IN) -m ruff check
	$(IN) -m mypy

docs: $(VENV)/installed
	$(IN) docs/generate_cli.py

# pyproject.toml too: the tools that are configured there are installed by setup.py's extra dev.
$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(IN) -m pip install --quiet --editable '.[dev]'
	touch $@
