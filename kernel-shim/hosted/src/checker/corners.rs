//! Corners that are read off what the engine tells.

use core::sync::atomic::Ordering;

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::Level;
use mmu_gather::tlb::{SINGLE_PAGE_FLUSH_CEILING, TlbEvent};

use crate::boundary::Boundary;
use crate::machine::HostedMachine;

impl HostedMachine {
    pub(crate) fn reach_by_tlb(&self, event: TlbEvent) {
        let TlbEvent::Raised { span: Some(span), .. } = event else { return };
        let boundary = match span.stride_shift {
            shift if shift == Level::Pmd.entry_shift() => Boundary::LargeCeiling,
            shift if shift == Level::Pud.entry_shift() => Boundary::GiantCeiling,
            _ => return,
        };
        if (span.end - span.start) >> span.stride_shift > SINGLE_PAGE_FLUSH_CEILING {
            self.note_reached(boundary);
        }
    }

    pub(crate) fn reach_by_gather(&self, event: GatherEvent) {
        let step = &self.cpu().step;
        match event {
            GatherEvent::ForcedFlush => step.was_forced.store(true, Ordering::Relaxed),
            GatherEvent::DeferredFlushSeen if step.was_forced.load(Ordering::Relaxed) => {
                self.note_reached(Boundary::AskedAgain);
            }
            GatherEvent::TableUnhooked(level) => {
                // With four levels, these are roots.
                if level == Level::P4d {
                    self.note_reached(Boundary::FifthLevel);
                }
                if u64::from(step.unhooked.fetch_add(1, Ordering::Relaxed)) >= SINGLE_PAGE_FLUSH_CEILING {
                    self.note_reached(Boundary::ManyTables);
                }
            }
            _ => {}
        }
    }
}
