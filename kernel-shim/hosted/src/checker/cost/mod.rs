//! What a call costs, against what its size explains.
//!
//! A kernel that flushes everything each time, interrupts every CPU and gives up its PCIDs frees
//! nothing too early. Here it is held to bounds, if it has promised to keep them
//! ([`Kernel::promises_cost`](crate::Kernel::promises_cost)). They are functions of what the call
//! did as far as the checker sees it: leaves cleared, tables freed, batch pages refused, other
//! calls open on the address space. What the engine says of itself excuses nothing: a flush
//! "because another gather is open" needs another call.
//!
//! Calls are counted by CPU, and CPUs are bits of one word: nothing is judged in sequences whose
//! threads move from CPU to CPU, nor on more than 64 CPUs.
//!
//! Of each: the bound, and what excuses more.
//!
//! - **a flush**: something was changed since the last one of this call. More: another call on
//!   the address space, reclaim at work there, or a flush that it owed, since this one began; the
//!   end of an exit; runs that found no room.
//! - **a flush of everything**: more pages from the first changed to the last than the ceiling,
//!   in steps of the smallest leaf. More: as for a flush; the call is an exit.
//! - **a flush of pages**: from the first page changed to the last, in steps of the smallest leaf
//!   changed. More: tables went: all of the call's range. Pages that move: as many as the call's
//!   range has, anywhere, because no note tells them one by one.
//! - **flushes of one call, or of one area of a discard**: one, two if tables go. More: one for
//!   each queue full of pages or tables, batch page refused, large leaf split, page whose dirty bit
//!   is flushed for under a lock, page that a fault replaces after the first; twice the tables of a
//!   move; one for others alone, while they run.
//! - **a generation raised**: one for each flush. More: reclaim: one for each page, as in Linux.
//! - **a CPU asked, no tables freed**: it runs programs of the address space; once for each
//!   flush. More: it switches, or has since the flush began.
//! - **a CPU asked, tables freed**: it has loaded the address space since it last left the
//!   cpumask. More: as above.
//! - **a CPU asked by reclaim**: it is on, and another. More: it has changed since reclaim began.
//! - **never asked**: a CPU that is off; the CPU itself. More: as above.
//! - **what a CPU does about a flush**: INVLPGs of the pages of that flush, each once, if that is
//!   the only generation it has missed. More: it missed others; another came meanwhile; reclaim's
//!   batch.
//! - **a CPU that flushes**: its PCID is older than the address space.
//! - **a switch**: keeps what is cached if the PCID is current; the PCID of the address space if
//!   it has one; a PCID that was never used before one that was. More: a generation raised
//!   meanwhile; PCIDs are off.
//! - **the kernel's own address space**: keeps what is cached. More: the CPU starts.
//! - **batch pages of one call, or of one area**: as many as its pages fill, and one for tables;
//!   they are kept from flush to flush. More: the last one may stay empty.
//! - **the lock of one table**: once for each area, and once. More: of leaves: once for each
//!   flush of the call, and for each large leaf; once for each area or 32 of the last-level tables
//!   unhooked there, once for each other table unhooked there, for each table linked, twice for
//!   each split; once a page for reclaim, which finds pages one by one, as by reverse mappings; the
//!   tries of a guard; a fault that meets other calls looks again as long as they change its entry;
//!   fork, which copies the large pages of a device one by one; a move, which takes both locks for
//!   each table.
//! - **the lock of one table, to unhook last-level tables**: once for each area. More: once for
//!   32 tables.
//! - **a table said to be freed**: is freed when the call returns.
//! - **under one map lock**: no more leaves changed than the call's range has pages; 256 seams
//!   (locks, entries, flushes, frees), 8 for each page of the range, and what a flush takes for
//!   each. More: guards and mprotect: four tries; fork, exit and the move of a stack have no range
//!   that says how much they do.
//!
//! A call that does not end at all is no matter of cost: turns are counted (`schedule`), and the
//! run ends with words.
//!
//! A PCID of an address space that has exited counts as used: neither this engine nor Linux keeps
//! account of which names are dead, and takes slots over in turn.
//!
//! ```text
//!  bounds   what excuses more, as pure functions
//!     │
//!     v
//!  state    what is remembered of calls, address spaces and CPUs
//!     │
//!     ├─────► calls     what a call did, and the bounds when it is done
//!     ├─────► flushes   each flush as it is asked for, and each CPU that is asked
//!     └─────► slots     what each CPU drops of its caches
//! ```

mod bounds;
mod calls;
mod flushes;
mod slots;
pub(crate) mod state;

pub(crate) use bounds::CallKind;

use crate::checker::checked::Checked;
use crate::machine::HostedMachine;
use crate::vocabulary::{FrameRole, Note};

impl HostedMachine {
    /// What a note means to the costs of the call that this CPU makes.
    pub(crate) fn note_cost(&self, checked: &Checked, note: Note) {
        if self.cost().is_none() {
            return;
        }
        match note {
            Note::Cleared { address, level, .. } | Note::Restricted { address, level, .. } => {
                self.cost_of_leaf(address, level);
            }
            Note::Split { address, level, .. } => self.cost_of_split(address, level),
            Note::Allocated(_, FrameRole::Table) => self.cost_of_new_table(),
            Note::Freed(_, FrameRole::Table) => self.cost_of_freed_table(),
            Note::Asked(target) => self.judge_asked(checked, target),
            Note::Tlb { event, slot } => {
                self.judge_flush_here(checked, event, slot);
                self.judge_request(checked, event);
            }
            Note::Gather(event) => self.cost_of_gather(event),
            Note::MapLocked { root, .. } => self.cost_of_hold_begins(root),
            Note::MapUnlocked { root } => self.judge_hold(checked, root),
            Note::BatchTaken => self.cost_of_batch(),
            Note::BatchRefused => self.cost_of_no_batch(),
            Note::RmapDelayed => self.cost_of_delayed(),
            Note::Areas(areas) => self.cost_of_areas(areas),
            Note::Unmapped { root, .. } | Note::Discarded { root, .. } | Note::Protected { root, .. } => {
                self.cost_of_part_ends(root);
            }
            _ => {}
        }
    }
}
