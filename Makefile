# Every target makes the virtual environment it needs, and is quick when run again.
# `make` lists the targets and the variables.

VENV            ?= .venv
INDEX_URL       ?=
EXTRA_INDEX_URL ?=
ARGS            ?=
JOBS            ?= 2
TRITON_VERSIONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
TORCH_VERSIONS  ?= 2.11.0 newest
# Whatever may run a kernel: everything but the tests of other things.
TRITON_TESTS    ?= tests \
    $(foreach f,reference benchmarks trainer explain from_scratch ppo_vs_grpo four_ways,--ignore-glob='*/test_$(f)*')
# What a torch may break by what it traces, differentiates or rounds.
TORCH_TESTS     ?= tests/call/test_compile.py tests/call/test_autograd.py tests/objective/test_config.py \
    tests/objective/test_quantile.py tests/reference

# Whatever a GPU may change. Left out are tests that never hand a kernel a tensor of the GPU: of reference/; of what
# trains on the CPU, or has ranks of gloo there; of reports that compile or count without a GPU; of the benchmarks'
# own code; of docs and packaging; of hosts whose stand-ins are on the CPU; of the pretended GPU. And those that ask
# for equal bits of torch's own operations.
NOT_OF_A_GPU    ?= reference trainer trl_trainer trl_distillation examples group_size ppo_vs_grpo four_ways distributed \
    linear_distributed vocab_parallel empty_ranks compile_report traffic benchmarks smoke interpreter docs package \
    explain host pretend_gpu chunk_rows supports_times logits_error from_scratch \
    layout variation linear_memory cases same_code default_dtype
GPU_TESTS       ?= tests --ignore=tests/parity_verl $(foreach f,$(NOT_OF_A_GPU),--ignore-glob='*/test_$(f)*')
# Processes that share one GPU: one a core, of which each takes half a GB of its memory.
GPU_JOBS        ?= $(shell j=$$(nproc 2>/dev/null || echo 4); [ $$j -gt 16 ] && j=16; echo $$j)

# Whatever compares numbers that rounding reaches, and is quick.
NUMERICAL       := anchor autograd counts edges groups layouts linear logprobs loss metrics microbatch objectives packed \
    rounding row_starts sampling_metrics
NUMERICAL_TESTS ?= $(foreach f,$(NUMERICAL),tests/*/test_$(f).py)

# The first interpreter that is new enough; empty if there is none.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
endif

# VENV= (empty): use PYTHON as it is and install nothing.
PY        := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
installed  = $(if $(VENV),$(VENV)/.installed-$(1),check-python)
index     := $(strip $(if $(INDEX_URL),--index-url $(INDEX_URL)) $(if $(EXTRA_INDEX_URL),--extra-index-url $(EXTRA_INDEX_URL)))
pip       := -m pip install --disable-pip-version-check $(index)

# What a stamp $(VENV)/.installed-NAME stands for.
install_demo  := -e .[trainer]
install_test  := -e .[test]
install_bench := -e .[bench]
install_notebook := -e .[test,notebook]
install_lint  := ruff

# Threads that wait for each other must not spin where several processes share the cores.
on_cpu := CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_WAIT_POLICY=passive

# A stamp of a virtual environment whose interpreter has gone (a system upgrade) is worth nothing.
ifneq ($(VENV),)
ifneq ($(wildcard $(VENV)/.installed-*),)
ifneq ($(shell "$(PY)" -c 'print("ok")' 2>/dev/null),ok)
$(wildcard $(VENV)/.installed-*): force
endif
endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo test test-variants test-gpu test-pretend-gpu smoke-gpu test-triton test-torch test-verl \
    test-notebook bench \
    traffic compile-report layout lint clean check-python

help: ## list the targets and the variables
	@echo "Targets"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables"
	@echo "  ARGS=            passed on to the command, e.g. make demo ARGS=\"--seed 1\""
	@echo "  JOBS=            processes that test, test-triton, test-torch and test-verl run in (now: $(JOBS)); 0: no extra process"
	@echo "  GPU_JOBS=        processes that test-gpu runs in, on one GPU (now: $(GPU_JOBS))"
	@echo "  PYTHON=          the interpreter to start from, 3.10 or newer (now: $(or $(PYTHON),none found))"
	@echo "  VENV=            the virtual environment (now: $(or $(VENV),none, PYTHON as it is)); empty: use"
	@echo "                   PYTHON as it is and install nothing"
	@echo "  INDEX_URL=       a package index in PyPI's place (a mirror); empty: as pip is configured"
	@echo "  EXTRA_INDEX_URL= a package index beside it. On Linux PyPI's torch brings CUDA along"
	@echo "                   (some GB); without a GPU this one serves torch alone:"
	@echo "                   make demo EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
	@echo "  TRITON_VERSIONS= what test-triton goes through (now: $(TRITON_VERSIONS))"
	@echo "  TORCH_VERSIONS=  what test-torch goes through (now: $(TORCH_VERSIONS)); newest: the newest that the"
	@echo "                   index has. Each is installed with all that it asks for, CUDA too where PyPI serves it"

demo: $(call installed,demo) ## train a tiny model on two-digit addition with GRPO
	$(PY) -m grpo_kernels.trainer $(ARGS)

test: $(call installed,test) ## the whole suite on the CPU, kernels interpreted
	$(on_cpu) $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-variants: $(call installed,test) ## the tests of numbers on other data, at other addresses, with AVX2; kernels for AMD
	ATEN_CPU_CAPABILITY=avx2 $(on_cpu) $(PY) -m pytest -n $(JOBS) --dist worksteal $(NUMERICAL_TESTS) --seed-offset=1 --shift=1 $(ARGS)
	GRPO_TESTS_TARGETS=gfx942 $(on_cpu) $(PY) -m pytest tests/benchmarks/test_compile_report.py $(ARGS)

test-gpu: $(call installed,test) ## whatever a GPU may change, on a GPU, kernels compiled
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"make test-gpu: torch {torch.__version__} sees no CUDA device (driver? CPU build of torch? CUDA_VISIBLE_DEVICES?)")'
	unset TRITON_INTERPRET; OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(GPU_JOBS) --dist worksteal $(GPU_TESTS) $(ARGS)

test-pretend-gpu: $(call installed,test) ## the tests of test-gpu without a GPU: fail where they mix devices
	$(on_cpu) $(PY) -m pytest -n $(JOBS) --dist worksteal --pretend-gpu $(GPU_TESTS) \
	    --deselect tests/triton_backend/test_laws.py::test_no_kernel_recompiles_for_new_values $(ARGS)

smoke-gpu: $(call installed,test) ## every kernel on a GPU against float64, within a minute
	$(PY) -m benchmarks.smoke $(ARGS)

bench: $(call installed,bench) ## benchmarks against eager PyTorch and Liger-Kernel
	$(PY) -m benchmarks $(ARGS)

traffic: $(call installed,test) ## the bytes every objective moves, counted without a GPU
	OMP_WAIT_POLICY=passive $(PY) -m benchmarks.traffic_report $(ARGS)

compile-report: $(call installed,test) ## registers, spills and instructions of every kernel, without a GPU
	env -u TRITON_INTERPRET $(PY) -m benchmarks.compile_report $(ARGS)

test-triton: $(if $(VENV),$(TRITON_VERSIONS:%=.venv-triton-%/.installed),needs-venv) ## the Triton tests with every supported Triton
	@failed=; for v in $(TRITON_VERSIONS); do \
	    echo "==> Triton $$v"; \
	    $(on_cpu) .venv-triton-$$v/bin/python -m pytest -n $(JOBS) --dist worksteal $(TRITON_TESTS) $(ARGS) \
	        || failed="$$failed $$v"; \
	done; \
	if [ -n "$$failed" ]; then echo "make test-triton: failed with Triton$$failed" >&2; exit 1; fi; \
	echo "==> passed with Triton $(TRITON_VERSIONS)"

test-torch: $(if $(VENV),$(TORCH_VERSIONS:%=.venv-torch-%/.installed),needs-venv) ## the compile and autograd tests with the oldest and the newest torch
	@failed=; for v in $(TORCH_VERSIONS); do \
	    echo "==> torch $$v ($$(.venv-torch-$$v/bin/python -c 'import torch; print(torch.__version__)'))"; \
	    $(on_cpu) .venv-torch-$$v/bin/python -m pytest -n $(JOBS) --dist worksteal $(TORCH_TESTS) $(ARGS) \
	        || failed="$$failed $$v"; \
	done; \
	if [ -n "$$failed" ]; then echo "make test-torch: failed with torch$$failed" >&2; exit 1; fi; \
	echo "==> passed with torch $(TORCH_VERSIONS)"

test-verl: $(if $(VENV),.venv-verl/.installed,needs-venv) ## parity with verl's own losses, on the CPU
	$(on_cpu) .venv-verl/bin/python -m pytest -n $(JOBS) --dist worksteal tests/parity_verl $(ARGS)

test-notebook: $(call installed,notebook) ## the notebook of examples/, run from its first cell to its last
	$(on_cpu) $(PY) -m pytest tests/notebook/run_notebook.py $(ARGS)

layout: check-python ## the rules of the source tree: which package imports which, no import circles, no long file
	$(PY) tests/project/layout.py

lint: $(call installed,lint) ## ruff over the sources
	$(PY) -m ruff check $(or $(ARGS),.)

clean: ## remove the virtual environments, builds and caches, not what you produced
	rm -rf .venv .venv-triton-* .venv-torch-* .venv-verl build dist *.egg-info .pytest_cache .hypothesis .benchmarks .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# --- environments ---------------------------------------------------------------------------------

# The stamp is written last, so a failed or interrupted install is done again.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt | $(if $(VENV),make-venv)
	@rm -f $@
	@$(if $(findstring -e,$(install_$*)),$(hint_cpu_torch))
	@echo "==> installing $(install_$*) into $(VENV)"
	$(PY) $(pip) -c constraints.txt $(install_$*)
	@touch $@

# Before the first install of torch, on Linux, where no NVIDIA driver is found and no index was named.
hint_cpu_torch = if [ "$$(uname -s)" = Linux ] && [ -z "$(index)" ] && ! command -v nvidia-smi >/dev/null 2>&1 \
    && ! "$(PY)" -c 'import torch' >/dev/null 2>&1; then \
    echo "note: no NVIDIA GPU found. If pip starts to download CUDA (some GB), stop it and run instead:"; \
    echo "      make $(MAKECMDGOALS) EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"; fi

# An environment that runs is used as it is, with pip added where it lacks it; one whose interpreter
# has gone is made anew; a directory that is no environment is left alone.
.PHONY: make-venv needs-venv force
make-venv: check-python
	@if "$(PY)" -c '' >/dev/null 2>&1; then \
	    "$(PY)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	        echo "make: Python 3.10 or newer is needed, $(VENV) has $$("$(PY)" --version 2>&1)" >&2; exit 1; }; \
	    "$(PY)" -c 'import pip' >/dev/null 2>&1 || "$(PY)" -m ensurepip; exit $$?; \
	fi; \
	if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	    echo "make: $(VENV) exists and is no virtual environment; move it away or choose another with VENV=" >&2; exit 1; \
	fi; \
	if ! "$(PYTHON)" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	    v=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    echo "make: Python $$v ($(PYTHON)) lacks venv or ensurepip. Remedy on Debian and Ubuntu: sudo apt install python$$v-venv" >&2; exit 1; \
	fi; \
	echo "==> making $(VENV) with $$("$(PYTHON)" --version 2>&1)"; \
	rm -rf "$(VENV)"; \
	trap 'rm -rf "$(VENV)"; exit 130' INT TERM HUP; \
	"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; echo "make: $(PYTHON) could not make $(VENV), see above" >&2; exit 1; }

check-python:
	@if [ -z "$(PYTHON)" ]; then \
	    echo "make: Python 3.10 or newer is needed and none was found (python3 is $$(python3 --version 2>&1 || echo missing)). Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	elif ! "$(PYTHON)" -c '' >/dev/null 2>&1; then \
	    echo "make: PYTHON=$(PYTHON) does not run" >&2; exit 1; \
	elif ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	    echo "make: Python 3.10 or newer is needed, $(PYTHON) is $$("$(PYTHON)" --version 2>&1)" >&2; exit 1; \
	fi

force:

needs-venv:
	@echo "make $(MAKECMDGOALS): needs a virtual environment to layer its own on, VENV= is empty" >&2; exit 1

# One environment per Triton, holding that Triton alone; the rest is read from $(VENV). --no-deps,
# because torch asks for one exact Triton. Triton 3.6's interpreter does not run with NumPy 2.4.
triton_numpy_3.6.0 := numpy<2.4
.venv-triton-%/.installed: $(VENV)/.installed-test
	@rm -rf $(@D)
	@echo "==> installing Triton $* into $(@D)"
	@$(PY) -m venv --without-pip $(@D)
	@$(PY) -m pip --python $(@D)/bin/python install --disable-pip-version-check $(index) --no-deps triton==$* $(if $(triton_numpy_$*),'$(triton_numpy_$*)')
	@base=$$($(PY) -c 'import os, sysconfig; print(os.path.abspath(sysconfig.get_path("purelib")))'); \
	own=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$base')" > "$$own/base.pth"
	@touch $@

# One environment per torch, with what that torch asks for (its Triton too); the rest is read from $(VENV).
torch_numpy_2.11.0 := $(triton_numpy_3.6.0)
.venv-torch-%/.installed: $(VENV)/.installed-test
	@rm -rf $(@D)
	@echo "==> installing torch $* into $(@D)"
	@$(PY) -m venv --without-pip $(@D)
	@$(PY) -m pip --python $(@D)/bin/python install --disable-pip-version-check $(index) $(if $(filter newest,$*),--upgrade torch,torch==$*) $(if $(torch_numpy_$*),'$(torch_numpy_$*)')
	@base=$$($(PY) -c 'import os, sysconfig; print(os.path.abspath(sysconfig.get_path("purelib")))'); \
	own=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$base')" > "$$own/base.pth"
	@touch $@

# verl in the same way. --no-deps, because verl asks for an older transformers, for Ray and for much else
# that its losses never use; and apart from $(VENV), because its wheel holds a package named tests.
verl_packages := verl tensordict pyvers cloudpickle omegaconf codetiming orjson peft
.venv-verl/.installed: $(VENV)/.installed-test constraints.txt
	@rm -rf $(@D)
	@echo "==> installing verl into $(@D)"
	@$(PY) -m venv --without-pip $(@D)
	@$(PY) -m pip --python $(@D)/bin/python install --disable-pip-version-check $(index) --no-deps -c constraints.txt $(verl_packages)
	@base=$$($(PY) -c 'import os, sysconfig; print(os.path.abspath(sysconfig.get_path("purelib")))'); \
	own=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$base')" > "$$own/base.pth"
	@touch $@
