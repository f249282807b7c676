#!/bin/bash
# Runs a command again while its exit code says that this helps: bash cloud/keep_running.sh python3 train_tfrecords.py ...
trap 'exit 130' INT # Ctrl-C is meant for both
pause=10 deaths=0 last=0
while true; do
  SECONDS=0
  "$@"
  code=$?
  case $code in 75 | 134 | 137 | 143) ;; *) exit $code ;; esac
  [ $SECONDS -gt 600 ] && pause=10 deaths=0
  [ $code = $last ] && deaths=$((deaths + 1)) || deaths=1
  last=$code
  if [ $code != 75 ] && [ $deaths = 5 ]; then
    echo "exit code $code five times in a row, each within ten minutes: look at the last lines before it"
    exit $code
  fi
  echo "exit code $code: again in $pause s"
  sleep $pause
  pause=$((pause < 300 ? pause * 2 : 600))
done
