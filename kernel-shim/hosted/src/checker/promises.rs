//! What no CPU may still be able to do when a call returns.
//!
//! Checked are the CPUs that run programs of the address space, or the kernel for them if it tells
//! (`Note::Runs`), and the caller if it runs one. Lazy
//! CPUs, and CPUs that run something else, may keep what they have cached: they compare generations
//! before they use it (rule T5, and the switch protocol).

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::Laziness;
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::{Caches, Checked};
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;
use crate::mmu::arch::LinearAddress;
use crate::mmu::watch::{CachedEntry, Use};
use crate::mutex::lock;
use crate::vocabulary::{Moment, Rights};

/// What a call that is about to return has promised.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Promise {
    /// The root table of the address space.
    pub(crate) root: PhysFrame,
    /// The addresses.
    pub(crate) range: VirtRange,
    /// Whether the CPU that made the call runs programs.
    pub(crate) caller: Laziness,
    /// What.
    pub(crate) what: Promised,
}

/// What a call has promised of its addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Promised {
    /// No program can use them.
    Gone,
    /// No program can use what was cached of them before this moment.
    ///
    /// Also where the call found empty entries, because another call was faster and has not flushed
    /// yet: rule G6, and the deferred flushes of reclaim.
    Discarded(Moment),
    /// A new area is there, and no program can use what was cached before this moment, when nothing
    /// was.
    New(Moment),
    /// No program can do more than this there.
    AtMost(Rights),
}

impl Promise {
    const fn kind(&self) -> ViolationKind {
        match self.what {
            Promised::Gone => ViolationKind::AddressUsableAfterUnmap,
            Promised::Discarded(_) => ViolationKind::PageUsableAfterDiscard,
            Promised::New(_) => ViolationKind::OldPageUsableAfterMap,
            Promised::AtMost(_) => ViolationKind::RightsUsableAfterProtect,
        }
    }

    fn is_broken_by(&self, entry: &CachedEntry, execution_is_a_right: bool) -> bool {
        let start = entry.address.as_u64();
        let is_inside = matches!(entry.held.as_a, Use::Page(_))
            && start < self.range.end()
            && start + (1 << entry.span_shift) > self.range.start();
        is_inside
            && match self.what {
                Promised::Gone => true,
                Promised::AtMost(Rights::Nothing) => entry.rights.user(),
                Promised::Discarded(since) | Promised::New(since) => entry.at < since,
                Promised::AtMost(most) => {
                    let writes = entry.rights.writable() && most != Rights::Write;
                    let executes =
                        !entry.rights.no_execute() && most != Rights::Execute && execution_is_a_right;
                    entry.rights.user() && (writes || executes)
                }
            }
    }
}

impl HostedMachine {
    /// A call that began at `since` has mapped a new area.
    pub(crate) fn promise_new(&self, root: PhysFrame, range: VirtRange, since: Moment, caller: Laziness) {
        if let Some(checked) = &self.checked {
            self.check_promise(checked, Promise { root, range, caller, what: Promised::New(since) });
        }
    }

    /// Whether the page is there again, by a mapping that came after the call had begun: reclaim
    /// takes a clean page whole, and puts it back if a program was faster to write to it. A discard
    /// that found the entry empty in between comes before that write.
    fn was_put_back(&self, checked: &Checked, promise: &Promise, entry: &CachedEntry) -> bool {
        match promise.what {
            Promised::Discarded(since) => {
                checked.ledger.was_mapped_since(entry.frame, since) && self.agrees(promise.root, entry)
            }
            Promised::Gone | Promised::New(_) | Promised::AtMost(_) => false,
        }
    }

    /// A call is about to return: looks for a CPU on which a program can still do what it must not.
    pub(crate) fn check_promise(&self, checked: &Checked, promise: Promise) {
        let execution_is_a_right = self.execution_is_a_right();
        for cpu in &self.cpus {
            let id = cpu.id;
            let is_caller = id == self.current() && promise.caller == Laziness::Active;
            if !self.may_use_addresses(id) && !is_caller {
                continue;
            }
            let caches = lock(&cpu.caches);
            let Some(Caches { mmu, .. }) = &*caches else { continue };
            if mmu.cr3().0 != promise.root {
                continue;
            }
            let range = promise.range;
            let is_broken_by = |entry: &CachedEntry| {
                promise.is_broken_by(entry, execution_is_a_right)
                    && !self.was_put_back(checked, &promise, entry)
            };
            // Few pages are looked up one by one; for many, all entries are scanned.
            let is_empty = range.nr_pages() <= 16
                && (range.start()..range.end())
                    .step_by(4096)
                    .all(|address| !mmu.has_page(LinearAddress::new(address)));
            let found = if is_empty { None } else { mmu.usable_entries().find(|entry| is_broken_by(entry)) };
            drop(caches);
            if let Some(entry) = found {
                let address = entry.address.as_u64().max(range.start());
                self.report(checked, promise.kind(), id, address, entry.frame, Some(entry));
            }
        }
    }
}
