# Where axolotl is: VENV=<folder>, else an active environment that has it, else .venv, which `make` sets up.
TORCH ?= 2.13.0
ACTIVE := $(filter-out $(CURDIR)/.venv/bin/axolotl,$(shell command -v axolotl))
BIN := $(if $(VENV),$(VENV)/bin,$(if $(ACTIVE),$(patsubst %/,%,$(dir $(ACTIVE))),.venv/bin))
READY := $(if $(filter .venv/bin,$(BIN)),.venv/.ready-$(TORCH))
PY := PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH="$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))" AXOLOTL_DO_NOT_TRACK=$${AXOLOTL_DO_NOT_TRACK:-1} $(BIN)/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all fuzz mutants train sweep eval report compare plan merge serve chat publish recipes check data audit pictures vllm lint constraints
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory

help: ## what `make` can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## the whole path on a CPU in three minutes; DATA=rows.jsonl for rows of your own
	@$(PY) -m finlora.demo $(if $(DATA),--data "$(DATA)")

test: $(READY) ## the tests in six minutes on two cores; ARGS= for pytest
	@$(PY) tests/surroundings.py && $(PY) -m ruff check . && $(PY) -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)

test-all: $(READY) ## all tests: every recipe, every way of distributing, more drawn examples
	@$(PY) tests/surroundings.py && $(PY) -m ruff check . && $(PY) -m pytest -n 2 --dist loadgroup --hypothesis-profile=all $(ARGS)

fuzz: $(READY) ## the property-based tests on new examples for SECONDS=300; prints failures as @example(...) to paste
	@$(PY) tests/fuzz.py $(if $(SECONDS),--seconds "$(SECONDS)") $(ARGS)

mutants: $(READY) ## how many small faults its own tests notice in MODULE=finlora/evaluate/scorers.py (all without)
	@$(PY) tests/mutants.py $(MODULE)

SEVERAL = $(if $(GPUS),--gpus "$(GPUS)") $(if $(ZERO),--zero "$(ZERO)") $(if $(OFFLOAD),--offload) \
  $(if $(FSDP),--fsdp "$(FSDP)") $(if $(RAY),--ray) $(if $(NODES),--nodes "$(NODES)") $(if $(NODE_RANK),--node-rank "$(NODE_RANK)") $(if $(MASTER),--master "$(MASTER)")

train: $(READY) ## train RECIPE=<name>; GPUS=4 ZERO=2, TINY=1 on a CPU, FORCE=1 anew, TRACK=wandb, ARGS="--learning-rate 0.0002"
	@$(PY) -m finlora.train.run "$(RECIPE)" $(if $(TINY),--tiny) $(if $(FORCE),--force) $(SEVERAL) $(if $(TRACK),--track "$(TRACK)") -- $(ARGS)

SWEEPING = $(if $(TINY),--tiny) $(if $(FORCE),--force) $(if $(GPUS),--gpus "$(GPUS)") $(if $(POINT),--point "$(POINT)") \
  $(if $(LIST),--list) $(if $(EVAL),--eval) $(if $(TASKS),--tasks "$(TASKS)") $(if $(LIMIT),--limit "$(LIMIT)") \
  $(if $(LABELS),--labels "$(LABELS)") $(if $(TRACK),--track "$(TRACK)")

sweep: $(READY) ## train RECIPE= at each point of SWEEP=rank; EVAL=1, GPUS=4 points at a time, LIST=1 shows them, TINY=1
	@$(PY) -m finlora.sweep.run "$(RECIPE)" "$(SWEEP)" $(SWEEPING) -- $(ARGS)

ASK = $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(MODEL),--model "$(MODEL)") $(if $(ADAPTER),--adapter "$(ADAPTER)") \
  $(if $(TASKS),--tasks "$(TASKS)") $(if $(LIMIT),--limit "$(LIMIT)") $(if $(LABELS),--labels "$(LABELS)") \
  $(if $(BITS),--bits "$(BITS)") $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(TESTS),--tests "$(TESTS)") \
  $(if $(NAME),--name "$(NAME)") $(if $(BATCH_TOKENS),--batch-tokens "$(BATCH_TOKENS)") $(if $(BACKEND),--backend "$(BACKEND)") \
  $(if $(ENDPOINT),--endpoint "$(ENDPOINT)") $(if $(ENCODER),--encoder "$(ENCODER)") $(if $(LAYER),--layer "$(LAYER)") $(if $(BASE),--base) \
  $(if $(TINY),--tiny) $(if $(FORCE),--force) $(if $(KEEP_QUANTISED),--keep-quantised)

eval: $(READY) ## evaluate RECIPE=, or MODEL= ADAPTER=; BASE=1 the base too, TASKS= LIMIT= LABELS=published BITS= PROMPT=
	@$(PY) -m finlora.evaluate.runner $(ASK) $(ARGS)

report: $(READY) ## results/index.html and results/README.md from all evaluations
	@$(PY) -m finlora.evaluate.report $(ARGS)

compare: $(READY) ## are A= and B= distinguishable? paired, on the same rows
	@$(PY) -m finlora.evaluate.compare "$(A)" "$(B)" $(ARGS)

plan: $(READY) ## what RECIPE= will take: parameters, memory, time, cost; GPU=a100-80g GPUS=4 PRICE=<a GPU-hour>
	@$(PY) -m finlora.plan.estimate "$(RECIPE)" $(if $(GPU),--gpu "$(GPU)") $(if $(GPUS),--gpus "$(GPUS)") $(if $(PRICE),--price "$(PRICE)")

SUBJECT = $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(ADAPTER),--adapter "$(ADAPTER)") $(if $(MODEL),--model "$(MODEL)") \
  $(if $(BITS),--bits "$(BITS)") $(if $(TINY),--tiny)

merge: $(READY) ## merge RECIPE='s adapter into its base and verify it; INTO=full or dequantised, ADAPTER= MODEL= BITS=, LIMIT=
	@$(PY) -m finlora.export.merge $(SUBJECT) $(if $(INTO),--into "$(INTO)") $(if $(LIMIT),--limit "$(LIMIT)") $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(FORCE),--force)

serve: $(READY) ## serve the merged model, OpenAI-compatible; PORT= HOST= BACKEND=transformers, ARGS= for vLLM
	@$(PY) -m finlora.export.serve $(SUBJECT) $(if $(PORT),--port "$(PORT)") $(if $(HOST),--host "$(HOST)") $(if $(BACKEND),--backend "$(BACKEND)") -- $(ARGS)

chat: $(READY) ## talk to RECIPE= in the terminal; KEEP_QUANTISED=1 for small cards
	@$(PY) -m finlora.export.chat $(SUBJECT) $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(KEEP_QUANTISED),--keep-quantised) $(ARGS)

publish: $(READY) ## write RECIPE='s model card and list what goes to REPO=; PUSH=1 pushes, MERGED=1 the merged model, PRIVATE=1
	@$(PY) -m finlora.export.publish $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(TINY),--tiny) --repo "$(REPO)" $(if $(MERGED),--merged) $(if $(PRIVATE),--private) $(if $(PUSH),--push)

recipes: $(READY) ## list the recipes; TASK= filters
	@$(PY) -m finlora.recipes.load $(if $(TASK),--task "$(TASK)")

check: $(READY) ## check every recipe: keys, types, names, factorisation
	@$(PY) -m finlora.recipes.load --check

data: $(READY) ## fetch and prepare TASK= (all without); FILE=<your rows> TASK=cfa for rows of your own; LABELS=published
	@$(if $(FILE),,$(PY) -m finlora.data.fetch $(TASK) &&) $(PY) -m finlora.data.prepare $(TASK) $(if $(FILE),--file "$(FILE)") $(if $(LABELS),--labels $(LABELS)) $(ARGS)

audit: $(READY) ## what is in the fetched files: labels, duplicates, leaks, lengths; TASK= for one
	@$(PY) -m finlora.data.audit $(TASK) $(ARGS)

pictures: $(READY) ## draw docs/speed.svg and docs/scores.svg from the recorded results
	@$(PY) -m finlora.plan.pictures

setup: $(READY) ## make .venv (TORCH=2.11.0, 2.12.1 or 2.13.0); every target does it by itself
	@$(PY) -c "import torch, axolotl; print('ready: torch', torch.__version__, 'in $(BIN)')"

vllm: ## set vLLM up in .venv-vllm, its own environment (a GPU machine; 10 GB), for make eval BACKEND=vllm
	@PYTHON="$(PYTHON)" scripts/setup_vllm.sh .venv-vllm

lint: $(READY) ## ruff: format in place, then check
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

constraints: ## pin every package again for TORCH= (needs uv)
	@scripts/constraints.sh "$(TORCH)"

.venv/.ready-%: pyproject.toml constraints/torch-%.txt scripts/setup.sh
	@scripts/setup.sh "$*" .venv "$@"
