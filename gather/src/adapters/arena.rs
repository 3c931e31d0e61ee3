//! Batch pages from a `bumpalo` arena.
#![expect(unsafe_code, reason = "lends pages of the arena")]

use core::cell::RefCell;
use core::ptr::NonNull;

use arrayvec::ArrayVec;
use bumpalo::Bump;

use crate::platform::BatchPage;

/// Lends batch pages out of an arena, and keeps those given back for the next gather.
///
/// It is for embedders that have no page allocator at hand, for fuzz runs and benches. A gather
/// holds at most 20 pages at once, and the arena grows to that and no further. It is not shared
/// between threads: an embedder has one for each CPU.
///
/// # Examples
/// ```
/// # use mmu_gather::BatchArena;
/// let arena = BatchArena::new(Some(1 << 20));
/// // `Pages::allocate_batch` and `Pages::free_batch` of a kernel that has this arena.
/// // SAFETY: the page is given back, just below.
/// let page = unsafe { arena.allocate() }.expect("below the limit");
/// arena.free(page);
/// ```
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

    /// A page, unless the limit is reached: for
    /// [`Pages::allocate_batch`](crate::Pages::allocate_batch).
    ///
    /// # Safety
    /// Before the arena is dropped the page is given back to it, or is used no more. So it is if
    /// the kernel that lends the page to a gather owns the arena, and outlives the gather.
    #[must_use]
    pub unsafe fn allocate(&self) -> Option<BatchPage> {
        #[repr(align(4096))]
        struct Page([u8; 4096]);
        let page = match self.spare.borrow_mut().pop() {
            Some(page) => page,
            None => NonNull::from(&mut self.arena.try_alloc(Page([0; 4096])).ok()?.0),
        };
        // SAFETY: the page is 4096 bytes of the arena, aligned to 4096, and lent to nobody else: a
        // spare page was given back, another one is new. The arena is never reset.
        Some(unsafe { BatchPage::new(page) })
    }

    /// Takes a page back: for [`Pages::free_batch`](crate::Pages::free_batch).
    pub fn free(&self, page: BatchPage) {
        // Pages beyond 32 are not used again; they stay in the arena until it is dropped.
        let _ = self.spare.borrow_mut().try_push(page.into_inner());
    }
}
