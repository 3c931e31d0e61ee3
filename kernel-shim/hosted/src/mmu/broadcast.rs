//! Broadcast invalidation: INVLPGB as one CPU receives it, TLBSYNC as its end.
//!
//! INVLPGB only starts: a receiving CPU may act at once or late. The machine posts the request to
//! every CPU, the issuer too, and delivers what is left when the issuer executes TLBSYNC; in
//! between a CPU may use what it should lose.

use x86_64::instructions::tlb::Pcid;

use crate::mmu::arch::{LinearAddress, PageSize};

/// The CPU that executed INVLPGB. Its TLBSYNC waits for its own requests only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Issuer(pub u32);

/// One INVLPGB for ASID 0, the host.
///
/// # Source
/// AMD64 APM vol. 3, INVLPGB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broadcast {
    /// This PCID only (PCID valid), or every one.
    pub pcid: Option<Pcid>,
    /// These pages only (VA valid), or every address.
    pub pages: Option<Pages>,
    /// Whether global translations go too.
    pub globals: Globals,
    /// Whether paging-structure caches are touched.
    pub uppers: Uppers,
}

/// Addresses named by one INVLPGB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// The first.
    pub first: LinearAddress,
    /// How many more follow it (ECX bits 15:0).
    pub more: u16,
    /// Bytes between them (ECX bit 31): 4 KiB or 2 MiB.
    pub stride: Stride,
}

/// Bytes from one address of an INVLPGB to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stride {
    /// 4 KiB.
    Small,
    /// 2 MiB: of smaller pages in between, only those at each address are named.
    Large,
}

/// Whether an INVLPGB includes global translations (rAX bit 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Globals {
    /// They stay.
    Kept,
    /// They go.
    Included,
}

/// What an INVLPGB does to paging-structure caches (rAX bit 4, "final translation only").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uppers {
    /// Nothing: not enough where a table was freed.
    Kept,
    /// Drops those that lead to the addresses named. With EFER.TCE = 0 a CPU drops more; that is
    /// not counted on.
    Dropped,
}

impl Pages {
    pub(crate) fn addresses(self) -> impl Iterator<Item = LinearAddress> {
        let step = match self.stride {
            Stride::Small => PageSize::Size4KiB.bytes(),
            Stride::Large => PageSize::Size2MiB.bytes(),
        };
        (0..=u64::from(self.more))
            .map(move |place| LinearAddress::new(self.first.as_u64().wrapping_add(place * step)))
    }
}
