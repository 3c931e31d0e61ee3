//! The words of the small kernel in those of the hosted machine, and back.

use mmu_hosted as kit;
use mmu_kernel_shim as shim;
use x86_64::structures::paging::PageTableFlags;

pub(crate) const fn seam(seam: shim::Seam) -> kit::Seam {
    match seam {
        shim::Seam::Entry => kit::Seam::Entry,
        shim::Seam::Cleared => kit::Seam::Cleared,
        shim::Seam::Lock => kit::Seam::Lock,
        shim::Seam::Free => kit::Seam::Free,
        shim::Seam::Allocate => kit::Seam::Allocate,
        shim::Seam::Unlock => kit::Seam::Unlock,
        shim::Seam::Step => kit::Seam::Step,
    }
}

pub(crate) const fn note(note: shim::Note) -> kit::Note {
    match note {
        shim::Note::Allocated(frame, of) => kit::Note::Allocated(frame, role(of)),
        shim::Note::Freed(frame, of) => kit::Note::Freed(frame, role(of)),
        shim::Note::MappedByNobody(frame, known) => kit::Note::MappedByNobody(frame, content(known)),
        shim::Note::Unmapped { root, range, caller } => kit::Note::Unmapped { root, range, caller },
        shim::Note::Discarded { root, range, since, caller } => {
            kit::Note::Discarded { root, range, since: kit::Moment(since.0), caller }
        }
        shim::Note::Protected { root, range, most, caller } => {
            kit::Note::Protected { root, range, most: rights(most), caller }
        }
        shim::Note::Mapped { root, address, frame } => kit::Note::Mapped { root, address, frame },
        shim::Note::OwnedAlone { root, address, frame } => kit::Note::OwnedAlone { root, address, frame },
        shim::Note::Runs(laziness) => kit::Note::Runs(laziness),
        shim::Note::Cleared { address, level, frame } => kit::Note::Cleared { address, level, frame },
        shim::Note::Restricted { address, level, frame } => kit::Note::Restricted { address, level, frame },
        shim::Note::Split { address, level, frame } => kit::Note::Split { address, level, frame },
        shim::Note::Asked(target) => kit::Note::Asked(target),
        shim::Note::Tlb { event, slot } => kit::Note::Tlb { event, slot },
        shim::Note::Gather(event) => kit::Note::Gather(event),
        shim::Note::MapLocked { root, most } => kit::Note::MapLocked { root, most: under_map_lock(most) },
        shim::Note::BatchTaken => kit::Note::BatchTaken,
        shim::Note::BatchRefused => kit::Note::BatchRefused,
        shim::Note::RmapDelayed => kit::Note::RmapDelayed,
        shim::Note::Areas(areas) => kit::Note::Areas(areas),
        shim::Note::MapUnlocked { root } => kit::Note::MapUnlocked { root },
        shim::Note::Contents(change) => kit::Note::Contents(contents(change)),
    }
}

const fn contents(change: shim::Contents) -> kit::Contents {
    match change {
        shim::Contents::Shown { root, range, shows } => {
            kit::Contents::Shown { root, range, shows: shown(shows) }
        }
        shim::Contents::Gone { root, range } => kit::Contents::Gone { root, range },
        shim::Contents::Discarding { root, range, began } => {
            kit::Contents::Discarding { root, range, began: kit::Moment(began.0) }
        }
        shim::Contents::Discarded { root, range, began } => {
            kit::Contents::Discarded { root, range, began: kit::Moment(began.0) }
        }
        shim::Contents::Moving { root, from, to } => kit::Contents::Moving { root, from, to },
        shim::Contents::Moved { root, from, to } => kit::Contents::Moved { root, from, to },
        shim::Contents::Forked { parent, child } => kit::Contents::Forked { parent, child },
    }
}

const fn shown(shows: shim::Shows) -> kit::Shows {
    match shows {
        shim::Shows::Zeroes => kit::Shows::Zeroes,
        shim::Shows::PrivateFile { file, first } => kit::Shows::PrivateFile { file, first },
        shim::Shows::SharedFile { file, first } => kit::Shows::SharedFile { file, first },
        shim::Shows::Anything => kit::Shows::Anything,
    }
}

pub(crate) const fn place(place: shim::Place) -> kit::Place {
    match place {
        shim::Place::File { file, page } => kit::Place::File { file, page },
        shim::Place::Swap { slot } => kit::Place::Swap { slot },
    }
}

const fn content(known: shim::Content) -> kit::Content {
    match known {
        shim::Content::Clean => kit::Content::Clean,
        shim::Content::Dirty => kit::Content::Dirty,
    }
}

const fn role(role: shim::FrameRole) -> kit::FrameRole {
    match role {
        shim::FrameRole::Page => kit::FrameRole::Page,
        shim::FrameRole::Block => kit::FrameRole::Block,
        shim::FrameRole::Table => kit::FrameRole::Table,
    }
}

const fn under_map_lock(most: shim::UnderMapLock) -> kit::UnderMapLock {
    match most {
        shim::UnderMapLock::WaitsForNobody => kit::UnderMapLock::WaitsForNobody,
        shim::UnderMapLock::Flushes => kit::UnderMapLock::Flushes,
        shim::UnderMapLock::FreesEarly => kit::UnderMapLock::FreesEarly,
        shim::UnderMapLock::Frees => kit::UnderMapLock::Frees,
    }
}

const fn rights(protection: shim::Protection) -> kit::Rights {
    match protection {
        shim::Protection::Nothing => kit::Rights::Nothing,
        shim::Protection::Read => kit::Rights::Read,
        shim::Protection::Write => kit::Rights::Write,
        shim::Protection::Execute => kit::Rights::Execute,
    }
}

pub(crate) const fn protection(rights: kit::Rights) -> shim::Protection {
    match rights {
        kit::Rights::Nothing => shim::Protection::Nothing,
        kit::Rights::Read => shim::Protection::Read,
        kit::Rights::Write => shim::Protection::Write,
        kit::Rights::Execute => shim::Protection::Execute,
    }
}

pub(crate) const fn access(access: shim::UserAccess) -> kit::UserAccess {
    match access {
        shim::UserAccess::Read => kit::UserAccess::Read,
        shim::UserAccess::Write => kit::UserAccess::Write,
        shim::UserAccess::Fetch => kit::UserAccess::Fetch,
    }
}

pub(crate) const fn access_of_program(access: kit::UserAccess) -> shim::UserAccess {
    match access {
        kit::UserAccess::Read => shim::UserAccess::Read,
        kit::UserAccess::Write => shim::UserAccess::Write,
        kit::UserAccess::Fetch => shim::UserAccess::Fetch,
    }
}

pub(crate) const fn supply(supply: kit::Supply) -> shim::Supply {
    match supply {
        kit::Supply::Always => shim::Supply::Always,
        kit::Supply::Never => shim::Supply::Never,
        kit::Supply::ExceptEvery(every) => shim::Supply::ExceptEvery(every),
        kit::Supply::Nth(number) => shim::Supply::Nth(number),
    }
}

/// A new area at `start`. Where it lies decides what its entries say besides, so that sequences
/// need no words for it.
pub(crate) const fn area(start: u64, backing: kit::Backing, rights: kit::Rights) -> shim::Area {
    let kind = match backing {
        kit::Backing::Anon
        | kit::Backing::Huge
        | kit::Backing::Clean
        | kit::Backing::Stack
        | kit::Backing::Zeroes
        | kit::Backing::Folios => shim::AreaKind::Anon,
        kit::Backing::Private => shim::AreaKind::FilePrivate(1),
        kit::Backing::Shared => shim::AreaKind::FileShared(2),
        kit::Backing::Pfn | kit::Backing::Giant => shim::AreaKind::Pfn,
    };
    let growth = match backing {
        kit::Backing::Stack => shim::Growth::Down,
        _ => shim::Growth::Fixed,
    };
    let granule = match backing {
        kit::Backing::Zeroes => shim::Granule::Block,
        kit::Backing::Folios => shim::Granule::Folio,
        _ => shim::Granule::Page,
    };
    shim::Area {
        kind,
        protection: protection(rights),
        growth,
        file_base: 0,
        attributes: attributes_at(start),
        granule,
    }
}

/// In four areas of eight: one bit that decides how pages are cached, or a protection key and a bit
/// that hardware does not look at.
const fn attributes_at(start: u64) -> PageTableFlags {
    match (start >> 12 ^ start >> 21 ^ start >> 30) & 0b111 {
        1 => PageTableFlags::NO_CACHE,
        // The PAT bit, in the last level.
        3 => PageTableFlags::HUGE_PAGE,
        5 => PageTableFlags::BIT_60.union(PageTableFlags::BIT_9),
        6 => PageTableFlags::WRITE_THROUGH,
        _ => PageTableFlags::empty(),
    }
}
