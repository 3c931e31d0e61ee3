//! What some machines are and others are not, drawn for each sequence: sizes of caches, how large
//! pages are kept, when CPUs speculate.
//!
//! Each is a word of a sequence's `mmu` line. Software must be right on every combination.

use core::fmt;

use crate::mmu::features::{Capacity, Coexisting, Faults, Features, InvlpgGlobals, LargePages, Tlbs};
use crate::options::{Cores, Eagerness, Options, Stores};
use crate::random::Choices;

macro_rules! quirks {
    ($($name:ident, $word:literal, $one_in:literal, $means:literal;)*) => {
        /// Something that a machine may be.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Quirk { $(#[doc = $means] $name,)* }

        impl Quirk {
            /// All of them. New ones come last: saved bytes name them by their number.
            pub const ALL: [Self; [$($word),*].len()] = [$(Self::$name),*];

            /// What stands in the line of a sequence that says what its machine is.
            pub(crate) const MMU_LINE: &'static str = concat!(
                "mmu, then pcid or nopcid, intel or amd, keeper or forgetter; then, if at all, late-dirty, device, la57, frames=N",
                $(", ", $word),*
            );

            /// The word in the text of a sequence.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)* }
            }

            /// What it means.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => $means,)* }
            }

            /// One sequence in so many has it.
            const fn one_in(self) -> u64 {
                match self { $(Self::$name => $one_in,)* }
            }
        }
    };
}

quirks! {
    SmallCaches, "small-caches", 10, "CPUs hold few translations, and few entries that lead to tables.";
    NoTlb, "no-tlb", 24, "CPUs hold no translation: each access walks, from what leads to tables.";
    NoUppers, "no-uppers", 12, "CPUs hold nothing that leads to tables: each walk begins at CR3.";
    Hybrid, "hybrid", 10, "Every second CPU has small caches, as the small cores of such a processor.";
    Pieces, "pieces", 4, "Large pages are kept in pieces of 4 KiB.";
    LargestFirst, "largest-first", 4, "Of several translations for one address the largest is used.";
    Rewalk, "rewalk", 4, "A fault that something cached led to is reported only after a walk from CR3 faults, too.";
    KeepsGlobals, "keeps-globals", 8, "INVLPG misses global translations while PCIDs are on.";
    SplitTlb, "split-tlb", 3, "Instruction fetches have translations of their own.";
    Ahead, "ahead", 4, "CPUs speculate where no program has been: at what has just been linked, and wherever tables lead.";
    Stores, "stores", 2, "Programs store at any moment through what their CPUs have cached and not stored through yet.";
    Variant1, "variant1", 6, "The kernel runs as the first of its other variants, if it has one.";
    Variant2, "variant2", 3, "The kernel runs as the second of its other variants, if it has one.";
}

/// A set of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Quirks(u16);

const _: () = assert!(Quirk::ALL.len() <= 16);

impl Quirks {
    /// The set with `quirk`.
    #[must_use]
    pub const fn with(self, quirk: Quirk) -> Self {
        Self(self.0 | 1 << quirk as u32)
    }

    /// The set without `quirk`.
    #[must_use]
    pub const fn without(self, quirk: Quirk) -> Self {
        Self(self.0 & !(1 << quirk as u32))
    }

    /// Whether `quirk` is in it.
    #[must_use]
    pub const fn has(self, quirk: Quirk) -> bool {
        self.0 >> quirk as u32 & 1 != 0
    }

    /// Those in it.
    pub fn iter(self) -> impl Iterator<Item = Quirk> {
        Quirk::ALL.into_iter().filter(move |quirk| self.has(*quirk))
    }

    /// A set by chance.
    pub(crate) fn draw(choices: &Choices) -> Self {
        let drawn = Quirk::ALL.into_iter().filter(|quirk| choices.one_in(quirk.one_in()));
        drawn.fold(Self::default(), Self::with)
    }

    /// The set of these bits; those that mean nothing are left out.
    pub(crate) fn from_bits(bits: u16) -> Self {
        Quirk::ALL.into_iter().filter(|quirk| Self(bits).has(*quirk)).fold(Self::default(), Self::with)
    }

    pub(crate) const fn bits(self) -> u16 {
        self.0
    }

    /// The set with the quirk that this word names; `None` if it names none.
    pub(crate) fn with_word(self, word: &str) -> Option<Self> {
        Quirk::ALL.into_iter().find(|quirk| quirk.word() == word).map(|quirk| self.with(quirk))
    }

    /// `base` with everything in the set.
    pub(crate) fn apply(self, base: Options) -> Options {
        self.iter().fold(base, |options, quirk| Options {
            features: with(quirk, options.features),
            cores: if quirk == Quirk::Hybrid { Cores::EverySecondSmall } else { options.cores },
            stores: if quirk == Quirk::Stores { Stores::AnyTime } else { options.stores },
            eagerness: if quirk == Quirk::Ahead { Eagerness::Anywhere } else { options.eagerness },
            variants: match quirk {
                Quirk::Variant1 => [true, options.variants[1]],
                Quirk::Variant2 => [options.variants[0], true],
                _ => options.variants,
            },
            ..options
        })
    }
}

fn with(quirk: Quirk, features: Features) -> Features {
    match quirk {
        Quirk::SmallCaches => features.with_small_caches(),
        Quirk::NoTlb => Features { tlb_capacity: Capacity::AtMost(0), ..features },
        Quirk::NoUppers => Features { structure_capacity: Capacity::AtMost(0), ..features },
        Quirk::Pieces => Features { large_pages: LargePages::InPieces, ..features },
        Quirk::LargestFirst => Features { coexisting: Coexisting::LargestFirst, ..features },
        Quirk::Rewalk => Features { faults: Faults::AfterRewalk, ..features },
        Quirk::KeepsGlobals => Features { invlpg_globals: InvlpgGlobals::MissedWithPcid, ..features },
        Quirk::SplitTlb => Features { tlbs: Tlbs::Split, ..features },
        Quirk::Hybrid | Quirk::Ahead | Quirk::Stores | Quirk::Variant1 | Quirk::Variant2 => features,
    }
}

impl fmt::Display for Quirks {
    /// Their words, each with a space before it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|quirk| write!(f, " {}", quirk.word()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_word_of_its_own_and_changes_the_machine() {
        let base = Options::new(4, 1024, 1);
        for quirk in Quirk::ALL {
            let alone = Quirks::default().with(quirk);
            assert_eq!(Quirks::default().with_word(quirk.word()), Some(alone));
            assert_eq!(Quirks::from_bits(alone.bits()), alone);
            assert_eq!(alone.to_string(), format!(" {}", quirk.word()));
            let made = alone.apply(base);
            assert_ne!(format!("{made:?}"), format!("{base:?}"), "{quirk:?} changes nothing");
            assert_eq!(alone.without(quirk), Quirks::default());
        }
        assert_eq!(Quirks::default().with_word("intel"), None);
        assert_eq!(Quirks::from_bits(u16::MAX).iter().count(), Quirk::ALL.len());
    }

    #[test]
    fn each_is_drawn_and_none_always() {
        let choices = Choices::new(1);
        let drawn: Vec<Quirks> = (0..400).map(|_| Quirks::draw(&choices)).collect();
        for quirk in Quirk::ALL {
            let times = drawn.iter().filter(|drawn| drawn.has(quirk)).count();
            assert!((4..250).contains(&times), "{quirk:?}: {times} of 400");
        }
        assert!(drawn.contains(&Quirks::default()));
    }

    #[test]
    fn small_cores_are_no_larger_than_large_ones_and_lie_between_them() {
        let hybrid = Quirks::default().with(Quirk::Hybrid).with(Quirk::NoTlb).apply(Options::new(4, 1024, 1));
        let capacities =
            |cpu| (hybrid.features_of(cpu).tlb_capacity, hybrid.features_of(cpu).structure_capacity);
        assert_eq!(capacities(0), capacities(2));
        assert_eq!(capacities(1), (Capacity::AtMost(0), Capacity::AtMost(4)));
        assert_eq!(capacities(1), capacities(3));
        assert_ne!(capacities(0), capacities(1));
    }
}
