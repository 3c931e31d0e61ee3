//! .

pub mod arch;
pub mod broadcast;
pub mod features;
pub mod invalidate;
pub mod mmu;
pub mod physical;
mod spaces;
pub mod structure_cache;
pub mod tlb_cache;
pub mod walk;
pub mod watch;
