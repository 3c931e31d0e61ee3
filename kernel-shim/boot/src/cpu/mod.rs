//! Several CPUs: the state of each, calls between them, work for all, programs in ring 3.

pub mod agent;
#[expect(unsafe_code, reason = "a borrowed function is used by other CPUs while its owner waits")]
pub mod ipi;
#[expect(unsafe_code, reason = "the GS base as a reference")]
pub mod percpu;
#[expect(unsafe_code, reason = "enters ring 3")]
pub mod ring3;
#[expect(unsafe_code, reason = "starts CPUs, and lends them a borrowed function")]
pub mod smp;
pub mod trap;
#[expect(unsafe_code, reason = "ports of the interval timer and the interrupt controller")]
pub mod watchdog;
