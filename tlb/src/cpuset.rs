//! CPU numbers, and sets of them, sized by the embedder.

use core::fmt;

use crate::sync::{AtomicU64, Ordering, array_of, const_fn};

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

/// Storage for a set of CPUs: 64 to a word. Implemented for `[AtomicU64; WORDS]`, so an embedder
/// picks 1 word for up to 64 CPUs, 64 words for up to 4096.
///
/// Sealed: if an implementor could share the words with other code, that code could take CPUs out
/// of a cpumask.
#[expect(private_bounds, reason = "seals the trait")]
pub trait CpuBits: Words + fmt::Debug + Send + Sync + 'static {}

/// What [`CpuBits`] asks of a type; private, so that the trait is sealed.
pub(crate) trait Words: Sized {
    /// The empty set, in a constant: a function of a trait cannot be `const`.
    #[cfg(not(mmu_loom))]
    const EMPTY: Self;
    /// The empty set: loom's atomics are made at run time.
    #[cfg(mmu_loom)]
    fn empty() -> Self;
    /// The words, lowest CPU numbers first.
    fn words(&self) -> &[AtomicU64];
}

/// The empty set of some storage, in a function made with `const_fn!`.
#[cfg(not(mmu_loom))]
macro_rules! empty_words {
    ($bits:ty) => {
        <$bits>::EMPTY
    };
}
#[cfg(mmu_loom)]
macro_rules! empty_words {
    ($bits:ty) => {
        <$bits>::empty()
    };
}
pub(crate) use empty_words;

impl<const WORDS: usize> CpuBits for [AtomicU64; WORDS] {}

impl<const WORDS: usize> Words for [AtomicU64; WORDS] {
    #[cfg(not(mmu_loom))]
    const EMPTY: Self = {
        assert!(WORDS > 0 && WORDS <= 64, "a set has room for 64 to 4096 CPUs");
        array_of!(AtomicU64::new(0); WORDS)
    };
    #[cfg(mmu_loom)]
    fn empty() -> Self {
        const { assert!(WORDS > 0 && WORDS <= 64, "a set has room for 64 to 4096 CPUs") };
        array_of!(AtomicU64::new(0); WORDS)
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// A set of CPUs that other CPUs may join and leave meanwhile. Linux: struct cpumask.
///
/// A set of more than one word remembers which of its words ever had a member, and looks at no
/// other word. So the cost of going through a large set does not grow with the CPUs that were never
/// in it.
///
/// ```
/// use core::sync::atomic::AtomicU64;
/// use mmu_tlb::{CpuId, CpuSet};
///
/// // Two words: room for 128 CPUs.
/// let mut cpus = CpuSet::<[AtomicU64; 2]>::empty();
/// cpus.insert(CpuId::new(70));
/// cpus.insert(CpuId::new(3));
/// assert!(cpus.iter().eq([3, 70].map(CpuId::new)));
/// ```
#[doc(alias = "cpumask")]
pub struct CpuSet<B: CpuBits> {
    bits: B,
    /// Bit n: word n has had a member. The bit is never cleared while others see the set, because
    /// clearing it would race with a CPU that joins. Not used with a single word.
    used: AtomicU64,
}

impl<B: CpuBits> CpuSet<B> {
    const_fn! {
        /// The empty set.
        #[must_use]
        pub fn empty() -> Self {
            Self { bits: empty_words!(B), used: AtomicU64::new(0) }
        }
    }

    /// Adds `cpu` with a locked instruction, unless it is a member already: then the line is not
    /// written.
    ///
    /// # Panics
    /// If `cpu` does not fit the storage.
    #[inline]
    pub(crate) fn set(&self, cpu: CpuId) {
        let (word, bit) = self.place(cpu);
        if word.load(Ordering::Relaxed) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
        // ORDERING: after the bit, before the caller's full fence (S3 in switch.rs): whoever must
        // see the bit sees this one, too.
        let used = self.used_bit(cpu);
        if used != 0 && self.used.load(Ordering::Relaxed) & used == 0 {
            self.used.fetch_or(used, Ordering::SeqCst);
        }
    }

    /// Removes `cpu` with a locked instruction. Only the CPU itself calls this, once the address
    /// space is no longer in its CR3.
    ///
    /// # Panics
    /// If `cpu` does not fit the storage.
    pub(crate) fn clear(&self, cpu: CpuId) {
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
    ///
    /// # Panics
    /// If `cpu` does not fit the storage.
    pub fn insert(&mut self, cpu: CpuId) {
        let (word, bit) = self.place(cpu);
        word.store(word.load(Ordering::Relaxed) | bit, Ordering::Relaxed);
        self.used.store(self.used.load(Ordering::Relaxed) | self.used_bit(cpu), Ordering::Relaxed);
    }

    /// Adds every member of `other` to a set that nobody else sees.
    pub fn insert_all(&mut self, other: &Self) {
        let mut used = self.used.load(Ordering::Relaxed);
        for (number, theirs) in other.used_words() {
            let mine = &self.bits.words()[number as usize];
            // ORDERING: acquire, pairs with `clear`, as in `words_without`: reclaim frees pages
            // without asking a CPU that it does not find here, and that CPU's last use of them must
            // come first.
            let theirs = theirs.load(Ordering::Acquire);
            mine.store(mine.load(Ordering::Relaxed) | theirs, Ordering::Relaxed);
            used |= 1 << number;
        }
        self.used.store(used, Ordering::Relaxed);
    }

    /// Makes an empty set, which others remove members from later, the same as `other`.
    pub(crate) fn copy_from(&self, other: &Self) {
        // First, so that the set is not taken for empty when the first word is there.
        let used = self.used.load(Ordering::Relaxed) | other.used.load(Ordering::Relaxed);
        self.used.store(used, Ordering::Relaxed);
        for (number, theirs) in other.used_words() {
            self.bits.words()[number as usize].store(theirs.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Removes every member of a set that nobody else sees.
    pub fn clear_all(&mut self) {
        for (_, word) in self.used_words() {
            word.store(0, Ordering::Relaxed);
        }
        self.used.store(0, Ordering::Relaxed);
    }

    /// Whether there is no member now.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        // ORDERING: acquire, pairs with `clear`: what the members did before they left comes first.
        self.used_words().all(|(_, word)| word.load(Ordering::Acquire) == 0)
    }

    /// How many members there are now.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.used_words().map(|(_, word)| word.load(Ordering::Relaxed).count_ones()).sum()
    }

    /// The members, lowest first. Each word is read once.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = CpuId> + '_ {
        // ORDERING: as in `words_without`.
        self.used_words().flat_map(|(number, word)| {
            members(word.load(Ordering::Acquire)).map(move |bit| CpuId(number * 64 + bit))
        })
    }

    /// Whether there are members other than `cpu`.
    #[inline]
    pub(crate) fn has_others(&self, cpu: CpuId) -> bool {
        self.words_without(cpu).any(|(_, others)| others != 0)
    }

    /// Calls `f` for the members other than `cpu`, lowest first. Each word is read once.
    #[inline]
    pub(crate) fn for_each_but(&self, cpu: CpuId, mut f: impl FnMut(CpuId)) {
        for (number, others) in self.words_without(cpu) {
            members(others).for_each(|bit| f(CpuId(number * 64 + bit)));
        }
    }

    /// The words that may have members, with their numbers and without `cpu`.
    #[inline]
    fn words_without(&self, cpu: CpuId) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.used_words().map(move |(number, word)| {
            // ORDERING: acquire, pairs with `clear`: whoever does not find a CPU here frees pages
            // and tables without asking it, and that CPU's last use of them must come first.
            let bits = word.load(Ordering::Acquire);
            (number, if number == cpu.0 / 64 { bits & !(1 << (cpu.0 % 64)) } else { bits })
        })
    }

    /// The words that may have members, with their numbers.
    #[inline]
    fn used_words(&self) -> impl Iterator<Item = (u32, &AtomicU64)> + '_ {
        let words = self.bits.words();
        let used = if words.len() == 1 { 1 } else { self.used.load(Ordering::Relaxed) };
        members(used).map(move |number| (number, &words[number as usize]))
    }

    /// The bit in `used` for the word that `cpu` is in; 0 for a set of one word.
    #[inline]
    fn used_bit(&self, cpu: CpuId) -> u64 {
        if self.bits.words().len() == 1 { 0 } else { 1 << (cpu.index() / 64) }
    }

    #[inline]
    fn place(&self, cpu: CpuId) -> (&AtomicU64, u64) {
        let words = self.bits.words();
        assert!(cpu.index() / 64 < words.len(), "{cpu} does not fit a set of {} CPUs", words.len() * 64);
        (&words[cpu.index() / 64], 1 << (cpu.index() % 64))
    }
}

/// The numbers of the bits that are set, lowest first.
#[inline]
pub(crate) fn members(mut bits: u64) -> impl Iterator<Item = u32> {
    core::iter::from_fn(move || {
        let lowest = (bits != 0).then(|| bits.trailing_zeros())?;
        bits &= bits - 1;
        Some(lowest)
    })
}

impl<B: CpuBits> fmt::Debug for CpuSet<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|cpu| cpu.0)).finish()
    }
}

#[cfg(all(test, not(mmu_loom)))]
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
    fn a_large_set_looks_only_at_words_that_had_a_member() {
        let set = CpuSet::<[AtomicU64; 64]>::empty();
        assert_eq!(set.used_words().count(), 0);
        set.set(CpuId::new(4095));
        set.set(CpuId::new(70));
        set.clear(CpuId::new(70));
        assert!(set.used_words().map(|(number, _)| number).eq([1, 63]));
        set.set(CpuId::new(70));
        assert!(set.iter().eq([70, 4095].map(CpuId::new)));
        let mut batch = CpuSet::<[AtomicU64; 64]>::empty();
        batch.insert(CpuId::new(200));
        batch.insert_all(&set);
        assert!(batch.iter().eq([70, 200, 4095].map(CpuId::new)));
        batch.clear_all();
        assert!(batch.is_empty() && batch.used_words().next().is_none());
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_cpu_beyond_the_storage_is_refused() {
        CpuSet::<[AtomicU64; 1]>::empty().set(CpuId::new(64));
    }
}
