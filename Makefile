# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TRITON := .venv-triton/.installed
# TensorRT's bindings without its libraries, of the oldest and the newest version we claim: the tests read them.
BINDINGS := 10.16 11.4
OUT ?= runs/demo

.PHONY: install demo test faults triton lint types bench docs-check wheel clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clinifed needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[rtx,dev]"
	for version in $(BINDINGS); do \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
			--target .venv/bindings/$$version "tensorrt-cu13-bindings==$$version.*" || exit 1; \
	done
	touch $(INSTALLED)

demo: $(INSTALLED)
	rm -rf $(OUT)
	$(BIN)/clinifed demo --out $(OUT)

test: $(INSTALLED) lint types
	$(BIN)/python -m pytest

faults: $(INSTALLED)
	$(BIN)/python -m pytest -m 'faults and not short' tests/faults

# A real Triton server, in an environment of its own since it needs NumPy 1, takes the configurations we write.
triton: $(INSTALLED) $(TRITON)
	$(BIN)/python -m pytest -m triton tests/export/test_triton_server.py

$(TRITON):
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check 'nvidia-pytriton==0.7.*' 'numpy<2'
	touch $(TRITON)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/privacy.py
	$(BIN)/python benchmarks/demo_seeds.py
	$(BIN)/python benchmarks/many_sites.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/payload.py
	$(BIN)/python benchmarks/gpu.py

docs-check: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_cli.py tests/test_docs.py tests/test_layout.py tests/test_load.py

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv .venv-triton build dist runs *.egg-info
