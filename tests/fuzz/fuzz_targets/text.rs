//! Bytes as text: no parser panics, and what a parser accepts reads back the same after it was
//! printed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmu_cli::input::layout::Layout;
use mmu_cli::input::strace::Trace;
use mmu_hosted::Sequence;

fuzz_target!(|text: &str| {
    if let Ok(sequence) = Sequence::parse(text) {
        assert_eq!(Sequence::parse(&sequence.to_string()).as_ref(), Ok(&sequence), "{sequence}");
    }
    if let Ok(layout) = Layout::parse("fuzz", text) {
        let printed = layout.to_string();
        assert_eq!(Layout::parse("fuzz", &printed).ok().as_ref(), Some(&layout), "{printed}");
    }
    let _ = Trace::parse("fuzz", text);
});
