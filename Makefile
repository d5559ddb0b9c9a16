# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
OUT ?= quickstart
MINUTES ?= 8

.PHONY: quickstart test check setup clean

quickstart: $(VENV)/.ready  ## the report in miniature, from text to a model that talks
	$(RUN)/qwen2 quickstart --out $(OUT) --minutes $(MINUTES)

test: $(VENV)/.ready-dev  ## all tests
	$(RUN)/pytest

check: $(VENV)/.ready-dev  ## lint, types, import contracts
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

setup: $(VENV)/.ready-dev

# constraints.txt pins every package, so that a fresh machine gets what was tested.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[serve,corpus]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[serve,corpus,ray,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
