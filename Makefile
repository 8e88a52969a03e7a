# make demo: see a low-dimensional GPT learn, write, and be measured. make test: the checks that guard every change.
# Both make .venv with what they need; PYTHON=python3.12 chooses another Python (3.11 or later).

PYTHON ?= python3
python := .venv/bin/python

.PHONY: demo lint test test-slow

demo: .venv/installed
	$(python) -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.8,<4'
	$(python) -m experiments.demo

lint: .venv/installed-dev
	$(python) -m ruff check .
	.venv/bin/pyrefly check --python-interpreter-path=$(python) --summary=none --output-format=min-text

test: lint
	$(python) -m pytest -n auto --dist worksteal

test-slow: .venv/installed-dev
	$(python) -m pip install --quiet --disable-pip-version-check 'lm-eval>=0.4.13,<0.5' 'accelerate>=1,<2'
	$(python) -m pytest -m slow -n auto --dist worksteal

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"Python 3.11 or later is needed, $(PYTHON) is {sys.version.split()[0]}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(python) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(python) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
