//! Frames in use: taken, mapped, let go of and given back, with the counts that say when.

use x86_64::structures::paging::PhysFrame;

use crate::counters::CpuCounters;
use crate::embed::Embedder;
use crate::frame::{FrameKind, Last};
use crate::machine::{FrameRole, Machine, Note};

impl<M: Machine> Embedder<M> {
    /// Takes a frame for `kind`; its bytes are as they were when it was given back.
    pub(crate) fn take_frame(&self, kind: FrameKind) -> Option<PhysFrame> {
        let frame = self.frames.allocate(kind)?;
        let role = if kind == FrameKind::Table { FrameRole::Table } else { FrameRole::Page };
        self.machine.note(Note::Allocated(frame, role));
        Some(frame)
    }

    /// Gives back a frame that was never counted, and is used for `kind`.
    ///
    /// A frame that is used for something else by now was given back before. It does not go to the
    /// free list once more: the list would end in a circle, and nobody would get any further.
    pub(crate) fn give_back(&self, frame: PhysFrame, kind: FrameKind) {
        self.machine.note(Note::Freed(frame, FrameRole::Page));
        if self.frames.meta(frame).kind() == kind {
            self.frames.free([frame]);
        } else {
            self.count().double_free();
        }
    }

    /// Gives tables back.
    pub(crate) fn give_back_tables(&self, tables: &[PhysFrame]) {
        let is_table = |table: &PhysFrame| self.frames.meta(*table).kind() == FrameKind::Table;
        for table in tables {
            if !is_table(table) {
                self.count().double_free();
            }
            self.machine.note(Note::Freed(*table, FrameRole::Table));
        }
        self.frames.free(tables.iter().copied().filter(is_table));
    }

    /// One entry less maps the frame; its reference stays until the flush.
    pub(crate) fn remove_mapping(&self, frame: PhysFrame) {
        if self.frames.meta(frame).remove_mapping().is_err() {
            self.count().double_free();
        }
    }

    /// Drops one reference on each page. Single pages go back as one list: the allocator's lock is
    /// taken once.
    pub(crate) fn drop_references(&self, frames: impl IntoIterator<Item = PhysFrame>) {
        let last_references = frames.into_iter().filter_map(|frame| self.release_page(frame));
        self.frames.free(last_references);
    }

    /// Drops one reference; a single page whose last one it was is handed back for the free list.
    #[inline]
    fn release_page(&self, frame: PhysFrame) -> Option<PhysFrame> {
        let meta = self.frames.meta(frame);
        match meta.drop_ref() {
            Ok(Last::No) => None,
            Ok(Last::Yes) if meta.kind() == FrameKind::Block => {
                self.machine.note(Note::Freed(frame, FrameRole::Block));
                self.frames.free_block(frame);
                None
            }
            Ok(Last::Yes) => {
                if meta.maps() != 0 {
                    self.count().double_free();
                }
                self.machine.note(Note::Freed(frame, FrameRole::Page));
                Some(frame)
            }
            Err(_) => {
                self.count().double_free();
                None
            }
        }
    }

    /// Where this CPU counts.
    #[inline]
    pub(crate) fn count(&self) -> &CpuCounters {
        self.machine.pinned(|cpu| self.counters.of_cpu(cpu))
    }
}
