//! Choices that depend on the seed and on nothing else.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::memory::index;

/// A source of choices that CPUs share. Order of use decides, so it is only as deterministic as the
/// schedule.
///
/// SplitMix64 (Steele, Lea, Flood 2014): one addition and a mix, on an atomic. CPUs share it
/// without a lock at every seam, so it is not one of `rand`, whose generators want `&mut`. Nothing
/// else in this crate is random.
#[derive(Debug)]
pub struct Choices(AtomicU64);

impl Choices {
    /// The choices of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// 64 bits, any with the same chance.
    #[inline]
    pub fn bits(&self) -> u64 {
        let mut bits =
            self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed).wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `bound`, which is not zero.
    #[inline]
    pub fn below(&self, bound: u64) -> u64 {
        // The high half of the product: the bias is below 2^-32 for the bounds used here.
        self.bits().carrying_mul(bound, 0).1
    }

    /// The index of one of `len` things; 0 if there are none.
    #[inline]
    pub fn pick(&self, len: usize) -> usize {
        index(self.below(len as u64))
    }

    /// True once in `times`.
    #[inline]
    pub fn one_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }
}
