#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Fetches NLD-AA, the recorded games of AutoAscend (Meta, arXiv 2211.00539), and unpacks it.
#
#   bash scripts/get_nld_aa.sh DATA_DIR              the taster pack: 1,934 games, a download of 1.7 GB
#   bash scripts/get_nld_aa.sh DATA_DIR aa ab ac     parts of the whole, some 6 GB each; there are aa to ap
#   bash scripts/get_nld_aa.sh DATA_DIR all          all 16, some 90 GB
#
# What broke off goes on where it stopped, by itself and when the command is given again; what was unpacked is not
# fetched again. No checksums of the archives are published, but every file in them has one, and all are compared before
# anything is unpacked; archives with links or with names that lead outside of DATA_DIR are refused.
# NLD_URL names another server, for a mirror; the default is that of NLE's DATASET.md.
set -euo pipefail

url=${NLD_URL:-https://dl.fbaipublicfiles.com/nld}
all=(a{a..p})

fail() {
    echo "error: $*" >&2
    exit 2
}

download() { # URL FILE: goes on with what there is of the file
    local code
    for _ in {1..8}; do
        code=0
        curl -fL --no-progress-meter --speed-limit 1 --speed-time 60 -C - -o "$2" "$1" || code=$?
        [ $code != 0 ] || return 0
        [ $code != 33 ] || rm "$2" # a server that cannot go on in the middle
        sleep "${NLD_PAUSE:-5}"
    done
    return 1
}

get() { # NAME FOLDER: one archive
    local from=$url/$2/$1.zip zip=$out/.$1.zip size free
    [ ! -e "$out/.$1.done" ] || { echo "$1: unpacked before"; return; }
    size=$(curl -fsIL "$from" | tr -d '\r' | sed -n 's/^content-length: *//Ip' | tail -1) ||
        fail "$from cannot be fetched"
    size=${size:-0} free=$(df --output=avail -B1 "$out" | tail -1)
    [ $((2 * size)) -le "$free" ] || fail "$1 needs $((2 * size)) bytes in $out, where $free are free: make room"
    if [ ! -e "$zip" ] || [ "$(stat -c %s "$zip")" != "$size" ]; then
        echo "$1: fetching $size bytes"
        download "$from" "$zip" || fail "$from broke off: give the same command again to go on"
    fi
    ! unzip -Z -s-h-t "$zip" 2>/dev/null | grep -E '^l| /|[ /]\.\.(/|$)' >/dev/null ||
        fail "$zip is refused: it holds links, or names that lead out of the folder"
    unzip -tqq "$zip" >&2 || { rm "$zip" && fail "$1 was damaged and is removed: give the same command again"; }
    unzip -qo "$zip" -d "$out" || fail "$zip cannot be unpacked into $out"
    mv "$zip" "$out/.$1.done" && : >"$out/.$1.done" # the mark takes the archive's place
    echo "$1: unpacked"
}

for tool in curl unzip; do
    command -v $tool >/dev/null || fail "$tool is missing: install it"
done
[ $# -ge 1 ] || fail "give the folder to unpack into: bash scripts/get_nld_aa.sh DATA_DIR [taster | all | aa ab ...]"
out=$1 && shift
mkdir -p "$out" 2>/dev/null && : >>"$out/.get_nld_aa.lock" || fail "cannot write to $out"
exec 9>>"$out/.get_nld_aa.lock"
flock -n 9 || [ $? != 1 ] || fail "another get_nld_aa.sh is at work in $out" # not 1: it has no locks
[ "${1:-}" != all ] || set -- "${all[@]}"
for part in "${@:-taster}"; do
    [[ " taster ${all[*]} " = *" $part "* ]] || fail "there is no part $part; there are taster, ${all[*]} and all"
done
for part in "${@:-taster}"; do
    if [ "$part" = taster ]; then get nld-aa-taster nld-aa-taster; else get "nld-aa-dir-$part" nld-aa; fi
done
echo "The games are in $out; python scripts/inspect_data.py $out shows them."
