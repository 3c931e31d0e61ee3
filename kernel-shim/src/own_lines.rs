//! What CPUs write, kept off the lines of what they read.

use core::ops::Deref;

use static_assertions::const_assert_eq;

/// A value on cache lines of its own: writing to it takes nothing from a CPU that reads what lies beside it.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct OwnLines<T>(T);

const_assert_eq!(size_of::<OwnLines<u8>>(), 64);
const_assert_eq!(align_of::<OwnLines<u8>>(), 64);

impl<T> OwnLines<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(value)
    }
}

impl<T> Deref for OwnLines<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}
