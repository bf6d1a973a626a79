# Everything here works on a fresh machine with Python 3.11+ and make. `make demo` and `make test` set themselves up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: several spinning thread pools on the same cores ruin each other.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test check format bench profile faults clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python -m tools.demo

test: install
	$(BIN)/python -m pytest -q

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make bench JSON=FILE writes the rows {row, figure, target, met} to FILE as well.
bench: install
	$(BIN)/python -m tools.bench $(if $(JSON),--json $(JSON))

# make profile [JSON=FILE] [PICTURE=FILE.svg]: where the time of one decoded token and of one training step goes.
profile: install
	$(BIN)/python -m tools.profile $(if $(JSON),--json $(JSON)) $(if $(PICTURE),--picture $(PICTURE))

# make faults [JSON=FILE]: every fault of SECURITY.md's table, as real experiments. Some need root.
faults: install
	$(BIN)/python -m tools.faults $(if $(JSON),--json $(JSON))

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out .pytest_cache .mypy_cache .ruff_cache
