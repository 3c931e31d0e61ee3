//! The CPUs that one waits for, which take themselves out as they answer.

use core::sync::atomic::{AtomicU64, Ordering};

use mmu_gather::tlb::CpuId;

use crate::options::Options;

/// A set of the machine's CPUs.
#[derive(Debug)]
pub(crate) struct Awaited([AtomicU64; WORDS]);

const WORDS: usize = Options::MOST_CPUS as usize / 64;

/// Whether there is anybody in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaits {
    Nobody,
    Somebody,
}

impl Awaited {
    pub(crate) const fn nobody() -> Self {
        Self([const { AtomicU64::new(0) }; WORDS])
    }

    /// These from now on, and no others.
    pub(crate) fn set(&self, cpus: impl Iterator<Item = CpuId>) -> Awaits {
        self.clear();
        let mut awaits = Awaits::Nobody;
        for cpu in cpus {
            awaits = Awaits::Somebody;
            let (word, bit) = place_of(cpu);
            self.0[word].fetch_or(bit, Ordering::Relaxed);
        }
        awaits
    }

    pub(crate) fn clear(&self) {
        for word in &self.0 {
            word.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn remove(&self, cpu: CpuId) {
        let (word, bit) = place_of(cpu);
        self.0[word].fetch_and(!bit, Ordering::Relaxed);
    }

    pub(crate) fn contains(&self, cpu: CpuId) -> bool {
        let (word, bit) = place_of(cpu);
        self.0[word].load(Ordering::Relaxed) & bit != 0
    }
}

const fn place_of(cpu: CpuId) -> (usize, u64) {
    (cpu.index() / 64, 1 << (cpu.index() % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cpu_is_awaited_until_it_has_answered() {
        let awaited = Awaited::nobody();
        let cpus = [0, 63, 64, 191].map(CpuId::new);
        assert_eq!(awaited.set(cpus.into_iter()), Awaits::Somebody);
        for (number, cpu) in cpus.into_iter().enumerate() {
            assert!(cpus[number..].iter().all(|cpu| awaited.contains(*cpu)));
            awaited.remove(cpu);
            assert!(!awaited.contains(cpu));
        }
        assert_eq!(awaited.set(core::iter::empty()), Awaits::Nobody);
    }
}
