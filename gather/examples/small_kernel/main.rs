#![doc = "A small kernel that embeds all of the engine, with the two system calls that unmap."]
// Two pretended CPUs, memory, and the three traits for the engine.
include!("machine.rs");
// The system calls, and what uses them.
include!("calls.rs");
