//! CPU numbers and sets of them, sized by the embedder.

use core::fmt;

use crate::sync::{AtomicU64, Ordering};

/// Number of a logical CPU, counted from 0 by the embedder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuId(u32);

impl CpuId {
    /// CPU number `id`.
    #[must_use]
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The number as an index.
    #[must_use]
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for CpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPU {}", self.0)
    }
}

/// Storage for a set of CPUs: 64 to a word. Implemented for `[AtomicU64; WORDS]`, so an embedder picks 1 word for up to
/// 64 CPUs, 64 words for up to 4096.
pub trait CpuBits: fmt::Debug + Send + Sync {
    /// A set without members.
    fn empty() -> Self;
    /// The words, lowest CPU numbers first.
    fn words(&self) -> &[AtomicU64];
}

impl<const WORDS: usize> CpuBits for [AtomicU64; WORDS] {
    fn empty() -> Self {
        core::array::from_fn(|_| AtomicU64::new(0))
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// A set of CPUs whose members other CPUs may add and remove meanwhile. Linux: struct cpumask.
#[doc(alias = "cpumask")]
pub struct CpuSet<B: CpuBits>(B);

impl<B: CpuBits> CpuSet<B> {
    /// The set without members.
    #[must_use]
    pub fn empty() -> Self {
        Self(B::empty())
    }

    /// Adds `cpu` with a locked instruction, unless it is there already: the line is not written then.
    ///
    /// # Panics
    /// If `cpu` does not fit the storage.
    #[inline]
    pub fn set(&self, cpu: CpuId) {
        let (word, bit) = self.place(cpu);
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Removes `cpu` with a locked instruction.
    ///
    /// # Panics
    /// If `cpu` does not fit the storage.
    pub fn clear(&self, cpu: CpuId) {
        let (word, bit) = self.place(cpu);
        word.fetch_and(!bit, Ordering::SeqCst);
    }

    /// Whether `cpu` is a member now.
    ///
    /// # Panics
    /// If `cpu` does not fit the storage.
    #[must_use]
    #[inline]
    pub fn contains(&self, cpu: CpuId) -> bool {
        let (word, bit) = self.place(cpu);
        word.load(Ordering::Relaxed) & bit != 0
    }

    /// Adds `cpu` to a set that nobody else sees.
    pub fn insert(&mut self, cpu: CpuId) {
        let (word, bit) = self.place(cpu);
        word.store(word.load(Ordering::Relaxed) | bit, Ordering::Relaxed);
    }

    /// Adds every member of `other` to a set that nobody else sees.
    pub fn insert_all(&mut self, other: &Self) {
        for (mine, theirs) in self.0.words().iter().zip(other.0.words()) {
            mine.store(mine.load(Ordering::Relaxed) | theirs.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Removes every member of a set that nobody else sees.
    pub fn clear_all(&mut self) {
        for word in self.0.words() {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Whether there is no member now.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.words().iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// How many members there are now.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.words().iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum()
    }

    /// The members, lowest first. Each word is read once.
    pub fn iter(&self) -> impl Iterator<Item = CpuId> + '_ {
        (0u32..).step_by(64).zip(self.0.words()).flat_map(|(base, word)| {
            let mut bits = word.load(Ordering::Relaxed);
            core::iter::from_fn(move || {
                let lowest = (bits != 0).then(|| bits.trailing_zeros())?;
                bits &= bits - 1;
                Some(CpuId(base + lowest))
            })
        })
    }

    #[inline]
    fn place(&self, cpu: CpuId) -> (&AtomicU64, u64) {
        let words = self.0.words();
        assert!(cpu.index() / 64 < words.len(), "{cpu} does not fit a set of {} CPUs", words.len() * 64);
        (&words[cpu.index() / 64], 1 << (cpu.index() % 64))
    }
}

impl<B: CpuBits> fmt::Debug for CpuSet<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|cpu| cpu.0)).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn members_come_back_in_order_across_words() {
        let set = CpuSet::<[AtomicU64; 64]>::empty();
        for id in [0, 63, 64, 4095] {
            set.set(CpuId::new(id));
        }
        set.clear(CpuId::new(63));
        let members: [CpuId; 3] = [0, 64, 4095].map(CpuId::new);
        assert!(set.iter().eq(members));
        assert_eq!(set.len(), 3);
        assert!(set.contains(CpuId::new(64)) && !set.contains(CpuId::new(63)));
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_cpu_beyond_the_storage_is_refused() {
        CpuSet::<[AtomicU64; 1]>::empty().set(CpuId::new(64));
    }
}
