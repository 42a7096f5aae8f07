# demo · test · torture · bench · lint · debug · clang: each creates the virtual environment that it needs, from a clean clone.
#   make test WITH="torch==2.13.0 gensim"     also installs these packages, so that the tests against them run
#   make bench NAME=gather                    see bench/README.md
PYTHON ?= python3
VENV ?= .venv
NAME ?= list
WITH ?=
PY = $(VENV)/bin/python
SOURCES = $(wildcard pyembed/*.pyx pyembed/_core_parts/*.pxi pyembed/_kernels/*) setup.py pyproject.toml

.PHONY: demo test torture bench lint debug clang build clean

demo: build
	$(PY) -m pip install -q matplotlib 'scipy>=1.15' 'adjustText>=1.3'
	$(PY) examples/demo.py

test: build
	$(PY) -m pytest

# Run every sweep of the crash suite in full, and write the counts into docs/durability.md: 15 minutes on two processors.
torture: build
	$(PY) -m tests.crash.torture --write

bench: build
	$(PY) -m pip install -q psutil lmdb rocksdict matplotlib torch==2.13.0 && $(PY) -m pip install -q --no-deps fbgemm-gpu-cpu==1.8.0
	$(PY) -m bench $(NAME)

lint: build
	$(PY) -m ruff check && $(PY) -m ruff format --check && PATH="$(VENV)/bin:$$PATH" cython-lint pyembed/*.pyx pyembed/_core_parts/*.pxi
	$(VENV)/bin/lint-imports
	$(PY) -m mypy && $(PY) -m mypy.stubtest --ignore-missing-stub pyembed._core
	$(PY) -m pytest -q tests/test_docstrings.py

# Run the kernels' conformance suite with bounds checks, the address sanitizer and the undefined-behaviour sanitizer.
# importlib: pytest's other modes put this folder, with the release build, in front of the path.
debug: build
	PYEMBED_DEBUG=1 CFLAGS=-fsanitize=address,undefined LDFLAGS=-fsanitize=address,undefined \
	  $(PY) setup.py -q build --build-base build/debug --build-lib build/debug/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=build/debug/lib:$(CURDIR) $(PY) -P -m pytest --import-mode=importlib \
	  tests/test_core.py tests/test_init.py tests/test_renorm.py tests/layers/test_embedding.py

# Build with clang, in a folder of its own, and run the kernels' conformance suite.
clang: build
	CC=clang $(PY) setup.py -q build --build-base build/clang --build-lib build/clang/lib
	PYTHONPATH=build/clang/lib:$(CURDIR) $(PY) -P -m pytest --import-mode=importlib tests/test_core.py

build: $(VENV)/ready
	@true

$(VENV)/ready: $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing; Debian: apt install python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv is missing; Debian, Ubuntu: apt install python3-venv"; exit 1; }
	@command -v $${CC:-cc} >/dev/null || \
	  { echo "a C compiler is missing; Debian, Ubuntu: apt install build-essential python3-dev; macOS: xcode-select --install"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -U pip 'setuptools>=77' 'cython>=3.1' 'numpy>=2.0'
	$(PY) -m pip install -q --no-build-isolation -e '.[test]' $(WITH)
	@touch $@

clean:
	rm -rf build demo .venv *.egg-info pyembed/*.so pyembed/_core.c
