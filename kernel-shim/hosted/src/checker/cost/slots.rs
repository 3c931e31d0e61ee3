//! What each CPU drops of its caches: no more than it must.

use mmu_gather::tlb::{CachedTranslations, CpuId, CtxId, NR_DYN_ASIDS, PcidSupport, Slot, TlbEvent};
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Checked;
use crate::checker::cost::state::{Cost, Scope, State};
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;
use crate::mutex::lock;

/// What is wrong, and the words for it.
pub(crate) type Waste = (ViolationKind, String);

impl HostedMachine {
    /// This CPU is about to switch to an address space, or to the kernel's own, or to go lazy.
    pub(crate) fn cost_of_switch_begins(&self, next: Option<CtxId>) {
        let Some(cost) = self.cost() else { return };
        let mut state = lock(&cost.state);
        let at_least = next.and_then(|ctx| state.space(ctx.get())).map_or(0, |space| space.generation);
        let cpu = &mut state.cpus[self.current().index()];
        cpu.switches = true;
        cpu.at_least = at_least;
        cpu.changed = self.turns();
    }

    /// It has arrived; lazily, perhaps.
    pub(crate) fn cost_of_switch_ends(&self, laziness: mmu_gather::tlb::Laziness) {
        let Some(cost) = self.cost() else { return };
        let mut state = lock(&cost.state);
        let cpu = &mut state.cpus[self.current().index()];
        cpu.switches = false;
        cpu.starts = false;
        cpu.loads = false;
        cpu.is_lazy = laziness == mmu_gather::tlb::Laziness::Lazy && cpu.loaded != 0;
        cpu.changed = self.turns();
    }

    /// This CPU starts: it knows nothing.
    pub(crate) fn cost_of_start_begins(&self) {
        let Some(cost) = self.cost() else { return };
        let turn = self.turns();
        let mut state = lock(&cost.state);
        let cpu = &mut state.cpus[self.current().index()];
        cpu.starts = true;
        cpu.switches = true;
        cpu.changed = turn;
    }

    /// This CPU is about to load CR3.
    pub(crate) fn cost_of_load_begins(&self) {
        if let Some(cost) = self.cost() {
            lock(&cost.state).cpus[self.current().index()].loads = true;
        }
    }

    /// CR3 is loaded on this CPU.
    pub(crate) fn judge_cr3(&self, root: PhysFrame, pcid: u16, cached: CachedTranslations) {
        let (Some(cost), Some(checked)) = (self.cost(), &self.checked) else { return };
        let waste = {
            let mut state = lock(&cost.state);
            self.loads(&mut state, root, usize::from(pcid), cached)
        };
        if let Some(waste) = waste {
            self.report_waste(checked, root, waste);
        }
    }

    fn loads(
        &self,
        state: &mut State,
        root: PhysFrame,
        pcid: usize,
        cached: CachedTranslations,
    ) -> Option<Waste> {
        let flushes = cached == CachedTranslations::Flush;
        let has_pcids = self.options.pcid == PcidSupport::On;
        let turn = self.turns();
        let here = self.current().index();
        let ctx = state.ctx_of(root);
        let (generation, reclaims) =
            state.space(ctx).map_or((0, 0), |space| (space.generation, space.reclaims));
        let cpu = &mut state.cpus[here];
        let was = core::mem::replace(&mut cpu.loaded, ctx);
        cpu.pcid = pcid;
        if was != ctx {
            cpu.changed = turn;
        }
        if ctx == 0 {
            cpu.is_lazy = false;
            if cpu.starts {
                cpu.slots = Default::default();
                return None;
            }
            return (flushes && has_pcids && root == self.kernel_root()).then(|| {
                let words = "the switch to the kernel's own address space drops what is cached, and no user page is cached under its PCID";
                (ViolationKind::PcidNotKept, words.to_owned())
            });
        }
        if !cpu.member_of.contains(&ctx) {
            cpu.member_of.push(ctx);
        }
        let slot = *cpu.slots.get(pcid)?;
        let at_least = if was == ctx { slot.generation } else { cpu.at_least };
        if !flushes {
            return None;
        }
        let same = slot.ctx == ctx && (has_pcids || was == ctx);
        let mut waste = None;
        cpu.dropped_all |= was == ctx;
        if was == ctx && cpu.invalidated.is_some() {
            let words = format!(
                "this CPU drops all of address space {ctx} after it has invalidated pages of it for the same flush"
            );
            waste = Some((ViolationKind::FlushedInVain, words));
        } else if same && generation <= slot.generation && reclaims == 0 {
            waste = Some(if was == ctx {
                let words = format!(
                    "this CPU drops all of address space {ctx}, and has missed no flush of it: it is at generation {generation}"
                );
                (ViolationKind::FlushedInVain, words)
            } else {
                let words = format!(
                    "the switch back to address space {ctx} drops what is cached under PCID {pcid}, which is current: at generation {generation}"
                );
                (ViolationKind::PcidNotKept, words)
            });
        } else if !same && has_pcids {
            let slots = &cpu.slots[1..=usize::from(NR_DYN_ASIDS)];
            if let Some(own) = slots.iter().position(|slot| slot.ctx == ctx) {
                let words = format!(
                    "the switch to address space {ctx} takes PCID {pcid}, and PCID {} is its own on this CPU",
                    own + 1
                );
                waste = Some((ViolationKind::PcidNotKept, words));
            } else if slot.ctx != 0
                && let Some(free) = slots.iter().position(|slot| slot.ctx == 0)
            {
                let words = format!(
                    "the switch to address space {ctx} takes PCID {pcid} from address space {}, and PCID {} was never used",
                    slot.ctx,
                    free + 1
                );
                waste = Some((ViolationKind::PcidNotKept, words));
            }
        }
        let slot = &mut cpu.slots[pcid];
        slot.generation = if same { slot.generation.max(at_least) } else { at_least };
        slot.ctx = ctx;
        waste
    }

    /// INVLPG on this CPU.
    pub(crate) fn count_invlpg(&self, address: u64) {
        let Some(cost) = self.cost() else { return };
        let cpu = &mut lock(&cost.state).cpus[self.current().index()];
        let (count, first, end) = cpu.invalidated.unwrap_or((0, u64::MAX, 0));
        cpu.invalidated = Some((count + 1, first.min(address), end.max(address + 4096)));
    }

    /// The shootdown core has carried something out on this CPU.
    pub(crate) fn judge_flush_here(&self, checked: &Checked, event: TlbEvent, slot: Slot) {
        let Some(cost) = self.cost() else { return };
        let waste = {
            let mut state = lock(&cost.state);
            flushed(cost, &mut state, self.current(), event, slot)
        };
        if let Some((root, waste)) = waste {
            self.report_waste(checked, root, waste);
        }
    }

    /// This CPU has answered `initiator`: it is out of the cpumask if it runs something else.
    pub(crate) fn cost_of_answer(&self, initiator: CpuId) {
        let Some(cost) = self.cost() else { return };
        let mut state = lock(&cost.state);
        let is_batch = state.cpus[initiator.index()].flushes_batch;
        let Some(request) = state.cpus[initiator.index()].request else { return };
        let cpu = &mut state.cpus[self.current().index()];
        if !is_batch && cpu.loaded != request.ctx {
            cpu.member_of.retain(|ctx| *ctx != request.ctx);
        }
    }
}

/// Judges what `here` did about a flush, by what it had missed; with the root of the address space.
fn flushed(
    cost: &Cost,
    state: &mut State,
    here: CpuId,
    event: TlbEvent,
    slot: Slot,
) -> Option<(PhysFrame, Waste)> {
    let is_flush = match event {
        TlbEvent::FlushedPages(_)
        | TlbEvent::FlushedAll
        | TlbEvent::FlushedAllForPages
        | TlbEvent::CaughtUp => true,
        TlbEvent::AlreadyCurrent | TlbEvent::LeftLazyMm => false,
        _ => return None,
    };
    // The CPU that makes the batch may be the only one that has to flush for it.
    let batch = state.cpus.iter().any(|cpu| cpu.flushes_batch) || state.cpus[here.index()].wanted.is_some();
    let cpu = &mut state.cpus[here.index()];
    cpu.loads = false;
    let invalidated = cpu.invalidated.take();
    let dropped_all = core::mem::take(&mut cpu.dropped_all);
    let ctx = slot.ctx_id.map_or(0, CtxId::get);
    let now = slot.tlb_gen.get();
    if ctx == 0 || ctx != cpu.loaded {
        return None;
    }
    let own = cpu.slots.get_mut(cpu.pcid)?;
    let before = own.generation;
    own.generation = before.max(now);
    let space = state.space(ctx)?;
    let root = space.root;
    let told = |kind, words| Some((root, (kind, words)));
    if let Some((count, first, end)) = invalidated {
        if !is_flush || !matches!(event, TlbEvent::FlushedPages(_)) {
            let words = format!(
                "this CPU has invalidated {count} pages of address space {ctx}, from {first:#x} to {end:#x}, and that was no part of a flush of pages"
            );
            return told(ViolationKind::FlushedInVain, words);
        }
        if before >= now || dropped_all {
            let words = format!(
                "this CPU has invalidated {count} pages of address space {ctx} for generation {now}, and had flushed for that before"
            );
            return told(ViolationKind::FlushedInVain, words);
        }
        if let Some(Scope::Pages(changed)) = space.scope_of(now)
            && (count > changed.strides() || first < changed.first() || end > changed.end)
        {
            let words = format!(
                "this CPU has invalidated {count} pages, from {first:#x} to {end:#x}, for a flush of address space {ctx} in which {:#x}..{:#x} had changed: {} entries at the most",
                changed.start,
                changed.end,
                changed.strides()
            );
            return told(ViolationKind::TooManyPagesFlushed, words);
        }
        return None;
    }
    let of_everything = matches!(event, TlbEvent::FlushedAllForPages | TlbEvent::FlushedAll);
    if of_everything
        && before + 1 == now
        && space.generation == now
        && !batch
        && let Some(Scope::Pages(changed)) = space.scope_of(now)
        && changed.strides() <= cost.promise.flush_ceiling
    {
        let words = format!(
            "this CPU drops all of address space {ctx} for a flush of {} pages, {:#x}..{:#x}, and has missed no other",
            changed.strides(),
            changed.start,
            changed.end
        );
        return told(ViolationKind::WholeFlushForPages, words);
    }
    None
}
