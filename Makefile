# Two commands for users: `make demo` and `make test`. The set-up they share is done once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-browser interop agents-interop bench-model bench-train bench-decode experiments check format clean

demo: $(STAMP)
	$(BIN)/step35 demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The live page and the chat page in a real browser; `make test` leaves these out where there is none.
test-browser: $(STAMP)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { echo "no Chromium; install it: apt install chromium"; exit 1; }
	$(BIN)/python -m pytest tests/cli/test_watch_browser.py tests/serve/test_page_browser.py

# Our numbers against transformers, vLLM and llama.cpp; the first time installs them under .interop/ (12 minutes).
interop: $(STAMP)
	PYTHON=$(PYTHON) tests/interop/install.sh
	$(BIN)/python tests/interop/run.py

# A coding agent against our server, with a scripted model; the first time installs the agent under .interop/ (1 minute).
agents-interop: $(STAMP)
	@test -x .interop/agent/bin/mini || { $(PYTHON) -m venv --clear .interop/agent \
		&& .interop/agent/bin/python -m pip install --quiet --disable-pip-version-check mini-swe-agent==2.4.6; }
	$(BIN)/python tests/interop/agent.py

# Training and inference speed of the model beside transformers; wants an idle machine.
bench-model: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[oracle]"
	$(BIN)/python benchmarks/model.py

# Whole training steps beside transformers with torch's Muon and AdamW; wants an idle machine.
bench-train: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[oracle]"
	$(BIN)/python benchmarks/train.py

# Decoding beside transformers, llama.cpp and vLLM, which `make interop` installs; wants an idle machine (15 minutes).
bench-decode: $(STAMP)
	PYTHON=$(PYTHON) tests/interop/install.sh
	$(BIN)/python benchmarks/decode.py

# Claims of the report at small scale, with figures; about half an hour on one core.
experiments: $(STAMP)
	$(BIN)/python experiments/polar_precision.py
	$(BIN)/python experiments/blow_up.py
	$(BIN)/python experiments/collapse.py
	$(BIN)/python experiments/collapse.py --high-rate --steps 1200 --seeds 4
	$(BIN)/python experiments/balance.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist src/*.egg-info

# The stamp is written last, so an interrupted set-up is taken up again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "step35 needs Python 3.11 or newer; choose one with make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "Python has no working venv module; install it: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(STAMP)
