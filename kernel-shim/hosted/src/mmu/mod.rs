//! The software MMU of one CPU: what hardware may cache, use and forget.
//!
//! ```text
//!  in    accesses and speculation at an address     access, walk
//!        INVLPG, INVPCID, CR3 loads, INVLPGB        invalidate, broadcast
//!        memory, as a walk reads and writes it      physical
//!        which vendor's CPU it is                   features
//!
//!        state: the control registers, and one space a PCID
//!               spaces: tlb_cache, structure_cache
//!
//!  out   a frame reached, or a fault                access
//!        what names a frame, as it comes and goes   watch
//! ```
//!
//! It caches whatever the architecture lets it cache and drops only what the architecture promises
//! to drop, so that a flush which software owes and forgets shows. `arch` has the architecture's
//! own words: addresses, levels, rights, and what an entry means.
//!
//! It knows nothing of this crate outside this folder. The machine owns one a CPU, the device one
//! an address space; the checker reads all of them.

mod access;
pub mod arch;
pub mod broadcast;
pub mod features;
pub mod invalidate;
pub mod physical;
mod spaces;
mod state;
pub mod structure_cache;
pub mod tlb_cache;
mod translate;
pub mod walk;
pub mod watch;

pub use access::{Access, AccessKind, AccessMode, Fault, GeneralProtection, PageFault, Source, Start};
pub use state::{Mmu, PCID_ZERO};
pub use translate::Begun;
