//! Batch pages from a `bumpalo` arena.
#![expect(unsafe_code, reason = "lends pages of the arena")]

use core::cell::RefCell;
use core::ptr::NonNull;

use arrayvec::ArrayVec;
use bumpalo::Bump;

use crate::platform::BatchPage;

/// Lends batch pages out of an arena and keeps those given back for the next gather.
///
/// For embedders that have no page allocator at hand, for fuzz runs and benches: a gather takes at most 20 pages at once,
/// and the arena grows to that and no further. Not shared between threads: one an embedder's CPU.
#[derive(Debug)]
pub struct BatchArena {
    arena: Bump,
    spare: RefCell<ArrayVec<NonNull<[u8; 4096]>, 32>>,
}

impl BatchArena {
    /// An arena that takes memory as it is asked for; at most `limit_bytes`, if given.
    #[must_use]
    pub fn new(limit_bytes: Option<usize>) -> Self {
        let arena = Bump::new();
        arena.set_allocation_limit(limit_bytes);
        Self { arena, spare: RefCell::new(ArrayVec::new()) }
    }

    /// A page, unless the limit is reached. For [`Pages::allocate_batch`](crate::Pages::allocate_batch).
    ///
    /// # Safety
    /// The page is given back to this arena, or is used no more, before the arena is dropped: the kernel that lends it to a
    /// gather outlives the gather, and owns the arena.
    #[must_use]
    pub unsafe fn allocate(&self) -> Option<BatchPage> {
        #[repr(align(4096))]
        struct Page([u8; 4096]);
        let page = match self.spare.borrow_mut().pop() {
            Some(page) => page,
            None => NonNull::from(&mut self.arena.try_alloc(Page([0; 4096])).ok()?.0),
        };
        // SAFETY: 4096 bytes of the arena, aligned to 4096, lent to nobody else: a spare page was given back, a new one is
        // new. The arena is not reset while pages are out (it offers no way to).
        Some(unsafe { BatchPage::new(page) })
    }

    /// Takes a page back. For [`Pages::free_batch`](crate::Pages::free_batch).
    pub fn free(&self, page: BatchPage) {
        // Beyond 32 spare pages, the rest stays in the arena unused until it goes.
        let _ = self.spare.borrow_mut().try_push(page.into_inner());
    }
}
