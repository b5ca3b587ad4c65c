# Every target sets itself up: virtual environment, build, model.
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: run test test-fast lint clean

run: $(VENV)/.installed
	$(BIN)/tael run "In which year did China replace the tael?" --file examples/tael.txt --temperature 0 --max-tokens 64

test: lint $(VENV)/.node
	$(BIN)/pytest

test-fast: $(VENV)/.tested
	$(BIN)/pytest tests/unit tests/kernels

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build tests/server/node/node_modules

$(VENV)/.installed: $(SOURCES)
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

# The official client for Node, which drives the server in tests; they are skipped without Node.
$(VENV)/.node: $(VENV)/.installed tests/server/node/package-lock.json
	if command -v npm > /dev/null; then npm ci --silent --prefix tests/server/node; fi
	touch $@
