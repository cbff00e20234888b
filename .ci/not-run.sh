#!/usr/bin/env bash
# not-run.sh WHAT WHY: say so that nobody can miss it that a part of the checks was left out. Exit code 0.
line=$(printf '!%.0s' {1..100})
printf '\n%s\n!!! NOT RUN: %s\n!!! %s\n%s\n\n' "$line" "$1" "$2" "$line"
if [[ -n ${GITHUB_ACTIONS:-} ]]; then
    printf '::warning::NOT RUN: %s: %s\n' "$1" "$2"
fi
