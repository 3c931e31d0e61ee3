//! Atomics that write down each access: which cache line, read or written, from where in the
//! source.
//!
//! They stand in for those of `core` in this crate's own unit tests, and nowhere else: see
//! `sync.rs`. In this crate, what CPUs share and change is atomic, so every write that takes a line
//! from another CPU is recorded. Reads of what never changes are not recorded: a request, on the
//! stack of the CPU that sent it, and the name and root of an address space.
extern crate std;

use core::cell::RefCell;
use core::fmt;
use core::panic::Location;
use core::sync::atomic::{self, Ordering};
use std::vec::Vec;

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// A cache line, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Line(usize);

impl Line {
    /// The lines that `value` lies in.
    pub(crate) fn all_of<T>(value: &T) -> core::ops::RangeInclusive<Self> {
        let first = core::ptr::from_ref(value).addr();
        Self(first / LINE_BYTES)..=Self((first + size_of::<T>().max(1) - 1) / LINE_BYTES)
    }
}

/// What was done to a line. Whoever writes takes the line away from every other CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    /// Also an access that reads and writes, whether or not it changes anything.
    Write,
}

/// One access.
#[derive(Clone, Copy)]
pub(crate) struct Access {
    pub(crate) line: Line,
    pub(crate) kind: Kind,
    /// Where in the source.
    place: &'static Location<'static>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of line {:#x} at {}", self.kind, self.line.0, self.place)
    }
}

std::thread_local! {
    static LOG: RefCell<Option<Vec<Access>>> = const { RefCell::new(None) };
}

/// Every access that `work` makes on this thread. A recording inside `work` keeps its accesses to
/// itself.
pub(crate) fn record(work: impl FnOnce()) -> Vec<Access> {
    let outer = LOG.replace(Some(Vec::new()));
    work();
    LOG.replace(outer).expect("a recording inside puts back what it found")
}

#[track_caller]
fn note<T>(atomic: &T, kind: Kind) {
    let access = Access { line: *Line::all_of(atomic).start(), kind, place: Location::caller() };
    LOG.with_borrow_mut(|log| {
        if let Some(log) = log {
            log.push(access);
        }
    });
}

/// Methods of an atomic, each of which is written down, then done.
macro_rules! methods {
    ($($kind:ident $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(#[track_caller]
        pub(crate) fn $name(&self, $($argument: $type),*) -> $result {
            note(self, Kind::$kind);
            self.0.$name($($argument),*)
        })*
    };
}

macro_rules! recorded {
    ($visible:vis $name:ident $(<$generic:ident>)?, $value:ty) => {
        #[derive(Debug)]
        #[repr(transparent)]
        $visible struct $name $(<$generic>)? (atomic::$name $(<$generic>)?);

        impl $(<$generic>)? $name $(<$generic>)? {
            pub(crate) const fn new(value: $value) -> Self {
                Self(atomic::$name::new(value))
            }

            methods! {
                Read load(order: Ordering) -> $value;
                Write store(value: $value, order: Ordering) -> ();
            }
        }
    };
}

recorded!(pub(crate) AtomicBool, bool);
recorded!(pub(crate) AtomicU16, u16);
recorded!(pub(crate) AtomicPtr<T>, *mut T);
// `CpuBits` is public and hands these out.
recorded!(pub AtomicU64, u64);

impl AtomicU64 {
    methods! {
        Write fetch_add(value: u64, order: Ordering) -> u64;
        Write swap(value: u64, order: Ordering) -> u64;
        Write fetch_or(value: u64, order: Ordering) -> u64;
        Write fetch_and(value: u64, order: Ordering) -> u64;
        Write compare_exchange(old: u64, new: u64, done: Ordering, not: Ordering) -> Result<u64, u64>;
        Write compare_exchange_weak(old: u64, new: u64, done: Ordering, not: Ordering) -> Result<u64, u64>;
    }
}
