//! The same work on any machine, so that what it counts can be compared.
//!
//! ```text
//!  in    a Stage: a kernel on a machine, and programs on its CPUs     stage
//!        an address space in a few words a line                       plan
//!
//!        a fixed piece of work, or one address space taken down       drill, plan
//!
//!  out   what the kernel counted meanwhile
//! ```
//!
//! The hosted machine and the bootable image are stages; the command compares what they count. The
//! kernel does not know this folder.

mod drill;
pub mod plan;
mod stage;

pub use drill::{Failure, drill};
pub use stage::{PROGRAM_FILE, PROGRAM_START, Stage, program_area};
