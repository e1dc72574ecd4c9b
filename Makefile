# make demo   the main job on real shipped data; ends with the paths of the report and of the merged checkpoint
# make test   every test: the quick ones first, then the long ones
# make zoo    every strategy on every architecture of tests/zoo, in about ten minutes; writes docs/coverage.md
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-quick zoo lint clean

demo:
	@$(PYTHON) tools/install.py demo
	@$(BIN)/lightsft demo --out runs/demo

test: test-quick
	$(BIN)/python -m pytest -q -m slow

test-quick:
	@$(PYTHON) tools/install.py test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

zoo:
	@$(PYTHON) tools/install.py test
	$(BIN)/python -m tests.zoo.sweep --jobs 2 --out runs/zoo.jsonl --page docs/coverage.md

lint:
	@$(PYTHON) tools/install.py test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build dist .mypy_cache .ruff_cache .pytest_cache
