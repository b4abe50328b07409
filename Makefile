# Where axolotl is: VENV=<folder>, else an active environment that has it, else .venv, which `make` sets up.
# Any of these folders may have spaces in its path, which make's own functions would split.
TORCH ?= 2.13.0
quote = '$(subst ','\'',$1)'
ACTIVE := $(shell found=$$(command -v axolotl) && [ "$$found" != $(call quote,$(CURDIR)/.venv/bin/axolotl) ] && dirname "$$found")
BIN := $(or $(if $(VENV),$(VENV)/bin),$(ACTIVE),.venv/bin)
READY := $(if $(subst .venv/bin,,$(BIN)),,.venv/.ready-$(TORCH))
WHOLE_BIN := $(if $(filter /%,$(firstword $(BIN))),,$(CURDIR)/)$(BIN)
PY := PATH=$(call quote,$(WHOLE_BIN)):"$$PATH" PYTHONUTF8=1 AXOLOTL_DO_NOT_TRACK=$${AXOLOTL_DO_NOT_TRACK:-1} $(call quote,$(BIN)/python)
FINLORA := $(PY) -m finlora
# $(call options,RECIPE TINY) is --recipe 'value of RECIPE' --tiny, each where the variable is set.
FLAGS := TINY FORCE CPU OFFLOAD RAY LIST EVAL BASE KEEP_QUANTISED MERGED PRIVATE PUSH
option = --$(shell echo $1 | tr A-Z_ a-z-)$(if $(filter $1,$(FLAGS)),, $(call quote,$($1)))
options = $(foreach name,$1,$(if $($(name)),$(call option,$(name))))
# A terminal's width has this name in the environment; only what stands on make's own command line counts.
ifneq ($(origin COLUMNS),command line)
COLUMNS :=
endif
unexport COLUMNS
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all fuzz mutants train sweep eval report compare plan merge serve chat publish recipes new check data task audit doctor pictures vllm lint constraints
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory

help: ## what `make` can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## the whole path on a CPU in five minutes; DATA=rows.jsonl for your own rows; VERBOSE=1 (any target) shows all
	@$(FINLORA) demo $(call options,DATA COLUMNS)

test: $(READY) ## lint and the tests, 6 to 8 minutes on two cores; ARGS= for pytest
	@$(PY) tests/surroundings.py && $(PY) -m ruff check . && $(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow" $(ARGS)

test-all: $(READY) ## all tests: every recipe, every way of distributing, more drawn examples
	@$(PY) tests/surroundings.py && $(PY) -m ruff check . && $(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --hypothesis-profile=all $(ARGS)

fuzz: $(READY) ## the property-based tests on new examples for SECONDS=300; prints failures as @example(...) to paste
	@$(PY) tests/fuzz.py $(if $(SECONDS),--seconds "$(SECONDS)") $(ARGS)

mutants: $(READY) ## how many small faults its own tests notice in MODULE=finlora/evaluate/scorers.py (all without)
	@$(PY) tests/mutants.py $(MODULE)

train: $(READY) ## train RECIPE=<name>; GPUS=4 ZERO=2, CPU=1 however long, TINY=1 two steps, FORCE=1 anew, EPOCHS=6 goes on, FROM=<adapter>, TRACK=wandb, ARGS="--learning-rate 0.0002"
	@$(FINLORA) train $(call quote,$(RECIPE)) $(call options,TINY FORCE CPU GPUS ZERO OFFLOAD FSDP RAY NODES NODE_RANK MASTER EPOCHS FROM TRACK) -- $(ARGS)

sweep: $(READY) ## train RECIPE= at each point of SWEEP=rank; EVAL=1, GPUS=4 POINTS_PER_GPU=1, LIST=1 shows them, TINY=1
	@$(FINLORA) sweep $(call quote,$(RECIPE)) $(call quote,$(SWEEP)) $(call options,TINY FORCE GPUS POINTS_PER_GPU POINT LIST EVAL TASKS LIMIT LABELS SHOTS TESTS TRACK) -- $(ARGS)

eval: $(READY) ## evaluate RECIPE=, or MODEL= ADAPTER=; BASE=1 the base too, TASKS= LIMIT= LABELS=published LENGTHS=published BITS= PROMPT= SHOTS=3
	@$(FINLORA) eval $(call options,RECIPE MODEL ADAPTER BASE BITS TASKS LIMIT LABELS LENGTHS PROMPT SHOTS TESTS NAME TINY FORCE KEEP_QUANTISED BATCH_TOKENS BACKEND ENDPOINT ENCODER LAYER) $(ARGS)

report: $(READY) ## results/index.html and results/README.md from all evaluations
	@$(FINLORA) report $(ARGS)

compare: $(READY) ## are A= and B= distinguishable? paired, on the same rows
	@$(FINLORA) compare $(call quote,$(A)) $(call quote,$(B)) $(ARGS)

plan: $(READY) ## what RECIPE= will take: parameters, memory, time, cost; GPU=a100-80g GPUS=4 FSDP=2 PRICE=<a GPU-hour>
	@$(FINLORA) plan $(call quote,$(RECIPE)) $(call options,GPU GPUS ZERO OFFLOAD FSDP PRICE)

merge: $(READY) ## merge RECIPE='s adapter into its base and verify it; INTO=full or dequantised, ADAPTER= MODEL= BITS=, LIMIT=
	@$(FINLORA) merge $(call options,RECIPE ADAPTER MODEL BITS TINY INTO LIMIT PROMPT FORCE)

serve: $(READY) ## serve the merged model, OpenAI-compatible; PORT= HOST= BACKEND=transformers, ARGS= for vLLM
	@$(FINLORA) serve $(call options,RECIPE ADAPTER MODEL BITS TINY PORT HOST BACKEND) -- $(ARGS)

chat: $(READY) ## talk to RECIPE= in the terminal; KEEP_QUANTISED=1 for small cards
	@$(FINLORA) chat $(call options,RECIPE ADAPTER MODEL BITS TINY PROMPT KEEP_QUANTISED) $(ARGS)

publish: $(READY) ## write RECIPE='s model card and list what goes to REPO=; PUSH=1 pushes, MERGED=1 the merged model, PRIVATE=1
	@$(FINLORA) publish $(call options,RECIPE TINY REPO MERGED PRIVATE PUSH)

recipes: $(READY) ## list the recipes; TASK= filters
	@$(FINLORA) recipes $(call options,TASK)

new: $(READY) ## write RECIPE=headline_qwen3_8b_r16_dora, or any name, from the nearest recipe
	@$(FINLORA) new $(call quote,$(RECIPE))

check: $(READY) ## check every recipe: keys, types, names, factorisation
	@$(FINLORA) check

data: $(READY) ## fetch and prepare TASK= (all without); FILE=<your rows> TASK=cfa for rows of your own; LABELS=published
	@$(FINLORA) data $(TASK) $(call options,FILE COLUMNS LABELS MIXTURE) $(ARGS)

task: $(READY) ## make a task of your own rows: NAME=credit_risk FILE=train.csv TEST=test.csv; COLUMNS= LABELS=good,bad METRIC=
	@$(FINLORA) task $(call options,NAME FILE TEST COLUMNS LABELS METRIC)

audit: $(READY) ## what is in the fetched files: labels, duplicates, leaks, lengths; TASK= for one, FILE=<your rows>
	@$(FINLORA) audit $(TASK) $(call options,FILE COLUMNS) $(ARGS)

doctor: $(READY) ## what a bug report needs, and what is missing here to train RECIPE=
	@$(FINLORA) doctor $(call options,RECIPE)

pictures: $(READY) ## draw docs/speed.svg and docs/scores.svg from the recorded results
	@$(FINLORA) pictures

setup: $(READY) ## make .venv (TORCH=2.11.0, 2.12.1 or 2.13.0; TORCH_BUILD=cpu or cuda); every target does it by itself
	@$(PY) -c "import sys, torch, axolotl; print('ready: torch', torch.__version__, 'in', sys.prefix)"

vllm: ## set vLLM up in .venv-vllm, its own environment (a GPU machine; 10 GB), for make eval BACKEND=vllm
	@PYTHON="$(PYTHON)" scripts/setup_vllm.sh .venv-vllm

lint: $(READY) ## ruff: format in place, then check; imports run one way
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix . && $(call quote,$(BIN)/lint-imports)

constraints: ## pin every package again for TORCH= (needs uv)
	@scripts/constraints.sh "$(TORCH)"

.venv/.ready-%: pyproject.toml constraints/torch-%.txt scripts/setup.sh
	@scripts/setup.sh "$*" .venv "$@"
