//! What other CPUs do while one crosses a seam: they run, and any of them speculates.

use core::sync::atomic::Ordering;

use crate::checker::access::{WatchedMemory, log_fills};
use crate::checker::checked::Caches;
use crate::checker::events::Fill;
use crate::machine::HostedMachine;
use crate::mmu::arch::{LinearAddress, TableLevel};
use crate::mmu::walk::Depth;
use crate::mutex::lock;
use crate::options::{Adversary, Eagerness, Stores};
use crate::schedule;
use crate::vocabulary::{Seam, UserAccess};

impl HostedMachine {
    /// Kernel code crosses a seam: other CPUs may run, and any CPU may speculate.
    pub(crate) fn cross(&self, seam: Seam) {
        schedule::progress();
        let choice = self.choices.bits();
        let here = self.cpu();
        here.seams.store(here.seams.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        // A CPU without a coroutine answers requests on that of another CPU. It must not give way
        // here: it would come back as the other one.
        let has_turns = here.has_turns.load(Ordering::Relaxed);
        let left = here.seams_to_preemption.load(Ordering::Relaxed);
        if left > 0 && has_turns {
            here.seams_to_preemption.store(left - 1, Ordering::Relaxed);
            if left == 1 {
                here.last_seam.store(1 + seam as u8, Ordering::Relaxed);
                return self.stay_away(PREEMPTED_TURNS);
            }
        }
        if seam == Seam::Entry && self.options.stores == Stores::AnyTime && choice >> 40 & 0b111 == 0 {
            self.store_on(self.choices.pick(self.cpus.len()));
        }
        // Most seams by far are entries of pages: one in eight of them is enough. What was locked
        // was asked for first, where others have run.
        let rarely = match seam {
            Seam::Entry | Seam::Cleared => choice & 0b111 != 0,
            Seam::Unlock | Seam::Step => choice & 0b11 != 0,
            Seam::Lock | Seam::Free | Seam::Allocate => false,
        };
        if rarely {
            return;
        }
        if choice >> 8 & 0b11 == 0 {
            self.speculate_on(self.choices.pick(self.cpus.len()), Near::Anything);
        }
        if self.options.eagerness == Eagerness::Anywhere && self.table_is_new() {
            // Tables come with a fault or a call: what leads to them is linked by now, or by one of
            // the next seams.
            self.speculate_on(self.choices.pick(self.cpus.len()), Near::Latest);
        }
        if choice >> 32 & 0b11 == 0 {
            self.device_turn(choice >> 34);
        }
        if choice >> 16 & self.calm == 0 && has_turns {
            here.last_seam.store(1 + seam as u8, Ordering::Relaxed);
            // Now and then this CPU is away for long: others get whole operations done inside what
            // looks like a moment.
            self.stay_away(if choice >> 24 & 0b11_1111 == 0 { 1 + self.choices.below(64) } else { 1 });
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
            self.stay_away(1 + (choice >> 8 & 0b1_1111));
        }
    }

    /// Others run for so many turns. This thread goes on on another CPU, perhaps.
    fn stay_away(&self, turns: u64) {
        for _ in 0..turns {
            if self.may_move_from_here() {
                schedule::may_move_now();
            }
            schedule::give_way();
        }
    }

    /// Lets the program on a CPU store through some of the translations that the CPU has cached,
    /// writable and not dirty: on the first that runs one, from this CPU on.
    fn store_on(&self, index: usize) {
        let (before, from) = self.cpus.split_at(index.min(self.cpus.len()));
        let mut cpus = from.iter().chain(before);
        let Some(cpu) = cpus.find(|cpu| self.is_in_user_mode(cpu.id)) else { return };
        let place = self.choices.bits();
        let clean = match &*lock(&cpu.caches) {
            Some(Caches { mmu, .. }) => mmu.clean_pages(place),
            None => return,
        };
        for address in clean.into_iter().flatten() {
            // What faults is tried again another time.
            let _ = self.on_cpu(cpu.id, || self.user_access(address.as_u64(), UserAccess::Write));
        }
    }

    /// An address at which a CPU speculates: of some CPU's last ones, whatever it runs now.
    fn address_near(&self, near: Near) -> u64 {
        let address = match near {
            Near::Anything => self.hot_address(),
            Near::Latest => return self.latest_address(),
        };
        let behind = address.wrapping_add(self.choices.below(8) << 12);
        if self.options.eagerness == Eagerness::Nearby {
            return behind;
        }
        match self.choices.below(8) {
            0 | 1 => address.wrapping_sub(self.choices.below(8) << 12),
            2 => address.wrapping_add(1 << TableLevel::Pd.entry_shift()),
            3 => address.wrapping_sub(1 << TableLevel::Pd.entry_shift()),
            4 => address.wrapping_add(1 << TableLevel::Pdpt.entry_shift()),
            _ => behind,
        }
    }

    /// Lets a CPU fill its caches through whatever it has loaded, or forget something.
    fn speculate_on(&self, index: usize, near: Near) {
        let Some(checked) = &self.checked else { return };
        let memory = WatchedMemory::new(&self.memory, &checked.ledger);
        let mut address = LinearAddress::new(self.address_near(near));
        let depth = match self.choices.below(4) {
            0 => Depth::Structure(TableLevel::Pdpt),
            1 => Depth::Structure(TableLevel::Pd),
            2 => Depth::Fetch,
            _ => Depth::Page,
        };
        let Some(cpu) = self.cpus.get(index).filter(|cpu| !self.is_off(cpu.id)) else { return };
        if let Some(Caches { mmu, watch }) = &mut *lock(&cpu.caches) {
            let anywhere = self.options.eagerness == Eagerness::Anywhere && near == Near::Anything;
            if anywhere && self.choices.one_in(4) {
                address = mmu.somewhere(&self.memory, |count| self.choices.below(count));
            }
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

/// Where a CPU speculates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Near {
    /// Anything that happened lately.
    Anything,
    /// The last that happened.
    Latest,
}

/// For how many turns a CPU stays away that a sequence preempts.
const PREEMPTED_TURNS: u64 = 48;
