#!/bin/bash
# Sets up worker 0 of a TPU: Python, packages, tokenizer. Run again, it goes on where it was.
#
#   bash cloud/setup_worker.sh requirements-tpu-pod.txt [gs://BUCKET/tokenizer]
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m pip install --user --quiet uv
uv=$HOME/.local/bin/uv
"$uv" venv --quiet --allow-existing --python 3.11 "$HOME/venv" # takes the machine's Python 3.11, or fetches one
"$uv" pip install --quiet --python "$HOME/venv/bin/python" -r "$1"
case $1 in *-pod.txt) # alone: its pins of 2020 are not those of gcsfs, but it works with today's clients
  "$uv" pip install --quiet --python "$HOME/venv/bin/python" --no-deps cloud-tpu-client==0.10
  "$HOME/venv/bin/python" -c 'import cloud_tpu_client' ;;
esac
if [ "${2:-}" ]; then gcloud storage cp --recursive "$2" .; fi
# ssl and hashlib first: TensorFlow's TPU build crashes when it comes before them.
"$HOME/venv/bin/python" -c 'import ssl, hashlib, tensorflow, keras, transformers, gcsfs'
touch ready
