# make demo            set up, then train on the embedded data set: half a minute on two cores after the installation
# make test            every test but the nightly ones
# make test-fast       the tests that take no seconds of their own
# make test-nightly    the tests that take minutes
# make test-oldest     make test with the lowest versions of .github/lowest-versions.txt, in .venv-oldest
# make test-newest     make test with the newest versions that the package index has, in .venv-newest
# make test-stand-in   the tests marked gpu in a GPU simulator, if $(STAND_IN) and gcc exist
# make lint            formatting, lint, types, layers
# make docs            write docs/cli.md from the commands' flags
# TESTS="FILE ..." limits test, test-fast, test-nightly, test-oldest and test-newest to these files.

PYTHON ?= python3
VENV ?= .venv
IN := $(VENV)/bin/python
STAND_IN ?= ../shared/gpu_stand_in
PYTEST := $(IN) -m pytest -n auto --dist worksteal

.PHONY: demo test test-fast test-nightly test-oldest test-newest test-stand-in test-stand-in-kernels test-stand-in-steps lint docs

demo: $(VENV)/installed
	$(IN) -m cifar_fast.train --dataset synthetic --widths 16 32 32 32 64 128 128 128 --epochs 6 --batch-size 128 --output runs/demo --overwrite

test: $(VENV)/installed
	$(PYTEST) -m "not nightly" $(TESTS)

test-fast: $(VENV)/installed
	$(PYTEST) -m "not slow and not nightly" $(TESTS)

test-nightly: $(VENV)/installed
	$(PYTEST) -m nightly $(TESTS)

test-oldest:
	PIP_CONSTRAINT=$(CURDIR)/.github/lowest-versions.txt $(MAKE) test VENV=.venv-oldest

# A later call installs what has been released since.
test-newest:
	$(MAKE) .venv-newest/installed VENV=.venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev,export]'
	$(MAKE) test VENV=.venv-newest

# The first command builds the simulator. Two jobs then run at a time, each with its own compiler cache and log. The
# ignored files test times and profiles, which the simulator does not have.
test-stand-in: $(VENV)/installed
	@if [ ! -d $(STAND_IN) ]; then echo "skipped: $(STAND_IN) does not exist"; \
	elif ! command -v gcc > /dev/null; then echo "skipped: gcc is not installed"; \
	else $(IN) $(STAND_IN)/run.py --log $(CURDIR)/$(VENV)/stand-in.log -m pytest --version > /dev/null 2>&1 && \
		$(IN) -m pytest -m nightly tests/benchmarks/test_launches.py && \
		$(MAKE) --jobs 2 --output-sync=target test-stand-in-kernels test-stand-in-steps; fi

KERNEL_TESTS := tests/kernels tests/diagnostics/test_check.py tests/diagnostics/test_compare.py
OTHER_TESTS := tests $(KERNEL_TESTS:%=--ignore %) --ignore tests/diagnostics/test_profile.py --ignore tests/benchmarks/test_cases.py
test-stand-in-kernels test-stand-in-steps: test-stand-in-%:
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/stand-in-$*-cache \
	$(IN) $(STAND_IN)/run.py --values --devices 2 --log $(CURDIR)/$(VENV)/stand-in-$*.log \
		-m pytest -m "gpu and not slow and not nightly" $(if $(filter kernels,$*),$(KERNEL_TESTS),$(OTHER_TESTS))

lint: $(VENV)/installed
	$(IN) -m ruff format --check
	$(IN) -m ruff check
	$(IN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

docs: $(VENV)/installed
	$(IN) docs/generate_cli.py

# pyproject.toml configures the tools that the extra dev of setup.py installs.
$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(IN) -m pip install --quiet --editable '.[dev]'
	touch $@
