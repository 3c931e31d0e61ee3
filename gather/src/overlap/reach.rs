//! How far a gather reaches: which counts it is in, and which others matter to it.

use mmu_pagetable::{Level, VirtRange};

use crate::overlap::counts::{Count, NR_STRIPES, OpenGathers};

/// The counts that a gather is in while it is open. They stay the same until it is closed.
pub(crate) trait Counted: Copy {
    /// Counts a gather in.
    fn open(self, gathers: &OpenGathers<'_>);

    /// Counts it out.
    fn close(self, gathers: &OpenGathers<'_>);

    /// Whether another gather is open that may have changed what this one has looked at. The gather
    /// that asks is counted, too.
    fn has_others(self, gathers: &OpenGathers<'_>) -> bool;
}

/// The stripe of one last-level table, for a gather that looks into no other.
///
/// INVARIANT: G6, all addresses of one last-level table have one stripe. Whoever changes an entry
/// that a gather of one stripe can find empty is counted in that stripe, or everywhere: it changes
/// an address of the same table, or a larger range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TableStripe(u8);

impl TableStripe {
    #[inline(always)]
    pub(crate) const fn of(address: u64) -> Self {
        // Multiplied, because areas of threads lie a power of two apart: the low bits of their
        // numbers are the same.
        let table = address >> Level::Pmd.entry_shift();
        let [.., high] = table.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        Self(high >> (u8::BITS - NR_STRIPES.ilog2()))
    }
}

impl Counted for TableStripe {
    #[inline(always)]
    fn open(self, gathers: &OpenGathers<'_>) {
        gathers.stripes.count(self.0).open();
    }

    #[inline(always)]
    fn close(self, gathers: &OpenGathers<'_>) {
        gathers.stripes.count(self.0).close();
    }

    #[inline(always)]
    fn has_others(self, gathers: &OpenGathers<'_>) -> bool {
        // One is the gather that asks.
        gathers.stripes.count(self.0).get() + gathers.everywhere.get() > 1
    }
}

/// A gather that looks into one last-level table, with the count that it is in at hand: for the
/// path of one page, which keeps it in a register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InTable<'a> {
    stripe: &'a Count,
}

impl<'a> InTable<'a> {
    #[inline(always)]
    pub(crate) fn of(gathers: &OpenGathers<'a>, address: u64) -> Self {
        Self { stripe: gathers.stripes.count(TableStripe::of(address).0) }
    }
}

impl Counted for InTable<'_> {
    #[inline(always)]
    fn open(self, _: &OpenGathers<'_>) {
        self.stripe.open();
    }

    #[inline(always)]
    fn close(self, _: &OpenGathers<'_>) {
        self.stripe.close();
    }

    #[inline(always)]
    fn has_others(self, gathers: &OpenGathers<'_>) -> bool {
        // One is the gather that asks.
        self.stripe.get() + gathers.everywhere.get() > 1
    }
}

/// How far a gather reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Anywhere.
    Everywhere,
    /// One table, or two of one stripe.
    Table(TableStripe),
    /// Two tables of different stripes.
    Tables(TableStripe, TableStripe),
}

impl Reach {
    /// The reach of a gather that looks at `range` alone, and unhooks no table.
    #[inline]
    pub(crate) const fn of(range: VirtRange) -> Self {
        let (first, last) = (range.start(), range.end() - 1);
        let shift = Level::Pmd.entry_shift();
        if (last >> shift) - (first >> shift) > 1 {
            return Self::Everywhere;
        }
        let (first, last) = (TableStripe::of(first), TableStripe::of(last));
        if first.0 == last.0 { Self::Table(first) } else { Self::Tables(first, last) }
    }

    /// As [`has_others`](Counted::has_others), for what was looked at in one last-level table, the
    /// one of `address`. A gather that reaches everywhere needs to ask one stripe then, not all.
    #[inline(always)]
    pub(crate) fn has_others_in_table(self, gathers: &OpenGathers<'_>, address: u64) -> bool {
        match self {
            Self::Everywhere => TableStripe::of(address).has_others(gathers),
            _ => self.has_others(gathers),
        }
    }
}

impl Counted for Reach {
    #[inline(always)]
    fn open(self, gathers: &OpenGathers<'_>) {
        match self {
            Self::Everywhere => gathers.everywhere.open(),
            Self::Table(stripe) => stripe.open(gathers),
            Self::Tables(first, last) => {
                first.open(gathers);
                last.open(gathers);
            }
        }
    }

    #[inline(always)]
    fn close(self, gathers: &OpenGathers<'_>) {
        match self {
            Self::Everywhere => gathers.everywhere.close(),
            Self::Table(stripe) => stripe.close(gathers),
            Self::Tables(first, last) => {
                first.close(gathers);
                last.close(gathers);
            }
        }
    }

    #[inline(always)]
    fn has_others(self, gathers: &OpenGathers<'_>) -> bool {
        match self {
            Self::Everywhere => gathers.everywhere.get() > 1 || gathers.stripes.any_open(),
            Self::Table(stripe) => stripe.has_others(gathers),
            Self::Tables(first, last) => first.has_others(gathers) || last.has_others(gathers),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u64 = 1 << 21;

    fn range(start: u64, end: u64) -> VirtRange {
        VirtRange::new(start, end).expect("a good range")
    }

    #[test]
    fn every_address_of_a_table_has_its_stripe() {
        for table in [0, 1, 511, 512, 0x3ff_ffff] {
            let first = TableStripe::of(table * TABLE);
            assert_eq!(first, TableStripe::of(table * TABLE + 4096));
            assert_eq!(first, TableStripe::of((table + 1) * TABLE - 1));
        }
    }

    #[test]
    fn areas_a_power_of_two_apart_use_all_stripes() {
        for shift in 21..40 {
            let mut used = [false; NR_STRIPES];
            for area in 0..16 * NR_STRIPES as u64 {
                used[usize::from(TableStripe::of(0x7f00_0000_0000 + (area << shift)).0)] = true;
            }
            let used = used.into_iter().filter(|used| *used).count();
            assert!(used >= NR_STRIPES * 3 / 4, "{used} stripes for areas {shift} bits apart");
        }
    }

    #[test]
    fn a_gather_reaches_every_table_of_its_range() {
        assert!(matches!(Reach::of(range(0, TABLE)), Reach::Table(_)), "a table, to its last page");
        for start in (0..2 * TABLE).step_by(4096) {
            match Reach::of(range(start, start + TABLE)) {
                Reach::Everywhere => panic!("at most two tables"),
                Reach::Table(stripe) => {
                    assert_eq!(stripe, TableStripe::of(start));
                    assert_eq!(stripe, TableStripe::of(start + TABLE - 1));
                }
                Reach::Tables(first, last) => {
                    assert_eq!(first, TableStripe::of(start));
                    assert_eq!(last, TableStripe::of(start + TABLE - 1));
                }
            }
        }
        assert_eq!(Reach::of(range(TABLE - 4096, 2 * TABLE + 4096)), Reach::Everywhere);
    }

    #[test]
    fn each_gather_sees_the_others_that_may_have_looked_where_it_has() {
        let other_stripe =
            (1..).map(|table| table * TABLE).find(|address| TableStripe::of(*address) != TableStripe::of(0));
        let there = other_stripe.expect("there is more than one stripe");
        let (here, there) = (Reach::Table(TableStripe::of(0)), Reach::Table(TableStripe::of(there)));
        let (Reach::Table(first), Reach::Table(last)) = (here, there) else { unreachable!() };
        let both = Reach::Tables(first, last);
        let reaches = [here, there, both, Reach::Everywhere];
        for own in reaches {
            for other in reaches {
                let (everywhere, stripes) = OpenGathers::none();
                let gathers = OpenGathers { everywhere: &everywhere, stripes: &stripes };
                own.open(&gathers);
                assert!(!own.has_others(&gathers), "{own:?} takes itself for another");
                other.open(&gathers);
                let apart = (own == here && other == there) || (own == there && other == here);
                assert_eq!(own.has_others(&gathers), !apart, "{own:?} beside {other:?}");
                if own == Reach::Everywhere {
                    let in_table = own.has_others_in_table(&gathers, 0);
                    assert_eq!(in_table, other != there, "{other:?}, looked at from everywhere");
                }
                other.close(&gathers);
                assert!(!own.has_others(&gathers), "{other:?} is closed");
                own.close(&gathers);
                assert_eq!(gathers.sum(), 0);
            }
        }
    }
}
