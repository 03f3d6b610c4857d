# make install [TORCH=torch==2.9.1]   a .venv with everything, built
# make demo [MODEL=dir]               a real model at 4, 3 and 2 bits, a table and a chart
# make gpu-check [PYTHON=python3]     builds, tests and measures on a GPU; wants a CUDA torch
.PHONY: install demo test slow lint bench gpu-check clean

TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := .venv/bin
# On all cores: each takes whole files of tests, and runs them on one thread.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
SOURCES := $(shell find csrc -type f) setup.py

install: .venv/installed

.venv/installed: requirements.txt Makefile $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -r requirements.txt pytest pytest-xdist ruff
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: install
	$(BIN)/python util/demo.py $(if $(MODEL),-i "$(MODEL)")

test: install
	$(TESTS)

slow: install
	$(TESTS) -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/python bench/encode_tiles.py

gpu-check:
	$(PYTHON) bench/gpu_check.py

clean:
	rm -rf .venv build demo exl3/_C*.so *.egg-info
