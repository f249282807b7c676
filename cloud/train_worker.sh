#!/bin/bash
# Trains on worker 0, detached from any ssh: keep_pod.sh has systemd-run start it. The log goes to train.log, and every minute to
# the bucket; the exit code to exit_code.
#
#   bash cloud/train_worker.sh gs://BUCKET/runs/algpt2 --tpu algpt2pod --config_path algpt2 ...
cd "$(dirname "$0")/.." || exit 2
run=$1 && shift
[ "$2" = local ] || export TPU_LOAD_LIBRARY=0 # a pod's hosts own their TPUs; worker 0 is a client
trap : TERM HUP INT                           # the training answers them; this shell waits for its code
upload() { gcloud storage cp --quiet train.log "$run.log" 2>/dev/null; }
while sleep 60; do upload; done >/dev/null 2>&1 &
touch train.log
"$HOME/venv/bin/python" train_tfrecords.py --save_dir "$run" "$@" >>train.log 2>&1
code=$?
kill $!
upload
echo $code >exit_code
