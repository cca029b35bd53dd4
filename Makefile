# `make demo` prunes the embedded model, `make test` checks everything; both set up what they need in .venv.
# `make gpu` runs what wants a GPU in less than ten minutes, with what PYTHON has installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# processes that run the tests, as many as there are cores and four at most; 0 runs them in this one, as --pdb needs
WORKERS ?= logical
# Idle OpenMP threads spin for long otherwise, which on a busy machine more than halves the speed of two. A little is best
# for one run; the tests start many processes at once, and these wait for each other least if no thread spins.
demo: export GOMP_SPINCOUNT ?= 5000
test: export GOMP_SPINCOUNT ?= 0

.PHONY: demo test gpu docs wheel clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/elsa fit --config configs/elsa.yaml $(ARGS)

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal $(ARGS)

gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(ARGS)

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist
