# make install [TORCH=torch==2.9.1]   a .venv with everything, built
# make demo [MODEL=dir]               a real model at 4, 3 and 2 bits, a table and a chart
.PHONY: install demo test lint bench clean

TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc -type f) setup.py

install: .venv/installed

.venv/installed: requirements.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -r requirements.txt pytest ruff
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: install
	$(BIN)/python util/demo.py $(if $(MODEL),-i "$(MODEL)")

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/python bench/encode_tiles.py

clean:
	rm -rf .venv build demo exl3/_C*.so *.egg-info
