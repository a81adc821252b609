#!/bin/sh
# Usage: run.sh SECONDS [TARGET]...
# Runs fuzz targets (all by default) one after the other, each for that long. What they find goes to fuzz/target/corpus, which is not
# committed; an input that breaks a promise goes to fuzz/artifacts and ends the run. See docs/fuzzing.md.
set -eu
cd "$(dirname "$0")/.."

seconds=$1
shift
[ $# -gt 0 ] || set -- $(cargo +nightly fuzz list)

if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    echo "fuzzing needs a nightly compiler and cargo-fuzz; run this, then try again:" >&2
    echo "    rustup toolchain install nightly && cargo install cargo-fuzz --locked" >&2
    exit 1
fi

# Journals and superblocks are written thousands of times a second: in memory, where that is possible.
TMPDIR=$(mktemp -d "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")/twinsite-fuzz-XXXXXX")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 130' INT TERM

cargo +nightly fuzz build
for target in "$@"; do
    found=fuzz/target/corpus/$target
    mkdir -p "$found" "fuzz/corpus/$target"
    echo "=== $target, $seconds s"
    # No decoder has a reason to ask for more than 8 MB at once, or to think for more than 10 s.
    nice -n 5 cargo +nightly fuzz run "$target" "$found" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -max_len=4096 -len_control=0 -malloc_limit_mb=8 -rss_limit_mb=1024 -timeout=10 -print_final_stats=1
done
