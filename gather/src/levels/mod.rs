//! How much of the engine a kernel takes: what differs between one level and the next.
//!
//! ```text
//!                walks and clears     flushes              files
//!  all of it     the engine           the engine           flush_tlb.rs: any `Cpus`
//!  own flush     the engine           the kernel           flush_tlb.rs, context.rs
//!  own walk      the kernel           the kernel           page_gather.rs
//! ```
//!
//! In: what a gather must have flushed, or (page_gather.rs) what the kernel has cleared. Out: the
//! flush, of the engine's or of the kernel's making. The gather uses it through flush_policy.rs;
//! kernels implement [`FlushTlb`](crate::FlushTlb), or have it by [`Cpus`](mmu_tlb::Cpus).

pub(crate) mod context;
pub(crate) mod flush_tlb;
pub(crate) mod page_gather;
