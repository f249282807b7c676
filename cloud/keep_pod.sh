#!/bin/bash
# Keeps one TPU slice at work until the training is done. It runs at home; whatever ends it, it deletes the slice.
# The flags are those of train_tfrecords.py without --tpu and --save_dir. A slice that already has this NAME is taken over.
#
#   export NAME=algpt2pod ZONE=europe-west4-a TYPE=v3-128 IMAGE=tpu-vm-tf-2.18.0-pod-se RUN=gs://BUCKET/runs/algpt2
#   export ACCOUNT=algpt2@PROJECT.iam.gserviceaccount.com TOKENIZER=gs://BUCKET/tokenizer
#   bash cloud/keep_pod.sh --config_path algpt2 --train_path gs://BUCKET/owt/train --val_path gs://BUCKET/owt/valid
#
# Exit codes: 0 the run is done; 75 TRIES or HOURS are used up; 129, 130, 143 SIGHUP, Ctrl-C, SIGTERM; others are the training's.
set -u
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${IMAGE:?}" "${RUN:?}" "${ACCOUNT:?}"
TPU=${TPU:-$NAME} REQUIREMENTS=${REQUIREMENTS:-requirements-tpu-pod.txt} # one host: local, requirements-tpu-host.txt
TRIES=${TRIES:-20} HOURS=${HOURS:-48}        # slices made one after another; hours by the clock, waiting included
DEATHS=${DEATHS:-3} QUICK_S=${QUICK_S:-1800} # so many equal ends in a row, each within QUICK_S, end it
LOST=${LOST:-10}                             # so many looks in a row without an answer: the slice is given up
PAUSE_S=${PAUSE_S:-60} CALL_S=${CALL_S:-300} SETUP_S=${SETUP_S:-1800} # between two looks; limits of a call, of the set-up
LOG=${LOG:-$PWD/$NAME.log} work=$(mktemp -d) child='' doing='' state='' tries=0 deaths=0 last='' lost=0 start_s=0
cd "$(dirname "$0")/.." || exit 2

say() { echo "$(date -u +%FT%TZ) $*" | tee -a "$LOG" || true; }
stop() { say "$2"; exit "$1"; }

call() { # gcloud compute tpus within $1 seconds, in the background: bash answers signals only while it waits
  doing=$3
  timeout -k 10 "$1" gcloud compute tpus "${@:2}" --zone "$ZONE" --quiet >"$work/out" 2>"$work/err" </dev/null &
  child=$!
  wait "$child" && doing='' && return
  [ "$doing" = describe ] || say "gcloud $2 $3 failed: $(tail -n 2 "$work/err" | tr '\n' ' ')"
  doing=''
  return 1
}
worker() { call "$1" tpu-vm ssh "$NAME" --worker 0 --strict-host-key-checking no --command "$2"; }

look() { # state: Google's word for a request or a machine, NOT_FOUND, or nothing when no answer came
  call "$CALL_S" "$1" describe "$NAME" --format "value($2)"
  state=$(cat "$work/out"; grep -om 1 NOT_FOUND "$work/err")
}

remove() { # returns when Google has said twice that there is neither a request nor a machine
  local gone=0
  while [ "$gone" -lt 2 ]; do
    look queued-resources state.state
    [ "$state" != NOT_FOUND ] || look tpu-vm state
    if [ "$state" = NOT_FOUND ]; then
      gone=$((gone + 1))
    else
      gone=0
      say "deleting; if this is cut off: gcloud compute tpus queued-resources delete $NAME --zone $ZONE --force"
      call "$SETUP_S" queued-resources delete "$NAME" --force || call "$SETUP_S" tpu-vm delete "$NAME"
    fi
    sleep "$PAUSE_S"
  done
  say "$NAME is deleted" && lost=0
}

# shellcheck disable=SC2317 # called by the trap
finish() {
  trap '' INT TERM HUP
  case $doing in '' | create) ;; *) kill "$child" ;; esac # what is just being made can be deleted only when it is there
  wait "$child"
  remove
  rm -rf "$work"
}

ended() { # with code $1: returns if trying again is of use
  [ $((SECONDS - start_s)) -gt "$QUICK_S" ] && deaths=0
  [ "$1" = "$last" ] && deaths=$((deaths + 1)) || deaths=1
  last=$1
  case $1 in
    0) stop 0 "done: $RUN" ;;
    75 | 129 | 134 | 137 | 143 | set-up) [ "$deaths" -lt "$DEATHS" ] || stop "${1/set-up/1}" "$1, $deaths times in a row: $RUN.log" ;;
    *) stop "$1" "the training ended with code $1: $RUN.log" ;;
  esac
  say "ended: $1 ($deaths of $DEATHS in a row), again"
}

set_up() {
  start_s=$SECONDS
  say "set-up of commit $(git rev-parse --short HEAD)"
  git archive --format tar.gz -o "$work/algpt2.tgz" HEAD || stop 2 "git archive failed: run this in a clone"
  call "$CALL_S" tpu-vm scp "$work/algpt2.tgz" "$NAME:" --worker 0 --strict-host-key-checking no &&
    worker "$SETUP_S" "mkdir -p algpt2 && tar xzf algpt2.tgz -C algpt2 &&
      bash algpt2/cloud/setup_worker.sh $REQUIREMENTS ${TOKENIZER:-}" && return
  ended set-up
}

start() { # 137 stands until the training's own code replaces it: what kills the training may kill its shell, too
  start_s=$SECONDS
  worker "$CALL_S" "echo 137 > algpt2/exit_code && sudo systemd-run --collect --unit algpt2 --uid \$(id -u) --setenv HOME=\$HOME \
    bash \$HOME/algpt2/cloud/train_worker.sh $(printf '%q ' "$RUN" --tpu "$TPU" "$@")"
}

# shellcheck disable=SC2016 # worker 0 expands it
STATUS='cd algpt2 2>/dev/null || { echo bare end; exit; }
  if systemctl is-active --quiet algpt2; then [ "$(find train.log -mmin +30)" ] && echo stalled end || echo running end
  elif [ -e exit_code ]; then echo "code $(cat exit_code) end"
  elif [ -e ready ]; then echo ready end; else echo bare end; fi
  tail -n 1 train.log 2>/dev/null || true'

tend() { # does what worker 0 needs next; an answer that was cut off (no "end") is no answer
  local answer='' code
  worker "$CALL_S" "$STATUS" && answer=$(grep -Em 1 '^(bare|ready|running|stalled|code [0-9]+) end$' "$work/out")
  [ "$answer" ] && lost=0
  case $answer in
    bare*) set_up ;;
    ready*) start "$@" ;;
    running*) say "running: $(tail -n 1 "$work/out")" ;;
    stalled*) say "no new line for 30 minutes: killed" && worker "$CALL_S" "sudo systemctl kill -s KILL algpt2" ;;
    code*) code=${answer//[!0-9]/} && ended "$code" && start "$@" ;;
    *) lost=$((lost + 1)) && say "worker 0 does not answer ($lost of $LOST)" && [ "$lost" -ge "$LOST" ] && remove ;;
  esac
}

trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
while [ "$SECONDS" -lt $((HOURS * 3600)) ]; do
  look queued-resources state.state
  case $state in
    ACTIVE) tend "$@" ;;
    FAILED | SUSPENDING | SUSPENDED) say "$NAME is $state" && remove ;;
    NOT_FOUND)
      tries=$((tries + 1))
      [ "$tries" -le "$TRIES" ] || stop 75 "no luck with $TRIES slices"
      say "slice $tries of $TRIES: $TYPE in $ZONE"
      call "$CALL_S" queued-resources create "$NAME" --node-id "$NAME" --accelerator-type "$TYPE" --runtime-version "$IMAGE" \
        --spot --service-account "$ACCOUNT" --scopes cloud-platform --valid-until-duration 12h
      ;;
    *) say "waiting: ${state:-no answer}" ;;
  esac
  sleep "$PAUSE_S" & wait $!
done
stop 75 "$HOURS hours are used up"
