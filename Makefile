# make venv | quickstart | test | test-arithmetic | test-tf218 | lint | bench
# (the environment is .venv, made on first use)

PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/quickstart

.PHONY: venv quickstart test test-arithmetic test-tf218 lint bench clean

# The environment is rebuilt whenever requirements.txt is not the one that it was built from.
# algpt2.pth is an editable install by a relative path: in a worktree whose .venv is a link, scripts
# find the worktree's own algpt2.
venv:
	@if ! cmp -s requirements.txt .venv/built-from.txt || ! $(PY) -c ''; then \
	  echo "installing into .venv (about 4.5 GB, a few minutes)"; \
	  rm -rf .venv && $(PYTHON) -m venv .venv && \
	  $(PY) -m pip install --progress-bar off -r requirements.txt && \
	  cp requirements.txt .venv/built-from.txt; fi
	@cd .venv/lib/python3*/site-packages && echo ../../../.. > algpt2.pth

quickstart: venv
	@echo "== 1/7 tokenizer: 8,192 byte pairs learnt from the docstrings of the installed packages"
	$(PY) train_tokenizer.py --train_path docs:train --vocab_size 8192 --save_path $(RUN)/tokenizer
	@echo "== 2/7 training shards"
	$(PY) make_tfrecords.py --path docs:train --tokenizer $(RUN)/tokenizer --seq_len 256 --save_path $(RUN)/train
	@echo "== 3/7 validation shards"
	$(PY) make_tfrecords.py --path docs:valid --tokenizer $(RUN)/tokenizer --seq_len 256 --save_path $(RUN)/val
	@echo "== 4/7 pretraining algpt2-tiny (about five minutes on two cores)"
	$(PY) train_pt.py --config algpt2-tiny --from_scratch --tokenizer $(RUN)/tokenizer \
	  --train_path $(RUN)/train --val_path $(RUN)/val --save_dir $(RUN)/model \
	  --optimizer Muon --lr 8e-3 --warmup_steps 20 --batch_size 4 --max_steps 1000 --eval_steps 250 --logging_steps 5
	@echo "== 5/7 evaluation"
	$(PY) train_pt.py --eval_only --checkpoint $(RUN)/model --val_path $(RUN)/val --compressors
	@echo "== 6/7 samples"
	$(PY) train_pt.py --sample_only --checkpoint $(RUN)/model --prompt "Returns the" --n_samples 3
	@echo "== 7/7 loss curve"
	$(PY) plot_runs.py $(RUN)/model --save_path $(RUN)/curves.png

test: venv lint
	$(PY) -m pytest

# The arithmetic of other processors, as far as this one can imitate it.
ARITHMETICS := OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default \
  ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE DNNL_MAX_CPU_ISA=SSE41 DNNL_MAX_CPU_ISA=AVX2 \
  TF_ENABLE_ONEDNN_OPTS=0 TF_ENABLE_ONEDNN_OPTS=1

test-arithmetic: venv
	@for setting in $(ARITHMETICS); do \
	  echo "== $$setting"; \
	  env $$setting $(PY) -m pytest -m numeric || failed="$$failed $$setting"; \
	done; test -z "$$failed" || { echo "failed with:$$failed"; exit 1; }

# The TensorFlow of a v3 pod, as worker 0 has it. The PyTorch that it is held against is that of .venv.
test-tf218: venv
	@if ! cmp -s requirements-tpu-pod.txt .venv-tf218/built-from.txt; then \
	  rm -rf .venv-tf218 && $(PYTHON) -m venv .venv-tf218 && \
	  .venv-tf218/bin/python -m pip install --progress-bar off -r requirements-tpu-pod.txt $$(grep -o '^pytest==[0-9.]*' requirements.txt) && \
	  cp requirements-tpu-pod.txt .venv-tf218/built-from.txt; fi
	PYTORCH=$(CURDIR)/$(PY) .venv-tf218/bin/python -m pytest -W "ignore:You are using a Python version:FutureWarning" \
	  tests/test_modeling_tf.py tests/training/test_trainer_tf.py

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: venv
	$(PY) benchmarks/train_pt.py

clean:
	rm -rf .venv .venv-tf218
