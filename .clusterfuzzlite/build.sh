#!/bin/bash -eu
# Called by ClusterFuzzLite and OSS-Fuzz inside their image: builds the targets and packs the first inputs.
cd "$SRC/mmu-gather/tests/fuzz"

# Before the flags of the fuzzers come into play.
RUSTFLAGS= cargo run --release --locked --example seeds -- "$WORK/corpus"

cargo fuzz build --fuzz-dir . --release
for target in sequence text; do
    cp "target/x86_64-unknown-linux-gnu/release/$target" "$OUT/"
    zip -q -j "$OUT/${target}_seed_corpus.zip" "$WORK/corpus/$target"/*
done
