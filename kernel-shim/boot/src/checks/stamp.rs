//! What words of memory say about their owner: the stamp of a program, or the poison of a free
//! frame.

use core::fmt;

use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

/// The upper 16 bits of a stamp.
const STAMP_TAG: u64 = 0x5a17;
/// The upper 24 bits of poison. Read as a page-table entry they set reserved bits on any machine
/// with less than 51 bits of physical address, so a walk through a freed table faults with the
/// reserved-bit flag and cannot be taken for a missing page.
const POISON_TAG: u64 = 0xde_adf4;
/// Present, writable, user, accessed, dirty: with these a walk goes on and meets the reserved bits.
const POISON_FLAGS: u64 = 0x067;
/// Bits of a frame number in poison: 1 TiB of memory.
const FRAME_BITS: u32 = 28;

/// The mark of a program: which process wrote it, which of its threads, for which page of its
/// memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Number of the process, below 2^24.
    pub(crate) process: u32,
    /// Number of the thread: the CPU it runs on.
    pub(crate) thread: u8,
    /// Number of the page.
    pub(crate) page: u16,
}

impl Stamp {
    /// The word for page 0; that for page n is this plus n.
    pub(crate) const fn word(self) -> u64 {
        // Widening: `From` is not const.
        STAMP_TAG << 48
            | ((self.process & 0xff_ffff) as u64) << 24
            | (self.thread as u64) << 16
            | self.page as u64
    }
}

/// What a word is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// A page nobody has written to.
    Zero,
    /// Written by a program.
    Stamp(Stamp),
    /// Written when this frame was freed.
    Poison(PhysFrame),
    /// Something else: a page-table entry, the kernel's data.
    Other(u64),
}

impl Word {
    /// Reads a word.
    pub(crate) fn decode(word: u64) -> Self {
        // Two bytes tag, three process, one thread, two page.
        let [_, _, p2, p1, p0, thread, page_high, page_low] = word.to_be_bytes();
        match (word >> 48, word >> 40) {
            _ if word == 0 => Self::Zero,
            (STAMP_TAG, _) => Self::Stamp(Stamp {
                process: u32::from_be_bytes([0, p2, p1, p0]),
                thread,
                page: u16::from_be_bytes([page_high, page_low]),
            }),
            (_, POISON_TAG) if word & 0xfff == POISON_FLAGS => {
                let number = word >> 12 & ((1 << FRAME_BITS) - 1);
                Self::Poison(PhysFrame::containing_address(PhysAddr::new(number << 12)))
            }
            _ => Self::Other(word),
        }
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zero, a page that nobody has written to"),
            Self::Stamp(Stamp { process, thread, page }) => {
                write!(f, "the stamp of process {process}, thread {thread}, page {page}")
            }
            Self::Poison(frame) => write!(f, "the poison of frame {:#x}", frame.start_address()),
            Self::Other(word) => write!(f, "{word:#018x}, which no program wrote"),
        }
    }
}

/// What fills a free frame.
pub(crate) fn poison(frame: PhysFrame) -> u64 {
    POISON_TAG << 40 | (frame.start_address().as_u64() & ((1 << (FRAME_BITS + 12)) - 1)) | POISON_FLAGS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_and_a_poison_say_whose_they_are() {
        let stamp = Stamp { process: 0xabcdef, thread: 63, page: 0xfffe };
        assert_eq!(Word::decode(stamp.word()), Word::Stamp(stamp));
        assert_eq!(Word::decode(stamp.word() + 1), Word::Stamp(Stamp { page: 0xffff, ..stamp }));
        let frame = PhysFrame::containing_address(PhysAddr::new(0xff_ffff_f000));
        assert_eq!(Word::decode(poison(frame)), Word::Poison(frame));
        assert_eq!(Word::decode(0), Word::Zero);
        assert_eq!(Word::decode(0x8000_0000_0123_4067), Word::Other(0x8000_0000_0123_4067));
    }

    #[test]
    fn poison_read_as_an_entry_is_present_and_has_reserved_bits() {
        let entry = poison(PhysFrame::containing_address(PhysAddr::new(0x123_4000)));
        assert_eq!(entry & 1, 1);
        // Bits 51..46, reserved wherever MAXPHYADDR is at most 46 (Intel SDM vol. 3A, 4.5).
        assert_ne!(entry >> 46 & 0x3f, 0);
        // Not a large page, at any level.
        assert_eq!(entry & 0x80, 0);
    }
}
