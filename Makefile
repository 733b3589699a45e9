# make demo   set up, then train on the embedded data set: about half a minute on two cores after the installation
# make test   set up, then run the whole test suite

PYTHON ?= python3
VENV ?= .venv
IN := $(VENV)/bin/python

.PHONY: demo test lint

demo: $(VENV)/installed
	$(IN) -m cifar_fast.train --dataset synthetic --widths 16 32 32 32 64 128 128 128 --epochs 6 --batch-size 128 --output runs/demo --overwrite

test: $(VENV)/installed
	$(IN) -m pytest

lint: $(VENV)/installed
	$(IN) -m ruff format --check
	$(IN) -m ruff check

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(IN) -m pip install --quiet --editable '.[dev]'
	touch $@
