//! A device that uses programs' memory through their own page tables: an IOMMU with shared virtual
//! addresses.
//!
//! It walks at any moment, caches what it walks through, pages and tables, and reads and writes
//! through what it has cached. No interrupt and no CR3 load reaches it: it forgets what the
//! kernel's hook for secondary TLBs names, and nothing else. So a frame that is freed while the
//! device has it cached was freed without a call of the hook, or before it.
//!
//! Of an address space that ends it knows no more than that its root was freed.

use std::sync::Mutex;

use mmu_gather::tlb::CtxId;
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Caches;

/// The address spaces that the device uses.
#[derive(Debug, Default)]
pub(crate) struct SharedSpaces(pub(crate) Mutex<Vec<Shared>>);

/// One of them, and what the device has cached of it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) ctx_id: CtxId,
    pub(crate) root: PhysFrame,
    pub(crate) caches: Caches,
}
