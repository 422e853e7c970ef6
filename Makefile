# Each target makes .venv from nothing where it is not there; PYTHON chooses the interpreter.
PYTHON ?= python3
PYTEST = .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart quickstart-all test test-slow lint docs tpu-check

# ARGS are further flags: make quickstart ARGS=--systems=m2at,claf
quickstart: .venv/installed
	.venv/bin/python experiments/quickstart.py $(ARGS)

quickstart-all: .venv/installed
	.venv/bin/python experiments/quickstart.py --systems=all $(ARGS)

test: .venv/installed
	$(PYTEST)

test-slow: .venv/installed
	$(PYTEST) -m slow --results=tests/slow.json

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy jaxdefense

# The pages of README's docs in site/, with the report of all committed records; no network.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	.venv/bin/python experiments/tables.py --html site/report.html experiments/records
	@echo "open site/index.html; for the search: .venv/bin/python -m http.server --directory site"

# Compiles for a TPU without one: an hour or two on two cores; it goes on where it was stopped.
tpu-check: .venv/libtpu
	.venv/bin/python experiments/accelerators $(ARGS)

# In a folder of its own, where no other command finds it: JAX would look for a TPU at each start.
# The version is the one that requirements.txt's jax names in its extra "tpu".
.venv/libtpu: .venv/installed
	.venv/bin/python -m pip install --quiet --no-deps --target $@ 'libtpu==0.0.42.*'

.venv/installed: requirements.txt setup.cfg
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	.venv/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
