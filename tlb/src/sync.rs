//! The atomics of this crate: those of `core`, or loom's when the protocol is model-checked, or recorded ones in unit tests.

#[cfg(all(test, not(loom)))]
pub(crate) use crate::recorded::{AtomicBool, AtomicPtr, AtomicU16, AtomicU64};
#[cfg(not(any(test, loom)))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU16, AtomicU64};
#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU16, AtomicU64, Ordering, fence};
