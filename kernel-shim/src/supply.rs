//! Memory pressure: whether what is asked for is had, so that the paths without memory run.

use core::sync::atomic::{AtomicU64, Ordering};

/// When something that is asked for is refused, although there is memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Supply {
    /// Never.
    #[default]
    Always,
    /// Every time.
    Never,
    /// Each time the number of requests so far is a multiple of this; 1 is every time.
    ExceptEvery(u32),
}

/// A [`Supply`] that can be changed while CPUs ask.
#[derive(Debug)]
pub(crate) struct Pressure {
    /// 0: always; n: not each n-th request.
    every: AtomicU64,
    requests: AtomicU64,
}

impl Pressure {
    pub(crate) fn new(supply: Supply) -> Self {
        let pressure = Self { every: AtomicU64::new(0), requests: AtomicU64::new(0) };
        pressure.set(supply);
        pressure
    }

    pub(crate) fn set(&self, supply: Supply) {
        let every = match supply {
            Supply::Always => 0,
            Supply::Never => 1,
            Supply::ExceptEvery(every) => u64::from(every.max(1)),
        };
        self.every.store(every, Ordering::Relaxed);
    }

    /// Whether this request is granted.
    pub(crate) fn grants(&self) -> bool {
        let every = self.every.load(Ordering::Relaxed);
        every == 0 || !(self.requests.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(every)
    }
}
