//! Several CPUs: the state of each, interrupts between them, work for all, programs in ring 3.
//!
//! ```text
//!   comes in                   file       goes out
//!   --------                   ----       --------
//!   the ids of the CPUs        smp        CPUs that are up; their state (percpu), numbers (index)
//!   a function, a set of CPUs  smp        it has run there, as ordinary work
//!   a set of CPUs with mail    ipi        they have taken it, in an interrupt
//!   registers of a program     ring3      the registers at the next trap, and what the trap was
//!   loops over memory          agent      the program itself, and what it read
//!   a trap in ring 0           trap       an interrupt handled, or the end of the run
//!   signs of life              watchdog   the end of a run that hangs, and each CPU's state (dump)
//! ```
//!
//! Uses `arch`. The checks, the machine and the workloads may use this room. `trap` is called by
//! the assembly and by `ring3`, `panic` by compiled code.

pub mod agent;
pub mod index;
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

pub(crate) mod dump;
#[cfg(bare)]
#[expect(unsafe_code, reason = "names that the prebuilt core and alloc call")]
mod panic;
