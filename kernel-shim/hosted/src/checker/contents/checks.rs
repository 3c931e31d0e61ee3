//! What programs read, against what they are to read.

use std::sync::Mutex;

use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Checked;
use crate::checker::contents::kept::Kept;
use crate::checker::contents::truth::{Truth, Written};
use crate::checker::contents::words::{Words, Writer, frame_at};
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;
use crate::mmu::arch::{LinearAddress, Meaning, decode};
use crate::mmu::physical::PhysicalMemory;
use crate::mutex::lock;
use crate::vocabulary::{Contents, FrameRole, Place, UserAccess};

/// A machine with more memory, 4 GiB, is not checked: words take sixteen bytes a frame, and what
/// has so many pages is measured, not searched for bugs. Sequences run on a machine of 24,576
/// frames.
const MOST_FRAMES: u64 = 1 << 20;

/// The bit that hardware sets in an entry that was used.
const ACCESSED: u64 = 1 << 5;

/// An entry that maps a page of 4 KiB, or is part of one that maps more.
enum Found {
    Page {
        at: PhysAddr,
        entry: u64,
    },
    Empty,
    /// It means something to the kernel.
    Other(u64),
}

impl HostedMachine {
    /// Fills `count` frames from `first` on with zeroes. A frame has no bytes on this machine, but
    /// two words, each of which stands for half of them.
    pub fn zero_frames(&self, first: PhysFrame, count: u64) {
        self.with_contents(|kept| kept.words.zero(first, count));
    }

    /// Copies what is in frame `from` to `to`.
    pub fn copy_frame(&self, from: PhysFrame, to: PhysFrame) {
        self.with_contents(|kept| kept.words.copy(from, to));
    }

    /// Writes what is in `frame` to a place on a disk.
    pub fn write_to_disk(&self, frame: PhysFrame, place: Place) {
        self.with_contents(|kept| kept.words.store(frame, place));
    }

    /// Reads what is at a place on a disk into `frame`. A page of a file that was never written
    /// there is like no other; a place for swap has zeroes.
    pub fn read_from_disk(&self, place: Place, frame: PhysFrame) {
        self.with_contents(|kept| kept.words.load(place, frame));
    }

    /// While nothing is going on: whatever programs have written is where they will find it.
    ///
    /// `swapped` says of an entry that hardware does not look at where its page is; of one that is
    /// none of those, nothing.
    pub fn compare_contents(&self, swapped: impl Fn(u64) -> Option<Place>) {
        let Some(checked) = &self.checked else { return };
        let Some(kept) = checked.contents.get() else { return };
        let kept = lock(kept);
        let wrong = kept.truth.written().find_map(|written| {
            let (frame, found) = match self.find(written.root, written.address) {
                Found::Page { at, entry }
                    if entry & ACCESSED == 0 && written.used_in == Some(frame_at(at)) =>
                {
                    return Some((ViolationKind::AccessForgotten, frame_at(at), written, None));
                }
                Found::Page { at, .. } => (frame_at(at), kept.words.at(at)),
                Found::Empty => (written.root, written.if_empty?),
                Found::Other(entry) => (written.root, kept.words.on_disk(swapped(entry)?, written.address)),
            };
            (found != written.word).then(|| {
                let kind = kept.words.kind_of(written.root, found);
                (kind, frame, written, Some(found))
            })
        });
        let Some((kind, frame, Written { root: _, address, word, .. }, found)) = wrong else { return };
        let told = found.map(|found| kept.told(found, word));
        drop(kept);
        self.report_because(checked, kind, (address, frame), told);
    }

    /// A program has reached `frame` at an address of the space of `root`.
    pub(crate) fn check_content(
        &self,
        checked: &Checked,
        root: PhysFrame,
        (address, frame): (u64, PhysFrame),
        access: UserAccess,
    ) {
        let Some(kept) = checked.contents.get() else { return };
        let mut kept = lock(kept);
        let Kept { words, truth } = &mut *kept;
        let address = words.half_of(address);
        let at = frame.start_address() + address % 4096;
        if access == UserAccess::Write {
            let word = words.write(at, Writer { root, address });
            truth.writes(root, address, (frame, word), checked.ledger.now());
            return;
        }
        let found = words.at(at);
        let Some(expected) = truth.reads(root, address, (frame, found)) else { return };
        let kind = words.kind_of(root, found);
        let told = kept.told(found, expected);
        drop(kept);
        self.report_because(checked, kind, (address, frame), Some(told));
    }

    pub(crate) fn note_contents(&self, checked: &Checked, change: Contents) {
        if self.memory.nr_frames() > MOST_FRAMES {
            return;
        }
        let nothing = || Kept { words: Words::new(self.memory.nr_frames()), truth: Truth::default() };
        lock(checked.contents.get_or_init(|| Mutex::new(nothing()))).truth.changes(change);
    }

    pub(crate) fn note_given_out(&self, frame: PhysFrame, role: FrameRole) {
        self.with_contents(|kept| kept.words.given_out(frame, role));
    }

    pub(crate) fn note_newly_mapped(&self, root: PhysFrame, address: u64) {
        self.with_contents(|kept| kept.truth.mapped(root, address));
    }

    fn with_contents(&self, f: impl FnOnce(&mut Kept)) {
        if let Some(kept) = self.checked.as_ref().and_then(|checked| checked.contents.get()) {
            f(&mut lock(kept));
        }
    }

    /// What page tables say of one address.
    fn find(&self, root: PhysFrame, address: u64) -> Found {
        let (mut table, mut level) = (root.start_address().as_u64(), self.root_level());
        loop {
            let index = level.index(LinearAddress::new(address));
            let entry = self.memory.read(PhysAddr::new_truncate(table + 8 * index));
            match decode(entry, level, self.options.features.physical_bits) {
                Meaning::NotPresent if entry == 0 => return Found::Empty,
                Meaning::NotPresent | Meaning::Reserved => return Found::Other(entry),
                Meaning::Page(size, page) => {
                    let inside = address & (size.bytes() - 1);
                    return Found::Page { at: page + inside, entry };
                }
                Meaning::Table(next) => {
                    let Some(below) = level.below() else { return Found::Other(entry) };
                    (table, level) = (next.as_u64(), below);
                }
            }
        }
    }
}
