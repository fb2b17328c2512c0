# make test           the tests; needs only Python and pytest, which it fetches when missing
# make test-314       those of what does no I/O, on Python 3.14 in WebAssembly; needs Node.js
# make test-clients   the real Claude Code, SDKs and agents' libraries against scripted upstreams
# make test-servers   real upstream servers with small models, prebuilt where they run
# make test-recipes   the recipes of .docs/operation.md with nginx, HAProxy, systemd, those installed
# make soak           load for two minutes: what is kept that should have been let go (Linux)
# make fuzz           mutated input for a minute, for every reader
# make lint           ruff and mypy
# make bench          speed and memory, side by side with nginx and the upstream itself
# make drift          what the newest SDKs and Claude Code know and ogx.py doesn't; needs Node.js
# make starter        write starter.json from the built-in configuration
# make docs           draw the picture in .docs from ogx.py
# make release        the version and the sum of ogx.py, for those who download it
# make clean          remove what these installed
#
# ARGS go on to the program: make fuzz ARGS="--seconds 600"; make test ARGS="-x -k aliases";
# make test ARGS=test_ogx.py::TestConfig for one class, and with ::test_a_name for one test

PYTHON ?= python3
TOOLS = .dev

.PHONY: help test test-clients test-servers test-recipes soak fuzz lint bench starter docs release drift clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# What to test, unless ARGS name a file themselves
files = $(if $(findstring .py,$(ARGS)),,$(1))

test:
	@.ci/pytest $(PYTHON) $(call files,test_ogx.py) $(ARGS)

test-clients:
	@.ci/clients-install $(PYTHON)
	@.clients/venv/bin/python -m pytest -m clients $(call files,.ci/clients) $(ARGS)

test-servers:
	@.ci/clients-install $(PYTHON)
	@.ci/servers-install $(PYTHON)
	@.clients/venv/bin/python -m pytest -m servers $(call files,.ci/test_servers.py) $(ARGS)

test-recipes:
	@.ci/pytest $(PYTHON) -rs $(call files,.ci/test_recipes.py) $(ARGS)

lint: $(TOOLS)/lint/done
	$(TOOLS)/lint/bin/ruff check ogx.py test_ogx.py .ci .docs
	$(TOOLS)/lint/bin/mypy ogx.py

$(TOOLS)/lint/done:
	$(PYTHON) -m venv $(TOOLS)/lint
	$(TOOLS)/lint/bin/python -m pip install -q ruff mypy
	@touch $@

# Pyodide 314.x is CPython 3.14, 315.x is 3.15.
PYODIDE = $(TOOLS)/pyodide-314.0.7

.PHONY: test-314
test-314: $(PYODIDE)/done
	@ulimit -s 65000 && node --stack-size=60000 .ci/py314.mjs $(abspath $(PYODIDE)) $(ARGS)

$(PYODIDE)/done:
	npm install --prefix $(@D) --silent $(subst pyodide-,pyodide@,$(notdir $(@D)))
	$(PYTHON) -m pip install -q --target $(@D)/site-packages --python-version 3.14 \
		--only-binary=:all: pytest
	@touch $@

soak:
	$(PYTHON) .ci/soak.py $(ARGS)

fuzz:
	$(PYTHON) .ci/fuzz.py $(ARGS)

bench:
	$(PYTHON) .ci/bench.py $(ARGS)
	@$(PYTHON) .ci/prompt_tokens.py --if-installed

starter:
	$(PYTHON) .ci/starter.py > starter.json

docs:
	$(PYTHON) .docs/pictures.py

release:
	@$(PYTHON) ogx.py --version
	@$(PYTHON) -c "import hashlib; print(hashlib.sha256(open('ogx.py', 'rb').read()).hexdigest(), '', 'ogx.py')"

drift:
	$(PYTHON) -m pip install -q --upgrade --target $(TOOLS)/drift/site anthropic openai
	npm install --prefix $(TOOLS)/drift/npm --silent @anthropic-ai/claude-code@latest
	$(PYTHON) .ci/drift.py $(TOOLS)/drift/site $(TOOLS)/drift/npm/node_modules/.bin/claude $(ARGS)

clean:
	rm -rf $(TOOLS) .clients .servers .pytest_cache .ruff_cache __pycache__ \
		.ci/__pycache__ .ci/clients/__pycache__ .docs/__pycache__
