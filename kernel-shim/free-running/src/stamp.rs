//! What programs write into pages: whose page it is, which, and since when.

use core::fmt;

/// A word of a page that says who wrote it. Never 0, and never poison: numbers of address spaces
/// start at 1 and end far below what poison begins with.
///
/// ```text
///  63      56 55   52  51  50     46 45     39 38           0
///  space      owner   moves  place    index     generation
/// ```
///
/// "Moves" says that the page is about to move to another place (mremap): a reader may find it at
/// either of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The address space.
    pub(crate) space: u64,
    /// The CPU whose program owns the area.
    pub(crate) owner: u64,
    pub(crate) moves: Moves,
    /// Which of its places the area lies at.
    pub(crate) place: u64,
    /// Which page of the area.
    pub(crate) index: u64,
    /// Rises with everything the owner maps there.
    pub(crate) generation: u64,
}

/// Whether a page is about to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moves {
    No,
    Soon,
}

/// The generations that a stamp has room for.
pub(crate) const GENERATION_MASK: u64 = (1 << 39) - 1;

impl Stamp {
    pub(crate) const fn to_word(self) -> u64 {
        let moves = match self.moves {
            Moves::No => 0,
            Moves::Soon => 1 << 51,
        };
        self.space << 56
            | (self.owner & 15) << 52
            | moves
            | (self.place & 31) << 46
            | (self.index & 127) << 39
            | self.generation & GENERATION_MASK
    }

    pub(crate) const fn from_word(word: u64) -> Self {
        Self {
            space: word >> 56,
            owner: word >> 52 & 15,
            moves: if word & 1 << 51 == 0 { Moves::No } else { Moves::Soon },
            place: word >> 46 & 31,
            index: word >> 39 & 127,
            generation: word & GENERATION_MASK,
        }
    }

    /// Whether this is of the same page of the same owner's as `other`, whatever the generation; at
    /// another place, if it is about to move.
    pub(crate) fn is_of_the_page_of(self, other: Self) -> bool {
        let same_place = self.place == other.place || self.moves == Moves::Soon;
        (self.space, self.owner, self.index) == (other.space, other.owner, other.index) && same_place
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { space, owner, place, index, generation, .. } = self;
        write!(
            f,
            "space {space}, CPU {owner}'s area at its place {place}, page {index}, generation {generation}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_comes_back_from_its_word() {
        let stamp =
            Stamp { space: 9, owner: 7, moves: Moves::Soon, place: 11, index: 63, generation: 123_456 };
        assert_eq!(Stamp::from_word(stamp.to_word()), stamp);
        assert!(!crate::memory::is_poison(stamp.to_word()));
    }

    #[test]
    fn only_a_page_that_moves_may_be_found_elsewhere() {
        let here = Stamp { space: 1, owner: 2, moves: Moves::No, place: 3, index: 4, generation: 5 };
        let there = Stamp { place: 6, generation: 9, ..here };
        assert!(!here.is_of_the_page_of(there));
        assert!(Stamp { moves: Moves::Soon, ..here }.is_of_the_page_of(there));
        assert!(!Stamp { moves: Moves::Soon, owner: 1, ..here }.is_of_the_page_of(there));
    }
}
