# Every target does its own set-up: a virtual environment in .venv, versions pinned in constraints.txt, the C++ module built in place.
PYTHON ?= python3
# One more package index to take torch from, such as PyTorch's own.
TORCH_INDEX ?=
# More arguments for pytest and for the benchmarks.
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Of the slow tests: 0, 1 or 2, a third of them; all; auto, the third that HEAD's hash modulo 3 names.
SHARE ?= auto
# Slow tests one of whose files changed since this commit run in every share; by default the newest that is 12 hours older than HEAD.
BASE ?=
# How long `make fuzz` looks for faults.
FUZZ_SECONDS ?= 20

# The folder kernels/ must never be imported by its bare name, which belongs to a package that transformers imports.
export PYTHONSAFEPATH := 1

RUN := .venv/bin/python -m
# Tests in several processes, of one thread each.
# Tests of one file share what they load.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
INSTALL := $(RUN) pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test test-share test-all test-cpus test-oldest peers sanitize fuzz bench rivals lint clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/ready ## answer prompts about photographs beside transformers; then a small model learns to read, and to answer
	@$(RUN) idefics2_fast.benchmarks.demo

test: lint ## lint, then the fast tests; those for CUDA too where there is a device
	@$(RUN) pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

test-all: lint peers ## lint, then every test, the slow ones and other people's too, another kind of CPU, the oldest transformers, the checks of the C++ code
	@$(RUN) pytest $(PARALLEL) $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-cpus test-oldest sanitize fuzz

# What torch computes on a CPU in numbers that its units can change.
NUMERIC := cpu_units ops linear_cross_entropy dora_linear row_norm embedding perceiver_context model generate adapters patch neftune
NUMERIC_TESTS := $(filter-out %_triton.py,$(wildcard $(foreach name,$(NUMERIC),tests/test_$(name)*.py) tests/training/test_trainer*.py tests/training/test_optim.py))

test-cpus: .venv/ready ## the numeric tests as on another kind of CPU: half-precision units capped where there are any, emulated elsewhere
	@CPU_UNITS=other $(RUN) pytest -m "not slow" $(PARALLEL) $(NUMERIC_TESTS)

# Files with the longest tests begin, so that no process is left alone with one of them. Steps write when they are done.
test-share: lint peers ## a third of what test-all has beside test, by turns, and what has changed files (SHARE=0, 1, 2, auto or all, BASE=a commit)
	@$(RUN) pytest -m slow --share '$(SHARE)' --base '$(BASE)' $(PARALLEL) --no-loadscope-reorder $(PYTEST_ARGS)
	@steps=$$(.venv/bin/python tests/support/shares.py --share '$(SHARE)' --base '$(BASE)' test-cpus test-oldest sanitize fuzz) && \
		{ [ -z "$$steps" ] || $(MAKE) --no-print-directory --jobs 2 --output-sync=target $$steps; }

CHECKS := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
CHECKED := -std=c++17 -O2 -g -fno-omit-frame-pointer -ffp-contract=off -pthread -w $(CHECKS)
SANITIZED := build/sanitized/idefics2_fast

sanitize: $(SANITIZED)/_C.so ## the image tests with csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer
	@ln -sf $(CURDIR)/idefics2_fast/*.py $(SANITIZED) && ln -sfn $(CURDIR)/kernels $(CURDIR)/training $(CURDIR)/benchmarks $(SANITIZED)
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitized $(RUN) pytest -q -m "not slow" -k "not ($(TOO_SLOW))" $(SANITIZED_TESTS)

# Under the sanitizers these alone take minutes, or bring a sanitizer of their own.
TOO_SLOW := random_sizes or on_every_path or test_the_pool
SANITIZED_TESTS := $(wildcard tests/test_geometry.py tests/test_images.py tests/test_resample.py tests/test_threads.py tests/test_image_processor.py tests/test_traps.py)

$(SANITIZED)/_C.so: $(patsubst csrc/%.cpp,build/sanitized/%.o,$(wildcard csrc/*.cpp))
	@mkdir -p $(@D)
	@$(CXX) -shared -pthread $(CHECKS) $^ -o $@

build/sanitized/%.o: csrc/%.cpp $(wildcard csrc/*.hpp) .venv/ready
	@mkdir -p $(@D)
	@$(CXX) $(CHECKED) -fPIC $$($(RUN) pybind11 --includes) -c $< -o $@

fuzz: build/fuzz/images ## look for inputs that csrc/ does not stand
	@mkdir -p build/fuzz/corpus
	@$< -max_total_time=$(FUZZ_SECONDS) -max_len=600 -len_control=0 -verbosity=0 -print_funcs=0 -artifact_prefix=build/fuzz/ build/fuzz/corpus
	@echo "Fuzzed for $(FUZZ_SECONDS) seconds, nothing found."

PURE_SOURCES := $(filter-out csrc/module.cpp,$(wildcard csrc/*.cpp))

build/fuzz/images: tests/fuzz/images.cpp $(PURE_SOURCES) $(wildcard csrc/*.hpp)
	@mkdir -p $(@D)
	@clang++ $(CHECKED) -fsanitize=fuzzer -Icsrc $< $(PURE_SOURCES) -o $@ 2>$(@D)/clang.log || { \
		echo "No libFuzzer here (Debian: apt-get install clang libclang-rt-dev): fuzzing with random inputs, not steered by coverage."; \
		$(CXX) $(CHECKED) -DWITH_MAIN -Icsrc $< $(PURE_SOURCES) -o $@; }

# Other people's tests: source distributions of the versions that are installed, and what only those tests import.
PEERS := $(foreach name,transformers peft,build/peers/$(name)-$(shell sed -n 's/^$(name)==//p' constraints.txt))
PEERS_NEED := parameterized==0.9.0 diffusers==0.42.1
PIP := $(RUN) pip --disable-pip-version-check

peers: $(PEERS) build/peers/site ## fetch the suites of transformers and PEFT, which tests/peers runs under the patch

$(PEERS): .venv/ready
	@$(PIP) download --quiet --no-deps --no-build-isolation --no-binary :all: --dest $(@D) $(subst -,==,$(@F))
	@tar -xzf $@.tar.gz -C $(@D) && touch $@/tests/__init__.py $@

build/peers/site: .venv/ready
	@$(PIP) install --quiet --no-deps --upgrade --target $@ $(PEERS_NEED)
	@touch $@

# The oldest transformers and Triton that the package takes, over .venv's other packages.
OLDEST := transformers==5.20.2 triton==3.6.0
OLDEST_TESTS := $(wildcard $(foreach name,model weights generate processor image_processor patch* *_triton,tests/test_$(name).py)) tests/sm90

test-oldest: .venv/oldest ## the tests of the model, the processors, the patch and the kernels with the oldest transformers and Triton
	@.venv/oldest/bin/python -m pytest -q -m "not slow" $(PARALLEL) $(OLDEST_TESTS)

# site reads .pth files of its own folders alone: .venv's are read through addsitedir, the editable install's among them.
.venv/oldest: .venv/ready
	@rm -rf $@ && $(RUN) venv --without-pip $@
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$(.venv/bin/python -c "$$site")')" >"$$($@/bin/python -c "$$site")/beside.pth"
	@$(PIP) --python $@/bin/python install --quiet --no-deps $(OLDEST)
	@touch $@

bench: .venv/ready ## every benchmark beside transformers and others, kept in benchmarks/results, drawn in report.html (BENCH_ARGS=--quick)
	@$(RUN) idefics2_fast.benchmarks --report report.html $(BENCH_ARGS)

# What the images suite compares with: pillow-simd takes Pillow's place, so each has an environment of its own beside .venv's packages.
RIVALS := pillow-simd==12.1.1.post0 torchvision==0.28.0 opencv-python-headless==5.0.0.93
# pillow-simd is built here, for its resize alone.
WITHOUT := $(foreach part,zlib jpeg tiff freetype raqm lcms webp jpeg2000 imagequant xcb avif,-C $(part)=disable)

rivals: .venv/ready ## install other libraries that the images suite compares with, each in an environment of its own
	@for rival in $(RIVALS); do \
		place=.venv/rivals/$${rival%%=*}; \
		$(RUN) venv --without-pip $$place; \
		site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		.venv/bin/python -c "$$site" >"$$($$place/bin/python -c "$$site")/beside.pth"; \
		CC='cc -mavx2' $(RUN) pip --python $$place/bin/python --disable-pip-version-check install --quiet --no-deps $(WITHOUT) $$rival \
			|| { rm -rf $$place; echo "$$rival cannot be installed here: the benchmark does without."; }; \
	done

lint: .venv/ready ## ruff: rules and formatting
	@$(RUN) ruff check --quiet
	@$(RUN) ruff format --check --quiet

clean: ## remove all that make made
	rm -rf .venv build *.egg-info idefics2_fast/_C.*.so demo-model report.html .pytest_cache .ruff_cache .hypothesis .benchmarks

comma := ,
# $(call require,a shell command that must succeed,what to say otherwise)
require = $(if $(shell { $(1); } >/dev/null 2>&1 && echo met),,$(error $(2)))

define preflight
$(call require,command -v $(PYTHON),$(PYTHON) was not found: install Python 3.11 or newer$(comma) or name one: make PYTHON=python3.11)
$(call require,$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3$(comma) 11))',$(PYTHON) is too old: install Python 3.11 or newer$(comma) or name one: make PYTHON=python3.11)
$(call require,$(PYTHON) -c 'import ensurepip$(comma) venv',$(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt-get install python3-venv))
$(call require,command -v $(firstword $(CXX)),idefics2_fast needs a C++17 compiler: install g++ (or set CXX to another one))
$(call require,$(PYTHON) -c 'import os$(comma) sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")',idefics2_fast needs the C headers of $(PYTHON): install them (Debian: apt-get install python3-dev))
endef

TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
INSTALL_TORCH := $(INSTALL) $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)')

# torch comes first, and alone: what follows finds it in place and replaces nothing.
.venv/torch: constraints.txt
	$(preflight)
	@echo "Setting up .venv: once, a few minutes."
	@$(PYTHON) -m venv .venv
	@if nvidia-smi -L >/dev/null 2>&1; then \
		$(INSTALL_TORCH) 'torch==$(TORCH_VERSION),!=$(TORCH_VERSION)+cpu'; \
	elif ! $(INSTALL_TORCH) 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null; then \
		echo "pip's indexes have no build of torch for CPUs alone: taking the ordinary one, which is larger (TORCH_INDEX=URL adds an index)."; \
		$(INSTALL_TORCH) 'torch==$(TORCH_VERSION)'; \
	fi
	@touch $@

# torch for CUDA brings the Triton that it was built with. For a CPU there is none: kernels are compiled and executed without a card by this one.
TRITON := 3.9.0

.venv/ready: .venv/torch pyproject.toml setup.py $(wildcard csrc/*)
	$(preflight)
	@$(INSTALL) setuptools wheel pybind11 ninja
	@$(INSTALL) --no-build-isolation --editable '.[test]'
	@.venv/bin/python -c 'import triton' 2>/dev/null || $(PIP) install --quiet triton==$(TRITON)
	@touch $@
