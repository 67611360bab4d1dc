.PHONY: help setup demo demo-llm test check protos clean

help:
	@echo "make demo    a model cut in three over three node processes, on this machine, on real input"
	@echo "make demo-llm  a language model, trained now, split over three node processes, writing"
	@echo "make test    the tests"
	@echo "make check   format, lint, types, import rules, generated stubs, wheel"
	@echo "make protos  regenerate the stubs from protos/"
	@echo "make setup   only make .venv (the others do it themselves)"
	@echo "make clean   remove what was built, but not .venv"

setup:
	@scripts/setup

demo:
	@scripts/demo

demo-llm:
	@scripts/demo --llm

test:
	@scripts/test

check:
	@scripts/check

protos:
	@scripts/protos

clean:
	rm -rf build dist .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find splitnet partitioner nodes tests scripts -name __pycache__ -prune -exec rm -rf {} +
