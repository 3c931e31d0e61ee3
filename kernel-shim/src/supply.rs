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
    /// Once: the request with this number from now on, the next one being number 1.
    Nth(u32),
}

/// What may be scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scarce {
    /// Pages for the batches of a gather.
    Batches,
    /// Page tables.
    Tables,
    /// Frames for the pages of programs.
    Frames,
}

/// Where something was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// A page for a batch of a gather: of pages, or of tables.
    Batch,
    /// The top table of a new address space.
    Root,
    /// A table below it.
    Table,
    /// A page of a program: a new one, a copy, or one that comes from swap.
    Page,
    /// A page of a file that is not in the cache.
    FilePage,
    /// The frame of the device.
    DeviceFrame,
    /// A 2 MiB page.
    Block,
    /// 16 pages of a program at once.
    Folio,
}

impl Site {
    const ALL: [Self; 8] = [
        Self::Batch,
        Self::Root,
        Self::Table,
        Self::Page,
        Self::FilePage,
        Self::DeviceFrame,
        Self::Block,
        Self::Folio,
    ];
}

/// What was asked for since the supply was set to [`Supply::Nth`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// How often.
    pub requests: u64,
    /// Where the last one was refused, if one was.
    pub refused: Option<Site>,
}

/// A [`Supply`] that can be changed while CPUs ask.
#[derive(Debug)]
pub(crate) struct Pressure {
    /// 0: always; n: not each n-th request; with [`ONCE`], not the n-th.
    every: AtomicU64,
    requests: AtomicU64,
    /// One more than the place in [`Site::ALL`].
    refused: AtomicU64,
}

/// One request alone is refused.
const ONCE: u64 = 1 << 63;

impl Pressure {
    pub(crate) fn new(supply: Supply) -> Self {
        let pressure =
            Self { every: AtomicU64::new(0), requests: AtomicU64::new(0), refused: AtomicU64::new(0) };
        pressure.set(supply);
        pressure
    }

    pub(crate) fn set(&self, supply: Supply) {
        let every = match supply {
            Supply::Always => 0,
            Supply::Never => 1,
            Supply::ExceptEvery(every) => u64::from(every.max(1)),
            Supply::Nth(number) => {
                self.requests.store(0, Ordering::Relaxed);
                self.refused.store(0, Ordering::Relaxed);
                u64::from(number.max(1)) | ONCE
            }
        };
        self.every.store(every, Ordering::Relaxed);
    }

    /// Whether this request is granted.
    pub(crate) fn grants(&self, site: Site) -> bool {
        let every = self.every.load(Ordering::Relaxed);
        if every == 0 {
            return true;
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let is_refused =
            if every & ONCE == 0 { number.is_multiple_of(every) } else { number == every & !ONCE };
        if is_refused {
            self.refused.store(site as u64 + 1, Ordering::Relaxed);
        }
        !is_refused
    }

    pub(crate) fn asked(&self) -> Asked {
        let refused = self.refused.load(Ordering::Relaxed);
        let refused = Site::ALL.into_iter().find(|site| *site as u64 + 1 == refused);
        Asked { requests: self.requests.load(Ordering::Relaxed), refused }
    }
}
