# `make quickstart` and `make test` need only Python 3.12 and a C++ compiler: they create .venv themselves.

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-distributed test-transformers-5 lint format clean

pytest = .venv/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder --max-worker-restart=0

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: .venv/installed  ## a whole small run, with or without a GPU: examples/quickstart.sh
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash examples/quickstart.sh

test: .venv/installed  ## run the tests: those of one process, those of four, and with Transformers 5
	$(pytest) tests/slurm tests/unit tests/gpu
	$(MAKE) test-distributed
	$(MAKE) test-transformers-5

test-fast: .venv/installed  ## run the tests of the everyday loop: one process, without those marked slow
	$(pytest) -m "not slow" tests/unit

test-distributed: .venv/installed  ## run the parallel layouts only
	.venv/bin/torchrun --standalone --nproc-per-node 4 --local-ranks-filter 0 -m pytest tests/distributed

test-transformers-5: .venv/transformers-5/installed  ## run the Hugging Face model's tests with Transformers 5
	PYTHONPATH=$(CURDIR)/.venv/transformers-5 .venv/bin/python -m pytest -n logical tests/unit/test_hf_*.py tests/unit/test_convert_to_hf.py \
		tests/unit/test_generate_command.py

.venv/transformers-5/installed: .venv/installed tests/transformers-5.txt
	rm -rf $(@D)
	.venv/bin/python -m pip install -q --no-deps --target $(@D) -r tests/transformers-5.txt
	touch $@

lint: .venv/installed  ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/installed  ## fix style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:  ## remove caches and build outputs; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# scripts/setup.sh makes this file last, so an interrupted installation is run again.
.venv/installed: pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh
