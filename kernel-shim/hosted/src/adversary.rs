//! What other CPUs do while one crosses a seam: they run, and any of them speculates.

use core::sync::atomic::Ordering;

use crate::checker::access::{WatchedMemory, log_fills};
use crate::checker::checked::Caches;
use crate::checker::events::Fill;
use crate::machine::HostedMachine;
use crate::mmu::arch::{LinearAddress, TableLevel};
use crate::mmu::walk::Depth;
use crate::mutex::lock;
use crate::options::Adversary;
use crate::schedule;
use crate::vocabulary::Seam;

impl HostedMachine {
    /// Kernel code crosses a seam: other CPUs may run, and any CPU may speculate.
    pub(crate) fn cross(&self, seam: Seam) {
        schedule::progress();
        let choice = self.choices.bits();
        let here = self.cpu();
        // A CPU without a coroutine answers requests on that of another CPU. It must not give way
        // here: it would come back as the other one.
        let has_turns = here.has_turns.load(Ordering::Relaxed);
        let left = here.seams_to_preemption.load(Ordering::Relaxed);
        if left > 0 && has_turns {
            here.seams_to_preemption.store(left - 1, Ordering::Relaxed);
            if left == 1 {
                here.last_seam.store(1 + seam as u8, Ordering::Relaxed);
                return stay_away(PREEMPTED_TURNS);
            }
        }
        // Most seams by far are entries of pages: one in eight of them is enough.
        let rarely = match seam {
            Seam::Entry | Seam::Cleared => choice & 0b111 != 0,
            Seam::Lock | Seam::Free | Seam::Allocate => false,
        };
        if rarely {
            return;
        }
        if choice >> 8 & 0b11 == 0 {
            self.speculate_on(self.choices.pick(self.cpus.len()));
        }
        if choice >> 32 & 0b11 == 0 {
            self.device_turn(choice >> 34);
        }
        if choice >> 16 & self.calm == 0 && has_turns {
            here.last_seam.store(1 + seam as u8, Ordering::Relaxed);
            // Now and then this CPU is away for long: others get whole operations done inside what
            // looks like a moment.
            stay_away(if choice >> 24 & 0b11_1111 == 0 { 1 + self.choices.below(64) } else { 1 });
        }
    }

    /// Code crosses a seam between two steps of a protocol, where other CPUs may see the first step
    /// without the second.
    pub(crate) fn cross_between_steps(&self) {
        if self.checked.is_none() {
            return;
        }
        self.cross(Seam::Lock);
        let choice = self.choices.bits();
        if choice & 0b111 == 0 && self.cpu().has_turns.load(Ordering::Relaxed) {
            stay_away(1 + (choice >> 8 & 0b1_1111));
        }
    }

    /// Lets a CPU fill its caches through whatever it has loaded, or forget something.
    fn speculate_on(&self, index: usize) {
        let Some(checked) = &self.checked else { return };
        let memory = WatchedMemory::new(&self.memory, &checked.ledger);
        let near = self.choices.below(8) << 12;
        let address = LinearAddress::new(self.hot_address().wrapping_add(near));
        let depth = match self.choices.below(4) {
            0 => Depth::Structure(TableLevel::Pdpt),
            1 => Depth::Structure(TableLevel::Pd),
            _ => Depth::Page,
        };
        let Some(cpu) = self.cpus.get(index).filter(|cpu| !self.is_off(cpu.id)) else { return };
        if let Some(Caches { mmu, watch }) = &mut *lock(&cpu.caches) {
            mmu.speculate(address, depth, &memory, watch);
            log_fills(checked, cpu.id, address.as_u64(), watch.take_fills(), Fill::Speculation);
            if self.options.adversary == Adversary::Forgetter && self.choices.one_in(8) {
                // Everything goes. A capacity bound already makes single entries go.
                mmu.forget_everything(watch);
            }
        }
        if let Some(frame) = memory.freed_table.get() {
            self.report_walk(checked, cpu.id, address.as_u64(), frame);
        }
        self.check_sizes(checked, index);
    }
}

/// For how many turns a CPU stays away that a sequence preempts.
const PREEMPTED_TURNS: u64 = 48;

fn stay_away(turns: u64) {
    for _ in 0..turns {
        schedule::give_way();
    }
}
