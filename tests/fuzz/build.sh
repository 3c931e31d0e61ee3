#!/usr/bin/env bash
# Builds the fuzz targets with coverage on the stable toolchain: everything `cargo fuzz` passes but the sanitizers, which need
# nightly. `cargo fuzz run` does the same and more where nightly is.
#
# usage: tests/fuzz/build.sh [CARGO OPTIONS]
set -euo pipefail
cd "$(dirname "$0")"

flags=(
    --cfg fuzzing
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    -Ccodegen-units=1
)
# With --target, so that build scripts are not built with these.
RUSTFLAGS="${RUSTFLAGS:-} ${flags[*]}" exec cargo build --release --locked --target x86_64-unknown-linux-gnu --bins "$@"
