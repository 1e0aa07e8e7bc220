# make demo: install, compress and evaluate the bundled checkpoint.   make test: install and run every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo_ratio-0.5_gs-4-global-fisher-sequential

.PHONY: demo test install clean

demo: $(VENV)/.installed
	$(BIN)/python compress.py --param_ratio_target 0.5 --overwrite
	$(BIN)/python run_ppl_eval.py --model_name_or_path $(DEMO) --baseline assets/demo/model --datasets demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) results $(DEMO)
