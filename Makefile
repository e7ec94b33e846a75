# Each target sets up what it needs. `make` alone lists them.
#
# The environment is $(VENV). It is built anew when the lock or a choice below changes, and when an
# installation was interrupted, so that it always matches the lock. The package is installed into
# it, not linked, as users have it, and again whenever its files change.

.DEFAULT_GOAL := help
VENV ?= .venv
LOCK := requirements/lock.txt
LOG := $(VENV)/setup.log
# Both are written last: an interrupted step is done again.
ENVIRONMENT := $(VENV)/environment
PACKAGE := $(VENV)/package

# The choices, each remembered once made.
BUILT := $(shell cat $(ENVIRONMENT) 2>/dev/null)
PYTHON ?= $(or $(word 1,$(BUILT)),python3.11)
TORCH ?= $(or $(word 2,$(BUILT)),any)
PYTHON312 ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12)),python3.12)
ARGS ?=

ifeq ($(filter any cuda,$(TORCH)),)
$(error TORCH=$(TORCH): give cuda, or any (the first build that pip finds))
endif
ifneq ($(BUILT),$(PYTHON) $(TORCH))
$(ENVIRONMENT): FORCE
endif

# By name as well as by age: a file that is gone changes the package too.
SOURCES := $(sort $(shell find evomoe_plugin hydra_configs -name '*.py' -o -name '*.yaml' 2>/dev/null))
ifneq ($(shell cat $(PACKAGE) 2>/dev/null),$(SOURCES))
$(PACKAGE): FORCE
endif

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --progress-bar off
# Some packages are built from source, with the lock's setuptools, not the newest.
SETUPTOOLS = sed -n '/^setuptools==/,/[^\]$$/p' $(LOCK)
# ve-fairseq requires torchaudio for speech alone. Its wheel is of CUDA and cannot be loaded beside
# a CPU build of torch, which keeps transformers from importing its models: the lock leaves it out.
CHECKED := ^No broken|^ve-fairseq [^ ]+ requires torchaudio, which is not installed\.$$
TORCH_VERSION = $(shell sed -n 's/^torch==//p' requirements/torch.txt)

# The tests of a file share trained models, hence loadfile; each process needs about 3 GB.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -gt 4 ] && echo 4 || echo $$n)
# What they write, half a gigabyte, is removed at the end. It lies in memory where there is room: a
# disk that is slow to flush and to remove can double their time.
MEMORY := $(shell ! grep -q '^[^ ]* /dev/shm .*noexec' /proc/mounts 2>/dev/null && \
	[ "$$(df -kP /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}')" -gt 4000000 ] 2>/dev/null && echo /dev/shm)
PYTEST = written=$$(mktemp -d $(if $(MEMORY),-p $(MEMORY))) && trap 'rm -rf "$$written"' EXIT INT TERM && \
	PYTEST_DEBUG_TEMPROOT="$$written" $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

# After a command: write its output to the log; if it fails, print the end of the log.
LOGGED = >>$(LOG) 2>&1 || { tail -n 25 $(LOG); echo 'error: that failed; the whole log is $(LOG)'; \
	exit 1; } >&2

define CHECK_PYTHON
import platform, sys
found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
if not ((3, 11) <= sys.version_info < (3, 13) and found.endswith("Linux x86_64")):
    sys.exit(f"error: PYTHON=$(PYTHON) is {found}; the lock is for 3.11 and 3.12 on Linux x86_64. "
             "Name one of these: make venv PYTHON=python3.12. Elsewhere, pip install '.[fairseq,tests,plots]' "
             "into an environment of your own.")
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit(f"error: PYTHON=$(PYTHON) cannot make environments ({error}); Debian and Ubuntu have "
             f"this in the package python{sys.version_info[0]}.{sys.version_info[1]}-venv.")
endef
export CHECK_PYTHON

define CHECK_TORCH
import platform, torch
cuda = torch.version.cuda
if "$(TORCH)" == "cuda" and not cuda:
    raise SystemExit("error: TORCH=cuda, yet pip found no CUDA build of torch for this machine.")
print(f"Ready: $(VENV), Python {platform.python_version()}, torch {torch.__version__} "
      f"({'CUDA ' + cuda if cuda else 'CPU'} build)")
endef
export CHECK_TORCH

help:  ## list these targets
	@echo 'make TARGET [VARIABLE=value]'
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-17s%s\n", $$1, $$2}'
	@echo
	@echo '  TORCH=cuda    the CUDA build of torch, for machines with a GPU; otherwise the first build'
	@echo '                that pip finds: a CPU wheel it was pointed to (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL),'
	@echo '                or else the package index'"'"'s own, which on Linux is the CUDA build (about 3 GB)'
	@echo '  PYTHON=...    the Python of a new environment (default: python3.11; 3.12 works too)'
	@echo '  PYTHON312=... the Python 3.12 of test-python312 (default: that of pyenv, or python3.12)'
	@echo '  ARGS=...      more arguments for quickstart, unit, test, test-slow, bench, study or torture:'
	@echo '                make test ARGS="-k gate"'

quickstart: venv  ## prepare a text, train a small MoE from dense to sparse on it, evaluate it
	@$(VENV)/bin/python examples/quickstart/run.py $(ARGS)

check: venv docs  ## check style, formatting, types and the documentation
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m ruff format --check .
	@$(VENV)/bin/python -m mypy
	@$(VENV)/bin/python -m pytest -q tests/test_docs.py tests/test_site.py -k 'links or site'

docs: venv  ## build the documentation as a site, build/site/index.html; no warning is let through
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

unit: venv  ## run the unit tests, in at most 4 minutes on 2 cores
	@$(PYTEST) -m unit $(ARGS)

test: venv  ## run all tests except the slow ones
	@$(PYTEST) -m 'not slow' $(ARGS)

test-slow: venv  ## run the slow tests, and (without ARGS) some of the others with Python 3.12
	@$(PYTEST) -m slow $(ARGS)
	$(if $(ARGS),,@$(MAKE) --no-print-directory test-python312)

test-python312:  ## run the unit tests and train with Python 3.12, in an environment of its own
	@$(PYTHON312) --version >/dev/null 2>&1 || { \
	echo 'error: no Python 3.12 here; name one: make $@ PYTHON312=/path/to/python3.12' >&2; exit 1; }
	@$(MAKE) --no-print-directory unit VENV=.venv-3.12 PYTHON=$(PYTHON312) ARGS=
	@$(MAKE) --no-print-directory test VENV=.venv-3.12 PYTHON=$(PYTHON312) ARGS=tests/trainer

bench: venv  ## measure speed and memory
	@$(VENV)/bin/python benchmarks/run.py $(ARGS)

study: venv  ## train and compare the routing systems (ARGS=--list: what is left)
	@$(VENV)/bin/python -W ignore benchmarks/study/run.py $(ARGS)

torture: venv  ## break runs and files in every way, for hours (ARGS=--help: a part, a case again, …)
	@$(VENV)/bin/python -W ignore -m tests.torture.run $(ARGS)

venv: $(PACKAGE)  ## build the environment only

$(ENVIRONMENT): requirements/torch.txt $(LOCK)
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/made-by-make ]; then \
	echo 'error: $(VENV) exists and was not made by make; move it, or give VENV=folder.' >&2; \
	exit 1; fi
	@command -v $(PYTHON) >/dev/null || { \
	echo 'error: PYTHON=$(PYTHON) is not a command here; name a Python 3.11 or 3.12: PYTHON=python3' >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/made-by-make
	@echo 'Creating $(VENV) with $(PYTHON)'; $(PYTHON) -m venv $(VENV_FLAGS) $(VENV) $(LOGGED)
	@echo 'Installing the packages of $(LOCK)'; { $(SETUPTOOLS) >$(VENV)/setuptools.txt && \
	$(INSTALL) --no-deps --require-hashes -r $(VENV)/setuptools.txt && \
	$(INSTALL) --no-deps --require-hashes --no-build-isolation -r $(LOCK); } $(LOGGED)
	@echo 'Installing torch $(TORCH_VERSION) ($(TORCH) build)'; $(INSTALL) -r requirements/torch.txt \
	$(if $(filter cuda,$(TORCH)),'torch!=$(TORCH_VERSION)+cpu') $(LOGGED)
	@echo 'Checking that they fit'; { $(PIP) check || [ $$? = 1 ]; } >$(VENV)/check.txt && \
	! grep -vE '$(CHECKED)' $(VENV)/check.txt $(LOGGED)
	@$(VENV)/bin/python -c "$$CHECK_TORCH"
	@echo '$(PYTHON) $(TORCH)' >$@

$(PACKAGE): $(ENVIRONMENT) setup.py pyproject.toml $(SOURCES)
	@rm -rf build evomoe_plugin.egg-info
	@echo 'Installing evomoe_plugin'; \
	$(INSTALL) --no-deps --no-build-isolation --force-reinstall . $(LOGGED)
	@rm -rf build evomoe_plugin.egg-info
	@echo '$(SOURCES)' >$@

# With hashes of every file of each release, so that one lock serves all Pythons and libcs; without
# torch, whose build differs by machine, but with what torch's CPU build needs. setup.py, not
# pyproject.toml: pip-compile reads extras of the latter without their markers. torch first: the
# resolver downloads what the first requirement of a name gives.
lock:  ## resolve the locked packages anew (UPGRADE=1: newest releases); needs torch's CPU wheel
	@set -e; new=$$(mktemp -d); trap 'rm -rf $$new' EXIT; \
	echo 'Resolving $(LOCK); hashes not yet known are computed from each file, which takes minutes'; \
	$(PYTHON) -m venv $$new/venv; $$new/venv/bin/python -m pip install -q pip-tools==7.6.2; \
	sed '/^torch==/s/$$/+cpu/' requirements/torch.txt >$$new/torch.txt; \
	cp $(LOCK) $$new/lock.txt; \
	CUSTOM_COMPILE_COMMAND='make lock' $$new/venv/bin/pip-compile -q --generate-hashes \
	$(if $(UPGRADE),--upgrade) --strip-extras --unsafe-package torch --unsafe-package torchaudio \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	$(addprefix --extra ,benchmarks docs fairseq lint plots tensorboard tests) \
	-o $$new/lock.txt $$new/torch.txt setup.py; \
	sed "/^# WARNING: /,\$$d; s|$$new|requirements|" $$new/lock.txt >$(LOCK); rm -rf evomoe_plugin.egg-info

clean:  ## remove the environment and caches, never a run
	rm -rf $(patsubst %/made-by-make,%,$(wildcard $(VENV)/made-by-make .venv-3.12/made-by-make)) build dist evomoe_plugin.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find evomoe_plugin tests -name __pycache__ -prune -exec rm -rf {} +

FORCE:
.PHONY: help quickstart check docs unit test test-slow test-python312 bench study torture venv lock clean FORCE
